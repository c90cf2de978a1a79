"""Motion supervision and point tracking: against recorded cases, and against loops written from the formulas."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import METHODS, TRACES

from dragdiff.modules import motion, tracking
from dragdiff.modules.features import FeatureMap
from dragdiff.modules.points import Points

UNITS = np.load(TRACES / "units.npz")
GOODDRAG = np.load(METHODS / "gooddrag.npz")


def recorded(pattern):
    """Parameters of a test: what a pattern finds in the keys of GoodDrag's cases, with the method's name as id."""
    found = [match.groups() for key in GOODDRAG if (match := re.fullmatch(pattern, key))]
    assert found
    return [pytest.param(*groups, id=f"gooddrag:{pattern.split(':')[0]}:{groups[0]}") for groups in found]


def gooddrag_features():
    """Those of the unedited latent, and those of a later one."""
    values = [torch.from_numpy(GOODDRAG[f"loss:F{i}"]) for i in (0, 1)]
    return [FeatureMap([each], tuple(each.shape[2:])) for each in values]


def positions(key):
    return torch.from_numpy(GOODDRAG[key]).float()


def features(*shape, grid=None, seed=0):
    values = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
    return FeatureMap([values], grid or shape[1:])


def resized(feature_map):
    return torch.cat([F.interpolate(part, feature_map.grid, mode="bilinear")[0] for part in feature_map.maps])


# --- tracking -----------------------------------------------------------------------------------------------


def tracked_by_loop(feature_map, templates, handles, radius):
    values, found = resized(feature_map), []
    for template, (row, col) in zip(templates, handles.long().tolist(), strict=True):
        best, place = float("inf"), None
        for r in range(row - radius, row + radius + 1):
            for c in range(col - radius, col + radius + 1):
                if 0 <= r < values.shape[1] and 0 <= c < values.shape[2]:
                    distance = (values[:, r, c] - template).abs().sum().item()
                    if distance < best - 1e-5:
                        best, place = distance, [r, c]
        found.append(place)
    return found


@pytest.mark.parametrize("radius", [0, 1, 3, 40])
def test_nearest_equals_a_loop(radius):
    now = features(5, 9, 7, grid=(20, 15), seed=1)
    handles = torch.tensor([[0.0, 0.0], [19.0, 14.0], [10.0, 7.0], [0.0, 9.0], [18.0, 1.0]])
    templates = features(5, 9, 7, grid=(20, 15)).at(handles)
    before = handles.clone()
    moved = tracking.nearest(now, templates=templates, handles=handles, radius=radius)
    assert moved.dtype == torch.float32
    assert moved.tolist() == tracked_by_loop(now, templates, handles, radius)
    assert torch.equal(handles, before)
    assert radius > 0 or torch.equal(moved, handles)


def test_recorded_tracking():
    first, now = (FeatureMap([torch.from_numpy(UNITS[f"pt_F{i}"])], (24, 30)) for i in (0, 1))
    handles = torch.from_numpy(UNITS["pt_init"])
    templates = first.at(handles)
    for expected in UNITS["pt_out_seq"]:  # each round starts where the one before ended
        handles = tracking.nearest(now, templates=templates, handles=handles, radius=3)
        np.testing.assert_array_equal(handles, expected)


@pytest.mark.parametrize(("case", "radius"), recorded(r"track:(\w+):tracked_r2_(\d+)"))
def test_recorded_tracking_of_gooddrag(case, radius):
    first, now = gooddrag_features()
    templates = first.at(positions(f"track:{case}:initial"))
    moved = tracking.nearest(now, templates=templates, handles=positions(f"track:{case}:handles"), radius=int(radius))
    np.testing.assert_array_equal(moved, GOODDRAG[f"track:{case}:tracked_r2_{radius}"])


def test_ties_go_to_the_first_in_row_major_order():
    flat = FeatureMap([torch.ones(1, 4, 12, 12)], (12, 12))
    handles = torch.tensor([[5.0, 5.0]])
    moved = tracking.nearest(flat, templates=flat.at(handles), handles=handles, radius=3)
    np.testing.assert_array_equal(moved[0], UNITS["pt_tie_out"])

    values = torch.ones(1, 1, 12, 12)
    values[0, 0, 4, 7] = values[0, 0, 6, 3] = 0  # the later column is in the earlier row
    moved = tracking.nearest(FeatureMap([values], (12, 12)), templates=torch.zeros(1, 1), handles=handles, radius=3)
    assert moved.tolist() == [[4, 7]]


def test_a_handle_stays_where_features_are_not_numbers():
    broken = FeatureMap([torch.full((1, 4, 12, 12), torch.nan)], (12, 12))
    handles = torch.tensor([[5.0, 6.0]])
    assert torch.equal(tracking.nearest(broken, templates=torch.ones(1, 4), handles=handles, radius=3), handles)


def test_around():
    assert tracking.around(torch.tensor(5.0), 1).tolist() == [4, 5, 6]
    assert tracking.around(torch.tensor(0.0), 2).tolist() == [-2, -1, 0, 1, 2]


# --- motion supervision -------------------------------------------------------------------------------------


def bilinear(values, row, col):
    """The value between grid positions, borders replicated."""
    height, width = values.shape[1:]

    def at(r, c):
        return values[:, min(max(r, 0), height - 1), min(max(c, 0), width - 1)]

    top, left = int(np.floor(row)), int(np.floor(col))
    down, across = row - top, col - left
    return (1 - down) * ((1 - across) * at(top, left) + across * at(top, left + 1)) + down * (
        (1 - across) * at(top + 1, left) + across * at(top + 1, left + 1)
    )


def loss_by_loop(feature_map, handles, targets, radius, stop_distance):
    values, total = resized(feature_map), torch.zeros(())
    height, width = feature_map.grid
    for handle, target in zip(handles.tolist(), targets.tolist(), strict=True):
        distance = np.hypot(target[0] - handle[0], target[1] - handle[1])
        if distance < stop_distance or distance == 0:
            continue
        step = [(target[i] - handle[i]) / distance for i in range(2)]
        terms = [
            (bilinear(values, r + step[0], c + step[1]) - values[:, r, c].detach()).abs()
            for r in range(int(handle[0]) - radius, int(handle[0]) + radius + 1)
            for c in range(int(handle[1]) - radius, int(handle[1]) + radius + 1)
            if 0 <= r < height and 0 <= c < width
        ]
        total = total + (2 * radius + 1) ** 2 * torch.stack(terms).mean()
    return total


@pytest.mark.parametrize("radius", [0, 1, 2])  # larger ones meet a corner, where replication gives ties
@pytest.mark.parametrize("grid", [(20, 15), (5, 9), (9, 7)])
def test_one_step_equals_a_loop(grid, radius):
    ours, theirs = features(5, 9, 7, grid=grid), features(5, 9, 7, grid=grid)
    last = torch.tensor(grid) - 1.0
    handles = torch.stack([torch.zeros(2), last, torch.tensor([3.0, 4.0]), torch.tensor([0.0, last[1]])])
    targets = torch.stack([last, torch.zeros(2), torch.tensor([1.0, 1.0]), torch.tensor([4.0, last[1]])])
    losses = []
    for feature_map, function in ((ours, motion.one_step), (theirs, None)):
        feature_map.maps[0].requires_grad_()
        if function:
            loss = function(feature_map, handles=handles, targets=targets, radius=radius, stop_distance=2.0)
        else:
            loss = loss_by_loop(feature_map, handles, targets, radius, 2.0)
        loss.backward()
        losses.append(loss)
    torch.testing.assert_close(losses[0], losses[1])
    assert losses[0] > 0
    torch.testing.assert_close(ours.maps[0].grad, theirs.maps[0].grad, rtol=1e-4, atol=1e-5)


def test_recorded_interpolation_at_every_border():
    """Where the published code works, ours gives the same; where it fails, at the far border, ours replicates it."""
    feature_map = FeatureMap([torch.from_numpy(UNITS["ip_feat"])], (12, 14))
    counts = {"equal": 0, "new": 0}
    for row, col, down, across, outcome, _, _, expected in json.loads(str(UNITS["ip_table_json"])):
        handle = torch.tensor([[row, col]], dtype=torch.float32)
        shift = torch.tensor([[down, across]], dtype=torch.float32)
        loss = motion.one_step(feature_map, handles=handle, targets=handle + 10 * shift, radius=1, stop_distance=2.0)
        if outcome == "ok":
            assert loss.item() == pytest.approx(expected, rel=2e-5)
            counts["equal"] += 1
        else:
            assert loss.isfinite()
            assert loss.item() == pytest.approx(
                loss_by_loop(feature_map, handle, handle + 10 * shift, 1, 2.0).item(), rel=2e-5
            )
            counts["new"] += 1
    assert counts == {"equal": 295, "new": 195}


def test_handles_that_have_arrived_are_left_alone():
    feature_map = features(5, 20, 20)

    def loss(*pairs, stop_distance=2.0):
        handles, targets = torch.tensor(pairs, dtype=torch.float32).unbind(1)
        return motion.one_step(
            feature_map, handles=handles, targets=targets, radius=1, stop_distance=stop_distance
        ).item()

    far, near, there = ([5, 5], [5, 9]), ([9, 9], [10, 10]), ([3, 3], [3, 3])
    at_the_limit = ([12, 12], [12, 14])
    assert loss(near) == loss(there) == 0
    assert loss(far, near) == loss(far) > 0
    assert loss(at_the_limit) > 0
    assert loss(near, stop_distance=1.0) > 0
    assert loss(there, stop_distance=0.0) == 0  # no direction to pull in


def test_the_pull_moves_content_towards_the_target():
    """Gradient steps on the features themselves bring the handle's content one position on."""
    feature_map = FeatureMap([torch.zeros(1, 1, 12, 12)], (12, 12))
    values = feature_map.maps[0]
    values[0, 0, 5, 5] = 1.0
    values.requires_grad_()
    handle, target = torch.tensor([[5.0, 5.0]]), torch.tensor([[5.0, 9.0]])
    motion.one_step(feature_map, handles=handle, targets=target, radius=0, stop_distance=2.0).backward()
    assert values.grad[0, 0, 5, 6] < 0  # grows where the content is to go
    assert values.grad.count_nonzero() == 1  # the patch that it comes from is not pulled back


def test_what_others_compare_with_is_no_matter_to_one_step():
    feature_map, handles, targets = features(5, 9, 7), torch.tensor([[5.0, 5.0]]), torch.tensor([[1.0, 2.0]])
    arguments = {"handles": handles, "targets": targets, "radius": 1, "stop_distance": 2.0}
    other = features(5, 9, 7, seed=1)
    assert motion.one_step(feature_map, **arguments, reference=other, initial=targets) == motion.one_step(
        feature_map, **arguments
    )


def pulled(feature_map, reference, handles, initial, targets, *, radius=1, stop_distance=2.0, reach=4.0):
    return motion.to_initial(
        feature_map,
        reference=reference,
        handles=torch.as_tensor(handles).float(),
        initial=torch.as_tensor(initial).float(),
        targets=torch.as_tensor(targets).float(),
        radius=radius,
        stop_distance=stop_distance,
        reach=reach,
    )


@pytest.mark.parametrize("case", recorded(r"loss:(\w+):drag_loss"))
def test_recorded_pull_to_the_initial_patch(case):
    first, now = gooddrag_features()
    for feature_map in (first, now):
        feature_map.maps[0].requires_grad_()
    places = [positions(f"loss:{case}:{key}") for key in ("handles", "initial", "targets")]
    loss = pulled(now, first, *places, radius=4)
    assert loss.item() == pytest.approx(float(GOODDRAG[f"loss:{case}:drag_loss"]), rel=2e-5)
    loss.backward()
    expected = GOODDRAG.get(f"loss:{case}:grad_F1", np.zeros(now.maps[0].shape))  # none where all have arrived
    np.testing.assert_allclose(now.maps[0].grad, expected, rtol=0, atol=2e-5)
    assert first.maps[0].grad is None


def pull_by_loop(feature_map, reference, handles, initial, targets, radius, stop_distance, reach):
    values, templates, total = resized(feature_map), resized(reference), torch.zeros(())
    (height, width), offsets = feature_map.grid, range(-radius, radius + 1)
    for handle, start, target in zip(handles, initial, targets, strict=True):
        distance = np.hypot(target[0] - handle[0], target[1] - handle[1])
        if distance < stop_distance or distance == 0:
            continue
        shift = [(target[i] - handle[i]) / distance * min(reach, distance) for i in range(2)]
        terms = [
            (templates[:, start[0] + r, start[1] + c] - bilinear(values, *ahead)).abs()
            for r in offsets
            for c in offsets
            if 0 <= start[0] + r < height and 0 <= start[1] + c < width
            if 0 <= handle[0] + r < height and 0 <= handle[1] + c < width
            for ahead in [(handle[0] + r + shift[0], handle[1] + c + shift[1])]
        ]
        total = total + (2 * radius) ** 2 * torch.stack(terms).mean()
    return total


@pytest.mark.parametrize("radius", [1, 2, 4])
@pytest.mark.parametrize("grid", [(20, 15), (5, 9), (9, 7)])
def test_to_initial_equals_a_loop(grid, radius):
    """Also at borders, where the recorded code fails: on either side of the patch, and for what lies ahead."""
    (bottom, right), reference = (size - 1 for size in grid), features(5, 9, 7, grid=grid, seed=1)
    handles = [[0, 0], [bottom, right], [3, 4], [0, right], [bottom, 3], [2, 2]]
    initial = [[1, 0], [0, right], [4, 4], [bottom, 0], [bottom, 3], [2, 2]]
    targets = [[bottom, right], [0, 0], [1, 1], [4, right], [bottom, 1], [3, 2]]
    losses, gradients = [], []
    for function in (pulled, pull_by_loop):
        feature_map = features(5, 9, 7, grid=grid)
        feature_map.maps[0].requires_grad_()
        loss = function(feature_map, reference, handles, initial, targets, radius=radius, stop_distance=2.0, reach=3.3)
        loss.backward()
        losses.append(loss)
        gradients.append(feature_map.maps[0].grad)
    torch.testing.assert_close(losses[0], losses[1])
    assert losses[0] > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_the_patch_ahead_lies_at_the_target_where_that_is_within_reach():
    """It is what was at the initial handle, wherever the handle is: then nothing is left to pull."""
    values = features(5, 20, 20).maps[0]
    moved = values.roll((3, 4), dims=(2, 3))  # what was at (5, 6) is at (8, 10)
    now, first = FeatureMap([moved], (20, 20)), FeatureMap([values], (20, 20))
    for handle, target in (([8, 7], [8, 10]), ([11, 10], [8, 10]), ([8, 6], [8, 16])):  # the last: reach 4
        assert pulled(now, first, [handle], [[5, 6]], [target], reach=4.0) == pytest.approx(0, abs=1e-4)
        assert pulled(now, first, [handle], [[5, 7]], [target], reach=4.0) > 1
        assert pulled(now, first, [handle], [[5, 6]], [target], reach=2.0) > 1


def test_handles_that_have_arrived_are_not_pulled_to_their_initial_patch():
    now, first = features(5, 20, 20), features(5, 20, 20, seed=1)

    def loss(*pairs, **settings):
        handles, targets = torch.tensor(pairs).unbind(1)
        return pulled(now, first, handles, handles, targets, **settings).item()

    far, near, there = ([5, 5], [5, 9]), ([9, 9], [10, 10]), ([3, 3], [3, 3])
    assert loss(near) == loss(there) == loss(there, stop_distance=0.0) == 0
    assert loss(far, near) == loss(far) > 0
    assert loss(([12, 12], [12, 14])) > 0  # at the limit
    assert loss(near, stop_distance=1.0) > 0


def test_distances():
    handles, targets = torch.tensor([[0.0, 0.0], [2.0, 2.0]]), torch.tensor([[3.0, 4.0], [2.0, 2.0]])
    assert Points(handles, handles, targets, (8, 8)).left.tolist() == [5, 0]


def test_mask_term_is_a_sum_where_nothing_may_change():
    before, now = (torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    keep = (torch.arange(30).view(1, 1, 5, 6) % 3 == 0).float()
    expected = sum(
        abs(now[0, channel, row, col].item() - before[0, channel, row, col].item())
        for channel in range(4)
        for row in range(5)
        for col in range(6)
        if keep[0, 0, row, col]
    )
    assert motion.mask_term(now, before, keep=keep).item() == pytest.approx(expected, rel=1e-5)
    assert motion.mask_term(now, now, keep=keep) == 0


@pytest.mark.parametrize(("case", "weight"), recorded(r"mask:(loss)_lam([\d.]+)"))
def test_recorded_mask_term_of_gooddrag(case, weight):
    now, before, mask = (torch.from_numpy(GOODDRAG[f"mask:{key}"]) for key in ("x", "x0", "mask"))
    expected = float(GOODDRAG[f"mask:{case}_lam{weight}"])
    assert float(weight) * motion.mask_term(now, before, keep=1 - mask).item() == pytest.approx(expected, rel=2e-5)
