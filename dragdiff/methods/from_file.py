"""A method in a file of the user's own: `method=my_method.py`.

What goes wrong in it is told with its file and line, as far as it is its own.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import linecache
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dragdiff.errors import NothingLeft, UserError, one_line, out_of_memory
from dragdiff.methods.method import METHODS_OWN, NEEDS, Method
from dragdiff.options import check_values
from dragdiff.reading import check_file

F = TypeVar("F", bound=Callable[..., Any])


def read(path: str) -> str:
    """The text of a method's file.

    Raises:
        UserError: it can't be read.
    """
    try:
        check_file(path)
        return Path(path).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"method is {path!r}, which can't be read: {one_line(error)}") from error


def load(path: str, source: str) -> Method:
    """The `METHOD` of a file, checked, with its source; what it raises from then on names the file and line.

    Args:
        path: the file's, by which messages name it; it need not be there any more.
        source: its text, which is run.

    Raises:
        UserError: it can't be run, or its METHOD is none.
    """
    module = ModuleType(f"dragdiff_method_{sha256(f'{path}{source}'.encode()).hexdigest()[:16]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look there for the names in annotations
    linecache.cache[path] = (len(source), None, source.splitlines(keepends=True), path)
    with _blamed(path):
        exec(compile(source, path, "exec"), module.__dict__)
    method = getattr(module, "METHOD", None)
    if not isinstance(method, Method):
        raise UserError(f"{path} has no METHOD: it must end with METHOD = Method(name=..., ...), see docs/methods.md")
    check(method, path)
    told = {name: _telling(path, getattr(method, name)) for name in ("stages", "run", "prompt")}
    return dataclasses.replace(method, source=source, **told)


def with_source(method: Method) -> Method:
    """A method of an imported module with that module's text, as far as there is one."""
    if method.run.__module__ == "__main__":  # a script, which would run again
        return method
    try:
        source = inspect.getsource(sys.modules[method.run.__module__])
    except (AttributeError, KeyError, OSError, TypeError):  # made in a shell, or no plain function
        return method
    return dataclasses.replace(method, source=source)


def check(method: Method, where: str) -> None:
    """Refuse a method whose name or settings can't be used.

    Args:
        where: what the method is from, for messages.

    Raises:
        UserError: says what is wrong, of settings with their line.
    """
    if not method.name.isidentifier():
        raise UserError(
            f"{where}: METHOD.name is {method.name!r}: it must be letters, digits and _, as it names settings"
        )
    for name in method.needs:
        if name not in NEEDS:
            raise UserError(f"{where}: METHOD.needs names {name!r}: a sample can have {', '.join(NEEDS)}")
    for key in method.reads:
        if key.partition(".")[0] not in METHODS_OWN:
            raise UserError(f"{where}: METHOD.reads names {key!r}: the shared sections are {', '.join(METHODS_OWN)}")
    kind = method.settings
    if kind is None:
        return
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise UserError(f"{where}: METHOD.settings is {kind!r}: it must be a dataclass")
    for field in dataclasses.fields(kind):
        place = f"{_place(kind, field.name, where)}: {kind.__name__}.{field.name}"
        if "scope" not in field.metadata:
            raise UserError(f"{place} is no option: write {field.name}: ... = option(default, 'what it is')")
    try:
        check_values(OmegaConf.to_object(OmegaConf.structured(kind)))
    except OmegaConfBaseException as error:
        key, said = getattr(error, "full_key", "") or "", str(error).partition("\n")[0]
        raise UserError(f"{_place(kind, key, where)}: {kind.__name__}.{key}: {said}") from error
    except UserError as error:
        raise UserError(f"{_place(kind, str(error).partition(' ')[0], where)}: the default {error}") from error


def _place(kind: type, name: str, where: str) -> str:
    """File and line of a field of a class, as far as they are known."""
    try:
        lines, first = inspect.getsourcelines(kind)
    except (OSError, TypeError):
        return where
    inside = next((number for number, line in enumerate(lines) if line.strip().startswith(f"{name}:")), 0)
    return f"{where}:{first + inside}"


def _telling(path: str, function: F) -> F:
    """The same function, whose errors name the line of the file at which they came up."""

    @functools.wraps(function)
    def told(*arguments: Any, **named: Any) -> Any:
        with _blamed(path):
            return function(*arguments, **named)

    return told  # type: ignore[return-value]


@contextmanager
def _blamed(path: str) -> Iterator[None]:
    """
    Raises:
        UserError: in place of a mistake, with the last line of the file that led to it.
    """
    try:
        yield
    except (UserError, NothingLeft):
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: {error.msg}: {(error.text or '').strip()}") from error
    except Exception as error:  # whatever somebody's own code raises
        if out_of_memory(error):  # for which there is a remedy
            raise
        theirs = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        line = f":{theirs[-1].lineno}: {theirs[-1].line}" if theirs else ""
        raise UserError(f"{path}{line}\n  {type(error).__name__}: {one_line(error)}") from error
