"""The published drag methods, one file for each paper.

A new one is a file with a `METHOD` and a line here.
"""

from __future__ import annotations

import difflib
from importlib import import_module

from dragdiff.errors import UserError
from dragdiff.methods.method import Method

NAMES = (
    "dragdiffusion",
    "dragnoise",
    "fastdrag",
    "gooddrag",
)


def find(name: str) -> Method:
    """The method of a name.

    Raises:
        UserError: there is none; says which there are.
    """
    if name not in NAMES:
        nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)[0]
        raise UserError(f"method is {name!r}: there are {', '.join(NAMES)}; did you mean {nearest!r}?")
    method: Method = import_module(f"dragdiff.methods.{name}").METHOD
    return method
