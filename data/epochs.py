"""Epochs without end over a data set, each in an order of its own."""

import numpy as np
import torch
from torch.utils.data import Dataset


def shuffled(n: int, *key: int) -> np.ndarray:
    """A permutation of n that depends on the key alone: on no state of a generator.

    The numbers of the key are mixed. Their sum would not do: one seed's second epoch would be the
    next seed's first.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()


class Epochs(Dataset):
    """Items start to stop-1 of epochs without end over `data`.

    Item g is a function of (seed, g) alone, so a run resumed at `start` sees what an unbroken one
    would have seen.
    Raises ValueError for data of no items, a range that is none, or a negative seed.
    """

    def __init__(self, data, start: int, stop: int, seed: int = 0):
        if len(data) == 0 or not 0 <= start <= stop or seed < 0:
            raise ValueError(f"{len(data)} items, start={start}, stop={stop}, seed={seed}: "
                             "expected at least 1 item, 0 <= start <= stop and seed >= 0")
        self.data = data
        self.range = range(start, stop)
        self.seed = seed
        # the epoch drawn last, for all its items; each worker has its own
        self.epoch = -1
        self.order = None

    def __len__(self):
        return len(self.range)

    def __getitem__(self, i):
        epoch, place = divmod(self.range[i], len(self.data))
        if epoch != self.epoch:
            self.order = shuffled(len(self.data), self.seed, epoch)
            self.epoch = epoch
        return self.data[int(self.order[place])]
