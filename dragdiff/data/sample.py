"""One edit: a picture, what it shows, which points go where, and which part may change."""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import ExifTags, Image, ImageChops, ImageCms, UnidentifiedImageError

from dragdiff.errors import UserError, one_line

FilePath = str | os.PathLike[str]
ImageLike = NDArray | Image.Image | FilePath

MIN_SIDE = 16
"""Smallest width and height in px: two cells of the latent grid, below which nothing can be dragged."""

# Only decoders that read pixels themselves: some of the others start programs (EPS runs Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # by EXIF's numbers
_CONVERSION_ERRORS = (OSError, SyntaxError, ValueError)  # a rare mode, or a PIL image not decoded until now


@dataclass(frozen=True, init=False, eq=False, repr=False)
class EditSample:
    """One edit, checked once on construction; its arrays are read-only copies.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        prompt: what the picture shows; may be empty.
        points: (N, 2, 2) float32 in px of ``image``: pair, then (handle, target), then (x, y), with
            0 <= x < W and 0 <= y < H; N may be 0. A handle equal to its target is an anchor.
        mask: (H, W) bool, True where the image may change; None when all of it may.
        name: identifies the sample in messages and names its results.
    """

    image: NDArray[np.uint8]
    prompt: str
    points: NDArray[np.float32]
    mask: NDArray[np.bool_] | None
    name: str

    def __init__(
        self,
        image: ImageLike,
        prompt: str,
        points: ArrayLike,
        mask: ImageLike | None = None,
        name: str = "",
    ) -> None:
        """Accept the forms in which these things usually come.

        Args:
            image: a file (see `load_image`), a PIL image, or a uint8 array (H, W), (H, W, 3) or (H, W, 4).
                A file is turned upright by its EXIF tag; a PIL image is taken as its pixels lie. Both become sRGB.
            prompt: what the picture shows.
            points: ``[[[x, y], [x, y]], ...]``, or DragBench's flat ``[[x, y] handle, [x, y] target, ...]``;
                none for a method that needs none.
            mask: a file (see `load_mask`), a PIL image, or an array (H, W) of bools or of numbers in
                0..1, 0..255 or 0..65535, where more than half means that the pixel may change.
            name: any text.

        Raises:
            UserError: for anything that does not fit the description of the class.
        """
        pixels = _as_image(image)
        height, width = pixels.shape[:2]
        if min(height, width) < MIN_SIDE:
            raise UserError(f"the image is {width}x{height} px: each side needs at least {MIN_SIDE} px")
        _check_prompt(prompt)
        values = {
            "image": pixels,
            "prompt": prompt,
            "points": _as_points(points, width, height),
            "mask": None if mask is None else _as_mask(mask, width, height),
            "name": str(name),
        }
        for key, value in values.items():
            if isinstance(value, np.ndarray):
                value = value.copy()
                value.flags.writeable = False
            object.__setattr__(self, key, value)  # the usual way round `frozen` in a constructor

    def __repr__(self) -> str:
        mask = "no mask" if self.mask is None else f"{self.mask.mean():.0%} may change"
        pairs = f"{len(self.points)} pair{'' if len(self.points) == 1 else 's'}"
        return f"<EditSample {self.name!r}: {self.width} x {self.height} px, {self.prompt!r}, {pairs}, {mask}>"

    @property
    def width(self) -> int:
        """Width of the image in px."""
        return self.image.shape[1]

    @property
    def height(self) -> int:
        """Height of the image in px."""
        return self.image.shape[0]

    @property
    def handles(self) -> NDArray[np.float32]:
        """(N, 2) float32, (x, y) in px: where each pair starts."""
        return self.points[:, 0]

    @property
    def targets(self) -> NDArray[np.float32]:
        """(N, 2) float32, (x, y) in px: where each pair should end."""
        return self.points[:, 1]

    def doubts(self) -> list[str]:
        """What is allowed, but most likely not meant: a sentence for each."""
        doubts = []
        outside = [
            f"the {end} ({x:g}, {y:g}) of pair {number}"
            for number, pair in enumerate(self.points, 1)
            for end, (x, y) in zip(("handle", "target"), pair, strict=True)
            if self.mask is not None and not self.mask[int(y), int(x)] and (pair[0] != pair[1]).any()  # no anchor
        ]
        if outside:
            doubts.append(
                f"Outside of the mask's white, where nothing may change: {', '.join(outside)}. Is the mask inverted?"
            )
        if len(self.points) and self.points.max() <= 1:
            doubts.append("All points are within 1 px of the top left corner: give px, not shares of width and height.")
        return doubts

    def resized(self, max_size: int) -> EditSample:
        """The same edit on a picture whose longer side has at most ``max_size`` px; never enlarged.

        A point keeps its relative place (x / W, y / H); the mask is sampled by nearest neighbour.

        Args:
            max_size: longest side allowed in px; 0 = any.

        Raises:
            UserError: for a negative ``max_size``, or when the image or the mask gets too small.
        """
        if max_size < 0:
            raise UserError(f"max_size is {max_size}: give the longest side in px, or 0 for no limit")
        longer = max(self.width, self.height)
        if max_size == 0 or longer <= max_size:
            return self
        width, height = (max(1, round(side * max_size / longer)) for side in (self.width, self.height))
        if min(width, height) < MIN_SIDE:
            raise UserError(
                f"resized from {self.width}x{self.height} to {width}x{height} px the image gets too small: "
                f"each side needs at least {MIN_SIDE} px, use a larger max_size than {max_size}"
            )
        image = Image.fromarray(self.image).resize((width, height), Image.Resampling.LANCZOS)

        size = np.array([width, height], np.float32)
        points = (self.points * (size / [self.width, self.height])).astype(np.float32)
        points = np.minimum(points, np.nextafter(size, np.float32(0)))  # rounding may reach the edge

        mask = self.mask
        if mask is not None:
            rows = (np.arange(height) + 0.5) * self.height / height
            columns = (np.arange(width) + 0.5) * self.width / width
            mask = mask[np.ix_(rows.astype(int), columns.astype(int))]
            if not mask.any():
                raise UserError(
                    f"resized from {self.width}x{self.height} to {width}x{height} px the mask vanishes: "
                    f"draw it larger or use a larger max_size than {max_size}"
                )
        return EditSample(image, self.prompt, points, mask, self.name)


def load_image(path: FilePath) -> NDArray[np.uint8]:
    """Read a picture of any usual kind as (H, W, 3) uint8 RGB.

    It is turned upright by its EXIF tag; colours with a profile (Display P3, Adobe RGB, CMYK) become sRGB;
    transparency is laid over white; 16 bits become 8 by scaling. Damaged EXIF data and profiles are ignored.

    Raises:
        UserError: for a missing, unreadable, damaged or overlarge file, or one that is no picture.
    """
    return _rgb(_in_srgb(_open(path)), str(path))


def load_mask(path: FilePath) -> NDArray[np.bool_]:
    """Read a mask as (H, W) bool, True = editable: the pixels brighter than half of the full range.

    The full range is the smallest of 1, 255 and 65535 that holds the brightest pixel, so that masks of 0
    and 1 work too. Colours count by their luminance; transparency is laid over black.

    Raises:
        UserError: as `load_image` does.
    """
    return _editable(_levels(_open(path), str(path)), str(path))


def _open(path: FilePath) -> Image.Image:
    """Decode a file wholly and turn it upright."""
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist: check its path")
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file: give an image file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                image.load()
                return _upright(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path} has over {Image.MAX_IMAGE_PIXELS} pixels: use a smaller image") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path} is not an image: give one of the formats {', '.join(_FORMATS)}") from error
    except Exception as error:  # damaged data make decoders raise nearly anything
        raise UserError(f"{path} cannot be read as an image, it may be damaged: {one_line(error)}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # its EXIF data are damaged, its pixels are not
        turn = None
    return image.copy() if turn is None else image.transpose(turn)


def _in_srgb(image: Image.Image) -> Image.Image:
    """Colours as sRGB has them; as they are without a profile, or with one that is damaged or of another mode."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode[0] in "IF":
        return image
    try:
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        colours = image.convert("RGB") if image.mode in ("P", "PA", "RGBA") else image
        colours = colours.convert("L") if image.mode == "LA" else colours
        converted = ImageCms.profileToProfile(
            colours, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, *_CONVERSION_ERRORS):
        return image
    assert converted is not None
    change = ImageChops.difference(converted, colours.convert("RGB"))
    if np.asarray(change).max() <= 1:  # rounding: it is sRGB
        return image
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _rgb(image: Image.Image, name: str) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of an image of any mode; ``name`` is for messages."""
    save = "save it with 8 or 16 bits per channel"
    try:
        if image.mode == "F":
            raise UserError(f"{name} holds floating-point levels: {save}")
        if image.mode.startswith("I"):
            levels = np.asarray(image).astype(np.int64)
            if levels.min() < 0 or levels.max() > 65535:
                raise UserError(f"{name} holds levels outside 0..65535: {save}")
            image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))  # 65535 = 257 * 255, rounded
        return np.asarray(_over(image, "white").convert("RGB"))
    except _CONVERSION_ERRORS as error:
        raise UserError(f"{name} (mode {image.mode}) cannot be converted to RGB: {one_line(error)}") from error


def _levels(image: Image.Image, name: str) -> NDArray:
    """(H, W) grey levels of an image of any mode, in its own range."""
    try:
        if image.mode[0] in "IF":
            return np.asarray(image)
        return np.asarray(_over(image, "black").convert("L"))
    except _CONVERSION_ERRORS as error:
        raise UserError(f"{name} (mode {image.mode}) cannot be converted to grey: {one_line(error)}") from error


def _over(image: Image.Image, background: str) -> Image.Image:
    """Lay a (partly) transparent image over a plain colour."""
    if not image.has_transparency_data:
        return image
    base = Image.new("RGBA", image.size, background)
    base.alpha_composite(image.convert("RGBA"))
    return base.convert("RGB")


def _editable(levels: NDArray, name: str) -> NDArray[np.bool_]:
    """(H, W) bool of levels in 0..1, 0..255 or 0..65535: those above half of the range."""
    if levels.ndim != 2 or levels.dtype.kind not in "biuf" or levels.size == 0:
        given = f"{levels.dtype} of shape {levels.shape}"
        raise UserError(f"{name} is {given}: give bools or numbers of shape (height, width)")
    brightest = levels.max()
    for full in (1, 255, 65535):
        if brightest <= full:
            return levels > full / 2
    raise UserError(f"{name} goes up to {brightest}: give levels in 0..1, 0..255 or 0..65535")


def _as_image(image: ImageLike) -> NDArray[np.uint8]:
    if isinstance(image, str | os.PathLike):
        return load_image(image)
    if isinstance(image, Image.Image):
        return _rgb(_in_srgb(image), "the image")
    if not isinstance(image, np.ndarray):
        raise UserError(f"the image is a {type(image).__name__}: give a file, a PIL image or a uint8 array")
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4) or image.size == 0:
        given = f"{image.dtype} of shape {image.shape}"
        raise UserError(f"the image is {given}: give uint8 (0..255) of shape (height, width, 3)")
    return _rgb(Image.fromarray(image.squeeze(2) if image.shape[2:] == (1,) else image), "the image")


def _as_mask(mask: ImageLike, width: int, height: int) -> NDArray[np.bool_]:
    if isinstance(mask, str | os.PathLike):
        editable = load_mask(mask)
    elif isinstance(mask, Image.Image):
        editable = _editable(_levels(mask, "the mask"), "the mask")
    elif isinstance(mask, np.ndarray):
        editable = _editable(mask, "the mask")
    else:
        raise UserError(f"the mask is a {type(mask).__name__}: give a file, a PIL image, an array or None")
    if editable.shape != (height, width):
        raise UserError(
            f"the mask is {editable.shape[1]}x{editable.shape[0]} px and the image {width}x{height} px: "
            "they must be of one size"
        )
    if not editable.any():
        raise UserError("the mask marks nothing as editable (white): leave the mask out if the whole image may change")
    return editable


def _as_points(points: ArrayLike, width: int, height: int) -> NDArray[np.float32]:
    expected = "give pairs [[[x, y], [x, y]], ...], each a handle and its target, in px"
    if points is None:
        return np.zeros((0, 2, 2), np.float32)
    try:
        given = np.asarray(points)
    except (TypeError, ValueError, OverflowError) as error:  # lists of uneven lengths
        raise UserError(f"the points are malformed: {expected}") from error
    if given.ndim and len(given) == 0:
        return np.zeros((0, 2, 2), np.float32)
    if given.dtype.kind not in "iuf":
        raise UserError(f"the points are not all numbers: {expected}")
    if given.ndim == 2 and given.shape[1] == 2:
        if len(given) % 2:
            raise UserError(f"the number of points is odd ({len(given)}), the last has no target: {expected}")
        given = given.reshape(-1, 2, 2)
    if given.ndim != 3 or given.shape[1:] != (2, 2):
        raise UserError(f"the points are of shape {given.shape}: {expected}")

    with np.errstate(over="ignore"):
        pairs = given.astype(np.float32)  # checked after the rounding, so that what is kept is within bounds
    inside = (pairs >= 0) & (pairs < np.array([width, height], np.float32))  # False for NaN, too
    for pair, end in np.argwhere(~inside.all(axis=2)):
        x, y = given[pair, end].tolist()
        raise UserError(
            f"the {('handle', 'target')[end]} of pair {pair + 1} of {len(pairs)}, ({x}, {y}), lies outside "
            f"the image of {width}x{height} px: 0 <= x < {width} and 0 <= y < {height} are possible"
        )
    return pairs


def _check_prompt(prompt: str) -> None:
    if not isinstance(prompt, str):
        raise UserError(f"the prompt is a {type(prompt).__name__}: give text, it may be empty")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair: neither files nor tokenizers take it
        raise UserError(f"the prompt has a broken character at position {error.start}: remove it") from error
