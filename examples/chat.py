"""Dialogues whose later turns reuse the pruned cache.

    chat = Chat(vlm, image, vlm.encode(vlm.pictures([image])), keep)
    chat.ask("what colour is the circle ?")
    chat.ask("how many are there ?")               # read behind what the cache holds
"""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from baselines.inside import streaming
from common import FrozenVLM, Units


class Tokens(NamedTuple):
    """Some tokens of one row.

    embeds (1, n, D) | pos (1, n), (3, 1, n) with M-RoPE | is_visual (1, n) bool
    later: of a Prompt; nothing in what the cache holds
    """
    embeds: Tensor
    pos: Tensor
    is_visual: Tensor
    later: tuple[Tensor, ...] = ()

    def cut(self, start: int, stop: int | None) -> "Tokens":
        return Tokens(self.embeds[:, start:stop], self.pos[..., start:stop],
                      self.is_visual[:, start:stop],
                      tuple(x[:, start:stop] for x in self.later))

    def followed_by(self, other: "Tokens") -> "Tokens":
        return Tokens(torch.cat([self.embeds, other.embeds], 1),
                      torch.cat([self.pos, other.pos], -1),
                      torch.cat([self.is_visual, other.is_visual], 1))


class Chat:
    """Turns about one row of images whose visual tokens were chosen once.

    A turn is read behind those before it, which the cache holds, at the positions that it has in
    the one full prompt of the whole dialogue.

    images: one row of batch()
    units: of this row, as encode() gives them
    keep, feats: as for prune(); keep=None for all units
    turns: [(question, answer), ...] so far; earlier turns may be handed in, and are read with the
           next question
    """

    def __init__(self, vlm: FrozenVLM, images, units: Units, keep: list[Tensor] | None = None,
                 turns=(), feats: Tensor | None = None):
        self.vlm = vlm
        self.images = images
        self.units = units
        self.keep = keep
        self.feats = feats
        self.turns = list(turns)
        self.cache = DynamicCache()
        self.held: Tokens | None = None                # what the cache holds

    @torch.no_grad()
    def ask(self, question: str, max_new_tokens: int = 32, streamer=None) -> str:
        """The answer of generate() to the whole dialogue; streamer as there.

        A turn whose answer no prompt can spell, such as none, is forgotten. Raises ValueError as
        batch() does, also if the template rewrites earlier turns.
        """
        vlm = self.vlm
        unread = self._unread([*self.turns, (question, None)])
        last = unread.pos[..., -1:]
        ends = vlm.ends()
        tokens = ends.new_zeros(1, 0)
        with vlm.decoding(), streaming(streamer, tokens) as put:
            for step in range(1, max_new_tokens + 1):
                token = vlm.model.lm_head(self._read(unread)).argmax(-1)
                put(token)
                tokens = torch.cat([tokens, token], 1)
                if torch.isin(token, ends).item():
                    break
                unread = Tokens(vlm.lm.get_input_embeddings()(token), last + step,
                                torch.zeros_like(token).bool())
        answer = vlm.texts(tokens)[0]
        if answer and vlm.image_token not in answer and not vlm.unknown_words(answer):
            self.turns.append((question, answer))
        return answer

    def _read(self, new: Tokens) -> Tensor:
        """Tokens behind the cache -> (1, 1, D), the last one's final state."""
        self.held = self.held.followed_by(new) if self.held else new
        # always with a mask, see FrozenVLM._states()
        mask = torch.ones_like(self.held.is_visual).long()
        with self.vlm.entering(new.later):
            states = self.vlm.lm(
                inputs_embeds=new.embeds, attention_mask=mask, position_ids=new.pos,
                past_key_values=self.cache, use_cache=True).last_hidden_state
        return states[:, -1:]

    def _unread(self, turns) -> Tokens:
        """The end of the dialogue's prompt that the cache lacks, at least its last token.

        An answer may be spelled by other tokens than those that were generated, or none at all:
        what the cache holds is compared with the prompt, and dropped from the first difference on.
        """
        prompt = self._prompt(turns)
        tokens = Tokens(prompt.embeds, prompt.pos, prompt.is_visual, prompt.later)
        if self.held is None:
            return tokens
        n = min(self.held.is_visual.shape[1], tokens.is_visual.shape[1] - 1)
        old = self.held.cut(0, n)
        new = tokens.cut(0, n)
        same_place = (old.pos == new.pos).reshape(-1, n).all(0)
        # visual tokens are always the same
        same_token = (old.embeds == new.embeds).all(-1)[0] | (old.is_visual & new.is_visual)[0]
        known = int((same_token & same_place).long().cumprod(0).sum())
        if surplus := self.held.is_visual.shape[1] - known:
            self.cache.crop(-surplus)
            self.held = self.held.cut(0, known)
        return tokens.cut(known, None)

    def _prompt(self, turns):
        batch = self.vlm.batch([self.images], [turns])
        if self.keep is None:
            return self.vlm.embed(batch, self.units, self.feats)
        return self.vlm.prune(batch, self.units, self.keep, self.feats)
