"""FastDrag's warp of the latent: against recorded cases, and against loops and closed forms from its description."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import METHODS

from dragdiff.errors import UserError
from dragdiff.modules import warp

FASTDRAG = np.load(METHODS / "fastdrag.npz")
TOLERANCE = {"rtol": 0, "atol": 2e-5}


def cases(pattern):
    """Parameters of a test: the cases whose keys are like this, with the method's name as id."""
    found = [match[1] for key in FASTDRAG if (match := re.fullmatch(pattern, key))]
    assert found
    return [pytest.param(case, id=f"fastdrag:{case}") for case in found]


def recorded(case, key):
    return torch.from_numpy(FASTDRAG[f"{case}:{key}"])


def pairs(case):
    """Handles and targets in latent px."""
    return recorded(case, "handles_halfres_rc") / 4, recorded(case, "targets_halfres_rc") / 4


def region(case):
    return recorded(case, "mask")[0, 0] > 0


def without_place(case):
    """(n,) bool: pixels for which the published code has no displacement, since a handle lies on them."""
    return recorded(case, "displacement").isnan().any(dim=1)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def blob(height, width, seed):
    """A ragged region that touches no border."""
    inner = random(height - 2, width - 2, seed=seed) > -0.5
    return F.pad(inner, (1, 1, 1, 1))


# --- the region ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases(r"(mask_resize\w*):half"))
def test_recorded_region(case):
    half, expected = recorded(case, "half")[0, 0] > 0, recorded(case, "latent")[0, 0] > 0
    whole = half.repeat_interleave(2, dim=0).repeat_interleave(2, dim=1)
    for mask in (half, whole):
        found = warp.region_of(mask, grid=tuple(half.shape), latent_size=tuple(expected.shape))
        assert found.dtype == torch.bool
        assert torch.equal(found, expected)


def test_a_latent_pixel_belongs_to_the_region_as_soon_as_one_inner_grid_position_does():
    for row in range(8):
        for col in range(12):
            mask = torch.zeros(16, 24, dtype=torch.bool)
            mask[2 * row, 2 * col] = True  # which is what the grid's nearest resizing reads
            if row % 4 in (1, 2) and col % 4 in (1, 2):
                found = warp.region_of(mask, grid=(8, 12), latent_size=(2, 3))
                assert found.nonzero().tolist() == [[row // 4, col // 4]]
            else:
                with pytest.raises(UserError, match="empty at the latent's size 3x2: paint a larger area"):
                    warp.region_of(mask, grid=(8, 12), latent_size=(2, 3))


def test_an_empty_region_is_refused():
    with pytest.raises(UserError, match="empty at the latent's size"):
        warp.region_of(torch.zeros(64, 64, dtype=torch.bool), grid=(32, 32), latent_size=(8, 8))


# --- displacements ------------------------------------------------------------------------------------------


def stretched_by_loop(handles, targets, region, blend):
    rows, cols = (line.tolist() for line in region.nonzero().unbind(1))
    centre = ((min(rows) + max(rows)) / 2, (min(cols) + max(cols)) / 2)
    radius = math.hypot(centre[0] - min(rows) + 1e-6, centre[1] - min(cols) + 1e-6)
    found = []
    for pixel in zip(rows, cols, strict=True):
        moves, distances = [], []
        for handle, target in zip(handles.tolist(), targets.tolist(), strict=True):
            distance, share = math.dist(pixel, handle), 1.0
            if distance:
                ray = [(pixel[i] - handle[i]) / distance for i in range(2)]
                along = sum(ray[i] * (handle[i] - centre[i]) for i in range(2))
                chord = max(0, radius**2 - math.dist(handle, centre) ** 2 + along**2) ** 0.5
                to_circle = max(chord - along, 1e-6)
                share = abs(distance - to_circle) / to_circle
            moves.append([share * (target[i] - handle[i]) for i in range(2)])
            distances.append(distance)
        if blend == "nearest":
            found.append(moves[distances.index(min(distances))])
        else:
            weights = [1 / (distance + 1e-4) for distance in distances]
            found.append(
                [sum(w * move[i] for w, move in zip(weights, moves, strict=True)) / sum(weights) for i in range(2)]
            )
    return torch.tensor(found)


@pytest.mark.parametrize("case", cases(r"(\w+):displacement"))
def test_recorded_displacement(case):
    handles, targets = pairs(case)
    expected, lost = recorded(case, "displacement"), without_place(case)
    assert torch.equal(region(case).nonzero(), recorded(case, "mask_index"))
    found = warp.stretch(handles, targets, region(case), blend="average")
    torch.testing.assert_close(found[~lost], expected[~lost], **TOLERANCE)
    by_loop = stretched_by_loop(handles, targets, region(case), "average")
    torch.testing.assert_close(found, by_loop, **TOLERANCE)  # where nothing could be recorded too


@pytest.mark.parametrize("case", cases(r"(\w+):factor"))
def test_recorded_share_of_each_pair(case):
    for handle, target, share in zip(*pairs(case), recorded(case, "factor"), strict=True):
        found = warp.stretch(handle[None], target[None], region(case), blend="average")
        expected = share.nan_to_num(1)[:, None] * (target - handle)  # a whole one at the handle
        torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("blend", warp.BLENDS)
@pytest.mark.parametrize("seed", range(4))
def test_stretch_equals_a_loop(blend, seed):
    area = blob(14, 17, seed)
    handles = random(3, 2, seed=seed + 10) * 3 + 7
    handles[1] = area.nonzero()[seed]  # on a pixel
    handles[2] = torch.tensor([0.0, 0.0])  # outside of the circle
    targets = handles + random(3, 2, seed=seed + 20) * 5
    found = warp.stretch(handles, targets, area, blend=blend)
    assert found.dtype == torch.float32
    # relative to the move: a ray that only touches the circle has half its digits in float32
    torch.testing.assert_close(found, stretched_by_loop(handles, targets, area, blend), rtol=1e-4, atol=1e-4)


def test_from_the_centre_the_share_falls_linearly_to_the_circle():
    area = F.pad(torch.ones(9, 9, dtype=torch.bool), (3, 3, 2, 2))
    centre, way = torch.tensor([[6.0, 7.0]]), torch.tensor([[3.0, -5.0]])
    away = (area.nonzero() - centre).norm(dim=1)
    found = warp.stretch(centre, centre + way, area, blend="average")
    torch.testing.assert_close(found, (1 - away / math.hypot(4, 4))[:, None] * way, rtol=0, atol=1e-5)


@pytest.mark.parametrize("blend", warp.BLENDS)
@pytest.mark.parametrize("handle", [[5.0, 6.0], [3.0, 4.0], [9.0, 4.0]])
def test_all_of_the_way_at_the_handle_and_nothing_on_the_circle(handle, blend):
    area = F.pad(torch.ones(8, 6, dtype=torch.bool), (4, 2, 3, 3))
    handles, way = torch.tensor([handle]), torch.tensor([[2.0, 1.5]])
    found = dict(
        zip(
            map(tuple, area.nonzero().tolist()),
            warp.stretch(handles, handles + way, area, blend=blend).tolist(),
            strict=True,
        )
    )
    assert found.pop(tuple(map(int, handle))) == way[0].tolist()
    for corner in ((3, 4), (3, 9), (10, 4), (10, 9)):
        if corner in found:
            assert found[corner] == pytest.approx([0, 0], abs=1e-5)
    assert all(0 < row < 2 for (_, col), (row, _) in found.items() if col in (5, 6, 7, 8))


def test_opposite_drags_cancel_out_in_the_average_alone():
    area = torch.ones(9, 9, dtype=torch.bool)
    handles = torch.tensor([[4.0, 2.0], [4.0, 6.0]])
    targets = torch.tensor([[4.0, 0.0], [4.0, 8.0]])
    between = 4 * 9 + 4
    assert warp.stretch(handles, targets, area, blend="average")[between].tolist() == pytest.approx([0, 0], abs=1e-6)
    nearest = warp.stretch(handles, targets, area, blend="nearest").view(9, 9, 2)
    assert (nearest[:, :5, 1] <= 1e-6).all() and (nearest[:, 5:, 1] >= -1e-6).all()  # the first where both are as near
    assert nearest[4, 4, 1] < -0.5


def test_a_region_of_one_pixel():
    area = torch.zeros(5, 5, dtype=torch.bool)
    area[2, 3] = True
    on, beside = torch.tensor([[2.0, 3.0]]), torch.tensor([[2.25, 3.0]])
    assert warp.stretch(on, on + 1, area, blend="average").tolist() == [[1, 1]]
    assert warp.stretch(beside, beside + 1, area, blend="average").tolist() == [pytest.approx([0, 0], abs=1e-2)]

    for handle in ([0.25, 1.5], [1.25, 2.75], [4.0, 0.25]):  # whose rays only touch the circle, if not for rounding
        handles = torch.tensor([handle])
        assert warp.stretch(handles, handles + 1, area, blend="average").isfinite().all()


@pytest.mark.parametrize("size", [(30, 65), (30, 72), (66, 86), (126, 121)])
def test_a_handle_a_hair_off_the_circle(size):
    """Its own pixel then has next to no way to the circle: it moves with the handle, and no pixel moves farther."""
    corner = torch.tensor(size) - 1.0
    for towards in torch.cartesian_prod(torch.arange(-1, 2), torch.arange(-1, 2)):
        handle = torch.nextafter(corner, corner + towards)[None]
        moves = warp.stretch(handle, handle + 1, torch.ones(size, dtype=torch.bool), blend="average")
        assert ((moves >= 0) & (moves <= 1 + 1e-5)).all()


def test_an_unknown_blend_is_refused():
    point = torch.ones(1, 2)
    with pytest.raises(ValueError, match="blend 'sum' is none of average, nearest"):
        warp.stretch(point, point, torch.ones(3, 3, dtype=torch.bool), blend="sum")


# --- relocation ---------------------------------------------------------------------------------------------


def destinations(area, displacement):
    """Of each pixel of the region, rounded half to even in float32, on the latent."""
    size = torch.tensor(area.shape)
    return [
        tuple(min(max(round(value), 0), last) for value, last in zip(place, (size - 1).tolist(), strict=True))
        for place in (area.nonzero() + displacement).tolist()
    ]


def relocated_by_loop(latent, area, displacement):
    moved, claimed = latent.clone(), set()
    moved[:, area] = 0
    for (row, col), place in zip(area.nonzero().tolist(), destinations(area, displacement), strict=True):
        if place not in claimed:
            claimed.add(place)
            moved[:, place[0], place[1]] = latent[:, row, col]
    holes = torch.zeros_like(area)
    for row, col in area.nonzero().tolist():
        holes[row, col] = (row, col) not in claimed
    return moved, holes


@pytest.mark.parametrize("case", cases(r"(\w+):warped_zero_holes"))
def test_recorded_relocation(case):
    latent, expected = recorded(case, "z")[0], recorded(case, "warped_zero_holes")[0]
    handles, targets = pairs(case)
    displacement = warp.stretch(handles, targets, region(case), blend="average")
    moved, holes = warp.relocate(latent, region(case), displacement)
    # where the published code loses the handle's own pixel, what claims its destination is another one
    other = torch.zeros_like(holes)
    for lost, place in zip(without_place(case), destinations(region(case), displacement), strict=True):
        other[place] |= lost
    assert torch.equal(moved[:, ~other], expected[:, ~other])
    assert torch.equal(holes[~other], (expected[0] == 0)[~other])
    assert other.any() == bool(FASTDRAG[f"{case}:n_caught_errors"])

    by_loop, holes_by_loop = relocated_by_loop(latent, region(case), displacement)
    assert torch.equal(moved, by_loop)
    assert torch.equal(holes, holes_by_loop)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [0.4, 2.0, 30.0])
def test_relocate_equals_a_loop(size, seed):
    latent, area = random(3, 12, 15, seed=seed), blob(12, 15, seed)
    latent[0, 5] = 0  # a value of 0 is content as any other
    displacement = size * random(int(area.sum()), 2, seed=seed + 5)
    displacement[::3] = (displacement[::3] * 2).round() / 2  # halves, which are ties
    before = latent.clone()
    moved, holes = warp.relocate(latent, area, displacement)
    by_loop, holes_by_loop = relocated_by_loop(latent, area, displacement)
    assert torch.equal(moved, by_loop)
    assert torch.equal(holes, holes_by_loop)
    assert torch.equal(latent, before)
    assert holes.any() and not (moved[:, holes] != 0).any()


def test_the_first_to_claim_a_destination_keeps_it():
    latent = torch.arange(1.0, 10).view(1, 3, 3)
    area = torch.tensor([[True, True, True], [False] * 3, [False] * 3])
    moved, holes = warp.relocate(latent, area, torch.tensor([[1.0, 1.0], [1.0, 0.0], [-9.0, 9.0]]))
    # 1 goes below 2, which comes too late; 3 is clamped to its own corner; 5 is overwritten outside of the region
    assert moved[0].tolist() == [[0, 0, 3], [4, 1, 6], [7, 8, 9]]
    assert holes.tolist() == [[True, True, False], [False] * 3, [False] * 3]


def test_without_a_displacement_nothing_changes():
    latent, area = random(4, 6, 7), blob(6, 7, 0)
    moved, holes = warp.relocate(latent, area, torch.zeros(int(area.sum()), 2))
    assert torch.equal(moved, latent) and not holes.any()


# --- holes --------------------------------------------------------------------------------------------------


def filled_by_loop(latent, holes):
    values, empty = latent.clone(), holes.clone()
    height, width = holes.shape
    for row in range(height):
        for col in range(width):
            if not holes[row, col]:
                continue
            lines = {
                "left": [(row, c) for c in range(col - 1, -1, -1)],
                "right": [(row, c) for c in range(col + 1, width)],
                "up": [(r, col) for r in range(row - 1, -1, -1)],
                "down": [(r, col) for r in range(row + 1, height)],
            }
            found = []
            for line in lines.values():
                near = [(1 / distance, place) for distance, place in enumerate(line, 1) if not empty[place]]
                found += near[:1]
            if found:
                total = sum(weight for weight, _ in found)
                values[:, row, col] = sum(weight / total * values[:, r, c] for weight, (r, c) in found)
                empty[row, col] = False
    return values


def fill(latent, holes, *, mode="neighbours", original=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return warp.fill(latent, holes, mode=mode, original=latent if original is None else original, generator=generator)


@pytest.mark.parametrize("case", cases(r"(fill\w*):x"))
def test_recorded_fill(case):
    latent = recorded(case, "x")[0]
    torch.testing.assert_close(fill(latent, latent[0] == 0), recorded(case, "y")[0], **TOLERANCE)


@pytest.mark.parametrize("case", cases(r"(\w+):warped_filled"))
def test_recorded_warp_filled(case):
    moved, expected = (recorded(case, f"warped_{key}")[0] for key in ("zero_holes", "filled"))
    torch.testing.assert_close(fill(moved, moved[0] == 0), expected, **TOLERANCE)
    if not FASTDRAG[f"{case}:n_caught_errors"]:  # then all of it is as published
        displacement = warp.stretch(*pairs(case), region(case), blend="average")
        moved, holes = warp.relocate(recorded(case, "z")[0], region(case), displacement)
        torch.testing.assert_close(fill(moved, holes), expected, **TOLERANCE)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.95])
def test_neighbours_equal_a_loop(density):
    holes = torch.rand(13, 11, generator=torch.Generator().manual_seed(3)) < density
    latent = random(4, 13, 11).masked_fill(holes, 0)
    before = latent.clone()
    filled = fill(latent, holes)
    torch.testing.assert_close(filled, filled_by_loop(latent, holes), rtol=0, atol=1e-6)
    assert torch.equal(filled[:, ~holes], latent[:, ~holes])
    assert torch.equal(latent, before)


def test_neighbours_are_filled_in_place_and_weighted_by_the_inverse_distance():
    holes = torch.tensor([[False, True, True, False]])
    filled = fill(torch.tensor([[[3.0, 7.0, 7.0, 9.0]]]), holes)
    first = (3 / 1 + 9 / 2) / (1 + 1 / 2)
    assert filled[0, 0].tolist() == pytest.approx([3, first, (first + 9) / 2, 9])


def test_a_value_of_zero_is_no_hole_and_a_hole_without_neighbours_stays_zero():
    holes = torch.ones(3, 3, dtype=torch.bool)
    holes[2, 2] = False
    latent = torch.full((2, 3, 3), 9.0)  # what is in a hole is no matter
    latent[:, 2, 2] = torch.tensor([0.0, 6.0])
    filled = fill(latent, holes)
    assert filled[0].count_nonzero() == 0
    # the last of the first row sees it below, and later ones see those that have been filled
    assert filled[1].tolist() == [[0, 0, 6], [0, 0, 6], [6, 6, 6]]


def test_noise_is_the_same_whatever_is_a_hole():
    latent = random(4, 40, 40)
    some, more = (random(40, 40, seed=seed) > 0 for seed in (1, 2))
    one, other = (fill(latent, holes, mode="noise", seed=7) for holes in (some, some | more))
    assert torch.equal(one[:, some], other[:, some])
    assert torch.equal(one[:, ~some], latent[:, ~some])
    assert torch.equal(one[:, some], random(4, 40, 40, seed=7)[:, some])
    assert abs(other[:, some].mean()) < 0.1 and abs(other[:, some].std() - 1) < 0.1


def test_keep_takes_the_original():
    latent, original, holes = random(4, 6, 7), random(4, 6, 7, seed=1), blob(6, 7, 0)
    kept = fill(latent, holes, mode="keep", original=original)
    assert torch.equal(kept[:, holes], original[:, holes])
    assert torch.equal(kept[:, ~holes], latent[:, ~holes])


@pytest.mark.parametrize("mode", warp.FILLS)
def test_a_fill_has_the_latents_type(mode):
    latent = random(4, 6, 7).to(torch.bfloat16)
    filled = fill(latent, blob(6, 7, 0), mode=mode)
    assert filled.dtype == torch.bfloat16 and filled.isfinite().all()
    assert torch.equal(fill(latent, torch.zeros(6, 7, dtype=torch.bool), mode=mode), latent)


def test_an_unknown_fill_is_refused():
    with pytest.raises(ValueError, match="mode 'zero' is none of neighbours, noise, keep"):
        fill(random(1, 3, 3), blob(3, 3, 0), mode="zero")
