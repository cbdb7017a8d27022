"""What an answer costs: time by stage, visual tokens by layer, and FLOPs of the prompt."""

import time
from contextlib import contextmanager

import torch


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
