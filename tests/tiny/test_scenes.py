"""The world of scenes keeps its promises, its answers are true, and pretraining sees what the
processor would give.

Answers are held against scene_reading.read().
"""

import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scene_reading import cell_words, read, third

from benchmarks.tiny_world import is_right, load_rows
from common import LlavaAdapter, QwenAdapter
from data.dialogues import Dialogues
from tiny import pretrain, scenes
from tiny.scenes import (
    CAPTION,
    COLOURS,
    FAMILIES,
    SHAPES,
    SPLITS,
    Scene,
    Thing,
    coverage,
    letter_box,
    make_scene,
)

SIZES = [(144, 144), (192, 108), (96, 216)]
FAMILY = {"llava": LlavaAdapter, "qwen2_5_vl": QwenAdapter}
MODELS = list(FAMILY)


@cache
def world():
    """Scenes of three sizes; nobody may write to them."""
    return [make_scene(seed, SIZES[seed % 3]) for seed in range(600)]


@cache
def pictures():
    """The first scenes of world() with their pixels, (h, w, 3) float32."""
    return [(scene, np.asarray(scenes.render(scene), np.float32)) for scene in world()[:240]]


@cache
def asked():
    """(scene, question) of every scene in world(), up to four questions of each family."""
    return [
        (s, q)
        for s in world()
        for q in scenes.questions(s, np.random.default_rng([s.seed, 5]), each=4)
    ]


# --------------------------------------------------------------------------------- seeds and splits

DIGEST = """
import hashlib, numpy as np
from tiny import scenes
h = hashlib.sha256()
for seed in [*range(8), *scenes.SPLITS.values()]:
    for size in [(144, 144), (192, 108), (96, 216)]:
        s = scenes.make_scene(seed, size)
        asked = scenes.questions(s, np.random.default_rng(seed))
        h.update(repr((s, scenes.caption(s), asked)).encode())
        h.update(scenes.render(s).tobytes())
print(h.hexdigest())
"""


@pytest.mark.parametrize("size", SIZES)
def test_same_seed_same_bytes(size):
    for seed in range(10):
        assert make_scene(seed, size) == make_scene(seed, size)
        assert (
            scenes.render(make_scene(seed, size)).tobytes()
            == scenes.render(make_scene(seed, size)).tobytes()
        )


def test_same_bytes_in_any_process():
    """Another hash seed would show an iteration over a set."""
    root, digests = Path(scenes.__file__).parents[1], set()
    for hash_seed in "12":
        out = subprocess.run(
            [sys.executable, "-c", DIGEST],
            text=True,
            capture_output=True,
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        assert len(out.stdout.strip()) == 64, out.stderr
        digests.add(out.stdout)
    assert len(digests) == 1


@pytest.mark.parametrize("size", SIZES)
def test_different_seeds_differ_and_size_is_honoured(size):
    some = [make_scene(seed, size) for seed in range(30)]
    images = [scenes.render(scene) for scene in some]
    assert all(image.size == size for image in images)
    assert len({image.tobytes() for image in images}) == len({repr(s.things) for s in some}) == 30


@pytest.mark.parametrize(
    "size", [(100, 144), (144, 150), (84, 144), (144, 84), (0, 144), (-144, 144)]
)
def test_sizes_that_do_not_fit_are_named(size):
    with pytest.raises(ValueError, match=re.escape(f"size={size}")):
        make_scene(0, size)


def seeds_of(start, seed):
    """The scenes' seeds that Dialogues renders, seen from outside: five items from `start` on."""
    seen, real = [], scenes.make_scene
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "make_scene", lambda s, *size: seen.append(s) or real(s, *size))
        for i in range(5):
            Dialogues(start, start + 5, seed)[i]
    return seen


def test_crowded_scenes_have_signs_and_small_shapes():
    crowded, usual = ([row.scene for row in load_rows(300, split)] for split in ("crowded", "test"))
    assert all(t.box[2] - t.box[0] <= 20 for scene in crowded for t in scene.shapes)
    assert np.mean([len(scene.signs) for scene in crowded]) > 1.5
    things = [np.mean([len(scene.things) for scene in scenes]) for scenes in (crowded, usual)]
    assert things[0] > things[1] + .7


def test_splits_and_training_seeds_are_disjoint():
    """Room for 10**9 scenes a split and 10**7 a seed; the VLMs' own scenes come before those of
    selector seed 0."""
    firsts = sorted(SPLITS.values())
    assert len(set(firsts)) == 4 and min(np.diff(firsts)) >= 10**9
    assert SPLITS["train"] < SPLITS["calibration"] < SPLITS["test"] < SPLITS["crowded"]
    spans = [
        (0, 10**7),
        *(
            (min(seeds_of(0, seed)), max(seeds_of(10**7 - 5, seed)) + 1)
            for seed in (*range(10), 98)
        ),
    ]
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert spans[-1][1] <= SPLITS["calibration"]
    for split in ("calibration", "test", "crowded"):
        ids = [row.id for row in load_rows(60, split)]
        assert min(ids) >= SPLITS[split] and max(ids) < SPLITS[split] + 10**9
    assert all(
        pretrain.scene_of(name, i).seed == i < 10**7 for name in MODELS for i in (0, 64, 24575)
    )


# --------------------------------------------------------------------------- what stands in a scene


def test_one_to_seven_shapes_up_to_two_signs():
    for scene in world():
        assert 1 <= len(scene.shapes) <= 7 and len(scene.signs) <= 2
        assert len(scene.shapes) + len(scene.signs) == len(scene.things)
        for t in scene.things:
            assert (
                t.colour in COLOURS
                and (t.kind == "sign") == bool(t.text)
                and t.kind in [*SHAPES, "sign"]
            )
        assert len({t.colour for t in scene.signs}) == len(scene.signs)
        assert all(len(t.text) == 3 and set(t.text) <= set(scenes.LETTERS) for t in scene.signs)
    assert {len(s.shapes) for s in world()} == set(range(1, 8)) and {
        len(s.signs) for s in world()
    } == {0, 1, 2}
    assert {(t.kind, t.colour) for s in world() for t in s.shapes} == set(
        itertools.product(SHAPES, COLOURS)
    )
    assert {c for s in world() for t in s.signs for c in t.text} == set(scenes.LETTERS)


def test_nothing_overlaps_and_everything_is_inside():
    for scene in world():
        painted = np.zeros(scene.size[::-1], int)
        for t in scene.things:
            x0, y0, x1, y1 = t.box
            assert 0 <= x0 < x1 <= scene.size[0] and 0 <= y0 < y1 <= scene.size[1]
            assert t.text or (x1 - x0 == y1 - y0 >= 18)
            painted[y0:y1, x0:x1] += 1
        assert painted.max() == 1
        for t in scene.signs:
            for i, (x0, y0, x1, y1) in enumerate(letter_box(t, j) for j in range(3)):
                assert t.box[0] < x0 and t.box[1] < y0 and x1 < t.box[2] and y1 < t.box[3]
                assert (x1 - x0, y1 - y0) == (12, 12) and x0 % 12 == 0 and (y0 + 1) % 12 <= 2
                assert x0 == letter_box(t, 0)[0] + 12 * i


# ------------------------------------------------------------------ the ground truth and the pixels


def nearest(pixel):
    return min(COLOURS, key=lambda c: np.square(np.subtract(COLOURS[c], pixel)).sum())


# fractions of the box: drawn, not drawn. No two kinds agree on all of these.
PROBES = {
    "circle": ([(0.5, 0.5), (0.5, 0.06), (0.22, 0.78), (0.78, 0.22)], [(0.05, 0.05), (0.93, 0.93)]),
    "square": ([(0.5, 0.5), (0.08, 0.08), (0.92, 0.08), (0.08, 0.92), (0.92, 0.92)], []),
    "triangle": ([(0.5, 0.5), (0.12, 0.92), (0.86, 0.92)], [(0.1, 0.2), (0.86, 0.2)]),
    "diamond": (
        [(0.5, 0.5), (0.5, 0.14), (0.5, 0.84), (0.16, 0.5), (0.84, 0.5)],
        [(0.1, 0.1), (0.9, 0.9), (0.1, 0.9)],
    ),
    "star": ([(0.5, 0.5), (0.5, 0.24)], [(0.5, 0.92), (0.08, 0.08), (0.92, 0.08)]),
    "cross": (
        [(0.5, 0.5), (0.5, 0.08), (0.08, 0.5), (0.92, 0.5), (0.5, 0.92)],
        [(0.1, 0.1), (0.88, 0.1), (0.88, 0.88)],
    ),
    "ring": ([(0.5, 0.1), (0.1, 0.5), (0.5, 0.86), (0.86, 0.5)], [(0.5, 0.5), (0.05, 0.05)]),
    "heart": ([(0.5, 0.6), (0.25, 0.25), (0.75, 0.25)], [(0.5, 0.02), (0.08, 0.85), (0.9, 0.85)]),
}


def test_shapes_have_their_colour_and_outline():
    drawn, empty = {k: [] for k in SHAPES}, {k: [] for k in SHAPES}
    for scene, pixels in pictures():
        for t in scene.shapes:
            (x0, y0), side = t.box[:2], t.box[2] - t.box[0]
            inside, outside = (
                [pixels[int(y0 + v * side), int(x0 + u * side)] for u, v in probes]
                for probes in PROBES[t.kind]
            )
            assert nearest(np.median(inside, 0)) == t.colour, (scene.seed, t)
            for pixel, hits in (*((p, drawn) for p in inside), *((p, empty) for p in outside)):
                hits[t.kind].append(np.linalg.norm(pixel - COLOURS[t.colour]) < 60)
    assert min(np.mean(hits) for hits in drawn.values()) > 0.95
    assert max(np.mean(hits) for kind, hits in empty.items() if kind != "square") < 0.1


def test_signs_have_their_colour_and_ink_in_every_letter_box():
    for scene, pixels in pictures():
        for t in scene.signs:
            x0, y0, x1, y1 = t.box
            plain = np.median(pixels[y0 + 2 : y1 - 2, x0 + 1 : x0 + 5].reshape(-1, 3), 0)
            assert nearest(plain) == t.colour, (scene.seed, t)
            for a, b, c, d in (letter_box(t, i) for i in range(3)):
                far = np.abs(pixels[b:d, a:c] - plain).max(-1) > 60
                assert 10 <= far.sum() <= 90, (scene.seed, t)


def changed(scene, pixels, old, new):
    """Where the picture changes if a thing does: both draw as many random numbers, so all else
    stays."""
    other = Scene(scene.seed, scene.size, [new if t is old else t for t in scene.things])
    return (np.asarray(scenes.render(other), np.float32) != pixels).any(-1)


def test_a_thing_is_drawn_in_its_box_and_a_letter_in_its_cell():
    """Up to one pixel off: polygons are closed, and a W is 14 pixels wide."""
    for scene, pixels in pictures()[:60]:
        for t in scene.things:
            new = replace(t, colour="white" if t.colour == "black" else "black")
            cases = [(t.box, new, 0.25)]
            cases += [
                (letter_box(t, i), replace(t, text=t.text[:i] + " " + t.text[i + 1 :]), 0.05)
                for i in range(len(t.text))
            ]
            for (x0, y0, x1, y1), new, share in cases:
                change = changed(scene, pixels, t, new)
                assert change[y0:y1, x0:x1].mean() > share, (scene.seed, t)
                change[max(y0 - 1, 0) : y1 + 1, max(x0 - 1, 0) : x1 + 1] = False
                assert not change.any(), (scene.seed, t)


# ---------------------------------------------------------------------------- questions and answers


def test_answers_and_evidence_agree_with_a_second_reading():
    for scene, q in asked():
        family, answer, evidence = read(scene, q.question)
        assert (q.family, q.answer, sorted(q.evidence)) == (family, answer, evidence), (
            scene.seed,
            q,
        )
    families = Counter(q.family for _, q in asked())
    assert set(families) == set(FAMILIES) and min(families.values()) > 300


def test_a_scene_is_asked_no_question_twice_and_only_the_wished_families():
    for scene in world()[:100]:
        for families in (FAMILIES, ["text", "exist"]):
            made = scenes.questions(scene, np.random.default_rng(scene.seed), families, each=5)
            assert len({q.question for q in made}) == len(made) and {q.family for q in made} <= set(
                families
            )
            once = scenes.questions(scene, np.random.default_rng(scene.seed), families)
            assert len({q.family for q in once}) == len(once)
    assert all(
        ("text" in {q.family for q in scenes.questions(s, np.random.default_rng(0))})
        == bool(s.signs)
        for s in world()[:100]
    )


def test_exist_is_balanced_and_its_noes_are_hard():
    """Hard: both words are true of some shape, though of no single one."""
    yes, hard, rng = [], [], np.random.default_rng(0)
    for scene in world() * 5:
        q = scenes.ask_exist(scene, rng)
        colour, kind = q.question.split()[3:5]
        yes.append(q.answer == "yes")
        if q.answer == "no":
            hard.append(
                any(t.colour == colour for t in scene.shapes)
                and any(t.kind == kind for t in scene.shapes)
            )
    assert 0.45 < np.mean(yes) < 0.55 and 0.55 < np.mean(hard) < 0.9


def test_relation_is_balanced_along_both_axes():
    rng = np.random.default_rng(0)
    made = [q for q in (scenes.ask_relation(scene, rng) for scene in world() * 4) if q]
    for word in ("left of", "above"):
        yes = [q.answer == "yes" for q in made if word in q.question]
        assert len(yes) > 500 and 0.44 < np.mean(yes) < 0.56


def test_count_takes_every_value_and_none_is_everywhere():
    counts = Counter(q.answer for _, q in asked() if q.family == "count")
    assert set(counts) == set("1234567") and max(counts.values()) < 0.6 * sum(counts.values())


def test_caption_mentions_every_thing_once_in_order():
    for scene in world():
        words = [
            f"a {t.colour} {t.kind} {cell_words(scene, t)} {' '.join(t.text.lower())}".strip()
            for t in scene.things
        ]
        assert scenes.caption(scene) == " , ".join(words) + " ."
        place = [
            (third(t.box[1] + t.box[3], scene.size[1]), t.box[0] + t.box[2]) for t in scene.things
        ]
        assert place == sorted(place), "reading order"


def test_every_word_is_in_the_vocabulary_once():
    words = scenes.vocabulary()
    used = {
        w
        for s, q in asked()
        for w in f"{q.question} {q.answer} {scenes.caption(s)} {CAPTION}".split()
    }
    assert len(words) == len(set(words)) and used <= set(words)
    assert set(words) - used <= set("089"), "words that nobody says"


# ------------------------------------------------------------------------------------ evidence


@pytest.mark.parametrize("grid", [(12, 12), (9, 16), (18, 8), (5, 7)])
def test_coverage_sums_to_the_area(grid):
    for scene in world()[:60]:
        cell = scene.size[0] * scene.size[1] / (grid[0] * grid[1])
        share = coverage(scene, *grid)
        area = [
            3 * 12 * 12 if t.text else (t.box[2] - t.box[0]) * (t.box[3] - t.box[1])
            for t in scene.things
        ]
        assert (
            share.shape == (len(scene.things), grid[0] * grid[1])
            and share.min() >= 0
            and share.max() <= 1 + 1e-5
        )
        np.testing.assert_allclose(share.sum(1) * cell, area, rtol=1e-4)
        assert share.sum(0).max() <= 1 + 1e-5, "two things share pixels"


def test_coverage_counts_pixels_and_of_a_sign_the_letters():
    for scene in world()[:60]:
        w, h = scene.size
        for t, share in zip(scene.things, coverage(scene, h // 12, w // 12), strict=True):
            mask = np.zeros((h, w))
            for x0, y0, x1, y1 in [letter_box(t, i) for i in range(3)] if t.text else [t.box]:
                mask[y0:y1, x0:x1] = 1
            by_cell = mask.reshape(h // 12, 12, w // 12, 12).mean((1, 3)).ravel()
            np.testing.assert_allclose(share, by_cell, atol=1e-6)
            assert not t.text or (share > 0.9).sum() == 3, "one letter per token"


# ---------------------------------------------------------------------------- dialogues to train on


def test_dialogues_are_a_function_of_seed_and_number():
    whole, later = Dialogues(0, 12, seed=3), Dialogues(7, 12, seed=3)
    assert len(whole) == 12 and len(later) == 5
    items = [(image.tobytes(), turns) for image, turns in (whole[i] for i in range(12))]
    assert [(image.tobytes(), turns) for image, turns in (later[i] for i in range(5))] == items[7:]
    assert len({pixels for pixels, _ in items}) == 12
    assert Dialogues(0, 12, seed=4)[0][0].tobytes() not in {pixels for pixels, _ in items}
    with pytest.raises(IndexError):
        later[5]


def test_a_dialogue_is_a_caption_then_true_answers():
    for i, number in enumerate(seeds_of(20, 0)):
        image, turns = Dialogues(20, 25, questions=4)[i]
        scene = make_scene(number)
        assert image.tobytes() == scenes.render(scene).tobytes()
        assert turns[0] == (CAPTION, scenes.caption(scene)) and 2 <= len(turns) <= 5
        assert all(read(scene, question)[1] == answer for question, answer in turns[1:])


# ------------------------------------------------------------------------ pretraining sees the same


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    """As evaluation gets them: saved by save_processor(), loaded by the class that FrozenVLM would
    use."""
    out = {}
    for name in MODELS:
        path = tmp_path_factory.mktemp(name)
        pretrain.save_processor(name, pretrain.build_tokenizer(name), path)
        out[name] = FAMILY[name].processor_class.from_pretrained(path)
    return out


def messages(turns):
    out = []
    for i, (question, answer) in enumerate(turns):
        image = [{"type": "image"}] if i == 0 else []
        out.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        out.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return out


@pytest.mark.parametrize("name", MODELS)
def test_dialogue_is_what_template_and_processor_give(name, processors):
    tok = pretrain.build_tokenizer(name)
    image_id = tok.convert_tokens_to_ids(pretrain.SPECIAL[name][4])
    scene = next(s for s in world() if s.signs and s.size == (144, 144))
    turns = [
        (CAPTION, scenes.caption(scene)),
        *(
            (q.question, q.answer)
            for q in scenes.questions(scene, np.random.default_rng(0), each=2)
        ),
    ]
    assert len(turns) > 7
    ids, labels = pretrain.dialogue(name, tok.get_vocab(), turns)
    text = tok.apply_chat_template(
        messages(turns), chat_template=pretrain.TEMPLATE[name], tokenize=False
    )
    expanded = [j for i in tok(text)["input_ids"] for j in ([i] * 144 if i == image_id else [i])]
    assert ids == expanded and ids.count(image_id) == 144
    batch = processors[name](images=[scenes.render(scene)], text=[text], return_tensors="np")
    assert batch["input_ids"][0].tolist() == ids
    assert processors[name].chat_template == pretrain.TEMPLATE[name]
    # labels: each answer and the end-of-turn mark behind it, nothing else; what precedes is the
    # generation prompt
    said = [w for _, answer in turns for w in [*answer.split(), tok.eos_token]]
    assert tok.convert_ids_to_tokens([i for i in labels if i >= 0]) == said
    assert len(labels) == len(ids) and all(b in (-100, a) for a, b in zip(ids, labels, strict=True))
    for k in range(len(turns)):
        text = tok.apply_chat_template(
            messages(turns)[: 2 * k + 1],
            chat_template=pretrain.TEMPLATE[name],
            tokenize=False,
            add_generation_prompt=True,
        )
        prompt = [j for i in tok(text)["input_ids"] for j in ([i] * 144 if i == image_id else [i])]
        answer = tok.convert_tokens_to_ids([*turns[k][1].split(), tok.eos_token])
        at = len(prompt)
        assert (
            ids[:at] == prompt
            and labels[at - 1] == -100
            and labels[at : at + len(answer)] == answer
        )


@pytest.mark.parametrize("name", MODELS)
def test_the_tokenizer_knows_every_word(name):
    tok = pretrain.build_tokenizer(name)
    for word in scenes.vocabulary():
        [i] = tok(word)["input_ids"]
        assert tok.convert_ids_to_tokens(i) == word and i != tok.unk_token_id
    assert tok("What COLOUR is the Ring ?") == tok("what colour is the ring ?")
    [unknown] = tok("antidisestablishmentarianism")["input_ids"]
    assert unknown == tok.unk_token_id, "or this test could not fail"
    assert (
        len(tok)
        == len(set(tok.get_vocab().values()))
        == len({*scenes.vocabulary(), *pretrain.SPECIAL[name]})
    )
    assert tok.eos_token_id != tok.pad_token_id
    says = tok.decode(
        tok("top left k t x")["input_ids"] + [tok.eos_token_id], skip_special_tokens=True
    )
    assert is_right(says, "top left k t x") == 1


@pytest.mark.parametrize("name", MODELS)
def test_pixel_batch_is_what_the_image_processor_gives(name, processors):
    data = np.zeros((130, 144 * 144 * 3), np.uint8)
    for first in (0, 64, 128):  # one batch per size of SIZES
        index, (w, h) = np.arange(first, first + 2), pretrain.scene_of(name, first).size
        for i in index:
            data[i] = pretrain._pixels((name, i))
        images = [Image.fromarray(data[i].reshape(h, w, 3)) for i in index]
        want = processors[name].image_processor(images=images, return_tensors="pt")
        got = pretrain.pixel_batch(name, data, index, torch.device("cpu"))
        x = got["pixel_values" if name == "llava" else "hidden_states"]
        assert x.shape == want["pixel_values"].shape
        torch.testing.assert_close(x, want["pixel_values"], atol=1e-5, rtol=1e-5)
        if name != "llava":
            assert torch.equal(got["grid_thw"], want["image_grid_thw"])
    sizes = {pretrain.scene_of(name, i).size for i in (0, 64, 128)}
    assert sizes == ({(144, 144)} if name == "llava" else {(144, 144), (192, 108), (108, 192)})


@pytest.mark.parametrize("name", MODELS)
def test_an_epoch_shows_every_picture_once_in_batches_of_one_size(name):
    for batch in (64, 32):
        steps = [pretrain.pick(step, 384, batch, 1) for step in range(2 * 384 // batch)]
        assert all(
            len({pretrain.scene_of(name, int(i)).size for i in index}) == 1 for index in steps
        )
        epochs = np.concatenate(steps).reshape(2, 384)
        assert (
            all(sorted(epoch) == list(range(384)) for epoch in epochs)
            and (epochs[0] != epochs[1]).any()
        )


def test_patch_labels_of_a_scene_drawn_by_hand():
    scene = Scene(
        0,
        (144, 144),
        [Thing("circle", "red", (24, 12, 48, 36)), Thing("sign", "blue", (78, 56, 126, 74), "KTX")],
    )
    labels, centre = pretrain.patch_labels(scene)
    kind, colour, row, column, letter, place, middle = labels.reshape(7, 12, 12)
    want = np.zeros((12, 12), int)
    want[1:3, 2:4], want[5, 7:10] = 1, 2  # the circle's patches, the sign's letters (at y = 59)
    values = {
        "kind": (kind, 1, 9),
        "colour": (colour, 1, 3),
        "row": (row, 1, 2),
        "column": (column, 1, 3),
    }
    for group, (got, circle, sign) in values.items():
        np.testing.assert_array_equal(got, np.array([0, circle, sign])[want], group)
    assert np.argwhere(letter).tolist() == np.argwhere(place).tolist() == [[5, 7], [5, 8], [5, 9]]
    assert [pretrain.GROUPS["letter"][i - 1] for i in letter[5, 7:10]] == ["k", "t", "x"]
    assert place[5, 7:10].tolist() == [1, 2, 3]
    assert np.argwhere(middle).tolist() == [[2, 3], [5, 8]]
    where = np.zeros((12, 12, 2), np.float32)
    where[want == 1], where[want == 2] = (36 / 72 - 1, 24 / 72 - 1), (102 / 72 - 1, 65 / 72 - 1)
    np.testing.assert_allclose(centre.reshape(12, 12, 2), where, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_patch_labels_agree_with_the_scene(name):
    names = {group: [None, *words] for group, words in pretrain.GROUPS.items()}
    for number in (*range(40), *range(64, 104), *range(128, 168)):
        scene = pretrain.scene_of(name, number)
        (w, h), columns = scene.size, scene.size[0] // 12
        labels, centre = pretrain.patch_labels(scene)
        share = coverage(scene, h // 12, columns)
        background = share.max(0) < 0.3
        assert labels.shape == (7, 144) and centre.shape == (144, 2)
        assert not labels[:6, background].any() and not centre[background].any()
        assert (labels[:4, ~background] > 0).all()
        assert labels[6].sum() == len(scene.things)
        letters = {}
        for t in scene.things:
            x, y = (t.box[0] + t.box[2]) / 2, (t.box[1] + t.box[3]) / 2
            assert labels[6, int(y / 12) * columns + int(x / 12)] == 1
            for i, c in enumerate(t.text.lower()):
                x0, y0, x1, y1 = letter_box(t, i)
                letters[int((y0 + y1) / 24) * columns + int((x0 + x1) / 24)] = (c, str(i + 1))
        got = {
            int(p): (names["letter"][labels[4, p]], names["place"][labels[5, p]])
            for p in np.flatnonzero(labels[4] + labels[5])
        }
        assert got == letters
        for patch in np.flatnonzero(~background):
            t = scene.things[share[:, patch].argmax()]
            said = [
                names[g][labels[k, patch]]
                for k, g in enumerate(("kind", "colour", "row", "column"))
            ]
            assert said == [t.kind, t.colour, *cell_words(scene, t).split()]
            np.testing.assert_allclose(
                centre[patch],
                [(t.box[0] + t.box[2]) / w - 1, (t.box[1] + t.box[3]) / h - 1],
                atol=1e-5,
            )


@pytest.mark.parametrize("name", MODELS)
def test_hidden_tokens_are_never_evidence(name):
    vocab = pretrain.build_tokenizer(name).get_vocab()
    image, shares, rows_hidden = vocab[pretrain.SPECIAL[name][4]], [], []
    for first in (0, 64, 128):
        index = np.arange(first, first + 48)
        ids, labels, mask, _ = pretrain.language_batch(
            name, vocab, index, np.random.default_rng(first)
        )
        assert ids.shape == labels.shape == mask.shape and set(mask.unique().tolist()) == {0, 1}
        for b, i in enumerate(index):
            scene = pretrain.scene_of(name, int(i))
            slot = ids[b] == image
            hidden = (mask[b, slot] == 0).numpy()
            share = coverage(scene, scene.size[1] // 12, scene.size[0] // 12)
            assert slot.sum() == 144 and not (share[:, hidden] >= 0.05).any()
            words = ids[b] != vocab["<pad>"]
            assert (
                mask[b, words & ~slot].all()
                and not mask[b, ~words].any()
                and (labels[b, ~words] == -100).all()
            )
            rows_hidden.append(hidden.any())
            shares += [hidden[share.max(0) < 0.05].mean()] if hidden.any() else []
        ids, _, mask, _ = pretrain.language_batch(
            name, vocab, index, np.random.default_rng(first), hide=False
        )
        assert torch.equal(mask == 1, ids != vocab["<pad>"]), "hide=False hid a token"
    assert 0.35 < np.mean(rows_hidden) < 0.65 and min(shares) < 0.3 and max(shares) > 0.8


@pytest.mark.parametrize("name", MODELS)
def test_packed_dialogues_are_true_and_name_their_families(name):
    tok = pretrain.build_tokenizer(name)
    index, captions = np.arange(64, 104), 0
    ids, labels, _, families = pretrain.language_batch(
        name, tok.get_vocab(), index, np.random.default_rng(0)
    )
    for b, i in enumerate(index):
        scene, said = (
            pretrain.scene_of(name, int(i)),
            [],
        )  # said: [question's words], [answer's words], ...
        answering = None
        for word, is_answer in zip(
            tok.convert_ids_to_tokens(ids[b]), (labels[b] >= 0).tolist(), strict=True
        ):
            if is_answer != answering:
                said.append([])
                answering = is_answer
            said[-1] += [] if word in pretrain.SPECIAL[name] else [word]
        texts = [" ".join(words) for words in said if words]
        assert len(texts) == 2 * len(families[b]) and len(families[b]) <= 13
        for question, answer, family in zip(texts[::2], texts[1::2], families[b], strict=True):
            want = (
                ("caption", scenes.caption(scene))
                if question == CAPTION
                else read(scene, question)[:2]
            )
            assert (family, answer) == want, question
        captions += families[b][0] == "caption"
        assert "caption" not in families[b][1:]
    assert 0.25 < captions / len(index) < 0.75


def test_windows_all_at_once_are_the_stock_windows(processors):
    """Qwen's tower trains with this attention; 192 x 108 has windows of four sizes."""
    model = pretrain.build_model("qwen2_5_vl", processors["qwen2_5_vl"].tokenizer)
    for first in (0, 64):
        data = np.random.default_rng(0).integers(0, 255, (first + 2, 144 * 144 * 3), dtype=np.uint8)
        pixels = pretrain.pixel_batch(
            "qwen2_5_vl", data, np.arange(first, first + 2), torch.device("cpu")
        )
        found = []
        for attention in ("flash_windows", "eager"):
            model.model.visual.config._attn_implementation = attention
            with torch.no_grad():
                found.append(pretrain.features("qwen2_5_vl", model, pixels)[0])
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
        assert found[0].std() > 0.1
