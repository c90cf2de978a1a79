"""The exceptions that others catch: a mistake of the user, not of the program; a study's worker or GPU that is gone."""

from __future__ import annotations

MEMORY_WORDS = ("allocate memory", "out of memory", "not enough memory", "bad_alloc", "DefaultCPUAllocator")


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


def out_of_memory(error: BaseException) -> bool:
    """Whether memory was too small for something, a GPU's or this machine's; torch says the latter in words alone."""
    return (
        isinstance(error, MemoryError)
        or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
        or (isinstance(error, RuntimeError) and any(word in str(error) for word in MEMORY_WORDS))
    )


def one_line(error: BaseException) -> str:
    """The text of somebody else's exception on one line of at most 200 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]
