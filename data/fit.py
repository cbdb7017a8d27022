"""What of a row the frozen VLM can read. One that it cannot read must not end a run."""

from PIL import Image

from common import FrozenVLM

# tokens more that a turn may come to inside its frame than alone [ours]
EDGES = 4


class Fit:
    """(picture, turns) -> the turns that become rows, and what was cut off, or None.

    A turn does not fit where the tokenizer cannot read it, and where the language model has not as
    many positions as it and the picture need. A dialogue is cut before the first of them; of rows
    that are one question each, they are left out.
    rows: runs.Selector.rows
    most: turns of a picture that are looked at
    Raises ValueError with the cause where no turn is left.
    """

    def __init__(self, vlm: FrozenVLM, rows: str, most: int):
        self.vlm = vlm
        self.rows = rows
        self.most = most
        self.twice = rows == "question twice"
        self.frame = None             # tokens that a prompt of one turn has beside the turn's own

    def __call__(self, image: Image.Image, turns: list) -> tuple[list, str | None]:
        if self.rows == "picture":
            return turns, None
        turns = turns[:self.most]
        if self.rows == "dialogue":
            # the longest that fits: nearly always the whole
            tried = (turns[:n] for n in range(len(turns), 0, -1))
        else:
            tried = ([turn] for turn in turns)
        left, causes = [], []
        for part in tried:
            cause = self.cause(image, part)
            if cause:
                causes.append(cause)
            else:
                left += part
                if self.rows == "dialogue":
                    break
        if not left:
            raise ValueError(causes[-1])
        cut = f"cut: {len(left)} of {len(turns)} turns are left, {causes[-1]}" if causes else None
        return left, cut

    def cause(self, image: Image.Image, turns: list) -> str | None:
        """Why these turns cannot be one row; None if they can."""
        if self.twice:
            turns = [(question, None) for question, _ in turns]
        for text in map(self.text, turns):
            if self.vlm.image_token in text:
                return f"{self.vlm.image_token} in the text"
            if unknown := self.vlm.unknown_words(text):
                return f"unknown words: {' '.join(unknown[:5])}"
        try:
            if self.frame is None:
                self.frame = self.count(image, turns[:1]) - self.tokens(turns[:1]) + EDGES
            # A picture takes at most three quarters of the positions in every family. It is made
            # into tokens to be counted only where the text may take more than the rest.
            if self.tokens(turns) + self.frame * len(turns) > self.vlm.limit // 4:
                self.count(image, turns)
        except ValueError as error:
            return f"does not fit: {str(error).removeprefix('row 0 has ')}"
        return None

    def text(self, turn: tuple[str, str | None]) -> str:
        question, answer = turn
        return f"{question} {question if self.twice else answer}"

    def tokens(self, turns: list) -> int:
        """Of the turns alone."""
        texts = [self.text(turn) for turn in turns]
        return sum(map(len, self.vlm.tokenizer(texts, add_special_tokens=False)["input_ids"]))

    def count(self, image: Image.Image, turns: list) -> int:
        """Text tokens of the prompt. Raises ValueError where it is too long with the picture's."""
        batch = self.vlm.batch([image], [turns], "cpu", ask_twice=self.twice)
        is_text = batch["attention_mask"].bool() & (batch["input_ids"] != self.vlm.image_id)
        return int(is_text.sum())
