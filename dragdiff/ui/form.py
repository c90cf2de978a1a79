"""The page's settings forms, one for each method, made from the config's dataclasses, and what their answers mean."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dragdiff import methods
from dragdiff.aliases import Json
from dragdiff.config import DEFAULT_METHOD, Config, UIConfig, config_folder, find_overlay, load_config
from dragdiff.errors import UserError
from dragdiff.methods.method import Method
from dragdiff.options import as_it_stands, walk

T = TypeVar("T")
ON_THE_PAGE = ("prompt", "points", "generate.enabled", "method")  # other controls of the page stand for these
LONGEST = 4000  # characters of a text
GENERATED_WITH = ("seed", "ddim.steps", "generate.", "model.")  # keys that a generated picture depends on


class Form:
    """Which settings a visitor may make, and the config that they amount to."""

    def __init__(self, settings: UIConfig) -> None:
        """
        Raises:
            UserError: an overlay or a method that is to be offered is not there, or is malformed.
        """
        if not settings.methods:
            raise UserError(f"methods is empty: name at least one, e.g. methods=[{DEFAULT_METHOD}]")
        self.settings = settings
        # found here and never again: a visitor's word only chooses among these
        found = [(methods.find(entry), entry) for entry in settings.methods]
        self.methods = {method.name: method for method, _ in found}
        self._entries = {method.name: entry for method, entry in found}
        self.models = {Path(name).stem: find_overlay(name) for name in settings.models}
        self.paths = {name: load_config([file]).model.path for name, file in self.models.items()}
        self.presets = {
            file.stem: file
            for file in sorted(config_folder().glob("*.yaml"))
            if "model" not in (yaml.safe_load(file.read_text("utf-8")) or {})
        }
        self.choices = {
            "model.vae": ("", *settings.vaes),
            "lora.path": ("", *settings.loras),
        }
        self.keys = {name: self._keys(name) for name in self.methods}

    def _keys(self, method: str) -> dict[str, dataclasses.Field[Any]]:
        """The settings that a visitor may make for a method; what it alone has comes first."""
        config = self._defaults(method)
        keys = {
            key: f
            for key, f, _ in walk(config)
            if key not in ON_THE_PAGE
            and config.reads(key)
            and (not f.metadata["local"] or len(self.choices.get(key, ())) > 1)
        }
        return dict(sorted(keys.items(), key=lambda entry: not entry[0].startswith(f"{method}.")))

    def _defaults(self, method: str) -> Config:
        return load_config([], [{"method": self._entries[method]}])

    def offered(self) -> list[Json]:
        """The methods that can be chosen: what each says of itself, and its settings, as plain values."""
        said = ("name", "title", "year", "paper", "summary", "note", "needs", "uses")
        return [
            {key: getattr(method, key) for key in said} | {"fields": self.describe(name)}
            for name, method in self.methods.items()
        ]

    def describe(self, method: str) -> list[Json]:
        """Each setting of a method with its explanation and limits, as plain values."""
        defaults = {key: value for key, _, value in walk(self._defaults(method))}
        fields = []
        for key, f in self.keys[method].items():
            check = f.metadata["check"]
            fields.append(
                {
                    "key": key,
                    "kind": type(defaults[key]).__name__,
                    "explanation": f.metadata["explanation"],
                    "allowed": check.words if check else "",
                    "low": check.low if check else None,
                    "high": check.high if check else None,
                    "choices": list(self.choices.get(key) or (check.choices if check else ())),
                }
            )
        return fields

    def values(self, request: Mapping[str, object]) -> Json:
        """What each setting is with the `model`, `preset` and `method` of a request, before a visitor changes anything.

        Raises:
            UserError: one of them is not offered.
        """
        method = self.chosen(request)
        config = self._load(request, method, {})
        return {key: value for key, _, value in walk(config) if key in self.keys[method.name]}

    def chosen(self, request: Mapping[str, object], key: str = "method") -> Method:
        """The method that a request names; the first of those offered where it names none.

        Args:
            key: under which it stands in the request.

        Raises:
            UserError: it is not offered.
        """
        return _offered(self.methods, str(request.get(key) or next(iter(self.methods))))

    def changes(self, request: Mapping[str, object]) -> Json:
        """The `settings` of a request, those that its method reads.

        Raises:
            UserError: one is none that a visitor may make for any method.
        """
        changes = request.get("settings") or {}
        if not isinstance(changes, dict):
            raise UserError("the settings must be key: value pairs")
        for key in changes:
            if not any(key in keys for keys in self.keys.values()):
                raise UserError(f"{key!r} can't be set on this page")
        mine = self.keys[self.chosen(request).name]
        return {key: value for key, value in changes.items() if key in mine}

    def config(self, request: Mapping[str, object], **settings: object) -> Config:
        """The config of a request with `model`, `preset`, `method`, and the `settings` that were changed.

        Args:
            settings: by name, what the page's other controls say.

        Raises:
            UserError: a model, preset or method that is not offered, a setting that is not a visitor's, a bad value.
        """
        changes = self.changes(request)
        for key, value in changes.items():
            choices = self.choices.get(key)
            if choices and value not in choices:
                raise UserError(f"{key} is {str(value)[:80]!r}: choose one of those that the page offers")
            if isinstance(value, str):
                check_length(key, value)
        config = self._load(request, self.chosen(request), {**changes, **settings})
        pixels = config.generate.width * config.generate.height
        if pixels > self.settings.max_megapixels * 1e6:
            raise UserError(f"the picture would have {pixels} pixels: at most {self.settings.max_megapixels:g} million")
        return config

    def command(self, request: Json, name: str) -> dict[str, str]:
        """The `edit.py` line that does the same with the downloaded edit unpacked beside it; and its settings in YAML.

        Raises:
            UserError: as `config`.
        """
        self.config(request)
        files, method = self._files(request), self.chosen(request).name
        changes = {**self._work_size(*files), **self.changes(request)}
        if load_config(files).method != method:
            changes = {"method": self._entries[method], **changes}
        words = [f"{key}={_as_text(value)}" for key, value in changes.items()]
        line = shlex.join(["python", "edit.py", *(self._named(file) for file in files), f"sample={name}", *words])
        nested: Json = {}
        for key, value in changes.items():
            *sections, last = key.split(".")
            holder = nested
            for section in sections:
                holder = holder.setdefault(section, {})
            holder[last] = value
        text = yaml.safe_dump(as_it_stands(nested), sort_keys=False, allow_unicode=True)
        return {"line": line, "yaml": text if nested else ""}

    def _load(self, request: Mapping[str, object], method: Method, changes: Mapping[str, object]) -> Config:
        files = self._files(request)
        # a text of a visitor's is a text, never a reference to the environment
        given = [{"method": self._entries[method.name]}, as_it_stands(dict(changes))]
        return load_config([*files, self._work_size(*files)], given)

    def _files(self, request: Mapping[str, object]) -> list[Path]:
        """The model's last: what its overlay says was chosen for that model, and presets are for any."""
        model, preset = str(request.get("model") or ""), str(request.get("preset") or "")
        return [*([_offered(self.presets, preset)] if preset else []), _offered(self.models, model)]

    @functools.lru_cache(maxsize=100)  # noqa: B019  one form lives as long as the server
    def _work_size(self, *files: Path) -> Json:
        return {} if load_config(files).data.max_size else {"data.max_size": self.settings.max_size}

    @staticmethod
    def _named(file: Path) -> str:
        return f"configs/{file.name}" if file.parent == config_folder() else str(file)


def _offered(known: Mapping[str, T], name: str) -> T:
    """
    Raises:
        UserError: there is nothing of this name among what the server was started with.
    """
    if name not in known:
        raise UserError(f"{name[:80]!r} is not offered here: choose from {', '.join(known)}")
    return known[name]


def check_length(what: str, text: str) -> None:
    """
    Raises:
        UserError: nobody writes so much; it would only be cut off, after long work.
    """
    if len(text) > LONGEST:
        raise UserError(f"the {what} has {len(text)} characters: at most {LONGEST} are read")


def _as_text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"[{','.join(map(_as_text, value))}]" if isinstance(value, list) else str(value)
