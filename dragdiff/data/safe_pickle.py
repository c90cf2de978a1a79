"""Read plain values and numpy arrays from a pickle that nobody vouches for.

A pickle is a program: it names functions and calls them. Python's own unpicklers are not used; four fences make it
harmless here:

1. its instructions are carried out here, and there are only those that build plain containers, numbers and texts and
   that numpy's arrays need;
2. each of the few numpy functions that it may name is replaced by a stand-in of ours, so that neither
   numpy's own nor any other function is ever called with its arguments;
3. the stand-ins take arrays of bools and numbers only, whose bytes are all in the file: no objects, and no
   allocation larger than the file;
4. the keys of dicts are texts and numbers, for some hundred bytes can nest tuples so that hashing or printing
   them takes forever; no message quotes a value that may be such a tuple.
"""

from __future__ import annotations

import math
import os
import pickletools
import re
from collections.abc import Callable, Sequence
from pickle import UnpicklingError

import numpy as np
from numpy.typing import NDArray

from dragdiff.errors import UserError, one_line
from dragdiff.reading import read_file

MAX_BYTES = 64 * 2**20
MAX_INSTRUCTIONS = 20_000  # a DragBench file has some hundred; also bounds how deep its values can nest

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = (  # the value stands in the instruction
    {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)
_CONTAINERS: dict[str, type] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}


class PickledArray:
    """Stands for an array among the values read; ``array`` is read-only, of bools or numbers."""

    __slots__ = ("array",)

    def __init__(self, array: NDArray) -> None:
        self.array = array


def load_pickle(path: str | os.PathLike[str]) -> object:
    """Read a pickle of protocol 2 to 5 without running anything that it names.

    Returns:
        Its value: dicts, lists, tuples, numbers, texts and bytes, with a `PickledArray` for each array.
        Check what you take from it: lists may contain themselves or each other.

    Raises:
        UserError: for a file that is missing, larger than `MAX_BYTES`, damaged, or asks for anything else.
    """
    try:
        return _Machine(read_file(path, most=MAX_BYTES)).run()
    except Exception as error:  # damaged or hostile data make unpickling raise nearly anything
        reason = one_line(error)
        raise UserError(
            f"{path} was refused, it cannot be read as plain values and arrays: {reason}; "
            "get it again from its source or leave it out"
        ) from error


class _StandIn:
    """A function that a pickle may name and call, but not alter."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self.function = function


class _Dtype:
    """Stands for a dtype of bools, integers or floats."""

    __slots__ = ("numpy",)

    def __init__(self, code: object) -> None:
        if not (isinstance(code, str) and re.fullmatch("[biuf][1248]", code)):
            raise UnpicklingError("it holds an array of objects, dates, texts or the like")
        self.numpy = np.dtype(code)

    def build(self, state: object) -> None:
        """Take in the order of the bytes."""
        _version, order, subarray, names, fields = state[:5] if isinstance(state, tuple) else ()
        if order not in ("<", ">", "=", "|") or (subarray, names, fields) != (None, None, None):
            raise UnpicklingError("it holds an array of a structured type")
        self.numpy = self.numpy.newbyteorder(order)


class _Machine:
    """Carries out the instructions of a pickle, as the documentation of `pickletools` has them."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.left = 2 * len(data)  # bytes that calls may still copy
        self.stack: list[object] = []  # what came after the last MARK
        self.below: list[list[object]] = []  # what came before it, and before those before it
        self.memo: dict[object, object] = {}

    def run(self) -> object:
        """The value that is made."""
        for count, (instruction, argument, _) in enumerate(pickletools.genops(self.data)):
            if count >= MAX_INSTRUCTIONS:
                raise UnpicklingError(f"it has more than {MAX_INSTRUCTIONS} instructions")
            if instruction.name != "STOP":
                self._do(instruction.name, argument)
        return self.stack.pop()

    def _do(self, name: str, argument: object) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            self.stack.append(argument)
        elif name in _CONTAINERS:
            self.stack.append(_CONTAINERS[name]())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            self.stack.append(tuple(self._popped(int(name[-1]))))
        else:
            self._do_other(name, argument)

    def _do_other(self, name: str, argument: object) -> None:
        match name:
            case "PROTO" if argument not in (2, 3, 4, 5):
                raise UnpicklingError(f"it is of protocol {argument}")
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.below.append(self.stack)
                self.stack = []
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "TUPLE":
                values = tuple(self._marked())
                self.stack.append(values)
            case "APPEND":
                self._extend(self._popped(1))
            case "APPENDS":
                self._extend(self._marked())
            case "SETITEM":
                self._set(self._popped(2))
            case "SETITEMS":
                self._set(self._marked())
            case "GLOBAL":
                self.stack.append(_stand_in(*str(argument).split(" ", 1)))
            case "STACK_GLOBAL":
                self.stack.append(_stand_in(*self._popped(2)))
            case "REDUCE":
                self.stack.append(self._called(*self._popped(2)))
            case "BUILD":
                self._build(*self._popped(1))
            case _:
                raise UnpicklingError(f"it contains the instruction {name}")

    def _popped(self, count: int) -> list[object]:
        values = self.stack[-count:]
        if len(values) < count:
            raise UnpicklingError("it takes a value that is not there")
        del self.stack[-count:]
        return values

    def _marked(self) -> list[object]:
        values, self.stack = self.stack, self.below.pop()
        return values

    def _extend(self, values: Sequence[object]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise UnpicklingError("it appends to something that is no list")
        target.extend(values)

    def _set(self, items: Sequence[object]) -> None:
        """Keys and values by turns."""
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise UnpicklingError("it sets an item of something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int, float):
                raise UnpicklingError(f"it holds a dict with a key of the type {type(key).__name__}")
            target[key] = value

    def _called(self, function: object, arguments: object) -> object:
        if not (isinstance(function, _StandIn) and isinstance(arguments, tuple)):
            raise UnpicklingError("it calls something that is no function")
        return function.function(self, *arguments)

    def _build(self, state: object) -> None:
        target = self.stack[-1]
        if isinstance(target, _Dtype):
            target.build(state)
        elif isinstance(target, PickledArray):
            _version, shape, dtype, fortran, data = state if isinstance(state, tuple) else ()
            target.array = self.array(data, dtype, shape, "F" if fortran else "C")
        else:
            raise UnpicklingError("it tries to alter a function")

    def spend(self, count: int) -> None:
        """Take note of so many bytes that are about to be copied."""
        self.left -= count
        if self.left < 0:
            raise UnpicklingError("it copies more than it holds")

    def array(self, data: object, dtype: object, shape: object, order: object) -> NDArray:
        """An array over ``data``, which must hold just the bytes of this dtype and shape."""
        if not (isinstance(data, bytes | bytearray) and isinstance(dtype, _Dtype) and isinstance(shape, tuple)):
            raise UnpicklingError("it holds a malformed array")
        if len(shape) > 4 or not all(isinstance(side, int) and side >= 0 for side in shape):
            raise UnpicklingError("it holds an array of an impossible shape")
        if math.prod(shape) * dtype.numpy.itemsize != len(data):
            raise UnpicklingError("it holds an array of another size than its data")
        self.spend(len(data))
        return np.frombuffer(bytes(data), dtype.numpy).reshape(shape, order="F" if order == "F" else "C")


def _encode(machine: _Machine, text: object, encoding: object) -> bytes:
    """How protocol 2 writes bytes."""
    if encoding != "latin1" or not isinstance(text, str):
        raise UnpicklingError("it encodes a text otherwise than as latin1")
    machine.spend(len(text))
    return text.encode("latin1")


def _ndarray(*_arguments: object) -> None:
    raise UnpicklingError("it makes an array without data")  # only named, as a subtype


_STAND_INS = {
    ("numpy", "ndarray"): _StandIn(_ndarray),
    ("numpy", "dtype"): _StandIn(lambda machine, code, align, copy: _Dtype(code)),
    # empty: its BUILD brings shape, dtype and data
    ("numpy.core.multiarray", "_reconstruct"): _StandIn(lambda *_: PickledArray(np.empty(0, np.uint8))),
    ("numpy.core.multiarray", "scalar"): _StandIn(
        lambda machine, dtype, data: machine.array(data, dtype, (), "C").item()
    ),
    ("numpy.core.numeric", "_frombuffer"): _StandIn(lambda machine, *parts: PickledArray(machine.array(*parts))),
    ("_codecs", "encode"): _StandIn(_encode),
}


def _stand_in(module: object, name: object) -> _StandIn:
    if not (isinstance(module, str) and isinstance(name, str)):
        raise UnpicklingError("it asks for something without a name")
    # numpy 2 renamed numpy.core to numpy._core
    found = _STAND_INS.get((module.replace("numpy._core.", "numpy.core.", 1), name))
    if found is None:
        raise UnpicklingError(f"it asks for {module}.{name}")
    return found
