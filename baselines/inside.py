"""Visual tokens that leave inside the language model: what a rule sees, and the loop over layers.

    rules  = {layer: rule, ...}                        stages() of fastv, dart, pdrop, ...
    texts  = generate_inside(vlm, prompt, rules)       answers, greedily
    logits, left = logits_inside(vlm, prompt, rules)   of the tokens that are left at the end
    states = visual_states(vlm, prompt, layer)         of the visual tokens, behind some layers
    shown  = Shown.of(vlm, batch, units)               which units the visual tokens show

Before layer i, counted from 0, rules[i] chooses among the visual tokens that are still there. To
the rivals a newline is one of them; to a rule that chooses units, Shown says which are newlines.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from common import Adapter, Prompt, Units, kept_mask

# decoders that are no more than layers and a norm
PLAIN = ("llama", "mistral", "qwen2", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text",
         "qwen3_vl_moe_text")


# -------------------------------------------------------------------------- what a rule sees


@dataclass
class Shown:
    """What the visual tokens of a prompt show, all of them, in the order in which they enter.

    units  of the batch
    unit   for each row (n,) int64: the unit of its own picture, -1 for a newline
    line   for each row (n,) int64: the same for a newline and the units of the line that it ends
    """
    units: Units
    unit: list[Tensor]
    line: list[Tensor]

    @classmethod
    def of(cls, vlm, batch, units: Units) -> "Shown":
        """Of vlm.embed(batch, units)."""
        visual = batch["input_ids"] == vlm.image_id
        unit, line = vlm.adapter.slots(batch) or (torch.arange(int(visual.sum())), None)
        unit = unit.to(visual.device)
        line = torch.full_like(unit, -1) if line is None else line.to(unit)
        counts = visual.sum(1).tolist()
        first = torch.tensor([0, *units.counts]).cumsum(0).tolist()
        own = [(x - start).masked_fill(x < 0, -1) for x, start in zip(unit.split(counts), first)]
        return cls(units, own, list(line.split(counts)))

    @classmethod
    def plain(cls, vlm, prompt: Prompt) -> "Shown | None":
        """Of a prompt alone: every visual token is a unit, every picture one view. None in families
        with newlines or several views, where a prompt does not tell."""
        family = type(vlm.adapter)
        if family.slots is not Adapter.slots or family.views is not Adapter.views:
            return None
        units = visual_units(prompt, prompt.embeds)
        unit = [torch.arange(n, device=prompt.mask.device) for n in units.counts]
        return cls(units, unit, [torch.full_like(x, -1) for x in unit])

    def rows(self, rows: list[int]) -> "Shown":
        """The same of some rows of the prompt."""
        return Shown(self.units.rows(rows), [self.unit[b] for b in rows],
                     [self.line[b] for b in rows])

    def with_states(self, states: Tensor) -> Units:
        """The units in their own order with the states (S, D) of all visual tokens, row after row,
        for features: those of newlines left out, zeros where a unit has no token."""
        first = torch.tensor([0, *self.units.counts]).cumsum(0).tolist()
        unit = torch.cat([x + start for x, start in zip(self.unit, first)])
        is_unit = torch.cat(self.unit) >= 0
        feats = states.new_zeros(len(self.units.image_of), states.shape[1])
        feats[unit[is_unit]] = states[is_unit]
        return replace(self.units, feats=feats)

    def tokens(self, keep) -> list[Tensor]:
        """keep (K_b,) of the units of every row -> the visual tokens that stay, ascending: they,
        and newlines if and only if a unit of their line does."""
        stay = []
        for unit, line, index in zip(self.unit, self.line, keep):
            kept = torch.isin(unit, index.to(unit))
            stay.append((kept | (unit < 0) & torch.isin(line, line[kept])).nonzero().flatten())
        return stay

    def units_of(self, row: int, tokens: Tensor) -> Tensor:
        """The units that some visual tokens (n,) int64 of a row show, ascending."""
        unit = self.unit[row][tokens.to(self.unit[row])]
        return unit[unit >= 0].sort().values


@dataclass
class LayerView:
    """What a rule sees in front of layer i.

    Attention, queries and keys are computed when they are asked for, from the layer's own
    projections and for the asked rows alone: the model itself keeps its attention kernel.

    prompt  all tokens in front of layer i
    before  the same tokens in front of layer i - 1
    start   all tokens in front of layer 0
    blocks  layers i - 1 and i; own=False reads the first, which has just run, own=True the second
    rotary  cos and sin of the positions of the prompt
    norm    the language model's last norm
    shown   what all tokens show that entered; None where the caller did not say, and a prompt alone
            does not tell

    N most visual tokens of one row, T most text tokens behind the last visual one, Q rows of the
    attention, H heads (of keys: fewer with grouped queries) of width d. Prompts are left padded:
    the last T columns hold the text behind the image.
    """
    prompt: Prompt
    before: Prompt
    start: Prompt
    blocks: tuple[nn.Module, nn.Module]
    rotary: tuple[Tensor, Tensor]
    norm: nn.Module
    shown: Shown | None = None

    def pad(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, ...) -> (B, N, ...) of the visual tokens with zeros behind shorter rows, and
        valid (B, N) bool."""
        return visual_units(self.prompt, x).pad()

    @cached_property
    def states(self) -> Tensor:
        """(B, N, D), the visual tokens' hidden states."""
        return self.pad(self.prompt.embeds)[0]

    @cached_property
    def valid(self) -> Tensor:
        """(B, N) bool."""
        return self.pad(self.prompt.mask)[1]

    @cached_property
    def origin(self) -> Tensor:
        """(B, N) int64, every visual token's index among those that entered the language model."""
        return self.pad(self.prompt.origin)[0]

    @cached_property
    def entered(self) -> list[int]:
        """How many visual tokens of each row entered the language model."""
        return self.start.is_visual.sum(1).tolist()

    @cached_property
    def behind(self) -> Tensor:
        """(B, T) bool: which of the last T columns are text behind the image."""
        no_visual_from_here_on = self.prompt.is_visual.flip(1).cumsum(1).flip(1) == 0
        behind = no_visual_from_here_on & self.prompt.mask.bool()
        return behind[:, -max(int(behind.sum(1).max()), 1):]

    def rotate(self, x: Tensor) -> Tensor:
        """(B, Q, H, d) of the last Q columns, turned by their positions (RoPE)."""
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
        block = self.blocks[own]
        attention = block.self_attn
        x = (self.prompt if own else self.before).embeds
        x = block.input_layernorm(x[:, -(last or x.shape[1]):])
        x = getattr(attention, name)(x).unflatten(-1, (-1, attention.head_dim))
        x = getattr(attention, name.replace("proj", "norm"), nn.Identity())(x)      # Qwen3 has them
        return self.rotate(x) if rope else x

    def attention(self, last: int = 1, own: bool = False) -> Tensor:
        """(B, H, Q, N), at least float32: what the last Q columns attend to each visual token.

        The softmax is over all keys that the column sees. Columns of padding mean nothing.
        """
        q = at_least_float32(self.queries(last, own))
        k = at_least_float32(self.keys(own))
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.blocks[own].self_attn.scaling
        if self.prompt.log_size is not None:
            logits = logits + self.prompt.log_size[:, None, None].to(logits)
        column = torch.arange(k.shape[1], device=k.device)
        sees = (column <= column[-last:, None]) & self.prompt.mask.bool()[:, None]     # (B, Q, L)
        lowest = torch.finfo(logits.dtype).min
        weights = logits.masked_fill(~sees[:, None], lowest).softmax(-1)
        return self.pad(weights.permute(0, 3, 1, 2))[0].permute(0, 2, 3, 1)


# Chooses the visual tokens that go on into a layer: keep, for each row ascending int64 indices (K,)
# into the visual tokens that it sees. Or keep and a dict of what to write over kept tokens, for
# each row as many values, under the name of the Prompt's field: {"embeds": [(K, D), ...],
# "log_size": [(K,), ...], "origin": [(K,), ...]}, any of these.
Rule = Callable[[LayerView], list[Tensor] | tuple[list[Tensor], dict[str, list[Tensor]]]]


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def visual_units(prompt: Prompt, x: Tensor) -> Units:
    """The visual tokens of a prompt as units with x (B, L, ...) for features: one line a row."""
    visual = prompt.is_visual
    counts = visual.sum(1).tolist()
    return Units(x[visual], visual.nonzero()[:, 0], [(1, n) for n in counts])


# -------------------------------------------------------------------------- running the model


@torch.no_grad()
def visual_states(vlm, prompt: Prompt, layer: int) -> Tensor:
    """(M, D) hidden states of all visual tokens after `layer` layers, 0 for none; the layers above
    do not run.

    Row after row in the order of the prompt, with newlines, which Shown.with_states() leaves out:
    what a rule in front of that layer gets, unpadded. Raises ValueError unless 0 <= layer < layers.
    """
    check_layers(vlm, [layer], 0)
    states = run_layers(vlm, prompt, no_past(prompt, {}), {}, depth=layer)
    return states.embeds[prompt.is_visual]


def logits_inside(vlm, prompt: Prompt, stages: dict[int, Rule], positions: str = "original",
                  shown: Shown | None = None) -> tuple[Tensor, Prompt]:
    """Logits (B, L, V) of the tokens that are left at the end, and these: their embeds are the last
    hidden states.

    What stays keeps its original position; positions="reindex" numbers what a stage leaves anew
    from 0, with M-RoPE on all three axes. shown: for rules that choose units, in families with
    newlines or several views. Raises ValueError on a stage that is none of 1 .. layers
    - 1 (in front of them all there is FrozenVLM.prune()), on a keep that does not fit or takes the
    last visual token from a row, on NaN among the states.
    """
    check_layers(vlm, stages, 1)
    left = run_layers(vlm, prompt, no_past(prompt, stages), stages, positions=positions,
                      shown=shown)
    left = replace(left, embeds=vlm.lm.norm(left.embeds))
    return vlm.model.lm_head(left.embeds), left


@torch.no_grad()
def generate_inside(vlm, prompt: Prompt, stages: dict[int, Rule], max_new_tokens: int = 32,
                    streamer=None, positions: str = "original", shown: Shown | None = None
                    ) -> list[str]:
    """FrozenVLM.generate() with the stages of logits_inside(), which run once, before the first new
    token.

    What is decoded goes on in every layer from the last position there: with "reindex" a smaller
    one from stage to stage.
    """
    check_layers(vlm, stages, 1)
    past = no_past(prompt, stages)
    cache = DynamicCache()
    ends = vlm.ends()
    tokens = prompt.mask[:, :0]
    running = torch.ones_like(prompt.mask[:, -1:]).bool()
    with vlm.decoding(), streaming(streamer, tokens) as put:
        state = run_layers(vlm, prompt, past, stages, cache, positions=positions, shown=shown)
        for step in range(1, max_new_tokens + 1):
            token = vlm.model.lm_head(vlm.lm.norm(state.embeds[:, -1:])).argmax(-1)
            token = token.masked_fill(~running, vlm.tokenizer.pad_token_id)
            put(token)
            tokens = torch.cat([tokens, token], 1)
            running = running & ~torch.isin(token, ends)
            if step == max_new_tokens or not running.any():
                break
            state = Prompt(vlm.lm.get_input_embeddings()(token), torch.ones_like(token),
                           prompt.pos[..., -1:] + step, None, torch.zeros_like(running))
            state = run_layers(vlm, state, past, {}, cache)
    return vlm.texts(tokens)


@contextmanager
def streaming(streamer, nothing: Tensor):
    """put(token) for a streamer of transformers, or for none.

    As generate() does, it gets something for the prompt first: nothing, (1, 0).
    """
    def put(token: Tensor):
        if streamer is not None:
            streamer.put(token.cpu())
    put(nothing)
    try:
        yield put
    finally:
        if streamer is not None:
            streamer.end()


def check_layers(vlm, wanted, first: int) -> None:
    """Raises ValueError if a wanted layer is none of first .. layers - 1, or run_layers() cannot
    run this language model."""
    config = vlm.lm.config
    layers = len(vlm.lm.layers)
    has_window = getattr(config, "sliding_window", None)
    all_alike = ["sliding_attention" if has_window else "full_attention"]
    kinds = set(getattr(config, "layer_types", None) or all_alike)
    if config.model_type not in PLAIN or kinds != {"full_attention"}:
        raise ValueError(f"the language model is {config.model_type!r} with "
                         f"{', '.join(sorted(kinds))}: expected one of {', '.join(PLAIN)} with "
                         "full_attention in every layer to prune inside")
    if wrong := [i for i in wanted if i not in range(first, layers)]:
        raise ValueError(f"layer {wrong[0]}: expected one of {first} to {layers - 1}")


# -------------------------------------------------------------------------- the layers


@dataclass
class Past:
    """What decoding needs to know of the layers from one stage up to the next.

    mask (B, K) int64: which of the keys that the cache holds there are real
    log_size (B, K) of these keys, or None
    shift: by how much the stage lowered the last position
    """
    mask: Tensor
    log_size: Tensor | None = None
    shift: Tensor | int = 0


def no_past(prompt: Prompt, stages) -> dict[int, Past]:
    """For run_layers(): layer 0 and every stage, nothing has gone through yet."""
    return {i: Past(prompt.mask[:, :0]) for i in (0, *stages)}


def run_layers(vlm, prompt: Prompt, past: dict[int, Past], stages: dict[int, Rule], cache=None,
               depth: int | None = None, positions: str = "original", shown: Shown | None = None
               ) -> Prompt:
    """What comes out of the first `depth` layers, all if None, without the last norm; embeds are
    the states.

    past, for layer 0 and every stage, grows by this prompt. stages is empty while decoding.
    """
    if positions not in ("original", "reindex"):
        raise ValueError(f"positions={positions!r}: expected 'original' or 'reindex'")
    index = prompt.is_visual.cumsum(1) - 1
    prompt = replace(prompt, origin=index.masked_fill(~prompt.is_visual, -1))
    start = before = prompt
    rotary = None
    layers = vlm.lm.layers
    for i, layer in enumerate(layers[:depth]):
        if i in stages:
            view = LayerView(prompt, before, start, (layers[i - 1], layer),
                             whole_rotary(vlm, rotary), vlm.lm.norm,
                             shown or Shown.plain(vlm, start))
            prompt = narrow(view, i, stages[i])
            if positions == "reindex":
                anew = (prompt.mask.cumsum(1) - 1).clamp(min=0)
                prompt = replace(prompt, pos=anew.expand_as(prompt.pos))
            past[i].shift = view.prompt.pos[..., -1:] - prompt.pos[..., -1:]
        elif i in past:                                # decoding: numbered on from the stage's last
            prompt = replace(prompt, pos=prompt.pos - past[i].shift)
        if i in past:
            mask = attention_mask(vlm, prompt, past[i], cache, i)
            rotary = vlm.lm.rotary_emb(prompt.embeds, position_ids=prompt.pos)
        before = prompt
        states = layer(prompt.embeds, attention_mask=mask, position_embeddings=rotary,
                       past_key_values=cache)
        if i < len(prompt.later):
            states = states + prompt.later[i]
        prompt = replace(prompt, embeds=states)
    return prompt


def attention_mask(vlm, prompt: Prompt, past: Past, cache, i: int) -> Tensor | None:
    """What the attention of layer i takes as its mask; past grows by the prompt's keys.

    Raises ValueError for an attention kernel that takes no sizes of merged tokens.
    """
    config = vlm.lm.config
    past.mask = torch.cat([past.mask, prompt.mask], 1)
    if past.log_size is not None:                      # decoding: what is new has size one
        past.log_size = F.pad(past.log_size, (0, prompt.mask.shape[1]))
    elif prompt.log_size is not None:
        past.log_size = prompt.log_size
    if past.log_size is None:
        # layer_idx: the cache is shorter from stage to stage, and by default layer 0 sizes the mask
        return create_causal_mask(config=config, inputs_embeds=prompt.embeds,
                                  attention_mask=past.mask, past_key_values=cache, layer_idx=i)
    kernel = config._attn_implementation
    dtype = prompt.embeds.dtype
    if kernel not in ("sdpa", "eager"):
        raise ValueError(f"attention {kernel!r} takes no sizes of merged tokens: expected the "
                         "model loaded with attn='sdpa' or 'eager'")
    # all in one additive mask, causality too: a kernel that is given one must not be told is_causal
    new = prompt.mask.shape[1]
    total = past.mask.shape[1]
    sees = torch.ones(new, total, dtype=torch.bool, device=past.mask.device).tril(total - new)
    sees = sees & past.mask.bool()[:, None]
    lowest = max(torch.finfo(torch.float32).min, torch.finfo(dtype).min)
    return torch.where(sees, past.log_size[:, None].to(dtype), lowest)[:, None]


def whole_rotary(vlm, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(B, L, d) cos and sin of the model's rotary embedding; older transformers leave the axes of
    M-RoPE apart."""
    if rotary[0].ndim == 3:
        return rotary
    sections = 2 * list(vlm.lm.config.rope_parameters["mrope_section"])

    def put_together(x: Tensor) -> Tensor:
        return torch.cat([part[i % 3] for i, part in enumerate(x.split(sections, -1))], -1)
    return put_together(rotary[0]), put_together(rotary[1])


def narrow(view: LayerView, i: int, rule: Rule) -> Prompt:
    """The prompt without the visual tokens that the rule in front of layer i drops."""
    prompt = view.prompt
    name = f"stages[{i}](...)"
    visual = prompt.is_visual
    units = visual_units(prompt, prompt.embeds)
    if units.feats.isnan().any():
        raise ValueError(f"NaN among the visual tokens in front of layer {i}: expected numbers; a "
                         "model that overflows in float16 runs in bfloat16 or float32")
    answer = rule(view)
    keep, changes = answer if isinstance(answer, tuple) else (answer, {})
    kept = kept_mask(units, keep, name)
    for b, n in enumerate(units.counts):
        if n and not len(keep[b]):
            raise ValueError(f"{name}[{b}] is empty: expected at least one of {n} visual tokens")
    left = prompt.only(prompt.mask.bool().masked_scatter(visual, kept))
    for column, values in changes.items():
        if [len(x) for x in values] != [len(x) for x in keep]:
            raise ValueError(f"{name} has {column} for {[len(x) for x in values]} tokens: expected "
                             f"one for each that it keeps, {[len(x) for x in keep]}")
        old = getattr(left, column)
        values = torch.cat(list(values))
        if old is None:
            old = values.new_zeros(left.mask.shape)
        where = left.is_visual[..., None] if values.ndim > 1 else left.is_visual
        left = replace(left, **{column: old.masked_scatter(where, values.to(old))})
    return left
