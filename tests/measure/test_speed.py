"""Times and a paper's FLOPs."""

import torch

from common import Units
from measure import flops, shapes, speed


class Counted(torch.nn.Module):
    """Selects by a product of the tokens with one another, in each view by itself."""

    def __init__(self, width: int = 1024):
        super().__init__()
        self.cfg = type("Config", (), {"width": width})

    def select(self, units: Units, question, keep: int) -> list[torch.Tensor]:
        v, _ = units.apart().pad()
        s = (v @ v.mT).sum((0, 2))
        return [s.argsort()[:keep].sort().values for _ in units.grid]


def test_speed_table():
    lines = [{"K": 576, "flops": 10, "prefill_ms": 100., "One_ms": 0., "Two_ms": 0.},
             {"K": 64, "flops": 2, "prefill_ms": 20., "One_ms": 32., "Two_ms": 64.}]
    # 80 ms saved by 4 layers, 640 by 32
    assert speed.speed_table(lines, 4).splitlines()[-1] == (
        "| 64 | 20 | 5.00x | 5.00x | 32.0 | 5.0 % | 64.0 | 10.0 % |")


def test_prefill_and_selection_are_timed_side_by_side(one_thread, monkeypatch):
    monkeypatch.setattr(speed, "BUDGETS", (24, 8))
    full, pruned = speed.measure_speed({"One": Counted(16)}, dim=128, device="cpu", layers=1,
                                       text=4, repeats=1)
    assert [full["K"], pruned["K"]] == [24, 8] and full["flops"] > 2 * pruned["flops"]
    assert full["One_ms"] == 0 < pruned["One_ms"] and pruned["prefill_ms"] > 0


def test_every_method_is_timed(one_thread):
    vlm = shapes.load("llava-1.5-7b", shrink=True, device="meta")
    selectors = flops.build_methods(vlm)
    for selector in selectors.values():
        selector.bfloat16().eval()
    text = speed.measure_selection(selectors, vlm.dim, "cpu", (20, 30), (1, 2), (2, 4), repeats=1)
    lines = text.splitlines()
    assert len(lines) == 2 + 4 * len(selectors)
    assert [line.split("|")[2:4] for line in lines[2:6]] == [
        [" 20 ", " 1 "], [" 20 ", " 2 "], [" 30 ", " 1 "], [" 30 ", " 2 "]]


def test_flops_by_the_papers_convention_and_counted(one_thread):
    table = speed.flops_table({"One": Counted()}).splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table[2:]]
    for _, printed, _, gated, counted in cells:
        assert abs(float(gated) - float(printed)) < .5
        assert 1.75 < float(counted) / float(gated) < 2.1
    by_hand = 32 * (4 * 2880 * 4096**2 + 2 * 2880**2 * 4096 + 2 * 2880 * 4096 * 11008)
    assert speed.paper_flops(2880) == by_hand
    selector = 4 * (4 * 576 * 1024**2 + 2 * 576**2 * 1024 + 2 * 576 * 1024 * 4096)
    assert speed.paper_flops(2880, 2, 576) - by_hand == selector
