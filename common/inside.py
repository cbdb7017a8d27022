"""Visual tokens that leave inside the language model: what a rule sees, and the loop over layers that obeys it."""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from common.units import Prompt, Units

PLAIN = ("llama", "mistral", "qwen2", "qwen2_5_vl_text")          # decoders that are no more than layers and a norm

@dataclass
class Look:
    """What a rule sees in front of layer i. Attention, queries and keys are computed when they are asked for, from the
    layer's own projections, for the asked rows alone: whatever kernel the model runs with, it runs with that.

    prompt  all tokens in front of layer i | before: the same tokens in front of layer i - 1 | start: of layer 0
    blocks  layers i - 1 and i, whose number 0 or 1 is `own`: own=False reads layer i - 1, which has just run
    norm    the language model's last norm
    N most visual tokens of one row, T most text tokens behind the last visual one, H heads (of keys: fewer with
    grouped queries) of width d. Prompts are left padded: the last T columns hold the text behind the image.
    """
    prompt: Prompt
    before: Prompt
    start: Prompt
    blocks: tuple[nn.Module, nn.Module]
    rotary: tuple[Tensor, Tensor]
    norm: nn.Module

    def pad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, ...) -> (B, N, ...) of the visual tokens with zeros behind shorter rows, valid (B, N) bool."""
        visual = self.prompt.is_visual
        return Units(x[visual], visual.nonzero()[:, 0], [(1, n) for n in visual.sum(1).tolist()]).pad()

    @cached_property
    def states(self) -> Tensor:
        """(B, N, D) the visual tokens' hidden states."""
        return self.pad(self.prompt.embeds)[0]

    @cached_property
    def valid(self) -> Tensor:
        """(B, N) bool."""
        return self.pad(self.prompt.mask)[1]

    @cached_property
    def origin(self) -> Tensor:
        """(B, N) int64, of every visual token its index among those that entered the language model."""
        return self.pad(self.prompt.origin)[0]

    @cached_property
    def behind(self) -> Tensor:
        """(B, T) bool: which of the last T columns are text behind the image."""
        visual = self.prompt.is_visual
        behind = (visual.flip(1).cumsum(1).flip(1) == 0) & self.prompt.mask.bool()
        return behind[:, -max(int(behind.sum(1).max()), 1):]

    def rotate(self, x: Tensor) -> Tensor:
        """(B, Q, H, d) of the last Q columns, turned by their positions."""
        cos, sin = (part[:, -x.shape[1]:, None].to(x) for part in self.rotary)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def queries(self, last: int | None = None, own: bool = False, rope: bool = True) -> Tensor:
        """(B, Q, H, d) of the last Q columns, by default all L."""
        return self._project("q_proj", last, own, rope)

    def keys(self, own: bool = False, rope: bool = True) -> Tensor:
        """(B, L, H, d)."""
        return self._project("k_proj", None, own, rope)

    def _project(self, name: str, last: int | None, own: bool, rope: bool) -> Tensor:
        block, x = self.blocks[own], (self.prompt if own else self.before).embeds
        x = block.input_layernorm(x[:, -(last or x.shape[1]):])
        x = getattr(block.self_attn, name)(x).unflatten(-1, (-1, block.self_attn.head_dim))
        return self.rotate(x) if rope else x

    def attention(self, last: int = 1, own: bool = False) -> Tensor:
        """(B, H, Q, N) at least float32: what the last Q columns attend to each visual token, the softmax over all
        keys that the column sees. Columns of padding mean nothing."""
        q, k = self.queries(last, own), self.keys(own)
        q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.blocks[own].self_attn.scaling
        if self.prompt.log_size is not None:
            logits = logits + self.prompt.log_size[:, None, None].to(logits)
        column = torch.arange(k.shape[1], device=k.device)
        sees = (column <= column[-last:, None]) & self.prompt.mask.bool()[:, None]            # (B, Q, L)
        weights = logits.masked_fill(~sees[:, None], torch.finfo(logits.dtype).min).softmax(-1)
        return self.pad(weights.permute(0, 3, 1, 2))[0].permute(0, 2, 3, 1)


# Chooses the visual tokens that go on into a layer: keep, for each row ascending int64 indices (K,) into the visual
# tokens that it sees. Or keep and a dict of what to write over kept tokens, for each row as many values, under the name
# of the Prompt's field: {"embeds": [(K, D), ...], "log_size": [(K,), ...], "origin": [(K,), ...]}, any of these.
Rule = Callable[[Look], list[Tensor] | tuple[list[Tensor], dict[str, list[Tensor]]]]


@dataclass
class _Past:
    """What decoding needs to know of a stage. mask (B, K) int64: which keys are real, of those that the cache holds
    from its layer up to the next stage | log_size (B, K) of these keys, or None | shift: by how much positions fell"""
    mask: Tensor
    log_size: Tensor | None = None
    shift: Tensor | int = 0


class Inside:
    """The part of FrozenVLM that runs its language model layer by layer."""

    @torch.no_grad()
    def visual_states(self, prompt: Prompt, layer: int) -> Tensor:
        """(M, D) hidden states of all visual tokens after `layer` layers, 0 for none; the layers above do not run.

        Row after row in the order of the prompt, with newlines: what a rule in front of that layer gets, unpadded.
        Raises ValueError unless 0 <= layer < layers.
        """
        self._check_layers([layer], 0)
        return self._layers(prompt, self._no_past(prompt, {}), {}, depth=layer).embeds[prompt.is_visual]

    def logits_within(self, prompt: Prompt, stages: dict[int, Rule], positions: str = "original"
                      ) -> tuple[Tensor, Prompt]:
        """Logits (B, L, V) of the tokens that are left at the end, and these: their embeds are the last hidden states.

        Before layer i, counted from 0, the rule stages[i] chooses among the visual tokens that are still there. What
        stays keeps its original position; positions="reindex" numbers what a stage leaves anew from 0, with M-RoPE on
        all three axes. Raises ValueError on a stage that is none of 1 .. layers - 1 (in front of them all there is
        prune()), on a keep that does not fit or takes the last visual token from a row, on NaN among the states.
        """
        self._check_layers(stages, 1)
        left = self._layers(prompt, self._no_past(prompt, stages), stages, positions=positions)
        left = replace(left, embeds=self.lm.norm(left.embeds))
        return self.model.lm_head(left.embeds), left

    @torch.no_grad()
    def generate_within(self, prompt: Prompt, stages: dict[int, Rule], max_new_tokens: int = 32,
                        streamer=None, positions: str = "original") -> list[str]:
        """generate() with the stages of logits_within(), which run once, before the first new token. What is decoded
        goes on in every layer from the last position there: with "reindex" a smaller one from stage to stage."""
        self._check_layers(stages, 1)
        past, cache = self._no_past(prompt, stages), DynamicCache()
        ends = self._ends()
        tokens, running = prompt.mask[:, :0], torch.ones_like(prompt.mask[:, -1:]).bool()
        with self._decoding(), streaming(streamer, tokens) as put:
            state = self._layers(prompt, past, stages, cache, positions=positions)
            for step in range(1, max_new_tokens + 1):
                token = self.model.lm_head(self.lm.norm(state.embeds[:, -1:])).argmax(-1)
                token = token.masked_fill(~running, self.tokenizer.pad_token_id)
                put(token)
                tokens, running = torch.cat([tokens, token], 1), running & ~torch.isin(token, ends)
                if step == max_new_tokens or not running.any():
                    break
                state = Prompt(self.lm.get_input_embeddings()(token), torch.ones_like(token),
                               prompt.pos[..., -1:] + step, None, torch.zeros_like(running))
                state = self._layers(state, past, {}, cache)
        return self._texts(tokens)

    @staticmethod
    def _no_past(prompt: Prompt, stages) -> dict[int, _Past]:
        """For _layers(): layer 0 and every stage, nothing has gone through yet."""
        return {i: _Past(prompt.mask[:, :0]) for i in (0, *stages)}

    def _layers(self, prompt: Prompt, past: dict[int, _Past], stages: dict[int, Rule], cache=None,
                depth: int | None = None, positions: str = "original") -> Prompt:
        """What comes out of the first `depth` layers, all if None, without the last norm; embeds are the states.

        past, for layer 0 and every stage, grows by this prompt. stages is empty while decoding.
        """
        if positions not in ("original", "reindex"):
            raise ValueError(f"positions={positions!r}: expected 'original' or 'reindex'")
        prompt = replace(prompt, origin=(prompt.is_visual.cumsum(1) - 1).masked_fill(~prompt.is_visual, -1))
        start, before, rotary = prompt, prompt, None
        for i, layer in enumerate(self.lm.layers[:depth]):
            if i in stages:
                full = Look(prompt, before, start, (self.lm.layers[i - 1], layer), self._rotary(rotary), self.lm.norm)
                prompt = self._narrow(full, i, stages[i])
                if positions == "reindex":
                    prompt = replace(prompt, pos=(prompt.mask.cumsum(1) - 1).clamp(min=0).expand_as(prompt.pos))
                past[i].shift = full.prompt.pos[..., -1:] - prompt.pos[..., -1:]
            elif i in past:
                prompt = replace(prompt, pos=prompt.pos - past[i].shift)
            if i in past:
                mask = self._mask(prompt, past[i], cache, i)
                rotary = self.lm.rotary_emb(prompt.embeds, position_ids=prompt.pos)
            before = prompt
            states = layer(prompt.embeds, attention_mask=mask, position_embeddings=rotary, past_key_values=cache)
            prompt = replace(prompt, embeds=states)
        return prompt

    def _mask(self, prompt: Prompt, past: _Past, cache, i: int) -> Tensor | None:
        """What the attention of layer i takes as its mask; past grows by the prompt's keys."""
        past.mask = torch.cat([past.mask, prompt.mask], 1)
        if past.log_size is not None:                  # decoding: what is new has size one
            past.log_size = F.pad(past.log_size, (0, prompt.mask.shape[1]))
        elif prompt.log_size is not None:
            past.log_size = prompt.log_size
        if past.log_size is None:
            # layer_idx: the cache is shorter from stage to stage, and by default layer 0 sizes the mask
            return create_causal_mask(config=self.lm.config, inputs_embeds=prompt.embeds, attention_mask=past.mask,
                                      past_key_values=cache, layer_idx=i)
        kernel, dtype = self.lm.config._attn_implementation, prompt.embeds.dtype
        if kernel not in ("sdpa", "eager"):
            raise ValueError(f"attention {kernel!r} takes no sizes of merged tokens: expected the model loaded with "
                             "attn='sdpa' or 'eager'")
        # all in one additive mask, causality too: a kernel that is given one must not be told is_causal as well
        (new, total), low = (prompt.mask.shape[1], past.mask.shape[1]), torch.finfo(torch.float32).min
        sees = torch.ones(new, total, dtype=torch.bool, device=past.mask.device).tril(total - new)
        sees = sees & past.mask.bool()[:, None]
        return torch.where(sees, past.log_size[:, None].to(dtype), max(low, torch.finfo(dtype).min))[:, None]

    def _rotary(self, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(B, L, d) cos and sin of the model's rotary embedding; older transformers leave the axes of M-RoPE apart."""
        if rotary[0].ndim == 3:
            return rotary
        sections = 2 * list(self.lm.config.rope_parameters["mrope_section"])
        cos, sin = (torch.cat([part[i % 3] for i, part in enumerate(x.split(sections, -1))], -1) for x in rotary)
        return cos, sin

    def _narrow(self, look: Look, i: int, rule: Rule) -> Prompt:
        """The prompt without the visual tokens that the rule in front of layer i drops."""
        prompt, name = look.prompt, f"stages[{i}](...)"
        visual = prompt.is_visual
        row, counts = visual.nonzero()[:, 0], visual.sum(1).tolist()
        if prompt.embeds[visual].isnan().any():
            raise ValueError(f"NaN among the visual tokens in front of layer {i}: expected numbers; a model that "
                             "overflows in float16 runs in bfloat16 or float32")
        found = rule(look)
        keep, changes = found if isinstance(found, tuple) else (found, {})
        kept = self._kept(Units(prompt.embeds[visual], row, [(1, n) for n in counts]), keep, name)
        if empty := [b for b, n in enumerate(counts) if n and not len(keep[b])]:
            raise ValueError(f"{name}[{empty[0]}] is empty: expected at least one of {counts[empty[0]]} visual tokens")
        left = prompt.only(prompt.mask.bool().masked_scatter(visual, kept))
        for column, values in changes.items():
            if [len(x) for x in values] != [len(x) for x in keep]:
                raise ValueError(f"{name} has {column} for {[len(x) for x in values]} tokens: expected one for each "
                                 f"that it keeps, {[len(x) for x in keep]}")
            old, values = getattr(left, column), torch.cat(list(values))
            old = values.new_zeros(left.mask.shape) if old is None else old
            where = left.is_visual[..., None] if values.ndim > 1 else left.is_visual
            left = replace(left, **{column: old.masked_scatter(where, values.to(old))})
        return left

    def _check_layers(self, wanted, first: int) -> None:
        """Raises ValueError if a wanted layer is none of first .. layers - 1, or _layers() cannot run this model."""
        config, layers = self.lm.config, len(self.lm.layers)
        kinds = set(getattr(config, "layer_types", None) or
                    ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"])
        if config.model_type not in PLAIN or kinds != {"full_attention"}:
            raise ValueError(f"the language model is {config.model_type!r} with {', '.join(sorted(kinds))}: expected "
                             f"one of {', '.join(PLAIN)} with full_attention in every layer to prune inside")
        if wrong := [i for i in wanted if i not in range(first, layers)]:
            raise ValueError(f"layer {wrong[0]}: expected one of {first} to {layers - 1}")


@contextmanager
def streaming(streamer, nothing: Tensor):
    """put(token) for a streamer of transformers, or none; as generate() does, it is put `nothing` (1, 0) first."""
    def put(token):
        if streamer is not None:
            streamer.put(token.cpu())
    put(nothing)
    try:
        yield put
    finally:
        if streamer is not None:
            streamer.end()
