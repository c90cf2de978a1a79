"""Read plain values and numpy arrays from a pickle that nobody vouches for.

A pickle is a program: it names functions and calls them. Four fences make it harmless here:

1. its instructions are looked through before any of them runs, and only those are let pass that build
   plain containers, numbers and texts and that numpy's arrays need;
2. each of the few numpy functions that it may name is replaced by a stand-in of ours, so that neither
   numpy's own nor any other function is ever called with its arguments;
3. the stand-ins take arrays of bools and numbers only, whose bytes are all in the file: no objects, and no
   allocation larger than the file;
4. the keys of dicts are texts and numbers, for some hundred bytes can nest tuples so that hashing or printing
   them takes forever; no message quotes a value that may be such a tuple.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
import re
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from dragdiff.errors import UserError, one_line

MAX_BYTES = 64 * 2**20
MAX_INSTRUCTIONS = 20_000  # a DragBench file has some hundred; also bounds how deep its values can nest

_INSTRUCTIONS = (
    {"PROTO", "FRAME", "MARK", "STOP", "MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"}
    | {"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"}
    | {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
    | {"EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS"}
    | {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
    | {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"}
)


_left: ContextVar[int] = ContextVar("left")  # bytes that the calls of a pickle may still copy


def _spend(count: int) -> None:
    left = _left.get() - count
    if left < 0:
        raise pickle.UnpicklingError("it copies more than it holds")
    _left.set(left)


class PickledArray:
    """Stands for an array among the values read; ``array`` is read-only, of bools or numbers."""

    __slots__ = ("array",)

    def __init__(self) -> None:
        self.array: NDArray = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, data = state
        self.array = _array(data, dtype, shape, "F" if fortran else "C")


def load_pickle(path: str | os.PathLike[str]) -> object:
    """Read a pickle of protocol 2 to 5 without running anything that it names.

    Returns:
        Its value: dicts, lists, tuples, numbers, texts and bytes, with a `PickledArray` for each array.
        Check what you take from it: lists may contain themselves or each other.

    Raises:
        UserError: for a file that is missing, larger than `MAX_BYTES`, damaged, or asks for anything else.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise pickle.UnpicklingError(f"it is larger than {MAX_BYTES // 2**20} MiB")
        _check_instructions(data)
        _left.set(2 * len(data))
        return _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # damaged or hostile data make unpickling raise nearly anything
        reason = one_line(error)
        raise UserError(
            f"{path} was refused, it cannot be read as plain values and arrays: {reason}; "
            "get it again from its source or leave it out"
        ) from error


def _check_instructions(data: bytes) -> None:
    for count, (instruction, _, _) in enumerate(pickletools.genops(data)):
        if instruction.name not in _INSTRUCTIONS:
            raise pickle.UnpicklingError(f"it contains the instruction {instruction.name}")
        if count >= MAX_INSTRUCTIONS:
            raise pickle.UnpicklingError(f"it has more than {MAX_INSTRUCTIONS} instructions")


_RUN: dict[int, Any] = pickle._Unpickler.dispatch  # a function for the code of each instruction


class _Unpickler(pickle._Unpickler):
    """The unpickler written in Python, since that in C does not let its instructions be replaced."""

    stack: list[Any]  # what came after the last MARK

    def find_class(self, module: str, name: str) -> Any:
        # numpy 2 renamed numpy.core to numpy._core
        stand_in = _STAND_INS.get((module.replace("numpy._core.", "numpy.core.", 1), name))
        if stand_in is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return stand_in

    def _set_item(self) -> None:
        _check_keys(self.stack[-2:-1])
        _RUN[pickle.SETITEM[0]](self)

    def _set_items(self) -> None:
        _check_keys(self.stack[::2])
        _RUN[pickle.SETITEMS[0]](self)

    def _reduce(self) -> None:
        function, arguments = self.stack[-2:]
        if not (isinstance(function, _StandIn) and isinstance(arguments, tuple)):
            raise pickle.UnpicklingError("it calls something that is no function")
        _RUN[pickle.REDUCE[0]](self)

    dispatch: ClassVar[dict[int, Any]] = _RUN | {
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.REDUCE[0]: _reduce,
    }


def _check_keys(keys: list[Any]) -> None:
    for key in keys:
        if type(key) not in (str, int, float):
            raise pickle.UnpicklingError(f"it holds a dict with a key of the type {type(key).__name__}")


class _StandIn:
    """A function that a pickle may call, but not alter: the instruction BUILD sets attributes."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it tries to alter a function")


class _Dtype:
    """Stands for a dtype of bools, integers or floats."""

    __slots__ = ("numpy",)

    def __init__(self, code: str) -> None:
        if not re.fullmatch("[biuf][1248]", code):
            raise pickle.UnpicklingError(f"it holds an array of the type {code}")
        self.numpy = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        _version, order, subarray, names, fields = state[:5]
        if order not in ("<", ">", "=", "|") or (subarray, names, fields) != (None, None, None):
            raise pickle.UnpicklingError("it holds an array of a structured type")
        self.numpy = self.numpy.newbyteorder(order)


def _array(data: Any, dtype: Any, shape: Any, order: Any) -> NDArray:
    """An array over ``data``, which must hold just the bytes of this dtype and shape."""
    if not (isinstance(data, bytes | bytearray) and isinstance(dtype, _Dtype) and isinstance(shape, tuple)):
        raise pickle.UnpicklingError("it holds a malformed array")
    if len(shape) > 4 or not all(isinstance(side, int) and side >= 0 for side in shape):
        raise pickle.UnpicklingError("it holds an array of an impossible shape")
    if math.prod(shape) * dtype.numpy.itemsize != len(data):
        raise pickle.UnpicklingError("it holds an array of another size than its data")
    _spend(len(data))
    return np.frombuffer(bytes(data), dtype.numpy).reshape(shape, order=order)


def _reconstruct(_subtype: Any, _shape: Any, _code: Any) -> PickledArray:
    return PickledArray()  # empty: its BUILD brings shape, dtype and data


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any) -> PickledArray:
    value = PickledArray()
    value.array = _array(data, dtype, shape, order)
    return value


def _scalar(dtype: Any, data: Any) -> bool | int | float:
    return _array(data, dtype, (), "C").item()


def _dtype(code: str, _align: Any, _copy: Any) -> _Dtype:
    return _Dtype(code)


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError("it encodes a text otherwise than as latin1")
    _spend(len(text))
    return text.encode("latin1")


def _ndarray(*_arguments: Any) -> None:
    raise pickle.UnpicklingError("it makes an array without data")  # only named, as the subtype above


_STAND_INS = {
    ("numpy", "ndarray"): _StandIn(_ndarray),
    ("numpy", "dtype"): _StandIn(_dtype),
    ("numpy.core.multiarray", "_reconstruct"): _StandIn(_reconstruct),
    ("numpy.core.multiarray", "scalar"): _StandIn(_scalar),
    ("numpy.core.numeric", "_frombuffer"): _StandIn(_frombuffer),
    ("_codecs", "encode"): _StandIn(_encode),
}
