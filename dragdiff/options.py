"""Options: a dataclass field that carries its default, explanation, unit and check; and how layers of them are merged.

Importing this module is cheap.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dragdiff.errors import UserError, one_line

T = TypeVar("T")
Values = dict[Any, Any]  # settings by dotted or plain keys, sections nested
Layer = tuple[Values, str]  # settings, and where they are from, for messages


class Check(NamedTuple):
    """What values an option may have: in words, the test, and what a form can show of it."""

    words: str
    holds: Callable[[Any], bool]
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()


def more_than(low: float) -> Check:
    """Greater than a limit."""
    return Check(f"> {low}", lambda value: value > low, low=low)


def at_least(low: float) -> Check:
    """A limit, or greater."""
    return Check(f">= {low}", lambda value: value >= low, low=low)


def within(low: float, high: float, *, low_open: bool = False) -> Check:
    """Between two limits, which are allowed themselves, with `low_open` the upper one alone."""
    words = f"in {'(' if low_open else '['}{low}, {high}]"
    return Check(words, lambda value: (low < value if low_open else low <= value) and value <= high, low, high)


def one_of(*choices: str) -> Check:
    """One of some words."""
    return Check(" | ".join(choices), lambda value: value in choices, choices=choices)


def option(
    default: Any,
    explanation: str,
    check: Check | None = None,
    *,
    local: bool = False,
    scope: str = "result",
    own: bool = False,
) -> Any:
    """A dataclass field that carries its explanation (with unit), its check and its scope.

    Args:
        local: it names a file, a folder, a device or an account here, or what the machine keeps: it belongs to whoever
            starts the program, and the web page does not let its visitors set it.
        scope: what it is part of: "result" has a say in the picture; "sample" is what is edited; "model" is told by the
            model itself; "machine" changes no picture.
        own: edits that share forwards may differ in it.
    """
    metadata = {"explanation": explanation, "check": check, "local": local, "scope": scope, "own": own}
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Each option of a config as (dotted key, field, value), sections flattened."""
    for f in fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", f, value


def check_values(config: object) -> None:
    """Refuse values out of range, NaN and infinity.

    Raises:
        UserError: names the key, the value and what is allowed.
    """
    for key, f, value in walk(config):
        allowed: Check | None = f.metadata["check"]
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{key} is {value}: it must be a finite number")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UserError(f"{key} is {value}: it is too large a number")
        if allowed and not allowed.holds(value):
            raise UserError(f"{key} is {value!r}: it must be {allowed.words}")


def describe(config: object, *, prefix: str = "") -> str:
    """Every key of a config with its value and explanation, for --help.

    Args:
        prefix: of a section that is described by itself, e.g. "drag.".
    """
    lines = []
    for key, f, value in walk(config, prefix):
        allowed = f"  [{f.metadata['check'].words}]" if f.metadata["check"] else ""
        shown = "''" if value == "" else value
        lines.append(f"  {key}={shown}\n      {f.metadata['explanation']}{allowed}")
    return "\n".join(lines)


def merged(kind: type[T], layers: Sequence[Layer]) -> T:
    """A config of a kind from its defaults and layers, of which later ones win.

    `${key}` in a text refers to another key; `${...}` of any other form, such as the environment's, is text.

    Raises:
        UserError: an unknown key (names the nearest), a value of the wrong type.
    """
    found = OmegaConf.structured(kind)
    for values, where in layers:
        _merge(kind, found, _references_alone(values), where)
    try:
        config = OmegaConf.to_object(found)
    except OmegaConfBaseException as error:
        raise UserError(f"cannot follow a reference ${{...}} in the settings: {one_line(error)}") from error
    assert isinstance(config, kind)
    return config


def read_yaml(path: Path) -> Values:
    """What a YAML file holds.

    Raises:
        UserError: unreadable, or no key: value lines.
    """
    try:
        overlay = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # YAML, encoding and permission errors have no common base
        raise UserError(f"cannot read config {path}: {one_line(error)}") from error
    if not isinstance(overlay, dict):
        raise UserError(f"cannot read config {path}: it must hold key: value lines")
    return overlay


def read_override(kind: type, override: str) -> Values:
    """What `key=value` says: text as it stands, anything else in YAML.

    Raises:
        UserError: it can't be read.
    """
    key, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"cannot read {override!r}: settings are written key=value, e.g. drag.lr=0.02")
    if isinstance(_defaults(kind).get(key), str):  # prompts and paths need no YAML quoting
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
        return {key: as_it_stands(text[1:-1] if quoted else text)}
    try:
        return {key: OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]}  # type: ignore[call-overload,index]
    except Exception as error:  # OmegaConf lets several YAML and grammar errors through
        raise UserError(f"cannot read {override!r}: {one_line(error)}") from error


def as_it_stands(value: Any) -> Any:
    """The same for OmegaConf, which would take `${` in a text for a reference to another key or the environment.

    Args:
        value: a text, or lists and dicts that hold some.
    """
    if isinstance(value, dict):
        return {key: as_it_stands(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [as_it_stands(entry) for entry in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


_REFERENCE = re.compile(r"\$\{[\w.-]+\}")  # to another key
_OPENED = re.compile(r"(?<!\\)(?:\\\\)*\$\{")  # as OmegaConf sees it: not escaped


def _references_alone(value: Any) -> Any:
    """Settings in whose texts OmegaConf finds references to other keys alone: a stranger's file reads nothing here."""
    if isinstance(value, dict):
        return {key: _references_alone(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_references_alone(entry) for entry in value]
    foreign = isinstance(value, str) and _OPENED.search(_REFERENCE.sub("", value))
    return as_it_stands(value) if foreign else value


def flat(settings: Values, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings with sections flattened.

    Returns:
        Dotted keys with their values.
    """
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nearest_key(key: str, kind: type) -> str:
    """The key of a kind of config that looks most like a misspelt one.

    Args:
        kind: a dataclass of options.
    """
    return difflib.get_close_matches(key, sorted(_defaults(kind)), n=1, cutoff=0.0)[0]


@functools.cache
def _defaults(kind: type) -> dict[str, Any]:
    return {key: value for key, _, value in walk(kind())}


@functools.cache
def _text_lists(kind: type) -> set[str]:
    return {key for key, f, _ in walk(kind()) if str(f.type) == "list[str]"}


_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list, e.g. [a, b]",
    dict: "key: value pairs",
}


def _merge(kind: type, config: DictConfig, layer: Values, where: str, prefix: str = "") -> None:
    defaults = _defaults(kind)
    for name, value in layer.items():
        key = f"{prefix}{name}"
        inside = next((known for known in defaults if key.startswith(f"{known}.")), None)
        example = next((known for known in defaults if known.startswith(f"{key}.")), None)
        if example and isinstance(value, dict):
            _merge(kind, config, value, where, f"{key}.")
        elif example:
            raise UserError(f"{key} {where} is a section: set one of its keys, e.g. {example}")
        elif inside and isinstance(defaults[inside], dict):  # settings.drag.lr=0.02
            OmegaConf.select(config, inside)[key.removeprefix(f"{inside}.")] = value
        elif key == "settings" and isinstance(value, dict):  # unlike a grid they add to those of a parent
            for setting, given in flat(value):
                config.settings[setting] = given
        elif key not in defaults:
            nearest = nearest_key(key, kind)
            raise UserError(f"unknown key {key!r} {where}: did you mean {nearest!r}? (--help lists all keys)")
        else:
            texts: dict[Any, list[Any]] = {
                str: [value],
                list: value if isinstance(value, list) and key in _text_lists(kind) else [],
            }
            guessed = [given for given in texts.get(type(defaults[key]), []) if isinstance(given, bool | int | float)]
            if guessed:
                raise UserError(
                    f"{key} is read as {guessed[0]!r} {where}, but it is text: put it in quotes, as it is to be read"
                )
            try:
                OmegaConf.update(config, key, value, merge=False)
            except Exception as error:  # OmegaConf's own, and bare TypeError and ValueError
                wanted = _KINDS[type(defaults[key])]
                raise UserError(f"{key} is {value!r} {where}: it must be {wanted}") from error
