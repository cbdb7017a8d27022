"""The benchmarks answered by a letter: prompts letter by letter, loaders on local files of the same
columns, and the scorers on cases worked by hand from each benchmark's own definition."""

import io
import json
import math
from importlib.util import find_spec

import pandas as pd
import pytest
from datasets import Dataset, Features, List, Value
from datasets import Image as Picture
from PIL import Image

from benchmarks import (
    ai2d,
    egoschema,
    frames,
    longvideobench,
    mmbench,
    mmbench_cn,
    mmmu,
    multiple_choice,
    nextqa,
    scienceqa,
    seed,
    seed_all,
    seed_video,
)
from benchmarks.questions import sample

LETTER = "\nAnswer with the option's letter from the given choices directly."


def png(grey: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), (grey,) * 3).save(file, "png")
    return file.getvalue()


def greys(question) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in question.images()]


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def answered(questions, answers) -> list[dict]:
    """Rows of a predictions file, through JSON and back."""
    return json.loads(
        json.dumps(
            [
                {"id": q.id, "prompt": q.prompt, "answer": answer, "gold": q.gold}
                for q, answer in zip(questions, answers, strict=True)
            ]
        )
    )


# ------------------------------------------------------------------------------------ letters read


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"), ("B.", "B"), ("B)", "B"), ("(B)", "B"), ("B:", "B"), (" B \n", "B"),
        ("[B]", "B"), ("B. red", "B"), ("The answer is B.", "B"), ("(B) red", "B"),
        ("B, because B", "B"),
        ("it is Red", "B"),  # text contained, in any case
        ("blue", "C"), ("A or B", None), ("green or blue", None), ("", None), ("   ", None),
        ("b", None), ("BB", None), ("E", None), ("D", None),
        ("purple", None),  # letters beyond the three options
        ("A red one", "A"),  # the article counts, as in VLMEvalKit
        ("B or C: red", "B"),  # several letters, one text
    ],
)
def test_a_letter_in_all_its_forms_or_the_one_option_contained(answer, letter):
    assert multiple_choice.read(answer, ["green", "red", "blue"]) == letter


def test_an_option_within_another_names_both():
    assert multiple_choice.read("dark red", ["red", "dark red"]) is None
    assert multiple_choice.read("it is red", ["red", "dark red"]) == "A"


@pytest.mark.parametrize(
    "answer, strict, loose",
    [
        ("B", "B", "B"), ("B.", "B", "B"), ("(B)", "B", "B"), ("B. a dog", None, "B"),
        ("(A) or rather (B)", "B", "B"), ("A or B", "B", "B"), ("B or A", "A", "A"),
        ("(B), not A", "B", "B"),
        ("PANDA bear", None, "A"),  # loose takes any A before a space
        ("A. x B. y", None, "A"),  # it looks for ' B ' alone to find the last, so the first stays
        ("A,.", None, None),  # the comma is stripped before the period
        ("I think that it is a cat", "B", "B"),
        ("it is a cat", None, None),  # text only in more than five words
        ("it is not a dog", None, None),
        ("it is not yet a dog", "A", "A"),
        ("a dog or a cat or a dog", "A", "A"),
        ("a cat or a dog or a cat", "B", "B"),  # of several the last
        ("", None, None),
        ("E", None, None),
        ("neither", None, None),
    ],
)
def test_mmmus_letter_without_its_random_choice(answer, strict, loose):
    options = ["a dog", "a cat", "a cow", "a hen"]
    assert multiple_choice.read_mmmu(answer, options) == strict
    assert multiple_choice.read_mmmu(answer, options, loose=True) == loose


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"), (" B\n", "B"), ("B. red", "B"), ("The answer is B.", "B"),
        ("So. The answer is B, clearly", "B"), ("b", None), ("B.", None), ("B) red", None),
        ("(B)", None), ("The answer is B", None), ("", None),
        ("The answer is A. The answer is B.", None), ("D", None), ("E. x", None),
        ("F. The answer is C.", "C"),
    ],
)
def test_scienceqas_three_forms(answer, letter):
    assert scienceqa.parse(answer, ["green", "red", "blue"]) == letter


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"), ("b", "B"), (" b. red", "B"), ("Because", "B"), ("(B)", None), ("E", None),
        ("", None), ("The B", None),
    ],
)
def test_seeds_first_character(answer, letter):
    assert seed.parse(answer, "wxyz") == letter


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"), ("b", "B"), ("B.", "B"), ("  B. moon", "B"), ("(B)", "B"), ("b)", "B"),
        ("B moon", None), ("b. moon", None), ("E", None), ("E. x", None), ("", None),
        ("moon", None),
    ],
)
def test_ai2ds_letter_at_the_start_or_alone(answer, letter):
    assert ai2d.parse(answer, ["sun", "moon", "star", "sky"]) == letter


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"), ("C", "C"), ("C.", "C"), ("(D)", "D"), (" [A] ", "A"),
        ("The answer is C.", "C"),
        ("B. C is making dough", "B"), ("E: C's plan is C", "E"), ("A) C washes a cup.", "A"),
        ("F. C is making dough", None), ("D, because C is in the kitchen", "D"),
        ("C washes a cup", "B"), ("c kneads dough to bake.", "A"),         # the option's own text
        ("C kneads", None), ("C's plan", None), ("The answer is D: C is outside", "D"),
        ("C walks a dog and C washes a cup", None), ("", None),
    ],
)
def test_egoschemas_letter_is_not_who_wears_the_camera(answer, letter):
    options = ["C kneads dough to bake.", "C washes a cup.", "C walks a dog.", "C reads.", "C is C"]
    assert egoschema.parse(answer, options) == letter


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("C", "C"), ("the answer: C", "C"), ("Best answer: C", "C"), ("Best option:C", "C"),
        ("Because C", "B"), ("D. A book", "D"), ("E", None), ("", None), ("c", None),
        ("no letter in any of these more than ten small words", None),
    ],
)
def test_longvideobenchs_first_capital(answer, letter):
    assert longvideobench.parse(answer, ["a", "b", "c", "d"]) == letter


@pytest.mark.parametrize(
    "answer, gold, right",
    [
        ("24.3", "24.3", True), ("24.30", "24.3", True), ("24.304", "24.3", True),
        ("24.31", "24.3", False), ("1,000 m", "1000", True), ("the result is 1e3", "1000", True),
        ("x = 5\ny = 7", "7", True),
        ("x = 5\ny = 7", "5", False),  # behind = only in the last line
        ("The capital is Paris.", "paris", True), ("Paris", "Paris", True),
        ("Pari", "Paris", False), ("the answer is a small one", "one", True),
        ("It is blue so it is red", "blue", False),  # the shortest end counts
        ("a", "a", True),
        ("cat", "a", False),
        ("plan a", "a", True),  # one letter only beside a space
        ("50%", "50", True), ("-3", "3", False), ("", "3", None), (" \n", "x", None),
        ("thirty", ["30", "thirty"], True), ("30.0", ["30", "thirty"], True),
        ("31", ["30", "thirty"], False),
    ],
)
def test_mmmus_open_answers(answer, gold, right):
    assert mmmu.right_open(answer, gold) is right


# ------------------------------------------------------------------------------------ MMBench


def rotations(index, options, answer, hint=None, n=None):
    """Rows of one question and its rotated copies, the index a text as in the English file."""
    rows, place = [], "ABCD".index(answer)
    for k in range(n or len(options)):
        turned = options[k:] + options[:k] + ["nan"] * (4 - len(options))
        rows.append(
            {
                "index": str(index + k * 1_000_000),
                "question": "What is it?",
                "hint": hint,
                **dict(zip("ABCD", turned)),
                "answer": "ABCD"[(place - k) % len(options)],
                "category": "ocr",
                "image": {"bytes": png(index % 200), "path": None},
            }
        )
    return rows


def mmbench_file(folder, rows, split="dev", language="en"):
    (folder / language).mkdir(parents=True, exist_ok=True)
    features = Features({name: Value("string") for name in rows[0]} | {"image": Picture()})
    Dataset.from_list(rows, features).to_parquet(
        folder / language / f"{split}-00000-of-00001.parquet"
    )
    return folder


def test_mmbenchs_prompt_letter_by_letter(tmp_path):
    rows = rotations(7, ["cat", "dog"], "A", hint="Look.") + rotations(
        8, ["a", "b", "c", "d"], "C", n=1
    )
    rows[0]["C"] = "None"  # nothing, in LLaVA's eyes; D counts no more
    rows[0]["D"] = "hen"
    rows[2]["hint"] = "nan"
    data = mmbench.load(mmbench_file(tmp_path, rows))
    assert [q.prompt for q in data] == [
        "Look.\nWhat is it?\nA. cat\nB. dog" + LETTER,
        "Look.\nWhat is it?\nA. dog\nB. cat" + LETTER,
        "What is it?\nA. a\nB. b\nC. c\nD. d" + LETTER,
    ]
    assert [q.id for q in data] == ["7", "1000007", "8"] and greys(data[2]) == [8]
    assert data[0].limit == 16 and mmbench.load(tmp_path, family="qwen2_5_vl")[0].limit == 32


def test_mmbench_cn_and_the_legacy_file(tmp_path):
    folder = mmbench_file(tmp_path, rotations(7, ["猫", "狗"], "B"), language="cn")
    assert mmbench_cn.load(folder)[0].prompt == "What is it?\nA. 猫\nB. 狗\n请直接回答选项字母。"
    assert len(mmbench.load(folder / "cn/dev-00000-of-00001.parquet", legacy=True)) == 2
    mmbench_file(tmp_path, rotations(7, ["cat", "dog"], "A"))
    assert mmbench.load(folder)[0].prompt == "What is it?\nA. cat\nB. dog" + LETTER
    with pytest.raises(
        ValueError, match="'dev' several times"
    ):  # of no language, where there are two
        mmbench.load(folder, legacy=True)
    with pytest.raises(
        ValueError, match="no column 'hint'.* expected the columns of lmms-lab-encoder/MMBench_EN"
    ):
        mmbench.load(
            jsonl(
                tmp_path / "dev.jsonl",
                [dict.fromkeys({*mmbench.COLUMNS, "answer"} - {"hint"}, "1")],
            ),
            legacy=True,
        )
    with pytest.raises(ValueError, match="language='de': expected en or cn"):
        mmbench.load(folder, language="de")


def test_circular_counts_a_question_whose_copies_are_all_right(tmp_path):
    rows = (
        rotations(1, ["u", "v", "w", "x"], "B")
        + rotations(2, ["yes", "no"], "A")
        + rotations(3, ["u", "v", "w"], "C")
        + rotations(4, ["u", "v"], "A")
    )
    data = mmbench.load(mmbench_file(tmp_path, rows))
    gold = [q.gold["answer"] for q in data]
    assert gold == list("BADCABCBAAB")
    full = answered(data, gold)
    assert mmbench.score(full) == {
        "circular": 100.0,
        "plain": 100.0,
        "questions": 4,
        "incomplete": 0,
        "n": 11,
        "unmatched": 0,
    }
    wrong = answered(data, ["B.", "(A)", "D)", "C:", "yes", "Yes, it is", "C", "B", "C", "A", ""])
    # 1: all right. 2: by texts. 3: third copy wrong. 4: second copy not read
    assert mmbench.score(wrong) == {
        "circular": 50.0,
        "plain": 100.0,
        "questions": 4,
        "incomplete": 0,
        "n": 11,
        "unmatched": 1,
    }
    assert mmbench.score(wrong[::-1]) == mmbench.score(wrong)
    assert [mmbench.group(row) for row in wrong] == [
        ("", base) for base in 4 * [1] + 2 * [2] + 3 * [3] + 2 * [4]
    ]
    # a missing copy is no hit, and said so; without its first order a question is not in the plain
    # figure
    assert mmbench.score(full[:3] + full[4:]) == {
        "circular": 75.0,
        "plain": 100.0,
        "questions": 4,
        "incomplete": 1,
        "n": 10,
        "unmatched": 0,
    }
    assert mmbench.score(full[1:4])["plain"] == 0.0 and mmbench.score(full[1:4])["incomplete"] == 1


def test_mmbenchs_test_split_has_no_answers_but_a_submission(tmp_path):
    rows = [
        {k: v for k, v in row.items() if k != "answer"} for row in rotations(5, ["u", "v"], "A")
    ]
    rows = answered(mmbench.load(mmbench_file(tmp_path, rows, "test"), "test"), ["A", "I say:\tv"])
    with pytest.raises(ValueError, match="'5' has no known answer.*submission"):
        mmbench.score(rows)
    table = pd.read_table(mmbench.submission(rows, tmp_path / "up.tsv"))
    assert list(table) == ["index", "question", "A", "B", "C", "D", "prediction"]
    assert table["index"].tolist() == [5, 1000005] and table["prediction"].tolist() == [
        "A",
        "I say:\tv",
    ]
    assert table["B"].tolist() == ["v", "u"] and table["D"].isna().all()
    with pytest.raises(ValueError, match="ends in .xlsx or .tsv"):
        mmbench.submission(rows, tmp_path / "up.csv")
    if find_spec("openpyxl"):
        pd.testing.assert_frame_equal(
            pd.read_excel(mmbench.submission(rows, tmp_path / "up.xlsx")), table
        )
    else:
        with pytest.raises(ValueError, match="pip install openpyxl"):
            mmbench.submission(rows, tmp_path / "up.xlsx")


# ----------------------------------------------------------------------------------- other pictures


def test_scienceqa(tmp_path):
    Image.new("RGB", (2, 2), (9, 9, 9)).save(tmp_path / "x.png")
    rows = [
        {
            "question": "Which?",
            "choices": ["u", "v", "w"],
            "answer": 2,
            "hint": "Read this.",
            "image": "x.png",
        },
        {"question": "Which?", "choices": ["u", "v"], "answer": 0, "hint": "", "image": "x.png"},
    ]
    data = scienceqa.load(
        jsonl(tmp_path / "ScienceQA-IMG/test.jsonl", [row | {"image": "../x.png"} for row in rows])
    )
    assert [q.prompt for q in data] == [
        "Context: Read this.\nWhich?\nA. u\nB. v\nC. w" + LETTER,
        "Which?\nA. u\nB. v" + LETTER,
    ]
    assert greys(data[0]) == [9] and [q.gold["answer"] for q in data] == ["C", "A"]
    assert scienceqa.load(tmp_path)[1].prompt == data[1].prompt  # the folder, its config and split
    assert scienceqa.score(answered(data, ["C", "C"])) == {"accuracy": 50.0, "n": 2, "unmatched": 1}
    rows[1]["answer"] = 2
    with pytest.raises(
        ValueError, match="ScienceQA-IMG row 1: the answer is 2: .* of its 2 options"
    ):
        scienceqa.load(jsonl(tmp_path / "bad.jsonl", rows))


def seed_file(path, rows):
    names = (
        "question_id", "question", "choice_a", "choice_b", "choice_c", "choice_d", "answer",
        "data_type",
    )
    data = [
        dict(zip(names, (f"q{i}", "Who?", "u", "v", "w", "x", answer, kind)))
        | {"image": [{"bytes": png(10 * i + k), "path": None} for k in range(n)]}
        for i, (answer, kind, n) in enumerate(rows)
    ]
    features = Features({name: Value("string") for name in names} | {"image": List(Picture())})
    Dataset.from_list(data, features).to_parquet(path)
    return path


def test_seed_of_pictures_videos_and_both(tmp_path):
    path = seed_file(
        tmp_path / "test.parquet", [("A", "image", 1), ("B", "video", 10), ("C", "image", 2)]
    )
    data = seed_all.load(path)
    assert data[0].prompt == "Who?\nA. u\nB. v\nC. w\nD. x" + LETTER and data[0].limit == 8
    assert [q.id for q in data] == ["q0", "q1", "q2"]
    assert greys(data[0]) == [0] and greys(data[2]) == [20]  # of a list the first
    assert greys(data[1]) == [10 + k for k in (0, 1, 2, 3, 5, 6, 7, 9)]  # 8 of 10, evenly
    assert greys(seed_video.load(path, frames=1)[0]) == [15]  # LLaVA's middle frame
    assert [q.id for q in seed.load(path)] == ["q0", "q2"]
    assert seed_all.score(answered(data, ["a", "A", ""])) == {
        "accuracy": pytest.approx(100 / 3),
        "image": 50.0,
        "video": 0.0,
        "n": 3,
        "unmatched": 1,
    }
    with pytest.raises(ValueError, match="kind='both': expected one of image, video, all"):
        seed.load(path, kind="both")
    with pytest.raises(ValueError, match="row 1: the answer is 'E'"):
        seed.load(seed_file(path, [("A", "image", 1), ("E", "image", 1)]))


def test_an_id_that_seed_has_twice_gets_a_number(tmp_path):
    path = seed_file(tmp_path / "test.parquet", 4 * [("A", "image", 1)])
    data = Dataset.from_parquet(str(path)).remove_columns("question_id")
    ids = ["49914", "7", "49914", "49914 (2)"]
    data.add_column("question_id", ids).to_parquet(tmp_path / "twice.parquet")
    questions = seed_all.load(tmp_path / "twice.parquet")
    assert [q.id for q in questions] == ["49914", "7", "49914 (3)", "49914 (2)"]
    assert sample(questions, None) == questions
    assert seed.score(answered(questions, "AABA"))["accuracy"] == 75


def test_seed_of_lists_of_files(tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(png(k))
    row = {
        "question_id": "v",
        "question": "Who?",
        "choice_a": "u",
        "choice_b": "v",
        "choice_c": "w",
        "choice_d": "x",
        "answer": "A",
        "data_type": "video",
        "image": ["0.png", "1.png", "2.png"],
    }
    data = seed_video.load(jsonl(tmp_path / "test.jsonl", [row]))
    assert greys(data[0]) == [0, 0, 0, 0, 1, 1, 1, 2]  # fewer than 8: some twice


def mmmu_file(path, *rows):
    features = Features(
        {name: Value("string") for name in mmmu.COLUMNS[:5]} | {n: Picture() for n in mmmu.PICTURES}
    )
    data = [
        dict(zip(mmmu.COLUMNS[:5], row))
        | {
            name: {"bytes": png(k), "path": None} if k in row[5] else None
            for k, name in enumerate(mmmu.PICTURES, 1)
        }
        for row in rows
    ]
    Dataset.from_list(data, features).to_parquet(path)
    return path


def test_mmmu_with_several_pictures_and_open_questions(tmp_path):
    path = mmmu_file(
        tmp_path / "validation.parquet",
        (
            "validation_Art_1",
            "See <image 1>.",
            "['<image 3>', '<image 2>', \"it's\"]",
            "B",
            "multiple-choice",
            (1, 2, 3, 4),
        ),
        ("validation_Math_2", "How many in <image 1>?", "[]", "['30', 'thirty']", "open", (1,)),
        ("validation_Math_3", "Where?", "[]", "[0, 1]", "open", (1, 2)),
    )
    data = mmmu.load(path)
    assert data[0].prompt == "See <image 1>.\nA. <image 3>\nB. <image 2>\nC. it's\n" + LETTER
    assert (
        data[1].prompt
        == "How many in <image 1>?\n\nAnswer the question using a single word or phrase."
    )
    assert [greys(q) for q in data] == [
        [1, 2, 3],
        [1],
        [1, 2],
    ]  # named ones; all where none is named
    assert [q.gold["answer"] for q in data] == ["B", ["30", "thirty"], "[0, 1]"] and data[
        0
    ].limit == 128
    assert mmmu.score(answered(data, ["(B)", "It is thirty", ""])) == {
        "accuracy": pytest.approx(200 / 3),
        "multiple-choice": 100.0,
        "open": 50.0,
        "n": 3,
        "unmatched": 1,
    }
    assert mmmu.score(answered(data, ["dunno", "31", "between [0, 1]"])) == {
        "accuracy": pytest.approx(100 / 3),
        "multiple-choice": 0.0,
        "open": 50.0,
        "n": 3,
        "unmatched": 1,
    }


@pytest.mark.parametrize(
    "row, message",
    [
        (
            ("validation_A_1", "<image 2>", "['u']", "A", "multiple-choice", (1,)),
            "names image_2, which the row does not",
        ),
        (
            ("validation_A_1", "<image 1>", "u, v", "A", "multiple-choice", (1,)),
            "'u, v' is not a list",
        ),
        (
            ("validation_A_1", "<image 1>", "['u']", "B", "multiple-choice", (1,)),
            "the answer is 'B': .* one of 1 options",
        ),
    ],
)
def test_rows_of_mmmu_that_cannot_be_asked(tmp_path, row, message):
    with pytest.raises(ValueError, match=f"MMMU validation_A_1: .*{message}"):
        mmmu.load(mmmu_file(tmp_path / "validation.parquet", row))


def test_ai2d(tmp_path):
    (tmp_path / "x.png").write_bytes(png(5))
    row = {
        "question": "Where is C?",
        "options": ["u", "v", "w", "x"],
        "answer": "3",
        "image": "x.png",
    }
    data = ai2d.load(jsonl(tmp_path / "test.jsonl", [row, row]))
    assert (
        data[0].prompt == "Where is C?\nA. u\nB. v\nC. w\nD. x" + LETTER
        and data[0].gold["answer"] == "D"
    )
    assert [q.id for q in data] == ["0", "1"] and greys(data[1]) == [5]
    assert ai2d.score(answered(data, ["d.", "x"])) == {"accuracy": 50.0, "n": 2, "unmatched": 1}
    with pytest.raises(ValueError, match="AI2D row 0: the answer is '4'"):
        ai2d.load(jsonl(tmp_path / "test.jsonl", [row | {"answer": "4"}]))


# ------------------------------------------------------------------------------------ videos


def video(folder, n):
    folder.mkdir(parents=True)
    for k in range(n):
        (folder / f"frame{k}.png").write_bytes(png(k))


NEXT = {
    "video": 11,
    "question": " why did he go ",
    "answer": 4,
    "qid": 3,
    "type": "CW",
    "a0": "u ",
    "a1": "v",
    "a2": "w",
    "a3": "x",
    "a4": "y",
}
EGO = {
    "video_idx": "e-1",
    "question": "What does C do?",
    "answer": "1",
    "option": [f"{x}. C does {x}." for x in "ABCDE"],
}
LONG = {
    "id": "l_0",
    "video_path": "l.mp4",
    "question": "When?",
    "option0": "u",
    "option1": "v",
    "option2": "w",
    "option3": "N/A",
    "option4": "N/A",
    "correct_choice": 2,
    "duration_group": 600,
}
FIVE = "\nA. u\nB. v\nC. w\nD. x\nE. y"


@pytest.mark.parametrize(
    "module, split, row, folder, prompt, gold, limit",
    [
        (nextqa, "MC/test", NEXT, "11", "why did he go" + FIVE, "E", 32),
        (
            egoschema, "Subset/test", EGO, "e-1",
            "What does C do?" + "".join(f"\n{x}. C does {x}." for x in "ABCDE") + LETTER,
            "B",
            16,
        ),
        (
            egoschema,
            "Subset/test",
            EGO | {"option": list("uvwxy")},
            "e-1",
            "What does C do?" + FIVE + LETTER,
            "B",
            16,
        ),
        (
            longvideobench, "validation", LONG, "l",
            "When?\nA. u\nB. v\nC. w" + LETTER + "\n", "C", 32,
        ),
    ],
)
def test_video_sets(tmp_path, module, split, row, folder, prompt, gold, limit):
    jsonl(tmp_path / f"{split}.jsonl", [row])
    with pytest.raises(
        FileNotFoundError, match=f"1 of 1 videos, such as {folder}: .*ffmpeg -i {folder}.mp4"
    ):
        module.load(tmp_path)
    video(tmp_path / "frames" / folder, 15)
    (question,) = module.load(tmp_path)
    assert (
        question.prompt == prompt
        and question.limit == limit
        and question.gold["answer"] == gold
    )
    assert greys(question) == [0, 2, 4, 6, 8, 10, 12, 14]  # frame10 behind frame9
    video(tmp_path / "elsewhere" / folder, 3)
    assert greys(module.load(tmp_path, videos=tmp_path / "elsewhere", frames=3)[0]) == [0, 1, 2]
    right, wrong = (module.score(answered([question], [answer])) for answer in (gold, ""))
    assert right["accuracy"] == 100 and right["unmatched"] == 0
    assert wrong["accuracy"] == 0 and wrong["unmatched"] == 1


def test_what_the_video_sets_tell_apart(tmp_path):
    video(tmp_path / "frames/11", 1)
    kinds = ("CW", "CH", "TN", "DO")
    data = nextqa.load(
        jsonl(tmp_path / "t.jsonl", [NEXT | {"qid": i, "type": t} for i, t in enumerate(kinds)])
    )
    assert [q.id for q in data] == ["11_0", "11_1", "11_2", "11_3"]
    assert nextqa.score(answered(data, ["E. y", "D", "E", "perhaps"])) == {
        "accuracy": 50.0,
        "causal": 50.0,
        "temporal": 100.0,
        "descriptive": 0.0,
        "n": 4,
        "unmatched": 1,
    }
    video(tmp_path / "frames/l", 1)
    data = longvideobench.load(
        jsonl(tmp_path / "l.jsonl", [LONG, LONG | {"id": "l_1", "duration_group": 15}])
    )
    assert longvideobench.score(answered(data, ["C. w", "E"])) == {
        "accuracy": 50.0,
        "600 s": 100.0,
        "15 s": 0.0,
        "n": 2,
        "unmatched": 1,
    }


def test_folders_of_frames_that_hold_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="name DIR as videos"):
        frames.clips(["a"], None, None)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="a holds no frame: .*ffmpeg"):
        frames.opened(frames.clips(["a"], tmp_path, None)["a"], 8)()
    with pytest.raises(ValueError, match="0 of 3 frames"):
        frames.uniform([1, 2, 3], 0)
    assert frames.uniform(range(100), 8) == [
        0, 14, 28, 42, 56, 70, 84, 99,
    ]  # linspace(0, 99, 8), cut to integers
    assert frames.uniform([7], 3) == [7, 7, 7]


# ------------------------------------------------------------------------------------ bad input

COLUMNS = [
    (module, column)
    for module in (mmbench, scienceqa, seed, mmmu, ai2d, nextqa, egoschema, longvideobench)
    for column in module.COLUMNS[:2]
]


@pytest.mark.parametrize("module, column", COLUMNS)
def test_missing_columns_and_splits_are_named(tmp_path, module, column):
    row = {name: "x" for name in {*module.COLUMNS, "answer"} - {column}}
    with pytest.raises(ValueError, match=f"no column '{column}'"):
        module.load(jsonl(tmp_path / "some.jsonl", [row]))
    with pytest.raises(ValueError, match="split 'tset'.*it has some"):
        module.load(tmp_path, split="tset")


def test_ids_that_stand_twice_are_named(tmp_path):
    data = mmbench.load(mmbench_file(tmp_path, 2 * rotations(7, ["u", "v"], "A")))
    with pytest.raises(ValueError, match="7.* 2 times"):
        sample(data, None)
    with pytest.raises(ValueError, match="the id '7' stands twice among the 4 rows"):
        mmbench.score(answered(data, ["A"] * 4))
    with pytest.raises(ValueError, match="no rows to score"):
        mmbench.score([])
    with pytest.raises(ValueError, match="row 1 is .*an answer that is a text"):
        mmbench.score([*answered(data[:1], ["A"]), {"id": "8", "answer": None, "gold": {}}])


def test_pictures_are_opened_when_asked_for_and_not_before(tmp_path):
    row = {"question": "Where?", "options": ["u", "v"], "answer": "0"}
    (tmp_path / "broken.png").write_bytes(png(5)[:40])
    data = ai2d.load(
        jsonl(tmp_path / "test.jsonl", [row | {"image": None}, row | {"image": "broken.png"}])
    )
    with pytest.raises(ValueError, match="row 0: no picture in the column image"):
        data[0].images()
    with pytest.raises(ValueError, match="broken.png: "):
        data[1].images()


@pytest.mark.parametrize(
    "cell, holds",
    [
        (None, False), (math.nan, False), ("nan", False), ("NaN", False), ("None", False),
        ("", False), (" ", False), ("none of them", True), ("0", True), (0, True),
    ],
)
def test_cells_that_hold_nothing(cell, holds):
    assert multiple_choice.is_empty(cell) is not holds
