"""What an answer costs: time by stage, memory, visual tokens by layer, and FLOPs of the prompt."""

import copy
import time
import weakref
from collections.abc import Callable
from contextlib import contextmanager

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from backbones.checkpoints import free_bytes

LARGE_MODEL = 1e9                     # parameters from which on memory is watched [ours]
SPARE = 0.15                          # of the free memory, for what differs from row to row [ours]


class Clock:
    """Milliseconds per item and stage, the mean over all calls."""

    def __init__(self, device):
        self.device = torch.device(device)
        self.seconds = {}
        self.items = {}

    @contextmanager
    def __call__(self, stage, items: int):
        self.wait()
        start = time.perf_counter()
        yield
        self.wait()
        self.add(stage, time.perf_counter() - start, items)

    def add(self, stage, seconds: float, items: int) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.) + seconds
        self.items[stage] = self.items.get(stage, 0) + items

    def wait(self) -> None:
        """Until the GPU has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def ms(self, stage) -> float:
        return 1e3 * self.seconds[stage] / self.items[stage]


class Stamps:
    """A streamer of transformers that notes when the prompt went in, when each token came, and the
    end."""

    def __init__(self):
        self.at = []

    def put(self, _):
        self.at.append(time.perf_counter())

    def end(self):
        self.put(None)


def timed(clock: Clock, way, items: int, generate) -> list[str]:
    """generate(streamer), its time split in two: up to the first new token, and after it."""
    stamps = Stamps()
    clock.wait()
    texts = generate(stamps)
    clock.wait()
    start, first_token, end = stamps.at[0], stamps.at[1], stamps.at[-1]
    clock.add(("prefill", way), first_token - start, items)
    clock.add(("decode", way), end - first_token, items)
    return texts


# ------------------------------------------------------------------------------------ memory


def is_large(model: torch.nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) > LARGE_MODEL


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are made and freed inside it; most: the highest count."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for tensor in tensors((args, kwargs)):
            self.meet(tensor.untyped_storage(), 0)             # it was there before, or is counted
        made = operator(*args, **kwargs)
        for tensor in tensors(made):
            self.meet(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return made

    def meet(self, storage, size: int) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def peak_bytes(run: Callable, device: torch.device) -> int:
    """The most memory that run() held at a time, beyond what was there before.

    On CUDA the allocator tells; elsewhere all tensors are counted, without the working memory
    inside an operator.
    """
    if device.type != "cuda":
        with LiveBytes() as live:
            run()
        return live.most
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def that_fit(row: int, device: torch.device, most: int, fixed: int = 0) -> int:
    """How many rows of `row` bytes fit beside `fixed` bytes into the device's free memory, SPARE
    left over; at most `most`, which stands where nothing tells what is free."""
    free = free_bytes(device)
    if free is None or not row:
        return most
    return max(0, min(most, int((free * (1 - SPARE) - fixed) // row)))


def training_bytes(selector, step: Callable, device: torch.device) -> tuple[int, int]:
    """What a training step takes beside the weights that are there: bytes whatever the number of
    pictures, with gradients and AdamW's two moments, and bytes of each picture.

    step(n)() makes the gradients of n pictures; the selector comes out as it went in. Where twice
    the memory of one picture is not there, two are not tried: all may be the picture's.
    """
    before = copy.deepcopy(selector.state_dict())
    moments = 2 * sum(p.nbytes for p in selector.parameters())
    peaks = []
    for n in (1, 2):
        try:
            peaks.append(peak_bytes(step(n), device))
        finally:
            selector.zero_grad(set_to_none=True)
            selector.load_state_dict(before)
        # all processes take the same steps, which add up what they find
        if n == 1 and not all(gather_object([that_fit(2 * peaks[0], device, 1)])):
            return moments, peaks[0]
    picture = max(peaks[1] - peaks[0], 1)
    return max(peaks[0] - picture, 0) + moments, picture


def pictures_that_fit(vlm, selector, step: Callable, share: int, ways: list[bool]
                      ) -> tuple[int, str]:
    """How many of its `share` of a batch every process can train on at a time, and what is measured
    of that, in words.

    step(n)() makes the gradients of n pictures
    ways: checkpointing or not, which is left as it was measured last; the first of them with which
    half of the share fits [ours], or the last
    """
    for on in ways:
        if selector.reads_language:
            vlm.checkpointing(on)
        try:
            fixed, picture = training_bytes(selector, step, vlm.device)
            said = f"{fixed / 2**30:.3f} GiB and {picture / 2**30:.3f} GiB a picture"
            fit = that_fit(picture, vlm.device, share, fixed)
        except torch.OutOfMemoryError:
            if PartialState().num_processes > 1:          # the others wait in the midst of a step
                raise
            said, fit = "more than there is, even for one picture", 0
        fit = min(gather_object([fit]))                   # all processes take the same way
        if 2 * fit >= share:
            break
    return fit, said + ", activations recomputed" * (on and selector.reads_language)


# ------------------------------------------------------------------------------------ tokens


def per_layer(tokens: int, counts: dict[int, int], layers: int) -> list[int]:
    """The visual tokens that each layer of the language model sees, of `tokens` that enter.

    counts: {layer: visual tokens from this layer on}, empty for a method that prunes before it.
    """
    seen = [tokens]
    for i in range(layers):
        seen.append(counts.get(i, seen[-1]))
    return seen[1:]


def token_budget(tokens: int, counts: dict[int, int], layers: int) -> tuple[int, int, float]:
    """Visual tokens that enter the language model, that its last layer sees, and their mean over
    its layers; see per_layer()."""
    seen = per_layer(tokens, counts, layers)
    return tokens, seen[-1], sum(seen) / layers


def prefill_flops(config, counts: list[int]) -> int:
    """FLOPs of a prompt up to its first new token in a Llama-like language model.

    2 per multiply-add, attention as n^2 products. Vision encoder and selection are not in it.
    config: of the language model | counts[i]: tokens, of image and text, that layer i sees
    """
    width, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries = config.num_attention_heads * head
    keys = config.num_key_value_heads * head
    weights = 2 * width * queries + 2 * width * keys + 3 * width * inner
    layers = sum(2 * n * weights + 4 * n ** 2 * queries for n in counts)
    return layers + 2 * width * config.vocab_size
