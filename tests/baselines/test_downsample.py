"""Downsampling by hand, against a picture's own box filter, and on every family."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from baselines import downsample
from common import Units

pytestmark = pytest.mark.usefixtures("one_thread")


def made(feats, grid, **more):
    n = grid[0] * grid[1]
    return Units(feats, torch.zeros(n, dtype=torch.int64), [grid], **more)


def raster(height, width):
    return torch.arange(float(height * width))[:, None].double()


def test_downsample_by_hand():
    keep, feats = downsample.select(made(raster(4, 4), (4, 4)), 4)
    # cells of 2 x 2; of four equally near their centre the first
    assert keep[0].tolist() == [0, 2, 8, 10] and feats.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    keep, feats = downsample.select(made(raster(3, 3), (3, 3)), 4)
    # one and a half units high and wide: 1 of 0, half of 1 and 3, a quarter of 4
    assert keep[0].tolist() == [0, 2, 6, 8]
    assert feats[0].item() == pytest.approx((0 + .5 * 1 + .5 * 3 + .25 * 4) / 2.25)
    keep, feats = downsample.select(made(raster(4, 4), (4, 4)), 5)
    # two cells above and three below, each four thirds of a unit wide
    assert keep[0].tolist() == [0, 2, 8, 9, 11]
    below = torch.tensor([8., 9, 12, 13])
    assert feats[2].item() == pytest.approx(float((below * torch.tensor([3, 1, 3, 1])).sum() / 8))
    keep, feats = downsample.select(made(raster(4, 4), (4, 4)), 1)
    assert keep[0].tolist() == [5] and feats.item() == 7.5


@pytest.mark.parametrize("height, width, k", [(24, 24, 64), (12, 24, 8), (9, 6, 24), (5, 7, 6)])
def test_a_grid_is_the_box_filter_of_a_picture(height, width, k):
    """Two other hands: every unit made so many that cells fit, and where they fit, Pillow."""
    x = np.random.default_rng(0).random((height, width), dtype=np.float32)
    rows = downsample.rows_of_cells(k, height, width)
    columns = k // rows
    assert rows * columns == k
    found = downsample.select(made(torch.from_numpy(x).view(-1, 1), (height, width)), k)[1]
    large = torch.from_numpy(x.repeat(rows, 0).repeat(columns, 1))[None]
    expected = F.avg_pool2d(large, (height, width))[0]
    torch.testing.assert_close(found.view(rows, -1), expected)
    if height % rows == 0 == width % columns:
        small = Image.fromarray(x).resize((columns, rows), Image.Resampling.BOX)
        np.testing.assert_allclose(found.view(rows, -1), np.asarray(small), atol=1e-6)


def test_cells_follow_the_shape_of_the_picture():
    rows = downsample.rows_of_cells
    assert [rows(k, 24, 24) for k in (64, 144, 192, 1)] == [8, 12, 14, 1]
    assert [rows(32, 8, 16), rows(32, 16, 8), rows(18, 2, 36)] == [4, 8, 1]
    assert rows(30, 2, 36) == 1 and rows(72, 2, 36) == 2
    assert rows(37, 1, 40) == 1 and rows(37, 40, 1) == 37


def test_every_k_of_every_shape_is_met_by_distinct_units_and_whole_means():
    for height, width in ((6, 6), (3, 5), (1, 7), (7, 1), (4, 9)):
        n = height * width
        for k in range(1, n + 1):
            centre, weight = downsample.pooling(torch.arange(n), width, k)
            assert len(centre) == k and (centre.diff() > 0).all()
            torch.testing.assert_close(weight.sum(1), torch.ones(k).double())
            assert (weight.gather(1, centre[:, None]) > 0).all()       # it stands where it is from
            assert (weight.sum(0) > 0).all()                           # and all of it is shown
        assert torch.equal(weight, torch.eye(n).double())              # K = N changes nothing


def test_an_even_picture_stays_even_and_every_patch_its_own():
    feats = torch.tensor([1., 2, 3, 4]).view(1, 4, 1).expand(15, 4, 2).contiguous()
    for k in (1, 4, 7, 15):
        keep, pooled = downsample.select(made(feats, (3, 5)), k)
        assert len(keep[0]) == k
        torch.testing.assert_close(pooled, feats[:k])
    half = downsample.select(made(feats.bfloat16(), (3, 5)), 7)[1]
    assert half.dtype == torch.bfloat16


def test_views_have_their_share_and_padding_is_no_part_of_it():
    """Two crops of 4 x 4, the second of which has padding left and right."""
    has_token = torch.tensor([[True] * 4] * 4 + [[False, True, True, False]] * 4).flatten()
    feats = torch.cat([raster(4, 4), raster(4, 4) + 100])
    feats[16:].view(4, 4)[:, [0, 3]] = 1e6
    units = Units(feats, torch.zeros(32, dtype=torch.int64), [(8, 4)], [2], has_token)
    keep, pooled = downsample.select(units, 6)         # 16 and 8 tokens: 4 and 2
    assert keep[0].tolist() == [0, 2, 8, 10, 17, 25]
    assert pooled.flatten().tolist() == [2.5, 4.5, 10.5, 12.5, 103.5, 111.5]
    assert torch.equal(downsample.select(units, 24)[1], feats[has_token])
    has_token[0] = False
    with pytest.raises(ValueError, match="15 units with a token in 4 x 4: downsample expected a"):
        downsample.select(units, 6)
