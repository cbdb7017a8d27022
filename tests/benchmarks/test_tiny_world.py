"""The tiny world as a benchmark: the same questions every time, true answers, evidence that covers
what is asked about."""

import numpy as np
import pytest
import torch
from scene_reading import read

from benchmarks import tiny_world
from benchmarks.tiny_world import is_right, load, load_rows, score
from data.dialogues import SIZES as FAMILY_SIZES
from tiny import scenes
from tiny.scenes import SPLITS, coverage

SIZES = [(144, 144), (192, 108), (96, 216)]


def test_load_is_deterministic_and_stops_at_n():
    first, again = load_rows(80, "test", SIZES), load_rows(80, "test", SIZES)
    assert [(r.id, r.image.tobytes(), r.questions, r.scene) for r in first] == [
        (r.id, r.image.tobytes(), r.questions, r.scene) for r in again
    ]
    counts = [len(r.questions) for r in first]
    assert sum(counts) >= 80 > sum(counts[:-1])
    assert [r.image.size for r in first] == [SIZES[i % 3] for i in range(len(first))]
    assert (
        [r.id for r in first]
        == [r.scene.seed for r in first]
        == [SPLITS["test"] + i for i in range(len(first))]
    )
    for n, rows in ((0, 0), (sum(counts[:3]), 3), (sum(counts[:3]) + 1, 4)):
        assert [r.questions for r in load_rows(n, "test", SIZES)] == [
            r.questions for r in first[:rows]
        ]
    assert load_rows(20)[0].image.tobytes() != load_rows(20, "calibration")[0].image.tobytes()
    for row in first:
        assert scenes.render(row.scene).tobytes() == row.image.tobytes()
        assert all(read(row.scene, q.question)[:2] == (q.family, q.answer) for q in row.questions)


def test_row_evidence_is_that_of_the_asked_things():
    empty = 0
    for row in load_rows(400, sizes=SIZES):
        w, h = row.scene.size
        share = coverage(row.scene, h // 12, w // 12)
        for q in row.questions:
            got = row.evidence(q, (h // 12, w // 12))
            assert got.shape == (share.shape[1],) and got.dtype == torch.float32
            want = np.zeros(share.shape[1])
            for i in read(row.scene, q.question)[2]:
                want = np.maximum(want, share[i])
            np.testing.assert_allclose(got.numpy(), want)
            empty += not q.evidence
            assert q.evidence or (q.family, q.answer) == ("exist", "no")
    assert empty, "a no that nothing in the scene comes near has no evidence: none was tried"


@pytest.mark.parametrize(
    "answer, gold, want",
    [
        ("yes", "yes", 1), ("Top  Left ", "top left", 1), ("k t x", "K T X", 1), ("no", "yes", 0),
        ("", "yes", 0), ("left top", "top left", 0), ("top", "top left", 0),
        ("top left left", "top left", 0), ("k t", "k t x", 0),
    ],
)
def test_score_wants_the_same_words(answer, gold, want):
    assert is_right(answer, gold) == want and isinstance(is_right(answer, gold), float)


def test_questions_are_those_of_the_rows_with_their_evidence():
    rows = load_rows(60)
    asked = load(n=60)
    pairs = [(row, number, q) for row in rows for number, q in enumerate(row.questions)]
    assert [q.id for q in asked] == [f"{row.id}-{number}" for row, number, _ in pairs]
    for question, (row, _, q) in zip(asked, pairs):
        assert question.images() == [row.image] and question.prompt == q.question
        assert question.gold == {
            "family": q.family,
            "answer": q.answer,
            "things": len(row.scene.things),
        }
        assert torch.equal(question.evidence((12, 12)), row.evidence(q, (12, 12)))
    calibration = load(split="calibration", n=20)
    assert {q.id for q in calibration}.isdisjoint(q.id for q in asked)


def test_a_family_has_the_pictures_that_its_encoder_takes():
    for family in ("llava", "internvl", "qwen2_5_vl"):
        sizes = [question.images()[0].size for question in load(family=family, n=60)]
        assert set(sizes) == set(FAMILY_SIZES[family])
    with pytest.raises(ValueError, match="tiny_world=here: the tiny world is drawn, not read"):
        load("here")


def test_the_score_is_the_mean_over_families():
    rows = [
        {"answer": answer, "gold": {"family": family, "answer": gold}}
        for answer, family, gold in (
            ("yes", "exist", "yes"), ("no", "exist", "yes"), ("Top left", "where", "top left"),
            ("", "text", "k t x"),
        )
    ]
    assert score(rows) == {
        "average": 50.0,
        "exist": 50.0,
        "where": 100.0,
        "text": 0.0,
        "n": 4,
        "unmatched": 1,
    }
    assert tiny_world.score(rows[:1])["average"] == 100
