"""The file as it is: rows appended, cut off by a kill, refused when they are of something else."""

import json
import shutil

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
    shutil.copy(path, tmp_path / "a-00002-of-00002.jsonl")
    with pytest.raises(ValueError, match="'0' has a row in .*a-00002-of-00002.jsonl and another"):
        predictions.read(path)
    with pytest.raises(ValueError, match="ids 7 stand 2 times"):
        sample([question(7), question(8), question(7)], None)


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
