"""Points and masks: image px to the feature grid and back."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TRACES

from dragdiff.errors import UserError
from dragdiff.modules import points


def units():
    return np.load(TRACES / "units.npz")


def test_recorded_rounding():
    table = torch.from_numpy(units()["round_table"])
    for size, half in ((250, 125), (331, 165), (511, 255), (512, 256)):
        rows = table[table[:, 0] == size]
        assert len(rows) == size
        assert points.grid_size((size, size), 0.5) == (half, half)
        expected = rows[:, 3].clamp(max=half - 1)  # the published code steps over the edge there, and crashes
        xy = torch.stack([rows[:, 2], torch.zeros(size)], dim=-1).float()
        moved = points.to_grid(xy, image_size=(size, size), grid=(half, half))
        assert torch.equal(moved[:, 1], expected.float())
        assert not moved[:, 0].any()


def test_x_y_becomes_row_column():
    xy = torch.tensor([[[30.0, 10.0], [300.0, 99.0]]])
    moved = points.to_grid(xy, image_size=(100, 400), grid=(50, 200))
    assert moved.tolist() == [[[5, 15], [49, 150]]]  # 99 / 2 rounds to the even 50, which is past the last row
    assert moved.dtype == torch.float32


def test_halves_go_to_the_even_neighbour():
    xy = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    assert points.to_grid(xy, image_size=(20, 20), grid=(10, 10)).tolist() == [[2, 0], [4, 2]]


@pytest.mark.parametrize("scale", [0.5, 0.25, 1.0, 0.3])
@pytest.mark.parametrize("size", [(250, 331), (512, 384), (17, 16), (255, 257)])
def test_image_and_back(size, scale):
    grid = points.grid_size(size, scale)
    every = torch.tensor(list(itertools.product(range(grid[0]), range(grid[1]))), dtype=torch.float32)
    xy = points.to_image(every, image_size=size, grid=grid)
    assert xy.min() >= 0
    assert (xy < torch.tensor([size[1], size[0]])).all()
    assert torch.equal(points.to_grid(xy, image_size=size, grid=grid), every)


def test_px_of_a_position():
    assert points.to_image(torch.tensor([[5.0, 7.0]]), image_size=(100, 300), grid=(50, 100)).tolist() == [[21, 10]]


def test_grid_rounds_down_and_is_never_empty():
    assert points.grid_size((251, 333), 0.5) == (125, 166)
    assert points.grid_size((16, 99), 0.01) == (1, 1)


@pytest.mark.parametrize("size", [(384, 512), (250, 331)])
def test_recorded_masks(size):
    recorded, name = units(), f"{size[0]}x{size[1]}"
    mask, expected = (torch.from_numpy(recorded[f"{kind}_{name}"]) for kind in ("mask", "mask_latent"))
    grid = points.grid_size(size, 0.5)
    small = points.mask_to_latent(mask.bool(), grid=grid, latent_size=tuple(expected.shape))
    assert small.dtype == torch.float32
    assert 0 < expected.float().mean() < 1
    assert torch.equal(small[0, 0], expected.float())
    if size == (250, 331):  # nearest neighbour in one stage would take other pixels
        assert not torch.equal(F.interpolate(mask[None, None].float(), expected.shape)[0, 0], expected.float())


def test_a_mask_that_vanishes_is_refused():
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[9:15, 9:15] = True  # between the pixels that the latent's size takes
    with pytest.raises(UserError, match=r"vanishes at the latent's size 8x8.*larger"):
        points.mask_to_latent(mask, grid=(32, 32), latent_size=(8, 8))
    mask[16, 24] = True
    assert points.mask_to_latent(mask, grid=(32, 32), latent_size=(8, 8)).nonzero().tolist() == [[0, 0, 2, 3]]
