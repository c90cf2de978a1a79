"""The page's settings form, made from the config's dataclasses, and what its answers mean."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Mapping
from pathlib import Path

import yaml

from dragdiff.aliases import Json
from dragdiff.config import Config, UIConfig, config_folder, find_overlay, load_config
from dragdiff.errors import UserError
from dragdiff.options import as_it_stands, walk

ON_THE_PAGE = ("prompt", "points", "generate.enabled", "method")  # other controls of the page stand for these, or will
LONGEST = 4000  # characters of a text
GENERATED_WITH = ("seed", "ddim.steps", "generate.", "model.")  # keys that a generated picture depends on


class Form:
    """Which settings a visitor may make, and the config that they amount to."""

    def __init__(self, settings: UIConfig) -> None:
        """
        Raises:
            UserError: an overlay that is to be offered is not there, or is malformed.
        """
        self.settings = settings
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
        self.keys = {
            key: f
            for key, f, _ in walk(Config())
            if key not in ON_THE_PAGE and (not f.metadata["local"] or len(self.choices.get(key, ())) > 1)
        }

    def describe(self) -> list[Json]:
        """Each setting with its explanation and limits, as plain values."""
        defaults = {key: value for key, _, value in walk(Config())}
        fields = []
        for key, f in self.keys.items():
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

    def values(self, model: str, preset: str) -> Json:
        """What each setting is with this model and preset, before a visitor changes anything."""
        config = self._load(model, preset, {})
        return {key: value for key, _, value in walk(config) if key in self.keys}

    def config(self, request: Mapping[str, object], **settings: object) -> Config:
        """The config of a request with `model`, `preset`, and the `settings` that were changed.

        Args:
            settings: by name, what the page's other controls say.

        Raises:
            UserError: a model or preset that is not offered, a setting that is not a visitor's, a bad value.
        """
        changes = request.get("settings") or {}
        if not isinstance(changes, dict):
            raise UserError("the settings must be key: value pairs")
        for key, value in changes.items():
            if key not in self.keys:
                raise UserError(f"{key!r} can't be set on this page")
            choices = self.choices.get(key)
            if choices and value not in choices:
                raise UserError(f"{key} is {str(value)[:80]!r}: choose one of those that the page offers")
            if isinstance(value, str):
                check_length(key, value)
        config = self._load(str(request.get("model") or ""), str(request.get("preset") or ""), {**changes, **settings})
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
        changes = dict(request.get("settings") or {})
        size = self._work_size(str(request.get("model") or ""), str(request.get("preset") or ""))
        changes = {**size, **changes}
        files = self._files(str(request["model"]), str(request.get("preset") or ""))
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

    def _load(self, model: str, preset: str, changes: Mapping[str, object]) -> Config:
        files = self._files(model, preset)
        # a text of a visitor's is a text, never a reference to the environment
        return load_config([*files, self._work_size(model, preset)], [as_it_stands(dict(changes))])

    def _files(self, model: str, preset: str) -> list[Path]:
        """The model's last: what its overlay says was chosen for that model, and presets are for any."""
        return [*([self._overlay(self.presets, preset)] if preset else []), self._overlay(self.models, model)]

    @functools.lru_cache(maxsize=100)  # noqa: B019  one form lives as long as the server
    def _work_size(self, model: str, preset: str) -> Json:
        return (
            {} if load_config(self._files(model, preset)).data.max_size else {"data.max_size": self.settings.max_size}
        )

    @staticmethod
    def _overlay(known: Mapping[str, Path], name: str) -> Path:
        if name not in known:
            raise UserError(f"{name!r} is not offered here: choose from {', '.join(known)}")
        return known[name]

    @staticmethod
    def _named(file: Path) -> str:
        return f"configs/{file.name}" if file.parent == config_folder() else str(file)


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
