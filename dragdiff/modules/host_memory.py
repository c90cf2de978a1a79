"""Host memory: tensors that rest in a file while nobody needs them, and an allocator that gives back or keeps."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

LARGE = 2**16  # bytes; smaller tensors stay where they are
ALIGNMENT = 64  # bytes, of a tensor's start in the file
ON_DISK = "/var/tmp"  # a system's /tmp may be in memory
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's mallopt(3)
OWN_MAPPING = 2**20  # bytes from which an allocation goes back to the system when it is freed
NEVER = 2**31 - 1  # bytes; the most that mallopt takes
# where glibc's own rule ends in a process with large blocks
USUAL = {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26, M_MMAP_MAX: 2**16}


class Resting:
    """Tensors whose bytes lie in an unlinked temporary file, and which take no memory from `sleep` to `wake`.

    Only large contiguous ones in the host's memory, on Linux, with room on the disk; others are left alone.

    Attributes:
        copies: what can be read meanwhile, one for each tensor: mapped from the file, in memory from when they are
            touched until `let_go`. Not to be written to.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """
        Args:
            tensors: not to be touched while they sleep: they hold zeros. None shares its memory with a tensor in use.
        """
        self.copies = list(tensors)
        self._originals: dict[int, Tensor] = {}
        self._map: mmap.mmap | None = None
        large = {
            number: tensor.detach()
            for number, tensor in enumerate(tensors)
            if type(tensor) is Tensor
            and tensor.device.type == "cpu"
            and tensor.is_contiguous()
            and tensor.nbytes >= LARGE
            and not tensor.is_inference()  # which can't be written to
        }
        if not large or sys.platform != "linux":
            return
        starts = {}
        try:
            with tempfile.TemporaryFile(prefix="dragdiff-", dir=os.environ.get("TMPDIR") or ON_DISK) as file:
                for number, tensor in large.items():
                    starts[number] = file.tell()
                    file.write(tensor.view(-1).view(torch.uint8).numpy().data)
                    file.write(bytes(-file.tell() % ALIGNMENT))
                file.flush()
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError:  # no room, no such folder
            return
        whole = torch.frombuffer(self._map, dtype=torch.uint8)
        for number, tensor in large.items():
            part = whole[starts[number] : starts[number] + tensor.nbytes]
            self.copies[number] = part.view(tensor.dtype).view(tensor.shape)
        self._originals = large

    def sleep(self) -> None:
        """Take the tensors' memory from them; to be followed by `wake`, whatever happens."""
        for tensor in self._originals.values():
            _drop_pages(tensor)

    def let_go(self) -> None:
        """Give back the memory of copies that were touched; touched again they are read again."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def wake(self) -> None:
        """Give the tensors their bytes again, at the addresses where they were."""
        try:
            while self._originals:
                number, tensor = next(iter(self._originals.items()))
                tensor.copy_(self.copies[number])
                del self._originals[number]
                self.let_go()
        except KeyboardInterrupt:  # a model must not be left without its weights
            self.wake()
            raise


def _drop_pages(tensor: Tensor) -> None:
    """Give the whole pages of a tensor's memory back to the system; they read as zeros from then on."""
    libc, page = ctypes.CDLL(None), mmap.PAGESIZE
    first = -(-tensor.data_ptr() // page) * page
    length = (tensor.data_ptr() + tensor.nbytes) // page * page - first
    libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(max(0, length)), mmap.MADV_DONTNEED)


@contextmanager
def resting(*modules: nn.Module) -> Iterator[Callable[[], None]]:
    """While it lasts, the weights of some modules take memory only from when they are used until they are let go.

    Yields:
        The function that lets them go, to be called after each use.
    """
    parameters = list(dict.fromkeys(parameter for module in modules for parameter in module.parameters()))
    originals = [parameter.data for parameter in parameters]
    rest = Resting(originals)
    try:
        for parameter, copy in zip(parameters, rest.copies, strict=True):
            parameter.data = copy
        rest.sleep()
        yield rest.let_go
    finally:
        try:
            rest.wake()
        finally:
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.data = original


@contextmanager
def freed_at_once() -> Iterator[None]:
    """While it lasts, what is freed goes back to the system: no room stays with the allocator for what comes next.

    With glibc only; room that its heap has from before may be used again, and then stays. Left, the allocator keeps
    blocks of up to 32 MiB, as it soon does by itself in a process that uses large ones.
    """
    with _allocator({M_MMAP_THRESHOLD: OWN_MAPPING}) as trim:
        trim()
        yield


@contextmanager
def kept_for_reuse() -> Iterator[None]:
    """While it lasts, what is freed stays for what comes next; the system would have to clear it again, page by page.

    Of Stable Diffusion 1.5 that is 3 % of a drag's step, and 4 % of a LoRA's with a batch of 2. With glibc only, in a
    process's main thread; for work that needs the same blocks again and again, as the room between them is lost to
    larger ones.
    """
    with _allocator({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER}) as trim:
        try:
            yield
        finally:
            trim()


@contextmanager
def _allocator(settings: Mapping[int, int]) -> Iterator[Callable[[], None]]:
    """glibc's allocator with settings of mallopt(3); left as it soon sets itself in a process with large blocks.

    Yields:
        What gives all the room of the heaps back to the system.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt") or libc is None:
        yield lambda: None
        return
    try:
        for parameter, value in settings.items():
            libc.mallopt(parameter, value)
        yield lambda: libc.malloc_trim(0)
    finally:
        for parameter, value in USUAL.items():
            libc.mallopt(parameter, value)
