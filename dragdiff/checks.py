"""What can be known of settings before a model is loaded, and before it works."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dragdiff.backbones.layout import layers_from
from dragdiff.config import Config, check
from dragdiff.errors import UserError
from dragdiff.options import walk

if TYPE_CHECKING:
    from dragdiff.backbones.diffusion import Diffusion
    from dragdiff.backbones.layout import Structure


def check_settings(config: Config, model: Structure | Diffusion | None = None) -> None:
    """What can be known of the settings without weights.

    Args:
        model: tells the names of its parts; None leaves out what depends on it.

    Raises:
        UserError: bad settings.
    """
    check(config)
    if model is None:
        return
    for name in config.drag.features if config.reads("drag.features") else ():
        if name not in model.feature_strides:
            raise UserError(f"drag.features names {name!r}: the model has {', '.join(model.feature_strides)}")
    if config.control.enabled and config.reads("control.start_layer"):
        layers_from(model.self_attention_layers, config.control.start_layer)


def shared_settings(config: Config) -> dict[str, object]:
    """The settings in which edits that share forwards must agree, by key."""
    return {
        key: value
        for key, f, value in walk(config)
        if not f.metadata["own"] and (f.metadata["scope"] in ("result", "model") or key.startswith("model."))
    }
