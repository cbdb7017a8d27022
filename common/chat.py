"""Dialogues whose later turns reuse the pruned cache."""

import torch
from torch import Tensor
from transformers import DynamicCache

from common.frozen import FrozenVLM
from common.inside import streaming
from common.units import Units


class Chat:
    """Turns about one row of images whose visual tokens were chosen once: a turn is read behind those before it, which
    the cache holds, at the positions that it has in the one full prompt of the whole dialogue.

    images: one row of batch() | units: of this row, as encode() gives them | keep: as for prune(), None for all
    turns: [(question, answer), ...] so far; what was said before may be handed in, and is read with the next question
    """

    def __init__(self, vlm: FrozenVLM, images, units: Units, keep=None, turns=()):
        self.vlm, self.images, self.units, self.keep, self.turns = vlm, images, units, keep, list(turns)
        self.cache, self.read = DynamicCache(), None   # read: embeds, positions and is_visual of what the cache holds

    @torch.no_grad()
    def ask(self, question: str, max_new_tokens: int = 32, streamer=None) -> str:
        """The answer of generate() to the whole dialogue; streamer as there. A turn whose answer no prompt can spell,
        such as none, is forgotten. Raises ValueError as batch() does, also if the template rewrites earlier turns."""
        vlm, (embeds, pos, visual) = self.vlm, self._unread([*self.turns, (question, None)])
        ends, tokens, last = vlm._ends(), vlm._ends().new_zeros(1, 0), pos[..., -1:]
        with vlm._decoding(), streaming(streamer, tokens) as put:
            for step in range(1, max_new_tokens + 1):
                token = vlm.model.lm_head(self._read(embeds, pos, visual)).argmax(-1)
                put(token)
                tokens = torch.cat([tokens, token], 1)
                if torch.isin(token, ends).item():
                    break
                embeds, pos = vlm.lm.get_input_embeddings()(token), last + step
                visual = torch.zeros_like(token).bool()
        answer = vlm._texts(tokens)[0]
        if answer and vlm.image_token not in answer and not vlm.unknown_words(answer):
            self.turns.append((question, answer))
        return answer

    def _read(self, *new: Tensor) -> Tensor:
        """embeds, positions and is_visual of tokens behind the cache -> (1, 1, D), the last one's final state."""
        held = zip(self.read, new) if self.read else zip(new)
        self.read = tuple(torch.cat(pair, dim) for pair, dim in zip(held, (1, -1, 1)))
        # always with a mask, see _hidden()
        return self.vlm.lm(inputs_embeds=new[0], attention_mask=torch.ones_like(self.read[2]).long(),
                           position_ids=new[1], past_key_values=self.cache, use_cache=True).last_hidden_state[:, -1:]

    def _unread(self, turns) -> tuple[Tensor, Tensor, Tensor]:
        """The end of the dialogue's prompt that the cache lacks, at least its last token.

        An answer may be spelled by other tokens than those that were generated, or none at all: what the cache holds is
        compared with the prompt, and dropped from the first difference on.
        """
        batch = self.vlm.batch([self.images], [turns])
        prompt = (self.vlm.embed(batch, self.units) if self.keep is None else
                  self.vlm.prune(batch, self.units, self.keep))
        parts, known = (prompt.embeds, prompt.pos, prompt.is_visual), 0
        if self.read:
            n = min(self.read[2].shape[1], prompt.mask.shape[1] - 1)
            (old, at, seen), (new, pos, visual) = self._cut(self.read, 0, n), self._cut(parts, 0, n)
            same = (old == new).all(-1)[0] | (seen & visual)[0]        # visual tokens are always the same
            known = int((same & (at == pos).reshape(-1, n).all(0)).long().cumprod(0).sum())
            if extra := self.read[2].shape[1] - known:
                self.cache.crop(-extra)
                self.read = self._cut(self.read, 0, known)
        return self._cut(parts, known, None)

    @staticmethod
    def _cut(parts, start: int, stop: int | None) -> tuple[Tensor, Tensor, Tensor]:
        embeds, pos, visual = parts
        return embeds[:, start:stop], pos[..., start:stop], visual[:, start:stop]
