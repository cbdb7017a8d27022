"""GQA, MME, POPE, VQAv2, TextVQA, VizWiz, DocVQA, InfoVQA, ChartQA: scores worked by hand, prompts
letter by letter."""

import io
import json
import random
import time

import datasets
import numpy as np
import pytest
from PIL import Image

from benchmarks import (
    chartqa,
    docvqa,
    gqa,
    infovqa,
    mme,
    pope,
    scores,
    short_answers,
    textvqa,
    vizwiz,
    vqav2,
)

SHORT = "\nAnswer the question using a single word or phrase."


@pytest.fixture(autouse=True)
def quiet(tmp_path_factory, monkeypatch):
    """A cache of its own, no progress bars."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def rows(*cells, **gold):
    """Rows of a predictions file from (answer, the right one or ones)."""
    return [
        {
            "id": str(i),
            "answer": answer,
            "gold": {"answers" if isinstance(right, list) else "answer": right, **gold},
        }
        for i, (answer, right) in enumerate(cells)
    ]


def people(**counts) -> list[str]:
    return [answer for answer, n in counts.items() for _ in range(n)]


# ------------------------------------------------------------------------------------ comparisons


@pytest.mark.parametrize(
    "text, official, m4c",
    [
        ("", "", ""),
        (" Yes.\n", "yes", "yes"),
        ("No, thanks", "no thanks", "no thanks"),
        (
            "red,white",
            "red white",
            "redwhite",
        ),  # M4C's drops the comma before it would become a space
        ("1,000", "1000", "1000"),
        (
            "$1,000-2,000",
            "$10002000",
            "$1000 2000",
        ),  # a comma between digits takes the other marks with it
        ("1,b 2-3", "1 b 2 3", "1b 2 3"), ("left-handed", "left handed", "left handed"),
        ("left - handed", "left handed", "left handed"),
        ("well- known/unknown", "well known unknown", "well known unknown"),
        ("3.50", "3.50", "3.50"),
        ("v1.", "v1", "v1"),  # the look-behind of the published pattern does nothing
        ("U.S.A.", "usa", "usa"),
        (".5", ".5", ".5"),
        ("." * 40 + "x", "." * 8 + "x", "." * 8 + "x"),  # re.UNICODE as the count: 32
        ("10:30", "10:30", "10:30"),  # a colon is no punctuation here
        ("None", "0", "0"), ("Two dogs", "2 dogs", "2 dogs"), ("ten", "10", "10"),
        ("eleven", "eleven", "eleven"), ("The cat on a mat", "cat on mat", "cat on mat"),
        ("an", "", ""), ("dont", "don't", "don't"), ("Dont", "don't", "don't"),
        ("don't", "don't", "don't"), ("couldnt've", "couldn't've", "couldn't've"),
        ("yalld've", "yalld've", "yalld've"), ("yall'd've", "y'all'd've", "y'all'd've"),
        ("somebody'd", "somebodyd", "somebodyd"), ("Im", "im", "im"),
        ("oclock", "o'clock", "o'clock"), ("dog's", "dog's", "dog 's"),
        ("what's that?", "what's that", "what 's that"), ("a\tb\nc", "b c", "b c"),
        ("Nope", "nope", "nope"), ("5%", "5%", "5%"),
    ],
)
def test_normalising_a_vqa_answer(text, official, m4c):
    assert (short_answers.normalise(text), short_answers.normalise_m4c(text)) == (official, m4c)


def test_the_contractions_are_the_official_ones():
    assert len(short_answers.CONTRACTIONS) == 120 - 6  # less those that never change anything
    assert {short_answers.CONTRACTIONS[word] for word in ("ow's'at", "'ows'at", "'ow'sat")} == {
        "'ow's'at"
    }
    assert {
        short_answers.CONTRACTIONS[word] for word in ("yall'd've", "y'alld've", "y'all'dve")
    } == {"y'all'd've"}
    assert (
        short_answers.CONTRACTIONS["twas"] == "'twas"
        and "couldntve" not in short_answers.CONTRACTIONS
    )


@pytest.mark.parametrize("agree, points", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_one_person_out(agree, points):
    golds = people(cat=agree, dog=10 - agree)
    assert short_answers.accuracy("Cat.", golds) == pytest.approx(points, abs=1e-12)
    random.Random(0).shuffle(golds)
    assert short_answers.accuracy("Cat.", golds) == pytest.approx(points, abs=1e-12)


def test_vqa_accuracy_cleans_people_too_even_where_all_agree():
    assert (
        short_answers.accuracy("yes", people(**{"Yes": 10})) == 1
    )  # 0 in the VQA repository's own code
    assert short_answers.accuracy("2", people(**{"two": 2, "Two.": 1, "3": 7})) == pytest.approx(
        0.9
    )
    assert short_answers.accuracy("", people(cat=10)) == 0
    assert short_answers.accuracy("the", people(a=1, cat=9)) == pytest.approx(
        0.3
    )  # both are nothing without articles


@pytest.mark.parametrize(
    "a, b, distance",
    [
        ("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2),
        ("abc", "abc", 0), ("ab", "ba", 2),
    ],
)
def test_levenshtein(a, b, distance):
    assert short_answers.levenshtein(a, b) == short_answers.levenshtein(b, a) == distance


@pytest.mark.parametrize(
    "answer, golds, points",
    [
        ("Paris", ["paris"], 1),
        ("  new   york ", ["New York"], 1),
        ("pariz", ["paris", "london"], 0.8),  # the closest counts
        ("abcd", ["abxy"], 0.5),  # exactly at the threshold
        ("abc", ["axy"], 0), ("", [""], 1), ("", ["x"], 0), ("x", [""], 0),
        ("abx  ", ["abc"], 0.8),  # 1 wrong of 3, but 5 is the raw answer's length
    ],
)
def test_anls(answer, golds, points):
    assert short_answers.anls(answer, golds) == pytest.approx(points, abs=1e-12)


def test_anls_of_the_paper_is_strict_at_the_threshold():
    assert (
        short_answers.anls("abcd", ["abxy"], strict=True) == 0
        and short_answers.anls("abcde", ["abcxy"], strict=True) == 0.6
    )


@pytest.mark.parametrize(
    "answer, gold, right",
    [
        ("105", "100", True), ("105.1", "100", False), ("95", "100", True), ("94.9", "100", False),
        ("-105", "-100", True), ("5", "5%", False), ("5%", "5%", True), ("0.05", "5%", True),
        ("5.2%", "5%", True), ("5%", "5", False), ("1,000", "1000", False),
        ("1,000", "1,000", True), ("1e3", "1000", True), ("0", "0", True), ("0.0", "0", False),
        ("0.001", "0", False),  # nothing is 5 % of 0: texts
        ("Yes.", "Yes", False), ("yes", "Yes", True), (" Yes\n", "Yes", True), ("", "5", False),
        ("%", "5%", False), ("about 100", "100", False), ("100", "[100]", False),
    ],
)
def test_relaxed_accuracy(answer, gold, right):
    assert short_answers.relaxed(answer, gold) is right


# ------------------------------------------------------------------------------------ scores


def test_gqa_is_exact_but_for_case_and_a_final_period():
    asked = rows(
        ("Yes.", "yes"), (" Left \n", "left"), ("yes", "no"), ("", "no"), ("yes, it is", "yes"),
        ("traffic-light", "traffic light"), ("t-shirt!", "t-shirt"), ("NO...", "no"),
    )
    assert gqa.score(asked) == {"accuracy": 100 * 3 / 8, "n": 8, "unmatched": 1}
    assert gqa.score(asked, lenient=True)["accuracy"] == 100 * 4 / 8


def mme_rows(category, *pairs):
    return [
        {
            "id": f"{category}/{i}#{k}",
            "answer": answer,
            "gold": {"answer": right, "category": category, "pair": f"{category}/{i}"},
        }
        for i, pair in enumerate(pairs)
        for k, (answer, right) in enumerate(pair)
    ]


@pytest.mark.parametrize(
    "answer, said",
    [
        ("Yes", "yes"), ("no.", "no"), ("NO", "no"), ("Yes, it is", "yes"), ("Nope", "no"),
        ("No, yes", "no"), ("It is yes", None), ("a no", "no"), ("", None), ("y", None),
        ("Unknown", None), ("not", "no"), ("Eyes", "yes"), (" \nyes", "yes"), ("know", "no"),
    ],
)
def test_mme_reads_the_first_four_characters(answer, said):
    assert mme.read(answer) == said


def test_mme_adds_accuracy_and_pairs_of_every_category():
    asked = [
        *mme_rows(
            "count", (("Yes", "Yes"), ("No", "No")), (("Yes", "Yes"), ("Yes", "No"))
        ),  # 75 + 50
        *mme_rows("OCR", (("maybe", "Yes"), ("no", "No"))),  # 50 + 0
        *mme_rows("code_reasoning", (("yes", "Yes"), ("no", "No"))),
    ]  # 100 + 100
    result = mme.score(asked)
    assert result == {
        "total": 375.0,
        "perception": 175.0,
        "cognition": 200.0,
        "count": 125.0,
        "OCR": 50.0,
        "code_reasoning": 200.0,
        "n": 8,
        "unmatched": 1,
        "half_pairs": 0,
    }
    random.Random(1).shuffle(asked)
    assert mme.score(asked) == result
    half = mme.score(mme_rows("count", (("Yes", "Yes"),)))  # of a subset: no pair, no acc+
    assert half["total"] == 100 and half["half_pairs"] == 1
    everything = [
        row
        for name in mme.PERCEPTION + mme.COGNITION
        for row in mme_rows(name, (("yes", "Yes"), ("no", "No")))
    ]
    assert [mme.score(everything)[key] for key in ("perception", "cognition", "total")] == [
        2000,
        800,
        2800,
    ]


def test_one_answer_is_right_or_not_where_scores_are_of_many():
    there, absent, unread = mme_rows("count", (("Yes", "Yes"), ("yes", "No")), (("a", "Yes"),))
    assert [mme.right(row) for row in (there, absent, unread)] == [True, False, False]

    def asked(answer, gold):
        return {"id": "1", "answer": answer, "gold": {"answer": gold, "category": "random"}}
    assert pope.right(asked("No.", "no")) and pope.right(asked("Yes", "yes"))
    assert not pope.right(asked("No", "yes")) and not pope.right(asked("maybe", "no"))
    assert pope.right(asked("", "yes")) and not pope.right(asked("", "no"))
    for gold in ("yes", "no"):                                     # never asked: wrong either way
        assert not pope.right(asked("", gold) | {"too long": 5000})


def test_mme_refuses_what_it_cannot_pair():
    with pytest.raises(ValueError, match="'juggling': expected one of existence"):
        mme.score(mme_rows("juggling", (("yes", "Yes"),)))
    with pytest.raises(ValueError, match="three rows"):
        mme.score(mme_rows("count", (("yes", "Yes"),) * 3))


@pytest.mark.parametrize(
    "answer, no",
    [
        ("No", True), ("no", True), ("No.", True), ("No, there is not", True),
        ("There is no dog. Yes", True), ("It is not", True), ("no,", True), ("Yes", False),
        ("Yes. No", False), ("NO", False), ("Nope", False), ("unknown", False), ("cannot", False),
        ("", False), ("no!", False), ("not-a-dog", False), (" No\n", True),
    ],
)
def test_pope_reads_a_no_as_the_official_script(answer, no):
    assert pope.says_no(answer) is no


def pope_rows(category, hit, wrong, missed, rejected):
    cells = (
        [("Yes", "yes")] * hit
        + [("yes", "no")] * wrong
        + [("No", "yes")] * missed
        + [("no", "no")] * rejected
    )
    return [
        {"id": f"{category}/{i}", "answer": answer, "gold": {"answer": label, "category": category}}
        for i, (answer, label) in enumerate(cells)
    ]


def test_pope_is_the_mean_of_three_f1():
    asked = (
        pope_rows("random", 4, 1, 1, 4)
        + pope_rows("popular", 3, 1, 2, 4)
        + pope_rows("adversarial", 1, 0, 0, 9)
    )
    result = pope.score(asked)
    each = [80, 100 * 2 * 0.75 * 0.6 / 1.35, 100]
    assert [result[f"{name}_f1"] for name in ("random", "popular", "adversarial")] == pytest.approx(
        each
    )
    assert result["f1"] == pytest.approx(sum(each) / 3)  # not that of all rows: 2 * 8 / (16 + 5)
    assert result["f1"] != pytest.approx(100 * 16 / 21, abs=1)
    assert result["accuracy"] == pytest.approx((80 + 70 + 100) / 3)
    assert (result["popular_precision"], result["popular_recall"]) == pytest.approx((75, 60))
    assert result["yes_ratio"] == pytest.approx((50 + 40 + 10) / 3)
    assert (result["n"], result["unmatched"], result["without_yes_or_no"]) == (30, 0, 0)


def test_pope_counts_what_is_neither_as_yes():
    asked = pope_rows("random", 1, 0, 0, 1)
    asked[0]["answer"], asked[1]["answer"] = "unknown", "cannot"
    result = pope.score(asked)
    assert (
        result["recall"] == 100 and result["precision"] == 50 and result["without_yes_or_no"] == 2
    )
    assert (
        pope.score(pope_rows("random", 0, 0, 2, 3))["f1"] == 0
    )  # nobody said yes: no division by 0
    with pytest.raises(ValueError, match="label 'maybe'"):
        pope.score([{"id": "1", "answer": "no", "gold": {"answer": "maybe", "category": "random"}}])


def test_popes_bootstrap_from_counts_is_that_from_rows():
    asked = [
        row
        for category, counts in (("random", (9, 3, 2, 8)), ("popular", (5, 6, 1, 4)))
        for row in pope_rows(category, *counts)
    ]
    rng = np.random.default_rng([3, 0])
    by_rows = []
    for _ in range(40):
        drawn = rng.integers(0, len(asked), len(asked))
        again = [{**asked[q], "id": str(place)} for place, q in enumerate(drawn)]
        by_rows.append(pope.score(again)["f1"])
    assert scores.bootstrap(pope, asked, 3, 40).tolist() == by_rows
    many = [{**row, "id": str(i)} for i, row in enumerate(asked * 230)]
    start = time.perf_counter()
    scores.bootstrap(pope, many, 0, 1000)
    assert len(many) > 8700 and time.perf_counter() - start < 5  # from the rows it took 36 s


def test_vqav2_by_type():
    asked = [
        *rows(("Yes.", people(yes=10)), type="yes/no"),
        {
            "id": "1",
            "answer": "two",
            "gold": {"answers": people(**{"2": 2, "3": 8}), "type": "number"},
        },
        {"id": "2", "answer": "", "gold": {"answers": people(cat=10), "type": "other"}},
    ]
    assert vqav2.score(asked) == pytest.approx(
        {"accuracy": 160 / 3, "number": 60, "other": 0, "yes/no": 100, "n": 3, "unmatched": 1}
    )


@pytest.mark.parametrize("module", [textvqa, vizwiz])
def test_textvqa_and_vizwiz_clean_as_m4c(module):
    asked = rows(
        ("Joe's", people(**{"joe 's": 10})), ("a,b", people(ab=3, x=7)),
        ("Unanswerable", people(unanswerable=2, x=8)), ("", people(x=10)),
    )
    assert module.score(asked) == {"accuracy": pytest.approx(100 * 2.5 / 4), "n": 4, "unmatched": 1}


@pytest.mark.parametrize("module", [docvqa, infovqa])
def test_documents_are_scored_by_anls(module):
    asked = rows(("pariz", ["paris"]), ("nothing like it", ["42"]), ("", ["42"]), ("", [""]))
    assert module.score(asked) == {"anls": pytest.approx(100 * 1.8 / 4), "n": 4, "unmatched": 1}


def test_chartqa_by_who_asked():
    asked = [
        {"id": str(i), "answer": answer, "gold": {"answer": gold, "type": kind}}
        for i, (answer, gold, kind) in enumerate(
            [
                ("105", "100", "human_test"),
                ("Yes.", "Yes", "human_test"),
                ("5%", "5%", "augmented_test"),
            ]
        )
    ]
    assert chartqa.score(asked) == pytest.approx(
        {"relaxed": 200 / 3, "human": 50, "augmented": 100, "n": 3, "unmatched": 0}
    )


ALL = [gqa, mme, pope, vqav2, textvqa, vizwiz, docvqa, infovqa, chartqa]


@pytest.mark.parametrize("module", ALL)
def test_scores_need_rows_and_refuse_a_repeated_one(module):
    with pytest.raises(ValueError, match="no rows"):
        module.score([])
    row = {
        "id": "7",
        "answer": "yes",
        "gold": {"answer": "yes", "category": "count", "pair": "1", "type": None},
    }
    with pytest.raises(ValueError, match="'7' comes 2 times among 2"):
        module.score([row, row])
    for broken in ({"answer": None}, {"gold": "yes"}):
        with pytest.raises(
            ValueError, match="row 0 is .* expected an id, an answer that is a text, and a gold"
        ):
            module.score([row | broken])


@pytest.mark.parametrize("module", [vqav2, textvqa, vizwiz, docvqa])
def test_a_split_without_answers_is_not_scored(module):
    for right in (None, []):
        with pytest.raises(ValueError, match="'7' has no right answer .* a split with labels"):
            module.score([{"id": "7", "answer": "yes", "gold": {"answers": right}}])


# ------------------------------------------------------------------------------------ loading


def write(path, **columns):
    """A parquet file as on the hub: pictures as structs of bytes and path, picture i of red i."""
    if columns.pop("image", True):
        n = len(next(iter(columns.values())))

        def data(i):
            Image.new("RGB", (4, 3), (i, 0, 0)).save(file := io.BytesIO(), "PNG")
            return {"bytes": file.getvalue(), "path": None}

        columns["image"] = [data(i) for i in range(n)]
    table = datasets.Dataset.from_dict(columns)
    if "image" in columns:
        table = table.cast_column("image", datasets.Image())
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_parquet(path)


def red(question) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in question.images()]


TEN = [f"w{i}" for i in range(10)]
# module -> (the file of its split, columns of two rows as on the hub)
LAYOUT = {
    mme: (
        "test",
        {
            "question_id": ["OCR/0.jpg"] * 2,
            # as seven of the official rows, the second has one space more
            "question": [f"Is it 1?{space} Please answer yes or no." for space in ("", " ")],
            "answer": ["Yes", "No"],
            "category": ["OCR"] * 2,
        },
    ),
    pope: (
        "test",
        {
            "id": ["0", "1"],
            "question_id": ["1", "1"],
            "question": ["Is there a dog in the image?"] * 2,
            "answer": ["yes", "no"],
            "image_source": ["x"] * 2,
            "category": ["popular", "random"],
        },
    ),
    vqav2: (
        "validation",
        {
            "question_id": [9, 4],
            "question": ["What?", "Where?"],
            "question_type": ["what", "where"],
            "answer_type": ["other", "number"],
            "answers": [[{"answer": w, "answer_id": i} for i, w in enumerate(TEN, 1)]] * 2,
        },
    ),
    textvqa: (
        "validation",
        {
            "question_id": [34602, 34603],
            "image_id": ["a", "b"],
            "answers": [TEN] * 2,
            "question": ["what does the sign by the USA say?", "who?"],
            "ocr_tokens": [["STOP", "All", "way"], []],
        },
    ),
    vizwiz: (
        "val",
        {
            "question_id": ["VizWiz_val_0", "VizWiz_val_1"],
            "question": ["what IS this? Thanks.", "HELP"],
            "answers": [TEN] * 2,
            "category": ["other"] * 2,
        },
    ),
    docvqa: (
        "validation",
        {
            "questionId": ["7", "8"],
            "question": ["Who signed?", "When?"],
            "answers": [["A"], ["b", "c"]],
            "docId": [1, 2],
            "question_types": [["form"], ["table"]],
        },
    ),
    chartqa: (
        "test",
        {
            "type": ["human_test", "augmented_test"],
            "question": ["How many?", "What?"],
            "answer": ["5%", "No"],
        },
    ),
}
LAYOUT[infovqa] = LAYOUT[docvqa]


def place(root, module, split=None, **changed):
    """Local copies in the hub's layout; returns the path that load() takes."""
    if module is gqa:
        columns = {
            "id": ["2", "1", "0"],
            "imageId": ["b", "a", "b"],
            "question": ["Q b?", "Q a?", "R b?"],
            "answer": ["yes", "left", "no"],
            "image": False,
            **changed,
        }
        write(root / gqa.QUESTIONS / "testdev-00000-of-00001.parquet", **columns)
        write(root / gqa.PICTURES / "testdev-00000-of-00001.parquet", id=["a", "b"])
    else:
        name, columns = LAYOUT[module]
        columns = {key: value for key, value in {**columns, **changed}.items() if value is not None}
        folder = root / (module.CONFIG or "data")
        write(folder / f"{split or name}-00000-of-00001.parquet", **columns)
    return root


PROMPTS = [
    (
        gqa,
        "llava",
        ["2", "1", "0"],
        ["Q b?" + SHORT, "Q a?" + SHORT, "R b?" + SHORT],
        {"answer": "yes"},
    ),
    (
        mme,
        "llava",
        ["OCR/0.jpg#0", "OCR/0.jpg#1"],
        ["Is it 1?" + SHORT] * 2,
        {"answer": "Yes", "category": "OCR", "pair": "OCR/0.jpg"},
    ),
    (
        mme,
        "internvl",
        ["OCR/0.jpg#0", "OCR/0.jpg#1"],
        ["Is it 1? Answer the question using a single word or phrase."] * 2,
        None,
    ),
    (
        pope,
        "qwen2_5_vl",
        ["popular/1", "random/1"],
        ["Is there a dog in the image?" + SHORT] * 2,
        {"answer": "yes", "category": "popular"},
    ),
    (
        vqav2,
        "llava",
        ["9", "4"],
        ["What?" + SHORT, "Where?" + SHORT],
        {"answers": TEN, "type": "other"},
    ),
    (
        textvqa,
        "llava",
        ["34602", "34603"],
        [
            "What does the sign by the usa say?\nReference OCR token: STOP, All, way" + SHORT,
            "Who?\nReference OCR token: " + SHORT,
        ],
        {"answers": TEN, "ocr": True},
    ),
    (
        textvqa,
        "qwen2_5_vl",
        ["34602", "34603"],
        ["What does the sign by the usa say?" + SHORT, "Who?" + SHORT],
        {"answers": TEN, "ocr": False},
    ),
    (
        vizwiz,
        "llava",
        ["VizWiz_val_0", "VizWiz_val_1"],
        [
            "What is this? thanks.\nWhen the provided information is insufficient, respond with "
            "'Unanswerable'."
            + SHORT,
            "Help\nWhen the provided information is insufficient, respond with 'Unanswerable'."
            + SHORT,
        ],
        {"answers": TEN},
    ),
    (docvqa, "llava", ["7", "8"], ["Who signed?" + SHORT, "When?" + SHORT], {"answers": ["A"]}),
    (infovqa, "llava", ["7", "8"], ["Who signed?" + SHORT, "When?" + SHORT], {"answers": ["A"]}),
    (
        chartqa,
        "llava",
        ["0", "1"],
        [
            "How many?\nAnswer the question with a single word.",
            "What?\nAnswer the question with a single word.",
        ],
        {"answer": "5%", "type": "human_test"},
    ),
    (chartqa, "internvl", ["0", "1"], ["How many?" + SHORT, "What?" + SHORT], None),
]


@pytest.mark.parametrize("module, family, ids, prompts, gold", PROMPTS)
def test_loading_the_hubs_layout(tmp_path, module, family, ids, prompts, gold):
    asked = module.load(place(tmp_path, module), family=family)
    assert len(asked) == len(ids) and [q.id for q in asked] == asked.ids == ids
    assert [q.prompt for q in asked] == prompts
    assert gold in (None, asked[0].gold) and json.loads(json.dumps(asked[0].gold)) == asked[0].gold
    assert [red(q) for q in asked] == ([[1], [0], [1]] if module is gqa else [[0], [1]])
    short = module in (gqa, mme, pope, vqav2, chartqa) and family != "qwen2_5_vl"
    assert asked[0].limit == (16 if short else 32)
    assert asked[-1].id == ids[-1] and [q.id for q in asked[1:]] == ids[1:]
    answered = [{"id": q.id, "answer": "yes", "gold": q.gold} for q in asked]
    result = module.score(answered)
    assert module.MAIN in result and result["n"] == len(ids) and result["unmatched"] == 0


def test_textvqa_with_and_without_the_ocr_line(tmp_path):
    root = place(tmp_path, textvqa)
    assert "OCR" not in textvqa.load(root, ocr=False)[0].prompt
    assert (
        "\nReference OCR token: STOP, All, way\n"
        in textvqa.load(root, family="internvl", ocr=True)[0].prompt
    )
    other = place(tmp_path / "no tokens", textvqa, ocr_tokens=None)
    assert len(textvqa.load(other, ocr=False)) == 2  # the column is asked for if it is needed
    with pytest.raises(ValueError, match="no column 'ocr_tokens'"):
        textvqa.load(other)


def test_pictures_are_opened_when_asked_for(tmp_path):
    name, columns = LAYOUT[chartqa]
    lines = [
        dict(zip(columns, cells), image=f"{i}.png")
        for i, cells in enumerate(zip(*columns.values()))
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, lines)))
    Image.new("RGB", (2, 2), (77, 0, 0)).save(tmp_path / "0.png")
    asked = chartqa.load(tmp_path)
    assert red(asked[0]) == [77]
    with pytest.raises(ValueError, match="1.png"):
        asked[1].images()  # loaded fine, shown it fails
    (tmp_path / "test.jsonl").write_text(
        "\n".join(json.dumps({**line, "image": None}) for line in lines)
    )
    with pytest.raises(ValueError, match="row 1 has no picture"):
        chartqa.load(tmp_path)[1].images()


@pytest.mark.parametrize("module", ALL)
def test_a_missing_column_or_split_is_named(tmp_path, module):
    lost = {
        gqa: "imageId",
        mme: "category",
        pope: "category",
        vqav2: "answers",
        chartqa: "type",
    }.get(module, "answers")
    if module is gqa:
        root = place(tmp_path, gqa)
        write(
            root / gqa.QUESTIONS / "testdev-00000-of-00001.parquet",
            image=False,
            id=["1"],
            question=["?"],
            answer=["x"],
        )
    else:
        root = place(tmp_path, module, **{lost: None})
    with pytest.raises(ValueError, match=f"no column '{lost}'"):
        module.load(root)
    with pytest.raises(ValueError, match="no file of the split 'dev'"):
        module.load(root, "dev")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        module.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "module, column, value, message",
    [
        (gqa, "id", ["1", "1", "0"], "'1' comes 2 times among 3"),
        (gqa, "imageId", ["b", "a", "c"], "lacks 1 pictures .* 'c'"),
        (pope, "category", ["popular", "popular"], "'popular/1' comes 2 times"),
        (vqav2, "question_id", [9, 9], "'9' comes 2 times"),
        (textvqa, "question_id", [9, 9], "'9' comes 2 times"),
        (vizwiz, "question_id", ["x", "x"], "'x' comes 2 times"),
        (docvqa, "questionId", ["x", "x"], "'x' comes 2 times"),
    ],
)
def test_bad_rows_are_refused(tmp_path, module, column, value, message):
    with pytest.raises(ValueError, match=message):
        module.load(place(tmp_path, module, **{column: value}))


def test_mme_refuses_a_third_question_about_a_picture(tmp_path):
    name, columns = LAYOUT[mme]
    with pytest.raises(ValueError, match="OCR/0.jpg has 3 questions"):
        mme.load(place(tmp_path, mme, **{key: [cells[0]] * 3 for key, cells in columns.items()}))


def test_pope_has_its_categories_as_splits_too(tmp_path):
    columns = {**LAYOUT[pope][1], "question_id": ["1", "2"], "category": ["popular"] * 2}
    write(tmp_path / "Full" / "popular-00000-of-00001.parquet", **columns)
    assert pope.load(tmp_path, "popular").ids == ["popular/1", "popular/2"]


# ------------------------------------------------------------------------------------ submissions


def test_vqav2_submission_holds_every_question_of_test(tmp_path):
    root = place(tmp_path, vqav2, "testdev", answers=None, answer_type=None)
    asked = vqav2.load(root, "testdev")
    assert asked[0].gold == {"answers": None, "type": None}
    answered = [
        {"id": q.id, "answer": text, "gold": q.gold}
        for q, text in zip(asked, ["Two, I think.", "Joe's"])
    ]
    vqav2.submission(answered, tmp_path / "some.json")
    cleaned = [{"question_id": 9, "answer": "2 i think"}, {"question_id": 4, "answer": "joe 's"}]
    assert json.loads((tmp_path / "some.json").read_text()) == cleaned
    vqav2.submission(answered, tmp_path / "all.json", every=[4, "5", 9])
    assert json.loads((tmp_path / "all.json").read_text()) == [
        cleaned[1],
        {"question_id": 5, "answer": ""},
        cleaned[0],
    ]
    with pytest.raises(
        ValueError, match="1 rows are of no question of the test split, such as '9'"
    ):
        vqav2.submission(answered, tmp_path / "x.json", every=[4, 5])
    with pytest.raises(ValueError, match="no rows"):
        vqav2.submission([], tmp_path / "x.json")
    with pytest.raises(ValueError, match="'9' comes 2 times"):
        vqav2.submission(answered[:1] * 2, tmp_path / "x.json")
    assert not (tmp_path / "x.json").exists()


def test_vizwiz_submission_names_the_pictures(tmp_path):
    asked = vizwiz.load(place(tmp_path, vizwiz, "test", answers=None), "test")
    vizwiz.submission(
        [{"id": q.id, "answer": "Unanswerable.", "gold": q.gold} for q in asked],
        tmp_path / "up.json",
    )
    assert json.loads((tmp_path / "up.json").read_text()) == [
        {"image": f"VizWiz_val_{i}.jpg", "answer": "unanswerable"} for i in range(2)
    ]
    with pytest.raises(ValueError, match="no rows"):
        vizwiz.submission([], tmp_path / "x.json")
