"""The published drag methods, one file for each paper; and those that users bring.

A new one of the package is a file with a `METHOD` and a line here.
"""

from __future__ import annotations

import difflib
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from dragdiff.errors import UserError, one_line
from dragdiff.methods.method import Method

NAMES = (
    "dragdiffusion",
    "dragnoise",
    "fastdrag",
    "gooddrag",
)
GROUP = "dragdiff.methods"  # of the entry points by which installed packages offer theirs
_brought: dict[str, Method] = {}  # by name, or by the absolute path of a file


def find(name: str) -> Method:
    """The method of a name (`NAMES`, an installed package's, one that was brought), or in a file.

    Args:
        name: or the path of a .py file that ends with a `METHOD`.

    Raises:
        UserError: there is none, and says which there are; or it is none that can be used.
    """
    if name in _brought:
        return _brought[name]
    if name in NAMES:
        method: Method = import_module(f"dragdiff.methods.{name}").METHOD
        return method
    if is_file(name):
        return bring_file(name)
    if name in offered():
        return _installed(name)
    names = [*NAMES, *sorted({*offered(), *(known for known in _brought if not is_file(known))})]
    nearest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    raise UserError(
        f"method is {name!r}: there are {', '.join(names)}, or a file my_method.py; did you mean {nearest!r}?"
    )


def is_known(name: str) -> bool:
    """Whether there is a method of this name."""
    return name in NAMES or name in _brought or name in offered()


def is_file(name: str) -> bool:
    """Whether a method is named by a file of its own."""
    return name.endswith(".py")


def bring(method: Method | str) -> str:
    """Let a method of one's own be found.

    Args:
        method: or what `find` already has it by.

    Returns:
        The name by which `find` has it from now on.

    Raises:
        UserError: a name or settings that can't be used.
    """
    from dragdiff.methods import from_file

    if isinstance(method, str):
        find(method)
        return method
    from_file.check(method, f"method {method.name!r}")
    _refuse_taken(method, f"method {method.name!r}")
    _brought[method.name] = from_file.with_source(method)
    return method.name


def bring_file(path: str, source: str = "") -> Method:
    """As `bring`, of a file as it is now.

    Args:
        source: its text, where the file may be on another machine; empty = what it holds.

    Raises:
        UserError: it can't be read or run, or its METHOD is none.
    """
    from dragdiff.methods import from_file

    path = str(Path(path).expanduser().absolute())
    source = source or from_file.read(path)
    if path not in _brought or _brought[path].source != source:
        method = from_file.load(path, source)
        _refuse_taken(method, path)
        _brought[path] = method
    return _brought[path]


def offered() -> list[str]:
    """Names of the methods that installed packages have."""
    return [entry.name for entry in entry_points(group=GROUP) if entry.name not in NAMES]


def _installed(name: str) -> Method:
    from dragdiff.methods import from_file

    (entry, *_) = entry_points(group=GROUP, name=name)
    where = f"method {name!r} of {entry.dist.name if entry.dist else 'a package'}, {entry.value}"
    try:
        method = entry.load()
    except Exception as error:  # whatever a package raises when it is imported
        raise UserError(f"{where}: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(method, Method) or method.name != name:
        raise UserError(f"{where}: it must be a Method of that name")
    from_file.check(method, where)
    _brought[name] = from_file.with_source(method)
    return _brought[name]


def _refuse_taken(method: Method, where: str) -> None:
    if method.name in NAMES:
        raise UserError(f"{where}: METHOD.name is {method.name!r}, which is taken: give it another")
