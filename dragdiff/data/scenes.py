"""Procedural scenes with known truth: a small world that the embedded model can learn and drag edits can be judged in.

Two families of pictures are drawn from signed distances (numpy only, vectorised over scenes):

- *landscape*: a sun or moon in a day, dusk or night sky, behind a snow-capped mountain on flat ground;
- *room*: a striped ball and a tower before a wall, on a floor.

Each kind of edit moves one part: the sun goes to another place in the sky, the tower grows or shrinks. Because a
scene is re-rendered with that part moved, the edited picture and the points in it are known exactly. Coordinates are
(x, y) in px of a 64 x 64 picture, origin at the top left corner of the top left pixel, so that pixel i has its centre
at i + 0.5; other sizes scale.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from dragdiff.data.sample import EditSample
from dragdiff.errors import UserError

UNIT = 64  # the side of the picture that all parameters refer to

Array = np.ndarray
Parameters = dict[str, Array]  # each (n,) or (n, k), float32 or int64

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.18, 0.16),
    "orange": (0.96, 0.52, 0.13),
    "yellow": (0.98, 0.85, 0.22),
    "green": (0.30, 0.62, 0.27),
    "blue": (0.20, 0.38, 0.80),
    "purple": (0.52, 0.27, 0.62),
    "brown": (0.50, 0.33, 0.20),
    "gray": (0.50, 0.52, 0.55),
    "white": (0.95, 0.95, 0.97),
    "sand": (0.86, 0.75, 0.52),
    "pink": (0.95, 0.68, 0.72),
    "mint": (0.70, 0.88, 0.78),
}
SKIES: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {  # top, horizon
    "day": ((0.30, 0.58, 0.92), (0.76, 0.89, 0.98)),
    "dusk": ((0.36, 0.25, 0.50), (0.97, 0.66, 0.50)),
    "night": ((0.03, 0.04, 0.15), (0.15, 0.18, 0.36)),
}
SUNS = {"day": ("yellow", "orange"), "dusk": ("red", "yellow"), "night": ("white",)}
MOUNTAINS = ("gray", "brown", "purple", "blue")
GROUNDS = ("green", "sand", "brown")
BALLS = ("red", "blue", "orange", "purple", "green")
STRIPES = ("white", "yellow")
TOWERS = ("gray", "brown", "red", "blue")
ROOFS = ("red", "purple", "brown", "green")
WALLS = ("sand", "mint", "pink", "gray")
FLOORS = ("brown", "gray", "green")


@dataclass(frozen=True)
class Kind:
    """One kind of edit: which part of which family moves, and how far."""

    family: str
    part: tuple[str, ...]  # the parameters that a displacement (dx, dy) is added to, in this order
    axes: tuple[int, ...]  # which of (dx, dy) each of them takes
    length: tuple[float, float]  # the drag's length, px
    anchor: tuple[str, str]  # the parameters that say where the part is, x and y
    grip: tuple[float, float]  # handle relative to the anchor, px: where a person would take hold
    bounds: dict[str, tuple[float, float]]  # where the moved parameters may go, px


@dataclass(frozen=True)
class Scene:
    """One edit with its truth.

    Attributes:
        sample: what an editor is given: picture (S, S, 3), caption, one point pair, mask.
        truth: the picture after the true edit, (S, S, 3) uint8.
        kind: name in `KINDS`.
        parameters: of the source, each with leading dimension 1.
        displacement: the true (dx, dy) in units of the 64 px picture.
    """

    sample: EditSample
    truth: Array
    kind: str
    parameters: Parameters
    displacement: Array


KINDS: dict[str, Kind] = {
    "sun": Kind(
        family="landscape",
        part=("sun_x", "sun_y"),
        axes=(0, 1),
        length=(8, 18),
        anchor=("sun_x", "sun_y"),
        grip=(0, 0),
        bounds={"sun_x": (11, 53), "sun_y": (11, 24)},
    ),
    "tower": Kind(
        family="room",
        part=("top_y",),
        axes=(1,),
        length=(7, 14),
        anchor=("tower_x", "top_y"),
        grip=(0, 3),
        bounds={"top_y": (14, 40)},
    ),
}


# ------------------------------------------------------------------------------------------- drawing


def _grid(size: int) -> tuple[Array, Array]:
    """Pixel centres x (1, 1, S) and y (1, S, 1), in px of the 64 px picture."""
    centres = ((np.arange(size) + 0.5) * (UNIT / size)).astype(np.float32)
    return centres[None, None, :], centres[None, :, None]


def _column(values: Array) -> Array:
    return np.asarray(values, dtype=np.float32).reshape(-1, 1, 1)


def _coverage(distance: Array, softness: float = 1.0) -> Array:
    """Signed distance (negative inside, px) to opacity in [0, 1]."""
    return np.clip(0.5 - distance / softness, 0.0, 1.0)


def _disc(p: Parameters, x: Array, y: Array, prefix: str) -> Array:
    return np.hypot(x - _column(p[f"{prefix}_x"]), y - _column(p[f"{prefix}_y"])) - _column(p[f"{prefix}_r"])


def _mountain(p: Parameters, x: Array, y: Array) -> Array:
    """A triangle from the peak to two fixed feet: the larger of its flanks' distances; the ground hides the base."""
    peak_x, peak_y = _column(p["peak_x"]), _column(p["peak_y"])

    def flank(side: float) -> Array:
        edge_x = _column(p["foot_x"]) + side * _column(p["foot_width"]) - peak_x
        edge_y = _column(p["horizon"]) + 2 - peak_y
        return side * ((x - peak_x) * edge_y - (y - peak_y) * edge_x) / np.hypot(edge_x, edge_y)

    return np.maximum(flank(-1.0), flank(1.0))


def _box(x: Array, y: Array, centre_x: Array, half_width: Array, top: Array, bottom: Array) -> Array:
    return np.maximum(np.abs(x - centre_x) - half_width, np.maximum(top - y, y - bottom))


def _tower(p: Parameters, x: Array, y: Array) -> tuple[Array, Array]:
    """Signed distances of body and roof."""
    centre, half, top = _column(p["tower_x"]), _column(p["tower_half"]), _column(p["top_y"])
    body = _box(x, y, centre, half, top, _column(p["horizon"]) + 5)
    roof_slope = 9.0 / (half + 2)
    roof = np.maximum((np.abs(x - centre) * roof_slope - (y - (top - 9.0))) / np.hypot(1.0, roof_slope), y - top)
    return body, roof


def _paint(canvas: Array, colour: Array, opacity: Array) -> None:
    canvas += (colour - canvas) * opacity[..., None]


def _rgb(red: float, green: float, blue: float) -> Array:
    return np.array([red, green, blue], dtype=np.float32)


def _colours(names: tuple[str, ...], index: Array) -> Array:
    return np.array([COLOURS[name] for name in names], dtype=np.float32)[index][:, None, None, :]


def _gradient(top: Array, bottom: Array, t: Array) -> Array:
    t = np.clip(t, 0.0, 1.0)[..., None]
    return top + (bottom - top) * t


def _render_landscape(p: Parameters, size: int) -> Array:
    x, y = _grid(size)
    top = np.array([SKIES[name][0] for name in SKIES], np.float32)[p["time"]][:, None, None, :]
    horizon_colour = np.array([SKIES[name][1] for name in SKIES], np.float32)[p["time"]][:, None, None, :]
    horizon = _column(p["horizon"])
    canvas = _gradient(top, horizon_colour, np.broadcast_to(y / horizon, (len(horizon), size, 1)))
    canvas = np.ascontiguousarray(np.broadcast_to(canvas, (len(horizon), size, size, 3)))

    suns = [SUNS[name] for name in SKIES]
    sun_colour = np.array(
        [COLOURS[suns[t][c % len(suns[t])]] for t, c in zip(p["time"], p["sun_colour"], strict=True)],
        np.float32,
    )[:, None, None, :]
    sun = _disc(p, x, y, "sun")
    _paint(canvas, sun_colour, 0.35 * np.clip(1.0 - (sun - 0.5) / 3.0, 0.0, 1.0) ** 2)  # a halo
    _paint(canvas, sun_colour, _coverage(sun))
    radius = _column(p["sun_r"])
    core = np.hypot(x - _column(p["sun_x"]), y - _column(p["sun_y"])) - 0.45 * radius
    _paint(canvas, np.minimum(sun_colour * 1.1 + 0.12, 1.0), 0.6 * _coverage(core, 2.0))

    mountain = _mountain(p, x, y)
    _paint(canvas, _colours(MOUNTAINS, p["mountain_colour"]), _coverage(mountain))
    snow = np.maximum(mountain, y - _column(p["peak_y"]) - 9.0)
    _paint(canvas, _rgb(0.96, 0.97, 1.0), _coverage(snow))

    ground = _colours(GROUNDS, p["ground_colour"])
    shade = 1.1 - 0.35 * np.clip((y - horizon) / (UNIT - horizon), 0, 1)
    _paint(canvas, ground * shade[..., None], np.broadcast_to(_coverage(horizon - y), canvas.shape[:3]))
    return canvas


def _render_room(p: Parameters, size: int) -> Array:
    x, y = _grid(size)
    horizon = _column(p["horizon"])
    wall = _colours(WALLS, p["wall_colour"])
    canvas = _gradient(wall * 1.05, wall * 0.85, np.broadcast_to(y / horizon, (len(horizon), size, 1)))
    canvas = np.ascontiguousarray(np.broadcast_to(canvas, (len(horizon), size, size, 3)))
    floor = _colours(FLOORS, p["floor_colour"])
    shade = 0.75 + 0.35 * np.clip((y - horizon) / (UNIT - horizon), 0, 1)
    _paint(canvas, floor * shade[..., None], np.broadcast_to(_coverage(horizon - y), canvas.shape[:3]))

    body, roof = _tower(p, x, y)
    tower_colour = _colours(TOWERS, p["tower_colour"])
    _paint(canvas, tower_colour, _coverage(body))
    centre, top = _column(p["tower_x"]), _column(p["top_y"])
    window = _box(x, y, centre, _column(np.array(2.5)), top + 4, top + 10)
    _paint(canvas, _rgb(0.98, 0.93, 0.60), _coverage(window))
    _paint(canvas, _colours(ROOFS, p["roof_colour"]), _coverage(roof))

    ball = _disc(p, x, y, "ball")
    ball_colour = _colours(BALLS, p["ball_colour"])
    dx, dy = x - _column(p["ball_x"]), y - _column(p["ball_y"])
    light = 1.12 - 0.30 * np.clip((dx + dy) / (2 * _column(p["ball_r"])) + 0.5, 0, 1)
    _paint(canvas, np.minimum(ball_colour * light[..., None], 1.0), _coverage(ball))
    angle = _column(p["stripe_angle"])
    across = np.abs(dx * np.sin(angle) - dy * np.cos(angle)) - 3.0
    stripe = _colours(STRIPES, p["stripe_colour"]) * np.minimum(light, 1.0)[..., None]
    _paint(canvas, stripe, _coverage(np.maximum(ball, across)))
    return canvas


RENDERERS: dict[str, Callable[[Parameters, int], Array]] = {
    "landscape": _render_landscape,
    "room": _render_room,
}


def render(family: str, parameters: Parameters, size: int = UNIT) -> Array:
    """Draw n scenes.

    Returns:
        (n, size, size, 3) uint8.
    """
    return (np.clip(RENDERERS[family](parameters, size), 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


# ------------------------------------------------------------------------------------------- scenes


def sample_parameters(family: str, rng: np.random.Generator, n: int) -> Parameters:
    """Draw the parameters of n scenes of a family.

    Returns:
        By name, (n,) each: positions and sizes in px of the 64 px picture, colours as places in their lists.
    """

    def uniform(low: float, high: float) -> Array:
        return rng.uniform(low, high, n).astype(np.float32)

    def choice(names: tuple[str, ...]) -> Array:
        return rng.integers(len(names), size=n)

    if family == "landscape":
        return {
            "time": rng.integers(len(SKIES), size=n),
            "sun_colour": rng.integers(2, size=n),
            "sun_x": uniform(10, 54),
            "sun_y": uniform(10, 26),
            "sun_r": uniform(9.5, 11.0),
            "peak_x": uniform(12, 52),
            "peak_y": uniform(18, 42),
            "foot_x": uniform(26, 38),
            "foot_width": uniform(24, 30),
            "mountain_colour": choice(MOUNTAINS),
            "horizon": uniform(50, 55),
            "ground_colour": choice(GROUNDS),
        }
    left = rng.random(n) < 0.5
    tower_x, tower_half, ball_r = uniform(10, 14), uniform(6, 8), uniform(10, 11.5)
    ball_x = uniform(0, 1) * (UNIT - 1 - ball_r - (tower_x + 16)) + tower_x + 16
    return {
        "wall_colour": choice(WALLS),
        "floor_colour": choice(FLOORS),
        "horizon": uniform(44, 50),
        "tower_x": np.where(left, tower_x, UNIT - tower_x).astype(np.float32),
        "tower_half": tower_half,
        "top_y": uniform(12, 42),
        "tower_colour": choice(TOWERS),
        "roof_colour": choice(ROOFS),
        "ball_x": np.where(left, ball_x, UNIT - ball_x).astype(np.float32),
        "ball_y": uniform(11, 50),
        "ball_r": ball_r,
        "ball_colour": choice(BALLS),
        "stripe_colour": choice(STRIPES),
        "stripe_angle": uniform(0, np.pi),
    }


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def caption(family: str, parameters: Parameters, index: int = 0) -> str:
    """The prompt of scene `index`.

    Returns:
        The parts and their colours by name; never where they are.
    """
    p = {name: values[index] for name, values in parameters.items()}
    if family == "landscape":
        time = tuple(SKIES)[p["time"]]
        colours = SUNS[time]
        disc = "moon" if time == "night" else "sun"
        sun = colours[p["sun_colour"] % len(colours)]
        return (
            f"{_a(sun)} {disc} in a {time} sky over a "
            f"{MOUNTAINS[p['mountain_colour']]} mountain and {GROUNDS[p['ground_colour']]} ground"
        )
    return (
        f"{_a(BALLS[p['ball_colour']])} ball with a {STRIPES[p['stripe_colour']]} stripe and a "
        f"{TOWERS[p['tower_colour']]} tower with a {ROOFS[p['roof_colour']]} roof in a room with a "
        f"{WALLS[p['wall_colour']]} wall and {FLOORS[p['floor_colour']]} floor"
    )


def moved(kind: str, parameters: Parameters, displacement: Array) -> Parameters:
    """The parameters after the kind's part has moved by (dx, dy) in px of the 64 px picture.

    Args:
        displacement: (2,), or (m, 2) for m versions of the one scene in `parameters`.
    """
    displacement = np.asarray(displacement, dtype=np.float32).reshape(-1, 2)
    n = len(displacement)
    result = {name: np.repeat(values, n, axis=0) if len(values) == 1 else values for name, values in parameters.items()}
    for name, axis in zip(KINDS[kind].part, KINDS[kind].axes, strict=True):
        result[name] = result[name] + displacement[:, axis]
    return result


def part_coverage(kind: str, parameters: Parameters, size: int = UNIT) -> Array:
    """Where the moving part of each scene is.

    Returns:
        (n, size, size) bool.
    """
    x, y = _grid(size)
    distance = _disc(parameters, x, y, "sun") if kind == "sun" else np.minimum(*_tower(parameters, x, y))
    return distance < 0


def _draw_edit(kind: str, rng: np.random.Generator) -> tuple[Parameters, Array] | None:
    """Parameters and displacement of one edit, or None when this draw breaks a rule of its kind."""
    spec = KINDS[kind]
    parameters = sample_parameters(spec.family, rng, 1)
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(*spec.length)
    displacement = np.array([np.cos(angle), np.sin(angle)], np.float32) * np.float32(length)
    if kind == "tower":
        displacement = np.array([0, np.sign(displacement[1]) * length], np.float32)
    ends = moved(kind, parameters, np.stack([np.zeros(2), displacement]))
    for name, (low, high) in spec.bounds.items():
        if ends[name].min() < low or ends[name].max() > high:
            return None
    if kind == "sun":  # the middle of the disc stays visible
        centre_distance = _mountain(ends, _column(ends["sun_x"]), _column(ends["sun_y"]))
        if (centre_distance < 4).any():
            return None
    return parameters, displacement


def named_scene(name: str) -> Scene:
    """The scene of 64 px that a name such as "sun-2000" means.

    Raises:
        UserError: it means none.
    """
    kind, _, seed = name.rpartition("-")
    if kind not in KINDS or not (seed.isascii() and seed.isdigit()):
        raise UserError(f"no scene {name!r}: give KIND-SEED with a kind of {', '.join(KINDS)}, e.g. sun-2000")
    return make_scene(kind, int(seed))


def make_scene(kind: str, seed: int, size: int = UNIT) -> Scene:
    """The scene of a kind and seed: the same on every machine.

    Args:
        kind: one of `KINDS`.
        seed: any non-negative integer.
        size: side of the picture in px.
    """
    spec = KINDS[kind]
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
    while (drawn := _draw_edit(kind, rng)) is None:
        pass
    parameters, displacement = drawn
    scale = size / UNIT
    handle = np.array([parameters[name][0] for name in spec.anchor]) + np.array(spec.grip)
    path = moved(kind, parameters, np.linspace(0, 1, 9)[:, None] * displacement)
    swept = part_coverage(kind, path, size).any(axis=0)
    margin = 2 * round(3 * scale) + 1
    mask = np.array(Image.fromarray(swept).convert("L").filter(ImageFilter.MaxFilter(margin))) > 127
    source, truth = render(spec.family, moved(kind, parameters, np.stack([np.zeros(2), displacement])), size)
    limit = np.nextafter(np.float32(size), np.float32(0))
    points = np.clip(np.stack([handle, handle + displacement]) * scale, 0, limit)
    sample = EditSample(source, caption(spec.family, parameters), [points.tolist()], mask, name=f"{kind}-{seed}")
    return Scene(sample, truth, kind, parameters, displacement)
