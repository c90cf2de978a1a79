"""Procedural scenes with known truth: a small world that the embedded model can learn and drag edits can be judged in.

Two families of pictures are drawn from signed distances (numpy only, vectorised over scenes):

- *landscape*: a sun or moon in a day, dusk or night sky, one or two snowy mountains, mostly a tower, hilly ground;
- *room*: a ball, mostly a clock, often a second ball or a box, before a wall on a floor.

Each kind of edit moves one part: sun, mountain peak and ball go elsewhere, the tower grows or shrinks, the clock's hand
turns. Because a scene is re-rendered with that part moved, the edited picture and the points in it are known exactly.
Coordinates are (x, y) in px of a 128 x 128 picture, origin at the top left corner of the top left pixel, so that pixel
i has its centre at i + 0.5; other sizes scale.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from dragdiff.data.sample import EditSample
from dragdiff.errors import UserError

UNIT = 128  # the side of the picture that all parameters refer to
SOFTNESS = 1.5  # px over which an edge fades
ROOF = 18.0  # px: height of a tower's roof
SNOW = 14.0  # px: how far down from a peak the snow reaches
RENDER_CHUNK = 16  # scenes drawn at once: their canvases stay in the CPU's cache

Array = np.ndarray
Parameters = dict[str, Array]  # each (n,), float32 or int64

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.18, 0.16),
    "orange": (0.96, 0.52, 0.13),
    "yellow": (0.98, 0.85, 0.22),
    "green": (0.30, 0.62, 0.27),
    "blue": (0.20, 0.38, 0.80),
    "purple": (0.52, 0.27, 0.62),
    "brown": (0.50, 0.33, 0.20),
    "gray": (0.50, 0.52, 0.55),
    "black": (0.12, 0.12, 0.14),
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
DAYLIGHT = {"day": (1.0, 1.0, 1.0), "dusk": (0.95, 0.85, 0.82), "night": (0.62, 0.66, 0.78)}  # on all but the sky
SUNS = {"day": ("yellow", "orange"), "dusk": ("red", "yellow"), "night": ("white", "yellow")}
MOUNTAINS = ("gray", "brown", "purple", "blue")
GROUNDS = ("green", "sand", "brown")
TOWERS = ("gray", "white", "red", "blue")
ROOFS = ("brown", "purple", "green", "orange")
BALLS = ("red", "blue", "orange", "purple", "green")
STRIPES = ("", "white", "yellow")  # "": a ball without a stripe
FACES = ("white", "yellow", "pink")
HANDS = ("black", "red", "blue")
BOXES = ("brown", "green", "blue", "red")
WALLS = ("sand", "mint", "pink", "gray")
WALL_TEXTURES = ("", "striped", "panelled")  # "": plain
FLOORS = ("brown", "gray", "green")
FLOOR_TEXTURES = ("", "checked")
EXTRAS = ("", "ball", "box")  # what else is in the room

# words for where and how large a part is: (word, from, to) in px; between two of them none is said
COLUMNS = (("left", 0, 46), ("middle", 54, 74), ("right", 82, UNIT))
SUN_HEIGHTS = (("high", 0, 30), ("low", 38, UNIT))
BALL_HEIGHTS = (("high", 0, 48), ("low", 66, UNIT))
PEAK_HEIGHTS = (("high", 0, 44), ("low", 54, UNIT))
TOWER_HEIGHTS = (("tall", 0, 58), ("short", 68, UNIT))
RADII = (("small", 0, 14.5), ("large", 17, UNIT))
HOURS = (("up", -30, 30), ("right", 60, 120), ("down", 150, 210), ("left", 240, 300), ("up", 330, 390))  # degrees


@dataclass(frozen=True)
class Kind:
    """One kind of edit: which part of which family moves, and how far.

    An *amount* is what is added to the parameters named in `part`, in their unit: px, or radians for the hand.
    """

    family: str
    part: tuple[str, ...]
    length: tuple[float, float]  # of the way of the first handle, px
    bounds: dict[str, tuple[float, float]]  # where the moved parameters may go
    pairs: int  # at most so many point pairs


@dataclass(frozen=True)
class Scene:
    """One edit with its truth.

    Attributes:
        sample: what an editor is given: picture (S, S, 3), caption, one to three point pairs, mask.
        truth: the picture after the true edit, (S, S, 3) uint8.
        kind: name in `KINDS`.
        parameters: of the source, each with leading dimension 1.
        amount: (k,), what is truly added to the k parameters of the kind's part.
    """

    sample: EditSample
    truth: Array
    kind: str
    parameters: Parameters
    amount: Array

    @property
    def scale(self) -> float:
        """px of this picture per px of the 128 px picture."""
        return self.truth.shape[0] / UNIT


KINDS: dict[str, Kind] = {
    "sun": Kind("landscape", ("sun_x", "sun_y"), (8, 40), {"sun_x": (16, 112), "sun_y": (16, 56)}, pairs=1),
    "mountain": Kind("landscape", ("peak_x", "peak_y"), (8, 40), {"peak_x": (16, 112), "peak_y": (32, 70)}, pairs=3),
    "tower": Kind("landscape", ("top_y",), (8, 40), {"top_y": (32, 84)}, pairs=2),
    "ball": Kind("room", ("ball_x", "ball_y"), (8, 40), {"ball_x": (16, 112), "ball_y": (18, 108)}, pairs=1),
    "clock": Kind("room", ("hand",), (8, 28), {}, pairs=2),
}


# ------------------------------------------------------------------------------------------- shapes


def _grid(size: int) -> tuple[Array, Array]:
    """Pixel centres x (1, 1, S) and y (1, S, 1), in px of the 128 px picture."""
    centres = ((np.arange(size) + 0.5) * (UNIT / size)).astype(np.float32)
    return centres[None, None, :], centres[None, :, None]


def _column(values: Array) -> Array:
    return np.asarray(values, dtype=np.float32).reshape(-1, 1, 1)


def _coverage(distance: Array, softness: float = SOFTNESS) -> Array:
    """Signed distance (negative inside, px) to opacity in [0, 1]."""
    return np.clip(0.5 - distance / softness, 0.0, 1.0)


def _disc(p: Parameters, x: Array, y: Array, prefix: str) -> Array:
    return np.hypot(x - _column(p[f"{prefix}_x"]), y - _column(p[f"{prefix}_y"])) - _column(p[f"{prefix}_r"])


def _right_of(x: Array, y: Array, top: tuple[Array, Array], bottom: tuple[Array, Array]) -> Array:
    """Signed distance to the line from `top` to `bottom`, positive on its right."""
    edge_x, edge_y = bottom[0] - top[0], bottom[1] - top[1]
    return ((x - top[0]) * edge_y - (y - top[1]) * edge_x) / np.hypot(edge_x, edge_y)


def _base(p: Parameters) -> Array:
    """Where a mountain's feet are, hidden by the ground."""
    return _column(p["horizon"]) + 8


def _mountain(p: Parameters, x: Array, y: Array, suffix: str = "") -> Array:
    """A triangle from the peak to two fixed feet: the larger of its flanks' distances."""
    peak = _column(p[f"peak{suffix}_x"]), _column(p[f"peak{suffix}_y"])
    foot, half = _column(p[f"foot{suffix}_x"]), _column(p[f"foot{suffix}_half"])
    return np.maximum(_right_of(x, y, peak, (foot + half, _base(p))), -_right_of(x, y, peak, (foot - half, _base(p))))


def _box(x: Array, y: Array, centre_x: Array, half_width: Array, top: Array, bottom: Array) -> Array:
    return np.maximum(np.abs(x - centre_x) - half_width, np.maximum(top - y, y - bottom))


def _ground(p: Parameters, x: Array, y: Array) -> Array:
    """Below a gentle hill."""
    return _column(p["horizon"]) - _column(p["hill"]) * np.cos((x - _column(p["hill_x"])) / 28) - y


def _tower(p: Parameters, x: Array, y: Array) -> tuple[Array, Array]:
    """Signed distances of body and roof; far away where there is no tower."""
    centre, half, top = _column(p["tower_x"]), _column(p["tower_half"]), _column(p["top_y"])
    absent = 1000.0 * (1 - _column(p["tower"]))
    body = _box(x, y, centre, half, top, _column(p["horizon"]) + 12)
    slope = ROOF / (half + 4)
    roof = np.maximum((np.abs(x - centre) * slope - (y - (top - ROOF))) / np.hypot(1.0, slope), y - top)
    return body + absent, roof + absent


def _hand(p: Parameters, x: Array, y: Array) -> Array:
    """A bar with round ends from the clock's centre to the hand's tip."""
    length, angle = _column(p["hand_length"]), _column(p["hand"])
    dx, dy = x - _column(p["clock_x"]), y - _column(p["clock_y"])
    along = dx * np.sin(angle) - dy * np.cos(angle)
    across = dx * np.cos(angle) + dy * np.sin(angle)
    return np.hypot(across, along - np.clip(along, 0, length)) - 4.5


# ------------------------------------------------------------------------------------------- drawing


def _paint(canvas: Array, colour: Array, opacity: Array) -> None:
    canvas += (colour - canvas) * opacity[..., None]


def _rgb(red: float, green: float, blue: float) -> Array:
    return np.array([red, green, blue], dtype=np.float32)


def _colours(names: tuple[str, ...], index: Array) -> Array:
    return np.array([COLOURS.get(name, (0, 0, 0)) for name in names], dtype=np.float32)[index][:, None, None, :]


def _gradient(top: Array, bottom: Array, t: Array) -> Array:
    t = np.clip(t, 0.0, 1.0)[..., None]
    return top + (bottom - top) * t


def _wave(position: Array, period: float) -> Array:
    """A soft square wave in [0, 1]."""
    return np.clip(0.5 + 2.0 * np.sin(position * np.float32(2 * np.pi / period)), 0.0, 1.0)


def _sun_colour(p: Parameters) -> Array:
    table = np.array([[COLOURS[name] for name in SUNS[time]] for time in SKIES], np.float32)
    return table[p["time"], p["sun_colour"]][:, None, None, :]


def _draw_mountain(canvas: Array, p: Parameters, x: Array, y: Array, light: Array, suffix: str = "") -> None:
    """Two flanks, one in the shade, and snow with a jagged edge that the peak takes along."""
    rock, inside = _colours(MOUNTAINS, p[f"mountain{suffix}_colour"]), _mountain(p, x, y, suffix)
    peak = _column(p[f"peak{suffix}_x"]), _column(p[f"peak{suffix}_y"])
    ridge = _right_of(x, y, peak, (_column(p[f"foot{suffix}_x"]) + 8 * np.sin(_column(p["hill_x"])), _base(p)))
    shade = 1.08 - 0.30 * _coverage(_column(p["light"]) * ridge, 3.0)
    _paint(canvas, rock * light * shade[..., None], _coverage(inside))
    edge = peak[1] + SNOW + 3.0 * np.cos((x - peak[0]) * 0.7)
    snow = _coverage(np.maximum(inside, y - edge))
    _paint(canvas, _rgb(0.96, 0.97, 1.0) * light * (0.35 + 0.65 * shade[..., None]), snow)


def _render_landscape(p: Parameters, size: int) -> Array:
    x, y = _grid(size)
    top = np.array([SKIES[name][0] for name in SKIES], np.float32)[p["time"]][:, None, None, :]
    low = np.array([SKIES[name][1] for name in SKIES], np.float32)[p["time"]][:, None, None, :]
    light = np.array([DAYLIGHT[name] for name in SKIES], np.float32)[p["time"]][:, None, None, :]
    horizon, n = _column(p["horizon"]), len(p["time"])
    canvas = _gradient(top, low, np.broadcast_to(y / horizon, (n, size, 1)))
    canvas = np.ascontiguousarray(np.broadcast_to(canvas, (n, size, size, 3)))

    sun, sun_colour = _disc(p, x, y, "sun"), _sun_colour(p)
    _paint(canvas, sun_colour, 0.35 * np.clip(1.0 - sun / 8.0, 0.0, 1.0) ** 2)  # a halo
    _paint(canvas, sun_colour, _coverage(sun))
    core = sun + 0.5 * _column(p["sun_r"])
    _paint(canvas, np.minimum(sun_colour * 1.1 + 0.12, 1.0), 0.6 * _coverage(core, 4.0))

    second = p["mountains"] == 2
    if second.any():
        rows = {name: values[second] for name, values in p.items()}
        behind = canvas[second]
        _draw_mountain(behind, rows, x, y, light[second], "2")
        canvas[second] = behind
    _draw_mountain(canvas, p, x, y, light)

    ground = _ground(p, x, y)
    shade = 1.12 - 0.35 * np.clip(-ground / 36, 0, 1) + 0.05 * _wave(ground, 14.0)
    _paint(canvas, _colours(GROUNDS, p["ground_colour"]) * light * shade[..., None], _coverage(ground))

    if p["tower"].any():
        body, roof = _tower(p, x, y)
        centre, half, top_y = _column(p["tower_x"]), _column(p["tower_half"]), _column(p["top_y"])
        round_shade = 1.04 - 0.22 * np.clip(0.5 - _column(p["light"]) * (x - centre) / (2 * half), 0, 1)
        courses = 1.0 - 0.10 * _wave(y - _column(p["horizon"]), 16.0)
        stone = _colours(TOWERS, p["tower_colour"]) * light * (round_shade * courses)[..., None]
        _paint(canvas, stone, _coverage(body))
        window = _box(x, y, centre, _column(np.array(4.0)), top_y + 7, top_y + 18) + 1000.0 * (1 - _column(p["tower"]))
        _paint(canvas, _rgb(0.98, 0.90, 0.50), _coverage(window))
        _paint(canvas, _colours(ROOFS, p["roof_colour"]) * light * round_shade[..., None], _coverage(roof))
    return canvas


def _draw_ball(canvas: Array, p: Parameters, x: Array, y: Array, prefix: str, striped: bool) -> None:
    ball, radius = _disc(p, x, y, prefix), np.maximum(_column(p[f"{prefix}_r"]), 1.0)
    dx, dy = (x - _column(p[f"{prefix}_x"])) / radius, (y - _column(p[f"{prefix}_y"])) / radius
    light = 1.15 - 0.45 * np.clip((dy - _column(p["light"]) * dx) * 0.4 + 0.4, 0, 1)
    _paint(canvas, np.minimum(_colours(BALLS, p[f"{prefix}_colour"]) * light[..., None], 1.0), _coverage(ball))
    if striped:
        angle = _column(p["stripe_angle"])
        across = np.abs(dx * np.sin(angle) - dy * np.cos(angle)) * radius - 0.27 * radius
        across = across + 1000.0 * (_column(p["stripe"]) == 0)
        colour = _colours(STRIPES, p["stripe"]) * np.minimum(light, 1.0)[..., None]
        _paint(canvas, colour, _coverage(np.maximum(ball, across)))


def _render_room(p: Parameters, size: int) -> Array:
    x, y = _grid(size)
    horizon, n = _column(p["horizon"]), len(p["light"])
    bright = 1.0 + 0.10 * _column(p["light"]) * (x / 64 - 1)  # from the side of the window
    texture = _column(p["wall_texture"])
    pattern = 1.0 - 0.12 * np.where(texture == 1, _wave(x, 21.333), 0.0) - 0.02 * y / horizon
    pattern = pattern - 0.18 * np.where(texture == 2, _coverage(horizon - 22 - y), 0.0)
    canvas = _colours(WALLS, p["wall_colour"]) * np.broadcast_to(bright * pattern, (n, size, size))[..., None]

    depth = np.clip((y - horizon) / (UNIT - horizon), 0, 1)
    checks = (_wave(x - 64, 42.667) - 0.5) * (_wave(y - UNIT, 32.0) - 0.5)
    shade = 0.80 + 0.30 * depth + 0.36 * np.where(_column(p["floor_texture"]) == 1, checks, 0.0)
    floor = _colours(FLOORS, p["floor_colour"]) * (bright * shade)[..., None]
    _paint(canvas, floor, np.broadcast_to(_coverage(horizon - y), (n, size, size)))

    clock = p["clock"] == 1
    if clock.any():
        radius = _column(p["clock_r"])
        disc = _disc(p, x, y, "clock") + 1000.0 * (1 - _column(p["clock"]))
        hand_colour = _colours(HANDS, p["hand_colour"])
        _paint(canvas, hand_colour, _coverage(disc))
        _paint(canvas, _colours(FACES, p["face_colour"]), _coverage(disc + 4.0))
        dx, dy = np.abs(x - _column(p["clock_x"])), np.abs(y - _column(p["clock_y"]))
        marks = np.hypot(np.maximum(dx, dy) - (radius - 8.0), np.minimum(dx, dy)) - 2.0  # at 12, 3, 6 and 9
        _paint(canvas, hand_colour, _coverage(np.maximum(marks, disc)))
        hand = np.maximum(_hand(p, x, y), disc)
        _paint(canvas, hand_colour, _coverage(hand))

    box = EXTRAS.index("box")
    if (p["extra"] == box).any():
        absent = 1000.0 * (_column(p["extra"]) != box)
        centre, half, top = _column(p["box_x"]), _column(p["box_half"]), _column(p["box_y"])
        front = _box(x, y, centre, half, top, _column(p["box_foot"])) + absent
        colour = _colours(BOXES, p["box_colour"])
        side = 1.05 - 0.20 * np.clip(0.5 - _column(p["light"]) * (x - centre) / (2 * half), 0, 1)
        _paint(canvas, colour * side[..., None], _coverage(front))
        lid = np.minimum(colour * 1.25 + 0.10, 1.0)
        _paint(canvas, lid, _coverage(np.maximum(front, y - top - 6)))

    other = EXTRAS.index("ball")
    if (p["extra"] == other).any():
        rows = p | {"ball2_r": np.where(p["extra"] == other, p["ball2_r"], np.float32(-1000))}
        _draw_ball(canvas, rows, x, y, "ball2", striped=False)
    _draw_ball(canvas, p, x, y, "ball", striped=True)
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
    n = len(next(iter(parameters.values())))
    result = np.empty((n, size, size, 3), np.uint8)
    for start in range(0, n, RENDER_CHUNK):
        rows = {name: values[start : start + RENDER_CHUNK] for name, values in parameters.items()}
        canvas = RENDERERS[family](rows, size)
        result[start : start + RENDER_CHUNK] = np.clip(canvas, 0.0, 1.0) * 255.0 + 0.5
    return result


# ------------------------------------------------------------------------------------------- scenes


def _draw(family: str, rng: np.random.Generator, n: int) -> Parameters:
    """Parameters of n scenes, in which parts may hide each other."""

    def uniform(low: float | Array, high: float | Array) -> Array:
        return rng.uniform(low, high, n).astype(np.float32)

    def choice(names: tuple[str, ...]) -> Array:
        return rng.integers(len(names), size=n)

    def likely(chance: float) -> Array:
        return (rng.random(n) < chance).astype(np.int64)

    light = 2.0 * likely(0.5).astype(np.float32) - 1.0  # -1: from the left, 1: from the right
    if family == "landscape":
        foot_x, foot2_x = uniform(30, 98), uniform(14, 114)
        return {
            "light": light,
            "time": choice(tuple(SKIES)),
            "sun_colour": rng.integers(2, size=n),
            "sun_x": uniform(14, 114),
            "sun_y": uniform(14, 58),
            "sun_r": uniform(11, 20),
            "foot_x": foot_x,
            "foot_half": uniform(38, 58),
            "peak_x": np.clip(foot_x + uniform(-40, 40), 14, 114),
            "peak_y": uniform(30, 70),
            "mountain_colour": choice(MOUNTAINS),
            "mountains": 1 + likely(0.5),
            "foot2_x": foot2_x,
            "foot2_half": uniform(26, 42),
            "peak2_x": np.clip(foot2_x + uniform(-14, 14), 10, 118),
            "peak2_y": uniform(38, 66),
            "mountain2_colour": choice(MOUNTAINS),
            "horizon": uniform(94, 104),
            "hill": uniform(0, 4),
            "hill_x": uniform(0, 176),
            "ground_colour": choice(GROUNDS),
            "tower": likely(0.75),
            "tower_x": uniform(18, 110),
            "tower_half": uniform(9.5, 13.5),
            "top_y": uniform(32, 84),
            "tower_colour": choice(TOWERS),
            "roof_colour": choice(ROOFS),
        }
    clock_r, horizon = uniform(28, 34), uniform(88, 98)
    box_foot = horizon + uniform(8, 26)
    return {
        "light": light,
        "wall_colour": choice(WALLS),
        "wall_texture": choice(WALL_TEXTURES),
        "floor_colour": choice(FLOORS),
        "floor_texture": choice(FLOOR_TEXTURES),
        "horizon": horizon,
        "clock": likely(0.85),
        "clock_x": uniform(clock_r + 3, UNIT - 3 - clock_r),
        "clock_y": uniform(clock_r + 3, 56),
        "clock_r": clock_r,
        "hand": uniform(0, 2 * np.pi),
        "hand_length": clock_r * np.float32(0.80) - 4.5,
        "hand_colour": choice(HANDS),
        "face_colour": choice(FACES),
        "ball_x": uniform(16, 112),
        "ball_y": uniform(18, 110),
        "ball_r": uniform(12, 20),
        "ball_colour": choice(BALLS),
        "stripe": choice(STRIPES),
        "stripe_angle": uniform(-0.6, 0.6),
        "extra": choice(EXTRAS),
        "ball2_x": uniform(16, 112),
        "ball2_y": uniform(18, 110),
        "ball2_r": uniform(12, 20),
        "ball2_colour": choice(BALLS),
        "box_x": uniform(18, 110),
        "box_half": uniform(14, 22),
        "box_y": box_foot - uniform(26, 44),
        "box_foot": box_foot,
        "box_colour": choice(BOXES),
    }


def _apart(p: Parameters, one: str, other: str, gap: float) -> Array:
    """Whether two discs of each scene are at least `gap` px apart."""
    distance = np.hypot(p[f"{one}_x"] - p[f"{other}_x"], p[f"{one}_y"] - p[f"{other}_y"])
    return distance >= p[f"{one}_r"] + p[f"{other}_r"] + gap


def _same_colour(p: Parameters, one: tuple[str, tuple[str, ...]], other: tuple[str, tuple[str, ...]]) -> Array:
    """Whether two parts, each given with the colours that it may have, have the same one, (n,) bool."""
    names, other_names = (np.array(colours)[p[f"{part}_colour"]] for part, colours in (one, other))
    return names == other_names


def _clear(family: str, p: Parameters) -> Array:
    """Whether each part of each scene is seen well enough to be named and taken hold of, (n,) bool."""
    if family == "landscape":

        def at(x: str, y: str, dx: float = 0.0, dy: float = 0.0) -> tuple[Array, Array]:
            return _column(p[x]) + dx, _column(p[y]) + dy

        sun, peak, peak2 = at("sun_x", "sun_y"), at("peak_x", "peak_y", dy=8.0), at("peak2_x", "peak2_y", dy=6.0)
        two = _column(p["mountains"]) == 2
        clear = (_mountain(p, *sun) > 5) & (~two | (_mountain(p, *sun, "2") > 5))
        clear &= np.minimum(*_tower(p, *sun)) > 8
        clear &= np.minimum(*_tower(p, *peak)) > 8
        clear &= ~two | ((np.minimum(*_tower(p, *peak2)) > 4) & (_mountain(p, *peak2) > 6))
        clear &= ~two | (np.abs(peak[0] - peak2[0]) > 24)
        clear &= np.abs(peak[0] - _column(p["foot_x"])) < _column(p["foot_half"]) - 4  # no overhang
        clear = clear[:, 0, 0]
        clear &= (p["mountains"] == 1) | (p["mountain_colour"] != p["mountain2_colour"])
        return clear & ~_same_colour(p, ("mountain", MOUNTAINS), ("ground", GROUNDS))
    extra = p["extra"]
    clock, ball2, box = p["clock"] == 1, extra == EXTRAS.index("ball"), extra == EXTRAS.index("box")
    clear = ~clock | (_apart(p, "ball", "clock", -5) & ~_same_colour(p, ("face", FACES), ("wall", WALLS)))
    clear &= ~ball2 | (_apart(p, "ball", "ball2", 3) & (p["ball_colour"] != p["ball2_colour"]))
    clear &= ~(ball2 & clock) | _apart(p, "ball2", "clock", -5)
    clear &= ~ball2 | ~_same_colour(p, ("ball2", BALLS), ("floor", FLOORS))
    beside = np.abs(p["clock_x"] - p["box_x"]) > p["clock_r"] + p["box_half"]
    clear &= ~(box & clock) | beside | (p["box_y"] > p["clock_y"] + p["clock_r"] - 3)
    in_box = np.abs(p["ball_x"] - p["box_x"]) < p["box_half"]
    in_box &= (p["ball_y"] > p["box_y"] + 4) & (p["ball_y"] < p["box_foot"])
    clear &= ~_same_colour(p, ("ball", BALLS), ("floor", FLOORS))
    alike = _same_colour(p, ("box", BOXES), ("floor", FLOORS)) | _same_colour(p, ("box", BOXES), ("ball", BALLS))
    return clear & ~(box & (in_box | alike))


def sample_parameters(family: str, rng: np.random.Generator, n: int) -> Parameters:
    """Draw the parameters of n scenes of a family in which all parts are well seen."""
    parameters = _draw(family, rng, n)
    while (hidden := np.flatnonzero(~_clear(family, parameters))).size:
        for name, values in _draw(family, rng, len(hidden)).items():
            parameters[name][hidden] = values
    return parameters


def _word(value: float, words: tuple[tuple[str, float, float], ...]) -> str:
    return next((word for word, low, high in words if low <= value < high), "")


def _place(x: float, height: str = "") -> str:
    """E.g. "high on the left"; between two words, what is sure is said alone."""
    column = _word(x, COLUMNS)
    side = f"in the {column}" if column == "middle" else f"on the {column}" if column else ""
    return " ".join(word for word in (height, side) if word)


def _phrase(*words: str) -> str:
    """A noun phrase with its article; empty words fall away."""
    text = " ".join(word for word in words if word)
    return f"an {text}" if text[0] in "aeiou" else f"a {text}"


def caption(family: str, parameters: Parameters, index: int = 0, layout: bool = True) -> str:
    """The prompt of scene `index`.

    Args:
        layout: say where the parts are, how high, and where the hand points: what edits change. Without it, parts,
            colours and sizes alone are named, which hold before and after an edit.
    """
    p = {name: values[index] for name, values in parameters.items()}

    def place(x: float, height: str = "") -> str:
        return _place(x, height) if layout else ""

    def word(value: float, words: tuple[tuple[str, float, float], ...]) -> str:
        return _word(value, words) if layout else ""

    if family == "landscape":
        time = tuple(SKIES)[p["time"]]
        disc = "moon" if time == "night" else "sun"
        sun_place = place(p["sun_x"], word(p["sun_y"], SUN_HEIGHTS))
        text = _phrase(_word(p["sun_r"], RADII), SUNS[time][p["sun_colour"]], disc, sun_place, f"in a {time} sky")
        for suffix, joint in (("", " above "), ("2", ", ")):
            if suffix and p["mountains"] == 1:
                continue
            height = word(p[f"peak{suffix}_y"], PEAK_HEIGHTS)
            colour = MOUNTAINS[p[f"mountain{suffix}_colour"]]
            text += joint + _phrase(height, colour, "mountain", place(p[f"peak{suffix}_x"]))
        if p["tower"]:
            height, colour, roof = word(p["top_y"], TOWER_HEIGHTS), TOWERS[p["tower_colour"]], ROOFS[p["roof_colour"]]
            text += ", " + _phrase(height, colour, "tower with", _phrase(roof, "roof"), place(p["tower_x"]))
        return f"{text}, {GROUNDS[p['ground_colour']]} ground"

    stripe, extra = STRIPES[p["stripe"]], EXTRAS[p["extra"]]
    ball = f"ball with a {stripe} stripe" if stripe else "ball"
    ball_place = place(p["ball_x"], word(p["ball_y"], BALL_HEIGHTS))
    text = _phrase(_word(p["ball_r"], RADII), BALLS[p["ball_colour"]], ball, ball_place)
    if extra == "ball":
        ball_place = place(p["ball2_x"], word(p["ball2_y"], BALL_HEIGHTS))
        text += ", " + _phrase(_word(p["ball2_r"], RADII), BALLS[p["ball2_colour"]], "ball", ball_place)
    if extra == "box":
        text += ", " + _phrase(BOXES[p["box_colour"]], "box", place(p["box_x"]))
    if p["clock"]:
        direction = word(float(np.rad2deg(p["hand"]) % 360), HOURS)
        hand = " ".join(w for w in ("hand", "pointing" if direction else "", direction) if w)
        text += ", " + _phrase(
            FACES[p["face_colour"]], "clock with", _phrase(HANDS[p["hand_colour"]], hand), place(p["clock_x"])
        )
    wall = " ".join(w for w in (WALL_TEXTURES[p["wall_texture"]], WALLS[p["wall_colour"]], "wall") if w)
    floor = " ".join(w for w in (FLOOR_TEXTURES[p["floor_texture"]], FLOORS[p["floor_colour"]], "floor") if w)
    return f"{text}, {wall}, {floor}"


def moved(kind: str, parameters: Parameters, amount: Array) -> Parameters:
    """The parameters after the kind's part has moved.

    Args:
        amount: (k,), or (m, k) for m versions of the one scene in `parameters`.
    """
    spec = KINDS[kind]
    amount = np.asarray(amount, dtype=np.float32).reshape(-1, len(spec.part))
    n = len(amount)
    result = {name: np.repeat(values, n, axis=0) if len(values) == 1 else values for name, values in parameters.items()}
    for column, name in enumerate(spec.part):
        result[name] = result[name] + amount[:, column]
    return result


def removed(kind: str, parameters: Parameters) -> Parameters:
    """The parameters of the scenes without the kind's part."""
    nothing = {
        "sun": {"sun_r": -1000.0},
        "mountain": {"peak_y": 2.0 * UNIT},
        "tower": {"tower": 0},
        "ball": {"ball_r": -1000.0},
        "clock": {"hand_length": -1000.0},
    }[kind]
    return parameters | {name: np.full_like(parameters[name], value) for name, value in nothing.items()}


def handles(kind: str, parameters: Parameters) -> Array:
    """Points of the kind's part that a person would take hold of, the first the surest; they move with the part.

    Returns:
        (n, pairs, 2), (x, y) in px of the 128 px picture.
    """
    p = parameters
    if kind in ("sun", "ball"):
        points = [(p[f"{kind}_x"], p[f"{kind}_y"])]
    elif kind == "mountain":  # below the peak, then half-way down either flank
        base, peak_x, peak_y = p["horizon"] + 8, p["peak_x"], p["peak_y"]
        points = [(peak_x, peak_y + 6)]
        for side in (-1, 1):
            foot = p["foot_x"] + side * p["foot_half"]
            points.append((peak_x + 0.4 * (foot - peak_x) - side * 4, peak_y + 0.4 * (base - peak_y)))
    elif kind == "tower":  # where the roof meets the wall, then the window
        points = [(p["tower_x"], p["top_y"] - 2), (p["tower_x"], p["top_y"] + 12)]
    else:  # near the hand's tip, then half-way
        points = [
            (
                p["clock_x"] + share * p["hand_length"] * np.sin(p["hand"]),
                p["clock_y"] - share * p["hand_length"] * np.cos(p["hand"]),
            )
            for share in (1.0, 0.55)
        ]
    return np.stack([np.stack(point, axis=-1) for point in points], axis=1)


def part_coverage(kind: str, parameters: Parameters, size: int = UNIT) -> Array:
    """Where the moving part of each scene is and nothing that stands still hides it, (n, size, size) bool."""
    x, y = _grid(size)
    if kind in ("sun", "ball"):
        return _disc(parameters, x, y, kind) < 0
    if kind == "clock":
        return _hand(parameters, x, y) < 0
    tower = np.minimum(*_tower(parameters, x, y)) < 0
    if kind == "tower":
        return tower
    return (_mountain(parameters, x, y) < 0) & (_ground(parameters, x, y) > 0) & ~tower


def _draw_edit(kind: str, rng: np.random.Generator) -> tuple[Parameters, Array] | None:
    """Parameters and amount of one edit, or None when this draw breaks a rule of its kind."""
    spec = KINDS[kind]
    parameters = sample_parameters(spec.family, rng, 1)
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(*spec.length)
    sign = 1.0 if angle < np.pi else -1.0
    if kind == "tower":
        amount = np.array([sign * length])
    elif kind == "clock":  # `length` is the chord that the tip's way spans
        half = length / (2 * parameters["hand_length"][0])
        if half > np.sin(np.pi / 4):  # more than a quarter turn: a straight pull would pass the centre
            return None
        amount = np.array([sign * 2 * np.arcsin(half)])
    else:
        amount = np.array([np.cos(angle), np.sin(angle)]) * length
    if (kind == "tower" and not parameters["tower"][0]) or (kind == "clock" and not parameters["clock"][0]):
        return None
    amount = amount.astype(np.float32)
    ends = moved(kind, parameters, np.stack([np.zeros_like(amount), amount]))
    for name, (low, high) in spec.bounds.items():
        if ends[name].min() < low or ends[name].max() > high:
            return None
    return (parameters, amount) if _clear(spec.family, ends).all() else None


def named_scene(name: str) -> Scene:
    """The scene of 128 px that a name such as "sun-2000" means.

    Raises:
        UserError: it means none.
    """
    kind, _, seed = name.rpartition("-")
    if kind not in KINDS or not (seed.isascii() and seed.isdigit()):
        raise UserError(f"no scene {name!r}: give KIND-SEED with a kind of {', '.join(KINDS)}, e.g. sun-2000")
    return make_scene(kind, int(seed))


def make_scene(kind: str, seed: int, size: int = UNIT, layout: bool = False) -> Scene:
    """The scene of a kind and seed: the same on every machine.

    Args:
        kind: one of `KINDS`.
        seed: any non-negative integer.
        size: side of the picture in px.
        layout: whether the caption says where the parts of the source are.
    """
    spec = KINDS[kind]
    rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
    while (drawn := _draw_edit(kind, rng)) is None:
        pass
    parameters, amount = drawn
    pairs = int(rng.integers(1, spec.pairs + 1))
    scale = size / UNIT
    ends = moved(kind, parameters, np.stack([np.zeros_like(amount), amount]))
    path = moved(kind, parameters, np.linspace(0, 1, 9)[:, None] * amount)
    swept = part_coverage(kind, path, size).any(axis=0)
    margin = 2 * round(6 * scale) + 1
    mask = np.array(Image.fromarray(swept).convert("L").filter(ImageFilter.MaxFilter(margin))) > 127
    source, truth = render(spec.family, ends, size)
    limit = np.nextafter(np.float32(size), np.float32(0))
    points = np.clip(handles(kind, ends)[:, :pairs].transpose(1, 0, 2) * scale, 0, limit)
    prompt = caption(spec.family, parameters, layout=layout)
    sample = EditSample(source, prompt, points.tolist(), mask, name=f"{kind}-{seed}")
    return Scene(sample, truth, kind, parameters, amount)
