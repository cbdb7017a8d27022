"""What rivals read off the vision encoder besides the features: attention, keys, [CLS].

    units = encode(vlm, batch, {"attention": ("cls", 22), "keys": ("keys", 22)})
    units.readings["attention"]                        # (M,)

The encoder runs once, as it always does, with any attention kernel. Hooks note the inputs of its
attention; queries and keys are then computed from these, for fused attention returns no weights.
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from common import Adapter, Units

OF_ATTENTION = ("cls", "cls wide", "received", "received wide", "keys", "keys wide")
OTHERS = ("projected", "cls state", "crop")


@torch.no_grad()
def encode(vlm, batch, needs: dict[str, tuple[str, int]] | None = None) -> Units:
    """FrozenVLM.encode(), whose Units have readings[name] for every name -> (what, layer) of needs.

    layer: a block of the encoder, from 0, one of adapter.whole. Of a unit's patches a reading is
    the mean. what, float32 but for the last three, which have no layer:

      cls, received            (M,) attention that the unit gets of [CLS], or of all tokens of its
                               view: mean over heads (and tokens), softmax over all tokens of the
                               view
      keys                     (M, d) mean over heads, before any rotation
      cls wide, received wide, keys wide
                               the same where all heads are one of full width
      projected                (M, D), the units as the language model would read them
      cls state                (M, C), what [CLS] of the unit's view is beside feats
      crop                     (M,) int64, LLaVA-NeXT's crop_of()

    Raises ValueError on one that this encoder does not have.
    """
    if not needs:
        return vlm.encode(batch)
    check_needs(vlm, needs)
    adapter = vlm.adapter
    layers = {layer for what, layer in needs.values() if what in OF_ATTENTION}
    with watch(adapter, layers) as (inputs, states):
        units = vlm.encode(batch)
        # LLaVA's encoder stops at the layer that feats are from: from there on for what is above
        x = states.get(adapter.depth - 1)
        for block in blocks(adapter)[adapter.depth:max(layers - {*inputs}, default=-1) + 1]:
            x = block(x, attention_mask=None)
    for name, (what, layer) in needs.items():
        if what == "projected":
            reading = vlm.project(units.feats)
        elif what == "cls state":
            reading = states[adapter.depth - 1][:, 0][units.apart().image_of]
        elif what == "crop":
            reading = adapter.crop_of(batch)
        else:
            reading = read(adapter, what, layer, *inputs[layer], batch)
        units.readings[name] = reading
    return units


def deepest(adapter: Adapter) -> int:
    """The last block that feats go through, of those whose attention spans a view."""
    return max(i for i in adapter.whole if i < adapter.depth)


def check_needs(vlm, needs: dict) -> None:
    known = (*OF_ATTENTION, *OTHERS)
    adapter = vlm.adapter
    for name, (what, layer) in needs.items():
        if what not in known:
            raise ValueError(f"needs[{name!r}] asks for {what!r}: expected one of "
                             f"{', '.join(known)}")
        lacks_cls = what.startswith("cls") and not adapter.has_cls
        lacks_crops = what == "crop" and not getattr(adapter, "crops", False)
        if lacks_cls or lacks_crops:
            raise ValueError(f"needs[{name!r}]: the vision encoder of {vlm.family} has no {what!r}")
        if what in OF_ATTENTION and not hasattr(adapter, "fold"):
            raise ValueError(f"needs[{name!r}]: {type(adapter).__name__} does not say which tokens "
                             "of its encoder make a unit: expected a fold()")
        if what in OF_ATTENTION and layer not in adapter.whole:
            raise ValueError(f"block {layer} of the vision encoder cannot be read: expected one of "
                             f"{adapter.whole}, whose attention spans a whole view")


def blocks(adapter: Adapter) -> list[nn.Module]:
    """The encoder's blocks: the modules that hold its attention, in order."""
    holder = {child: part for part in adapter.model.modules() for child in part.children()}
    return [holder[attention] for attention in adapter.attentions]


@contextmanager
def watch(adapter: Adapter, layers: set[int]):
    """Gives two dicts that fill while this is open.

    inputs: layer -> (x, how), what the attention of each of the layers is called with
    states: number of the last block that feats go through -> its output (T, n, C)
    """
    inputs, states = {}, {}

    def note_input(layer: int):
        def hook(module, args, how):
            how = dict(how)
            x = args[0] if args else how.pop("hidden_states")
            inputs[layer] = x, how
        return hook

    def note_output(module, args, output):
        states[adapter.depth - 1] = output[0] if isinstance(output, tuple) else output
    hooks = [adapter.attentions[i].register_forward_pre_hook(note_input(i), with_kwargs=True)
             for i in layers]
    hooks.append(blocks(adapter)[adapter.depth - 1].register_forward_hook(note_output))
    try:
        yield inputs, states
    finally:
        for hook in hooks:
            hook.remove()


def queries_keys(attention: nn.Module, x: Tensor, how: dict | None) -> list[tuple]:
    """q and k (T, n, heads, d) that `attention` makes of its input x, in groups of views that do
    not see one another. how: what else it was called with; None for keys as projected."""
    if not hasattr(attention, "qkv"):
        norms = [getattr(attention, name, nn.Identity()) for name in ("q_norm", "k_norm")]
        q = norms[0](attention.q_proj(x)).unflatten(-1, (-1, attention.head_dim))
        k = norms[1](attention.k_proj(x)).unflatten(-1, (-1, attention.head_dim))
        return [(q, k)]
    # Qwen2.5-VL: all pictures are one row, in windows that cu_seqlens bounds
    q, k, _ = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(1)
    if how is None:
        return [(q[None], k[None])]
    q, k = apply_rotary_pos_emb_vision(q, k, *how["position_embeddings"])
    sizes = how["cu_seqlens"].diff().tolist()
    return [(part_q[None], part_k[None]) for part_q, part_k in zip(q.split(sizes), k.split(sizes))]


def read(adapter: Adapter, what: str, layer: int, x: Tensor, how: dict, batch) -> Tensor:
    """(M,) or, for keys, (M, d) float32, from what the attention of a block was called with.

    Of [CLS], one row is computed, and never more than one head at a time.
    """
    what, _, wide = what.partition(" ")
    attention = adapter.attentions[layer]
    parts = []
    for q, k in queries_keys(attention, x, None if what == "keys" else how):
        if wide:                                       # all heads are one
            q = q.flatten(2)[:, :, None]
            k = k.flatten(2)[:, :, None]
        q, k = q.float(), k.float()
        if what == "keys":
            parts.append(k.mean(2))
            continue
        heads = k.shape[2]
        q = (q[:, :1] if what == "cls" else q).transpose(1, 2) * q.shape[-1] ** -.5
        k = k.permute(0, 2, 3, 1)                      # (T, heads, d, n)
        weights = sum((q[:, h] @ k[:, h]).softmax(-1).mean(1) for h in range(heads)) / heads
        parts.append(weights[..., None])
    reading = adapter.fold(torch.cat(parts, 1), batch)
    return reading if what == "keys" else reading[:, 0]
