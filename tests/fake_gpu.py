"""A GPU that is not there: tensors on it have shape, type and device but no values; what is read from it is ones.

An operation on its tensors and a CPU's raises, as on a real one, backward included. Mixed precision has no effect.

Once registered, a device stays for as long as the process lives: cases run in one of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import lightning as L
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves

from dragdiff.modules.points import Points

DEVICE = "fake:0"
aten = torch.ops.aten


def register() -> None:
    """Make the device known to torch."""
    backend_registration._setup_privateuseone_for_python_backend("fake")


class FakeGPU(FakeTensorMode):
    """While it is entered, the device can be used; a CPU's tensors have their values as ever."""

    avoid_device_init = True  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, for real where nothing of it is on the device."""
        kwargs = kwargs or {}
        given = tree_leaves((args, kwargs))
        there = any(isinstance(value, FakeTensor) for value in given)
        to_cpu = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
        if not there and (to_cpu or kwargs.get("device") is None):
            return func(*args, **kwargs)
        if any(isinstance(value, torch.Generator) for value in given):
            raise RuntimeError("a generator of the CPU draws on another device")  # which FakeTensorMode lets pass
        if func is aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        if func is aten.equal.default:
            return True
        if func is aten._to_copy.default and to_cpu:
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            return args[0].fill_(1)
        if func is aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.int64)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], _positions(args[1]), *args[2:])
        return super().__torch_dispatch__(func, types, args, kwargs)


def _positions(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Indices, masks on the device as the positions of all their values: whatever they are, they read as True."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool or not isinstance(index, FakeTensor):
            found.append(index)
        else:
            found += [index.new_empty((index.numel(),), dtype=torch.int64) for _ in range(index.dim())]
    return found


def _apply(module: nn.Module, change: Any, recurse: bool = True) -> nn.Module:
    """As `nn.Module._apply`, which can't change a module that is there already."""
    for part in module.modules() if recurse else [module]:
        for own in (part._parameters, part._buffers):
            for name, value in own.items():
                if value is None:
                    continue
                changed = change(value.data)
                if (changed.device, changed.dtype) != (value.device, value.dtype):
                    kept = nn.Parameter(changed, value.requires_grad) if isinstance(value, nn.Parameter) else changed
                    own[name] = kept
    return module


class FakeAccelerator(CPUAccelerator):
    """What a Trainer must know of the device: nothing, but that it is not the CPU."""

    def setup_device(self, device: torch.device) -> None:
        """Leave it as it is."""


@contextmanager
def fake_gpu() -> Iterator[None]:
    """The device can be used, by a Trainer too."""

    def trainer(*, accelerator: str, devices: object, **settings: Any) -> L.Trainer:
        assert accelerator == torch.device(DEVICE).type
        return L.Trainer(strategy=SingleDeviceStrategy(DEVICE, accelerator=FakeAccelerator()), **settings)

    arrived = Points.arrived
    # all that is read is true, also that a drag has nothing to do
    under_way = mock.patch.object(Points, "arrived", lambda points, near: arrived(points, near).cpu() < 0)
    with (
        FakeGPU(),
        under_way,
        mock.patch.object(nn.Module, "_apply", _apply),
        mock.patch("dragdiff.models.trainer.L", mock.Mock(Trainer=trainer)),
    ):
        yield
