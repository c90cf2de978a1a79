"""The exceptions that others catch: a mistake of the user, not of the program; a study's worker or GPU that is gone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

MEMORY_WORDS = ("allocate memory", "out of memory", "not enough memory", "bad_alloc")


class UserError(Exception):
    """Something that the user can mend: says what is wrong, with which value, and what to do.

    The command line prints its message as one line and exits with code 2.
    """


class WorkerDied(Exception):
    """A study's worker is gone, its process or machine, and with it what it was doing."""


class DeviceLost(UserError):
    """A GPU answers every call with an error; until the process that has it ends, nothing can be done there."""


class NothingLeft(Exception):
    """Every edit of a job has failed."""


def one_line(error: BaseException) -> str:
    """The text of somebody else's exception on one line of at most 200 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


@contextmanager
def one_memory_error() -> Iterator[None]:
    """Memory that gives out on a CPU or on MPS, where torch raises other errors, is an error as on a GPU.

    Raises:
        torch.OutOfMemoryError: the device's memory was too small.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        from torch import OutOfMemoryError

        told = isinstance(error, MemoryError) or any(words in str(error) for words in MEMORY_WORDS)
        if isinstance(error, OutOfMemoryError) or not told:
            raise
        raise OutOfMemoryError(one_line(error)) from error
