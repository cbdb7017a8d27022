"""The file as it is: rows appended, cut off by a kill, refused when they are of something else."""

import gc
import json
import multiprocessing
import shutil
import time

import pytest
from prediction_rows import HEADER, question, row

from benchmarks import predictions
from benchmarks.predictions import Predictions
from benchmarks.questions import sample


def test_half_rows_are_cut_off_and_nothing_else(tmp_path, capsys):
    path, questions = tmp_path / "a.jsonl", [question(i) for i in range(3)]
    Predictions(path, HEADER, questions).add([row(0, answer="né\u2028e"), row(1)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])  # a kill in the last row
    assert [x["id"] for x in predictions.read(path)[1]] == ["0"] and path.read_bytes() == whole[:-7]
    file = Predictions(path, HEADER, questions)
    assert file.done == {"0"} and "cut off" in capsys.readouterr().out
    file.add([row(0, answer="another"), row(1)])  # what is there stays
    assert path.read_bytes() == whole
    path.write_bytes(whole[:20])  # in the header
    Predictions(path, HEADER, questions).add([row(0, answer="né\u2028e"), row(1)])
    assert path.read_bytes() == whole
    assert predictions.read(tmp_path / "none.jsonl") == (None, [])


def test_a_last_row_that_lacks_only_its_newline_is_a_row(tmp_path, capsys):
    path, questions = tmp_path / "a.jsonl", [question(i) for i in range(3)]
    Predictions(path, HEADER, questions).add([row(0), row(1)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert [x["id"] for x in predictions.read(path)[1]] == ["0", "1"]
    assert path.read_bytes() == whole[:-1]                         # to read changes nothing
    assert Predictions(path, HEADER, questions).done == {"0", "1"}
    assert path.read_bytes() == whole and not capsys.readouterr().out
    path.write_bytes(whole.split(b"\n")[0])                        # a header alone
    Predictions(path, HEADER, questions).add([row(0), row(1)])
    assert path.read_bytes() == whole
    path.write_bytes(whole + b"{}")                                # whole, but no row
    Predictions(path, HEADER, questions)
    assert path.read_bytes() == whole and "cut off" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["{}", "nonsense", "[1]", json.dumps({"id": "1"})])
def test_a_broken_row_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    Predictions(path, HEADER, [question(0)]).add([row(0)])
    path.write_text(path.read_text() + line + "\n" + json.dumps(row(2)) + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3 is no row"):
        predictions.read(path)


def test_an_id_has_one_row_and_one_question(tmp_path):
    path = tmp_path / "a.jsonl"
    Predictions(path, HEADER, [question(0)]).add([row(0)])
    other = tmp_path / "a-00002-of-00002.jsonl"
    shutil.copy(path, other)
    text = other.read_text()
    other.write_text(text.replace('"answer": "a"', '"answer": "b"'))
    with pytest.raises(ValueError, match="'0' has a row in .*a-00002-of-00002.jsonl and another"):
        predictions.read(path)
    with pytest.raises(ValueError, match="ids 7 stand 2 times"):
        sample([question(7), question(8), question(7)], None)


def test_rows_that_stand_twice_with_the_same_answer_are_one(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    Predictions(path, HEADER, [question(0), question(1)]).add([row(0), row(1)])
    quicker = row(0, ms=dict.fromkeys(("vision", "select", "prefill", "decode"), 0.))
    path.write_text(path.read_text() + json.dumps(quicker) + "\n")
    shutil.copy(path, tmp_path / "a-00002-of-00002.jsonl")
    assert predictions.read(path)[1] == [row(0), row(1)]           # the first of each
    assert "left out: 4, such as that of '0'" in capsys.readouterr().out
    assert Predictions(path, HEADER, [question(0), question(1)]).done == {"0", "1"}


def write(path, begun):
    _file = Predictions(path, HEADER, [])
    begun.set()
    time.sleep(60)


def writer(path):
    """Another evaluation, that has begun to write."""
    fork = multiprocessing.get_context("fork")
    begun = fork.Event()
    other = fork.Process(target=write, args=(path, begun), daemon=True)
    other.start()
    assert begun.wait(60)
    return other


def test_two_evaluations_of_one_folder_are_refused_and_a_killed_one_is_not_in_the_way(tmp_path):
    path = tmp_path / "pope/a.jsonl"
    other = writer(path)
    try:
        for name in ("a.jsonl", "b.jsonl"):                        # not of one file: of the folder
            with pytest.raises(RuntimeError, match="another evaluation is writing into .*pope: w"):
                Predictions(path.with_name(name), HEADER, [question(0)])
        with pytest.raises(RuntimeError, match="another evaluation"):      # however it is shared
            Predictions(path, HEADER, [question(0)], 0, 2)
        Predictions(tmp_path / "mme/a.jsonl", HEADER, [question(0)])       # another folder
        second = Predictions(path, HEADER, [question(0)], 1, 2)
    finally:
        other.kill()
        other.join()
    first = Predictions(path, HEADER, [question(0)], 0, 2)         # of one launch, side by side
    for file in (first, second):
        file.add([row(0)])
    Predictions(path.with_name("b.jsonl"), HEADER, [question(0)]).add([row(0)])
    del first, second, file
    gc.collect()                                                   # the lock is given back
    other = writer(path.with_name("c.jsonl"))
    other.kill()
    other.join()


@pytest.mark.parametrize(
    "header, questions, words",
    [
        (HEADER | {"model": "n"}, [question(0)], "model: 'm' there, 'n' here"),
        (HEADER | {"protocol": "papers"}, [question(0)], "protocol: 'stock' there"),
        (HEADER, [question(0, "who ?")], "prompt of '0' differs: 'what \\?' there, 'who \\?' here"),
        (HEADER, [question(0, gold=["b"])], "gold of '0' differs"),
        (HEADER, [question(5)], "'0', which is none of these"),
    ],
)
def test_answers_of_something_else_are_refused(tmp_path, header, questions, words):
    path = tmp_path / "a.jsonl"
    Predictions(path, HEADER, [question(0)]).add([row(0)])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=words):
        Predictions(path, header, questions)
    assert path.read_bytes() == before
    Predictions(path, HEADER | {"versions": {"torch": "9"}}, [question(0)])  # is said, not refused
