"""What can be known of settings before a model is loaded, and before it works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dragdiff.config import Config, check, walk
from dragdiff.errors import UserError
from dragdiff.modules import attention, motion, tracking
from dragdiff.modules.backbone import feature_block, self_attention_layers

_AN_EDITS_OWN = ("sample", "image", "prompt", "points", "mask", "drag.", "edit.", "output.", "cache.")


def check_settings(config: Config, unet: Any = None) -> None:
    """What can be known of the settings without weights.

    Args:
        unet: the model's, see `loading.skeleton`; None leaves out what depends on it.

    Raises:
        UserError: bad settings.
    """
    check(config)
    strategy("drag.supervision", config.drag.supervision, motion.SUPERVISIONS)
    strategy("drag.tracker", config.drag.tracker, tracking.TRACKERS)
    if unet is not None:
        check_blocks(config, lambda name: feature_block(unet, name), self_attention_layers(unet))


def check_blocks(config: Config, find_block: Callable[[str], Any], layers: Sequence[str]) -> None:
    """Whether the model has the blocks that the settings name."""
    for name in config.drag.features:
        find_block(name)
    if config.control.enabled:
        attention.layers_from(layers, config.control.start_layer)


def strategy(key: str, name: str, choices: dict[str, Any]) -> Any:
    """The choice that a setting names.

    Raises:
        UserError: there is none of this name.
    """
    if name not in choices:
        raise UserError(f"{key} is {name!r}: choose from {', '.join(sorted(choices))}")
    return choices[name]


def shared_settings(config: Config) -> dict[str, Any]:
    """The settings in which the edits of a batch must agree, by key."""
    return {key: value for key, _, value in walk(config) if key == "drag.features" or not key.startswith(_AN_EDITS_OWN)}
