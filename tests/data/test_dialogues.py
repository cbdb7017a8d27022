"""The tiny world as training data. That its answers are true is tested with the world itself."""

import pytest

from data.dialogues import SIZES, Dialogues, training_sizes
from tiny.scenes import CAPTION


def test_the_caption_comes_first_then_as_many_questions_as_asked_for():
    for questions in (1, 3):
        for _, turns in Dialogues(0, 4, questions=questions):
            assert turns[0][0] == CAPTION and len(turns) == 1 + questions
    longer = Dialogues(0, 4, questions=3)
    assert [longer[i][1][:2] for i in range(4)] == [
        turns for _, turns in Dialogues(0, 4, questions=1)
    ]


def test_sizes_take_turns_and_the_last_of_qwen_is_for_the_test_alone():
    assert training_sizes("llava") == ((144, 144),) == SIZES["internvl"]
    sizes = training_sizes("qwen2_5_vl")
    assert {image.size for image, _ in Dialogues(0, 6, sizes=sizes)} == set(sizes)
    assert set(SIZES["qwen2_5_vl"]) - set(sizes) == {(96, 216)}


@pytest.mark.parametrize("seed, stop", [(-1, 5), (99, 5), (0, 10**7 + 1)])
def test_scenes_of_others_are_refused(seed, stop):
    with pytest.raises(ValueError, match=f"seed={seed}, stop={stop}: expected a seed from 0 to 98"):
        Dialogues(0, stop, seed)
