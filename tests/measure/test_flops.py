"""FLOPs of real sizes, against the papers' and by hand."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from backbones.checkpoints import blank_model
from benchmarks.costs import prefill_flops
from common import Units
from measure import flops, shapes


@pytest.fixture(scope="module")
def small(one_thread):
    """Shapes alone: a vision width of 32, a language model of width 64."""
    return shapes.load("llava-1.5-7b", shrink=True, device="meta")


def test_llava_reproduces_the_papers_flops(one_thread):
    """8.89 T for 576 tokens, 2.13 T for 64: all layers of the encoder, 70 tokens of text, causal
    attention half."""
    model = blank_model(shapes.config("llava-1.5-7b")).eval()
    encoder, project = flops.clip_stages(model, 1)
    for k, printed in flops.PRINTED.items():
        body, attention = flops.prefill(model, k + 70)
        total = encoder + project(k) + body - attention / 2
        assert total / 1e12 == pytest.approx(printed, rel=5e-3)
        n = k + 70
        products = 32 * n * (4 * 4096**2 + 3 * 4096 * 11008)        # by hand, multiply-adds
        assert attention == pytest.approx(32 * 4 * n**2 * 4096, rel=1e-3)
        assert body - attention == 2 * (products + 4096 * 32064)
    assert encoder == pytest.approx(0.382e12, rel=2e-3)
    assert project(576) == 576 * 2 * (1024 * 4096 + 4096**2)


def test_methods_are_counted_as_they_select(small):
    """By hand, of Transformer blocks of width c over n units; crops are selected apart by the
    method that is trained on one at a time."""
    n, c, text = 30, 32, 6
    layers = dict(layers=3, decoder_layers=2)
    selectors = flops.build_methods(small, **layers)
    rates = {name: [flops.selection(selector, views, n, k, small.dim, text)
                    for views, k in ((1, 8), (1, 4), (3, 8))]
             for name, selector in selectors.items()}

    def blocks(n, layers):
        return layers * (2 * n * 12 * c**2 + 4 * n**2 * c)
    auto, recon, step = rates["AutoSelect"], rates["ReconSelector"], rates["StepPrune"]
    assert auto[0] == auto[1] == blocks(n, 3) + 2 * n * c
    assert auto[2] == blocks(3 * n, 3) + 2 * 3 * n * c
    assert recon[0] == recon[1] == blocks(n, 3) + 2 * n * 2 * c and recon[2] == 3 * recon[0]
    memory = blocks(n + 1 + text, 3) + 2 * text * small.dim * c      # units, stop and words
    keys = 2 * (n + 1) * (2 * c * c + c * c)
    # each pick costs the same
    assert step[0] - step[1] == pytest.approx(step[1] - memory - keys, rel=.05)


def test_counting_leaves_products_out_and_the_selection_whole(small):
    """As many tokens are selected as in earnest, by a program that looks at its tensors; the count
    is that of the products that are really made."""
    selector = next(iter(flops.build_methods(small).values())).eval().requires_grad_(False)
    v = torch.randn(12, 32)
    units = Units(v, torch.zeros(12, dtype=torch.int64), [(3, 4)])
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        counted, _ = flops.count(lambda: selector.select(units, None, 5))
        with flops.NoProducts():
            keep = selector.select(units, None, 5)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    assert counted == flops.selection(selector, 1, 12, 5, small.dim, 4)
    assert [len(row) for row in keep] == [5] and fast == torch.backends.mha.get_fastpath_enabled()
    linear = nn.Linear(4, 6)
    with torch.no_grad(), flops.NoProducts():
        assert linear(torch.ones(2, 3, 4)).shape == (2, 3, 6)
        assert not (torch.ones(2, 3, 4) @ torch.ones(2, 4, 5)).any()


def test_each_merger_of_qwen3_is_counted_by_hand(one_thread):
    """A last one and three of deepstack, of blocks of four patches; the encoder without them."""
    model = blank_model(shapes.config("qwen3-vl-8b")).eval()
    encoder, project = flops.qwen_stages(model, 8, 12)
    block, n = 4 * 1152, 8 * 12
    assert project(24) == 4 * 24 * 2 * (block**2 + block * 4096)
    a_block = n * 2 * (4 * 1152**2 + 2 * 1152 * 4304) + 4 * n**2 * 1152
    patches = n * 2 * 3 * 2 * 16**2 * 1152
    assert encoder == pytest.approx(27 * a_block + patches, rel=1e-3)


class Counted(nn.Module):
    """Selects by a product of the tokens with one another, in each view by itself."""

    def __init__(self, width: int = 1024):
        super().__init__()
        self.cfg = type("Config", (), {"width": width})

    def select(self, units: Units, question, keep: int) -> list[torch.Tensor]:
        v, _ = units.apart().pad()
        s = (v @ v.mT).sum((0, 2))
        return [s.argsort()[:keep].sort().values for _ in units.grid]


def test_flops_by_a_papers_convention_and_counted(one_thread):
    vlm = shapes.load("llava-next-vicuna-7b", device="meta")
    table = flops.paper_table({"One": Counted()}, vlm).splitlines()
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table[2:]]
    for _, printed, _, gated, counted in cells:
        assert abs(float(gated) - float(printed)) < .5
        assert 1.75 < float(counted) / float(gated) < 2.1
    by_hand = 32 * (4 * 2880 * 4096**2 + 2 * 2880**2 * 4096 + 2 * 2880 * 4096 * 11008)
    assert flops.paper_flops(2880) == by_hand
    selector = 4 * (4 * 576 * 1024**2 + 2 * 576**2 * 1024 + 2 * 576 * 1024 * 4096)
    assert flops.paper_flops(2880, 2, 576) - by_hand == selector


@pytest.mark.parametrize("name", ["llava-1.5-7b", "qwen2.5-vl-7b", "qwen3-vl-8b"])
def test_the_flops_table_of_a_small_model(name, one_thread):
    vlm = shapes.load(name, shrink=True, device="meta")
    is_llava = name.startswith("llava")
    stages = flops.clip_stages(vlm.model, 1) if is_llava else flops.qwen_stages(vlm.model, 8, 12)
    lines = flops.table(vlm, stages, [24, 8], text=5).splitlines()
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1
    whole, pruned = (flops.prefill(vlm.model, k + 5) for k in (24, 8))
    encoder, project = stages
    assert whole[0] > 2 * pruned[0] and project(24) == 3 * project(8) > 0 and encoder > 0


def test_the_prefill_of_a_prompt_is_what_an_answer_is_said_to_cost(small):
    """benchmarks/costs.py has it in closed form."""
    config = small.model.config.text_config
    assert isinstance(config, LlamaConfig)
    counted, _ = flops.prefill(small.model, 50)
    assert prefill_flops(config, [50] * config.num_hidden_layers) == pytest.approx(counted, rel=.01)
