"""Samples: reading, checking, resizing and converting them, and what must be refused."""

import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from dragdiff import methods
from dragdiff.data import safe_pickle
from dragdiff.data.readers import (
    convert,
    find_samples,
    read_drag100,
    read_dragbench,
    read_folder,
    read_sample,
    read_sde_drag,
    sample_names,
    write_dragbench,
    write_folder,
)
from dragdiff.data.safe_pickle import PickledArray, load_pickle
from dragdiff.data.sample import EditSample, load_image, load_mask
from dragdiff.errors import UserError

SAMPLES = Path(__file__).parent / "data" / "samples"
BIRD = SAMPLES / "dragbench" / "animals" / "JH_2023-09-14-1839-58"
NEBULA = SAMPLES / "drag100" / "nature_10"
PAIR = [[[3, 4], [10, 12]]]


def picture(height=24, width=32, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def box(height=24, width=32):
    mask = np.zeros((height, width), np.uint8)
    mask[5:15, 8:20] = 1
    return mask


def message(call, *arguments, **options):
    """The message of the UserError that a call must raise; always one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text


def saved(path, array, mode=None, **options):
    Image.fromarray(array, mode).save(path, **options) if mode else Image.fromarray(array).save(path, **options)
    return path


def dragbench(folder, prompt="a cat", points=((3, 4), (10, 12)), mask=None, protocol=4):
    folder.mkdir(parents=True, exist_ok=True)
    saved(folder / "original_image.png", picture())
    meta = {"prompt": prompt, "points": [list(p) for p in points], "mask": box() if mask is None else mask}
    (folder / "meta_data.pkl").write_bytes(pickle.dumps(meta, protocol))
    return folder


def same(a, b):
    assert np.array_equal(a.image, b.image)
    assert a.prompt == b.prompt
    assert np.array_equal(a.points, b.points)
    assert (a.mask is None) == (b.mask is None)
    assert a.mask is None or np.array_equal(a.mask, b.mask)
    return True


# --- the sample ---------------------------------------------------------------------------------------------


def test_sample_holds_what_it_was_given():
    image, mask = picture(), box()
    sample = EditSample(image, "a cat", [[[3, 4], [10.5, 12]], [[31, 23], [31, 23]]], mask, "tom")
    assert (sample.width, sample.height, sample.prompt, sample.name) == (32, 24, "a cat", "tom")
    assert sample.image.dtype == np.uint8 and np.array_equal(sample.image, image)
    assert sample.points.dtype == np.float32
    assert sample.handles.tolist() == [[3, 4], [31, 23]]
    assert sample.targets.tolist() == [[10.5, 12], [31, 23]]  # the second pair is an anchor
    assert sample.mask.dtype == bool and np.array_equal(sample.mask, mask == 1)


def test_arrays_are_read_only_copies():
    image, mask, points = picture(), box().astype(bool), np.array(PAIR, np.float32)
    sample = EditSample(image, "", points, mask)
    before = image[0, 0].tolist()
    image[:], mask[:], points[:] = 0, False, 0
    assert sample.image[0, 0].tolist() == before
    assert sample.mask.sum() == 120 and sample.points[0, 1].tolist() == [10, 12]
    for array in (sample.image, sample.mask, sample.points, sample.handles):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(AttributeError):
        sample.prompt = "a dog"


def test_all_natural_forms_of_input_agree(tmp_path):
    image, mask = picture(), box()
    file, mask_file = saved(tmp_path / "a.png", image), saved(tmp_path / "m.png", mask * 255)
    flat = [[3, 4], [10, 12], [5, 5], [6, 6]]
    nested = [[[3, 4], [10, 12]], [[5, 5], [6, 6]]]
    reference = EditSample(image, "", nested, mask)
    for image_form, points, mask_form in [
        (file, flat, mask_file),
        (str(file), tuple(flat), str(mask_file)),
        (Image.fromarray(image), np.array(nested), Image.fromarray(mask * 255)),
        (Image.open(file), np.array(flat, np.int64), Image.open(mask_file).convert("1")),
        (np.asfortranarray(image), np.array(nested, np.float64), mask.astype(bool)),
        (image, nested, mask * np.uint8(255)),
        (image, nested, mask * 0.9),
        (image, nested, mask.astype(np.uint16) * 65535),
    ]:
        assert same(EditSample(image_form, "", points, mask_form), reference)


def test_grey_and_rgba_arrays():
    grey = picture(channels=0)
    for array in (grey, grey[:, :, None]):
        assert np.array_equal(EditSample(array, "", PAIR).image, np.stack([grey] * 3, axis=2))
    rgba = picture(channels=4)
    rgba[..., 3] = 0
    assert (EditSample(rgba, "", PAIR).image == 255).all()


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([[]], "shape (1, 0)"),
        ([[[]]], "shape (1, 1, 0)"),
        ([[1, 2], [3, 4], [5, 6]], "the number of points is odd (3)"),
        ([[1, 2]], "the number of points is odd (1)"),
        ([1, 2, 3, 4], "shape (4,)"),
        ([[1, 2, 3], [4, 5, 6]], "shape (2, 3)"),
        ([[[1, 2], [3, 4], [5, 6]]], "shape (1, 3, 2)"),
        ([[[1, 2], [3]]], "malformed"),
        ([[[1, 2], 3]], "malformed"),
        ([["1", "2"], ["3", "4"]], "not all numbers"),
        ("1,2 3,4", "not all numbers"),
        ([[1, None], [3, 4]], "not all numbers"),
        ([[True, False], [True, True]], "not all numbers"),
        ([[10**400, 1], [3, 4]], "not all numbers"),
        ({"handle": [1, 2]}, "not all numbers"),
        ([[1, 2], [float("nan"), 4]], "the target of pair 1 of 1, (nan, 4.0)"),
        ([[1, float("inf")], [3, 4]], "the handle of pair 1 of 1, (1.0, inf)"),
        ([[1, 1e300], [3, 4]], "the handle of pair 1 of 1, (1.0, 1e+300)"),
        ([[1, 2], [3, 4], [5, 6], [32, 6]], "the target of pair 2 of 2, (32, 6)"),
        ([[1, 2], [3, 4], [-0.5, 6], [7, 6]], "the handle of pair 2 of 2, (-0.5, 6.0)"),
        ([[1, 24], [3, 4]], "0 <= x < 32 and 0 <= y < 24"),
        ([[1, 2], [31.9999999, 4]], "the target"),  # 32 in float32
    ],
)
def test_bad_points(points, expected):
    assert expected in message(EditSample, picture(), "", points)


@pytest.mark.parametrize("points", [None, [], (), np.zeros((0, 2, 2))])
def test_a_sample_may_have_no_points_and_a_method_refuses_it(points, tmp_path):
    sample = EditSample(picture(), "", points, box(24, 32), "x")
    assert sample.points.shape == (0, 2, 2) and sample.points.dtype == np.float32
    assert sample.handles.shape == sample.targets.shape == (0, 2)
    assert sample.resized(24).points.shape == (0, 2, 2)
    write_folder(sample, tmp_path / "x")
    assert len(read_sample(tmp_path / "x").points) == 0
    for name in methods.NAMES:
        method = methods.find(name)
        assert "points" in method.needs
        said = message(method.check, sample)
        assert said.startswith(f"there are no points, and {name} needs them: give pairs [[[x, y], [x, y]], ...]")
        method.check(EditSample(picture(), "", [[1, 2], [3, 4]]))


def test_points_up_to_the_edge_are_inside():
    edge = [[0, 0], [31.99, 23.99]]
    assert np.allclose(EditSample(picture(), "", edge).points, [edge])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"image": picture(15, 32)}, "32x15 px"),
        ({"image": picture(24, 15)}, "at least 16 px"),
        ({"image": picture() / 255}, "float64 of shape (24, 32, 3)"),
        ({"image": picture(channels=2)}, "shape (24, 32, 2)"),
        ({"image": picture()[None]}, "shape (1, 24, 32, 3)"),
        ({"image": np.zeros((0, 32, 3), np.uint8)}, "shape (0, 32, 3)"),
        ({"image": None}, "NoneType"),
        ({"image": Image.new("F", (32, 24))}, "floating-point"),
        ({"image": Image.fromarray(np.full((24, 32), 70000, np.int32))}, "outside 0..65535"),
        ({"prompt": None}, "NoneType"),
        ({"prompt": b"a cat"}, "bytes"),
        ({"prompt": "a \ud83d cat"}, "position 2"),
        ({"mask": box(23, 32)}, "the mask is 32x23 px and the image 32x24 px"),
        ({"mask": np.zeros((24, 32), bool)}, "leave the mask out"),
        ({"mask": np.full((24, 32), 127, np.uint8)}, "leave the mask out"),
        ({"mask": picture()}, "uint8 of shape (24, 32, 3)"),
        ({"mask": np.full((24, 32), np.nan)}, "goes up to nan"),
        ({"mask": np.full((24, 32), 70000)}, "goes up to 70000"),
        ({"mask": np.full((24, 32), "x")}, "<U1"),
        ({"mask": [[1, 0]]}, "the mask is a list"),
        ({"image": "nowhere.png"}, "nowhere.png does not exist"),
        ({"mask": "nowhere.png"}, "nowhere.png does not exist"),
    ],
)
def test_bad_image_prompt_and_mask(options, expected):
    assert expected in message(EditSample, **{"image": picture(), "prompt": "", "points": PAIR} | options)


def test_what_is_most_likely_not_meant():
    image, mask = np.zeros((48, 64, 3), np.uint8), np.zeros((48, 64), np.uint8)
    mask[:, 32:] = 255
    pairs = [[[40, 9], [50, 9]], [[10, 9], [20.5, 9]], [[40, 9], [31, 9]], [[5, 5], [5, 5]]]
    (doubt,) = EditSample(image, "", pairs, mask).doubts()
    assert doubt.startswith("Outside of the mask's white, where nothing may change: the handle (10, 9) of pair 2, ")
    assert doubt.count("pair 2") == 2 and "the target (31, 9) of pair 3. Is the mask inverted?" in doubt
    assert "pair 1" not in doubt and "pair 4" not in doubt, "an anchor may be there"
    assert EditSample(image, "", pairs, 255 - mask).doubts()
    assert not EditSample(image, "", pairs).doubts() and not EditSample(image, "", [], mask).doubts()
    (doubt,) = EditSample(image, "", [[[0.3, 0.4], [0.6, 1]]]).doubts()
    assert "not shares of width and height" in doubt
    assert not EditSample(image, "", [[[0.3, 0.4], [0.6, 1.5]]]).doubts()


def test_resized_scales_points_and_mask_with_the_picture():
    mask = np.random.default_rng(1).random((60, 101)) > 0.5
    sample = EditSample(picture(60, 101), "a cat", [[[0, 0], [100.9, 59.9]], [[50.5, 30], [20, 45]]], mask, "tom")
    small = sample.resized(40)
    assert (small.width, small.height, small.prompt, small.name) == (40, 24, "a cat", "tom")
    for new, old in zip(small.points.reshape(-1, 2), sample.points.reshape(-1, 2), strict=True):
        assert new[0] / 40 == pytest.approx(old[0] / 101, abs=1e-6)
        assert new[1] / 24 == pytest.approx(old[1] / 60, abs=1e-6)
    for row in range(24):
        for column in range(40):
            assert small.mask[row, column] == mask[int((row + 0.5) * 2.5), int((column + 0.5) * 2.525)]
    assert abs(small.image.mean() - sample.image.mean()) < 3


def test_resized_never_enlarges():
    sample = EditSample(picture(), "", PAIR)
    for max_size in (0, 32, 512):
        assert same(sample.resized(max_size), sample)
    assert sample.resized(31).width == 31 and sample.resized(31).mask is None


def test_resized_keeps_points_inside():
    last = np.nextafter(np.float32(1001), np.float32(0))
    sample = EditSample(picture(1001, 1001), "", [[[last, last], [last, 0]]])
    for max_size in (16, 17, 333, 512, 999, 1000):
        assert sample.resized(max_size).points.max() < max_size


def test_resized_refuses_what_gets_lost():
    mask = np.zeros((600, 600), bool)
    mask[0, 0] = True
    assert "32x32 px the mask vanishes" in message(EditSample(picture(600, 600), "", PAIR, mask).resized, 32)
    assert "100x5 px the image gets too small" in message(EditSample(picture(20, 400), "", PAIR).resized, 100)
    assert "max_size is -1" in message(EditSample(picture(), "", PAIR).resized, -1)


# --- image and mask files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: a[::-1].swapaxes(0, 1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: a.swapaxes(0, 1)[::-1]),
    ],
)
def test_exif_orientation(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = picture()
    file = saved(tmp_path / "a.png", stored, exif=exif)
    assert np.array_equal(load_image(file), upright(stored))
    mask = saved(tmp_path / "m.png", box() * 255, exif=exif)
    assert np.array_equal(load_mask(mask), upright(box() == 1))
    deep = saved(tmp_path / "d.png", stored[..., 0].astype(np.uint16) * 257, exif=exif)
    assert np.array_equal(load_image(deep)[..., 0], upright(stored[..., 0]))


def colour_profile(primaries: list[tuple[float, float, float]]) -> bytes:
    """A small ICC matrix profile of gamma 2.2."""
    gamma = 2.2

    def s15(value):
        return struct.pack(">i", round(value * 65536))

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(map(s15, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    name = b"P3 like\0"
    described = b"desc\0\0\0\0" + struct.pack(">I", len(name)) + name + b"\0" * 79
    described += b"\0" * (-len(described) % 4)
    white = (0.9642, 1, 0.8249)
    tags = [(b"desc", described), (b"cprt", b"text\0\0\0\0none\0\0\0\0"), (b"wtpt", xyz(white))]
    tags += [(n, xyz(v)) for n, v in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)]
    tags += [(n, curve) for n in (b"rTRC", b"gTRC", b"bTRC")]
    start, table, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for n, value in tags:
        table += n + struct.pack(">II", start + len(data), len(value))
        data += value
    body = table + data
    head = struct.pack(">I4sI4s4s4s", 128 + len(body), b"lcms", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
    head += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + b"\0" * 28 + b"".join(map(s15, white)) + b"\0" * 48
    return head + body


P3 = colour_profile([(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_with_a_profile_become_srgb(tmp_path, mode):
    image = Image.new("RGB", (32, 32), (200, 60, 60))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "a.png", icc_profile=P3)
    for given in (tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        pixels = EditSample(given, "", []).image
        assert np.abs(pixels.astype(int) - (219, 37, 49)).max() <= 1
    mask = Image.fromarray(box() * 255).convert("RGB")
    mask.save(tmp_path / "m.png", icc_profile=P3)
    assert np.array_equal(load_mask(tmp_path / "m.png"), box() == 1)


def test_transparency_stays_beside_a_profile(tmp_path):
    image = Image.new("RGBA", (32, 32), (200, 60, 60, 255))
    image.putpixel((0, 0), (200, 60, 60, 0))
    image.save(tmp_path / "a.png", icc_profile=P3)
    pixels = load_image(tmp_path / "a.png")
    assert pixels[0, 0].tolist() == [255, 255, 255] and np.abs(pixels[1, 1].astype(int) - (219, 37, 49)).max() <= 1


def test_profiles_that_say_nothing_leave_pixels_as_they_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"no profile", P3[:200], P3[:-60]):
        file = saved(tmp_path / "a.png", pixels, icc_profile=profile)
        assert np.array_equal(load_image(file), pixels)
    grey = saved(tmp_path / "g.png", pixels[..., 0], icc_profile=P3)
    assert np.array_equal(load_image(grey)[..., 0], pixels[..., 0]), "a profile of another mode"


@pytest.mark.parametrize(
    "exif", [b"no TIFF header", b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01", b"Exif\0\0", b"II*\0\xff\xff\xff\x7f"]
)
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_damaged_exif_data_are_ignored(tmp_path, exif, name):
    file = saved(tmp_path / name, picture(), exif=exif)
    assert np.array_equal(load_image(file), np.asarray(Image.open(file).convert("RGB")))


@pytest.mark.parametrize("name", ["a.png", "a.tif", "big-endian.tif", "mode-I"])
def test_sixteen_bits_are_scaled(tmp_path, name):
    levels = np.linspace(0, 65535, 24 * 32).astype(np.uint16).reshape(24, 32)
    if name == "mode-I":
        found = EditSample(Image.fromarray(levels.astype(np.int32)), "", PAIR).image
    elif name == "big-endian.tif":
        Image.fromarray(levels.astype(">u2")).save(tmp_path / name)
        assert Image.open(tmp_path / name).mode == "I;16B"
        found = load_image(tmp_path / name)
    else:
        found = load_image(saved(tmp_path / name, levels))
    assert found.shape == (24, 32, 3) and found.dtype == np.uint8
    assert np.array_equal(found[..., 1], np.round(levels / 65535 * 255))
    assert found.min() == 0 and found.max() == 255


def test_transparency_is_laid_over_white(tmp_path):
    rgba = picture(channels=4)
    alpha = rgba[..., 3:] / 255
    expected = rgba[..., :3] * alpha + 255 * (1 - alpha)
    assert np.abs(load_image(saved(tmp_path / "a.png", rgba)) - expected).max() <= 1

    la = picture(channels=2)
    alpha = la[..., 1] / 255
    found = load_image(saved(tmp_path / "la.png", la))
    assert np.abs(found[..., 2] - (la[..., 0] * alpha + 255 * (1 - alpha))).max() <= 1

    rgb = picture()
    rgb[0, 0] = rgb[1, 1] = (1, 2, 3)
    found = load_image(saved(tmp_path / "key.png", rgb, transparency=(1, 2, 3)))
    assert (found[0, 0] == 255).all() and (found[1, 1] == 255).all() and (found[2, 2] == rgb[2, 2]).all()


def test_palettes(tmp_path):
    indices = np.random.default_rng(0).integers(0, 3, (24, 32)).astype(np.uint8)
    image = Image.fromarray(indices)
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0])
    assert image.mode == "P"
    colours = np.array([[10, 20, 30], [200, 100, 50], [0, 255, 0]])
    image.save(tmp_path / "p.png")
    assert np.array_equal(load_image(tmp_path / "p.png"), colours[indices])
    image.save(tmp_path / "t.png", transparency=1)
    colours[1] = 255
    assert np.array_equal(load_image(tmp_path / "t.png"), colours[indices])


def test_other_modes(tmp_path):
    grey = picture(channels=0)
    assert np.array_equal(load_image(saved(tmp_path / "l.png", grey)), np.stack([grey] * 3, axis=2))
    assert np.array_equal(load_image(saved(tmp_path / "1.png", grey > 99))[..., 0], (grey > 99) * 255)
    cmyk = picture(channels=4)
    Image.frombytes("CMYK", (32, 24), cmyk.tobytes()).save(tmp_path / "c.tif")
    ink = cmyk.astype(float)
    assert np.abs(load_image(tmp_path / "c.tif") - (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255).max() <= 1
    for suffix in ("jpg", "webp", "bmp", "gif"):
        assert load_image(saved(tmp_path / f"a.{suffix}", picture())).shape == (24, 32, 3)


def test_masks_of_all_modes(tmp_path):
    one = box()
    expected = one == 1
    noisy = np.where(expected, 140, 120).astype(np.uint8)
    for number, array in enumerate(
        [
            one,  # 0 and 1
            one * 255,
            noisy,
            expected,
            one.astype(np.uint16),
            one.astype(np.uint16) * 255,
            one.astype(np.uint16) * 40000,
            np.stack([one * 255] * 3, axis=2),
            np.stack([one] * 3, axis=2),
            np.stack([np.full_like(one, 255)] * 3 + [one * 255], axis=2),  # drawn in white on a transparent layer
            np.stack([one * 255, np.full_like(one, 255)], axis=2),
        ]
    ):
        assert np.array_equal(load_mask(saved(tmp_path / f"{number}.png", array)), expected), number
    assert np.array_equal(load_mask(saved(tmp_path / "f.tif", one.astype(np.float32))), expected)
    palette = Image.fromarray(1 - one)
    palette.putpalette([255, 255, 255, 0, 0, 0])  # the colours count, not the indices
    palette.save(tmp_path / "p.png")
    assert np.array_equal(load_mask(tmp_path / "p.png"), expected)


@pytest.mark.parametrize("load", [load_image, load_mask])
def test_files_that_are_no_image(tmp_path, load):
    assert "does not exist" in message(load, tmp_path / "none.png")
    assert "is not a file" in message(load, tmp_path)
    text = tmp_path / "text.png"
    text.write_text("not a picture")
    assert "is not an image" in message(load, text)
    text.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\nshowpage\n")  # would start Ghostscript
    assert "is not an image" in message(load, text)
    text.write_bytes(b"")
    assert "is not an image" in message(load, text)
    for suffix in ("png", "jpg", "webp"):
        whole = saved(tmp_path / f"whole.{suffix}", picture(200, 200)).read_bytes()
        (tmp_path / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
        text = message(load, tmp_path / f"cut.{suffix}")
        assert f"cut.{suffix}" in text and ("damaged" in text or "is not an image" in text)
    # A PIL image that was opened but not decoded yet.
    assert "cannot be converted" in message(EditSample, Image.open(tmp_path / "cut.png"), "", PAIR)
    assert "cannot be converted" in message(EditSample, picture(), "", PAIR, Image.open(tmp_path / "cut.png"))


@pytest.mark.parametrize("limit", [300, 100])  # at 400 pixels Pillow warns of the first and fails at the second
def test_decompression_bomb(tmp_path, monkeypatch, limit):
    file = saved(tmp_path / "a.png", picture(20, 20))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    for load in (load_image, load_mask):
        assert f"a.png has over {limit} pixels" in message(load, file)


# --- formats ------------------------------------------------------------------------------------------------


def test_real_dragbench_sample():
    sample = read_sample(BIRD)
    assert sample.prompt == "a photo of a bird"
    assert sample.points.tolist() == [[[134, 113], [164, 83]], [[180, 180], [183, 177]], [[63, 17], [61, 19]]]
    assert sample.name == "JH_2023-09-14-1839-58"
    assert np.array_equal(sample.image, np.asarray(Image.open(BIRD / "original_image.png")))
    # The mask's bytes, taken from the file without unpickling it: its only long string of bytes.
    instructions = pickletools.genops((BIRD / "meta_data.pkl").read_bytes())
    (data,) = (value for _, value, _ in instructions if isinstance(value, bytes) and len(value) > 1000)
    assert np.array_equal(sample.mask, np.frombuffer(data, np.uint8).reshape(341, 512) == 1)
    assert sample.mask.sum() == 26987


def test_real_drag100_sample():
    sample = read_sample(NEBULA)
    assert (sample.width, sample.height, sample.prompt, sample.name) == (512, 801, "", "nature_10")
    assert sample.handles.tolist() == [[274, 362], [313, 414], [351, 468]]
    assert sample.targets.tolist() == [[271, 271], [404, 340], [437, 499]]
    assert sample.mask.sum() == (np.asarray(Image.open(NEBULA / "mask.png")) == 255).sum() == 67158
    for x, y in sample.points.reshape(-1, 2).astype(int):
        assert sample.mask[y, x]  # the drag takes place where the picture may change


def test_sde_drag(tmp_path):
    saved(tmp_path / "origin_image.png", picture())
    saved(tmp_path / "mask.png", box() * 255)
    edit = {"prompt": "a cat", "source": [[3, 4], [5, 6]], "target": [[10, 12], [5, 6]]}
    (tmp_path / "prompt.json").write_text(json.dumps(edit))
    sample = read_sample(tmp_path, "tom")
    assert sample.handles.tolist() == edit["source"] and sample.targets.tolist() == edit["target"]
    assert sample.prompt == "a cat" and sample.mask.sum() == 120 and sample.name == "tom"
    (tmp_path / "prompt.json").write_text(json.dumps(edit | {"target": [[1, 1]]}))
    assert "equal length" in message(read_sde_drag, tmp_path)


@pytest.mark.parametrize("mask", [None, box()])
def test_plain_format_round_trip(tmp_path, mask):
    points = np.random.default_rng(0).random((7, 2, 2), np.float32) * 24
    sample = EditSample(picture(), 'Ein "Kätzchen" 猫\n\\', points, mask, "anything")
    (tmp_path / "out").mkdir()
    write_folder(sample, tmp_path / "out")  # an empty folder is as good as none
    write_folder(sample, tmp_path / "new" / "out")
    for folder in (tmp_path / "out", tmp_path / "new" / "out"):
        found = read_folder(folder)
        assert same(found, sample) and found.name == "out"
        assert (folder / "mask.png").exists() == (mask is not None)


@pytest.mark.parametrize("mask", [None, box()])
def test_dragbench_round_trip(tmp_path, mask):
    prompt = "猫 cnumpy._core.multiarray\n_reconstruct\n"  # no name in the pickle, so left as it is
    points = [[3, 4], [10.5, 12], [0, 23], [31.25, 0]]
    sample = EditSample(picture(), prompt, points, mask, "anything")
    write_dragbench(sample, tmp_path / "out")
    everything = np.ones((24, 32), np.uint8)
    found = read_sample(tmp_path / "out")
    assert same(found, EditSample(picture(), prompt, points, everything if mask is None else mask))
    assert found.name == "out"
    assert Image.open(tmp_path / "out" / "user_drag.png").size == (32, 24)
    assert "not an empty folder" in message(write_dragbench, sample, tmp_path / "out")

    data = (tmp_path / "out" / "meta_data.pkl").read_bytes()
    names = [argument for instruction, argument, _ in pickletools.genops(data) if instruction.name == "GLOBAL"]
    assert "numpy.core.multiarray _reconstruct" in names and "_core" not in " ".join(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # numpy 2 renamed numpy.core
        meta = pickle.loads(data)
    assert list(meta) == ["prompt", "points", "mask"] and meta["prompt"] == prompt
    assert meta["points"] == points
    assert [[type(n) for n in p] for p in meta["points"]] == [[type(n) for n in p] for p in points]
    assert meta["mask"].dtype == np.uint8 and np.array_equal(meta["mask"], everything if mask is None else mask)


def test_write_dragbench_leaves_nothing_unfinished(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    text = message(write_dragbench, EditSample(picture(), "", PAIR), tmp_path / "out")
    assert "No space left" in text and not list(tmp_path.iterdir())


def test_write_folder_replaces_nothing(tmp_path):
    sample = EditSample(picture(), "", PAIR)
    kept = tmp_path / "full" / "notes.txt"
    kept.parent.mkdir()
    kept.write_text("mine")
    assert "not an empty folder" in message(write_folder, sample, tmp_path / "full")
    assert "not an empty folder" in message(write_folder, sample, kept)
    assert "cannot be written" in message(write_folder, sample, kept / "below")
    assert [*tmp_path.rglob("*")] == [tmp_path / "full", kept] and kept.read_text() == "mine"


def test_write_folder_leaves_nothing_unfinished(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    text = message(write_folder, EditSample(picture(), "", PAIR), tmp_path / "out")
    assert "No space left" in text and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["image.jpg", "image.JPEG", "image.webp", "image.png"])
def test_plain_format_takes_other_image_files(tmp_path, name):
    saved(tmp_path / name, picture())
    (tmp_path / "edit.json").write_text(json.dumps({"prompt": "a cat", "points": PAIR}), "utf-8-sig")
    assert read_folder(tmp_path).prompt == "a cat"


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ("{", "edit.json is not valid JSON"),
        ("[" * 100000, "edit.json is not valid JSON"),
        ("[]", "prompt and points"),
        ('{"prompt": "a cat"}', "has no points"),
        ('{"promt": "a cat", "points": [[[1, 2], [3, 4]]]}', "has no prompt"),
        ('{"prompt": "a cat", "points": [[[1, 2], [3, NaN]]]}', "lies outside"),
        ('{"prompt": "a cat", "points": {}}', "not all numbers"),
        ('{"prompt": 5, "points": [[[1, 2], [3, 4]]]}', "the prompt is a int"),
        (b"\xff\xfe\xff", "edit.json is not valid JSON"),
        (None, "edit.json cannot be read: No such file"),
    ],
)
def test_broken_plain_folders(tmp_path, edit, expected):
    saved(tmp_path / "image.png", picture())
    if edit is not None:
        (tmp_path / "edit.json").write_bytes(edit if isinstance(edit, bytes) else edit.encode())
    text = message(read_folder, tmp_path)
    assert expected in text and str(tmp_path) in text


def test_plain_folder_needs_one_image(tmp_path):
    write_folder(EditSample(picture(), "", PAIR, box()), tmp_path / "a")
    saved(tmp_path / "a" / "image.jpg", picture())
    assert "image.jpg and image.png" in message(read_folder, tmp_path / "a")
    for file in (tmp_path / "a").glob("image.*"):
        file.unlink()
    assert "holds no image.png" in message(read_folder, tmp_path / "a")


def test_broken_drag100_and_dragbench_folders(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "points.json").write_text(json.dumps({"points": [[1, 2], [3, 4]]}))
    saved(tmp_path / "d" / "original.jpg", picture())
    assert "mask.png does not exist" in message(read_drag100, tmp_path / "d")
    folder = dragbench(tmp_path / "b")
    (folder / "original_image.png").unlink()
    assert "original_image.png does not exist" in message(read_dragbench, folder)
    (folder / "meta_data.pkl").unlink()
    assert "No such file" in message(read_dragbench, folder)
    assert "is no sample" in message(read_sample, folder)
    text = message(read_dragbench, dragbench(tmp_path / "c", points=[(1, 2), (40, 4)]))
    assert text.startswith(f"{tmp_path / 'c'}: the target of pair 1 of 1, (40, 4)")


# --- many samples -------------------------------------------------------------------------------------------


def test_find_samples(tmp_path):
    expected = [
        tmp_path / "animals" / "a",
        tmp_path / "animals" / "b",
        tmp_path / "c-x",
        tmp_path / "c" / "d" / "e",
    ]
    for folder in reversed(expected):
        dragbench(folder)
    dragbench(tmp_path / ".cache" / "x")
    dragbench(expected[0] / "inside")
    (expected[1] / "meta_data.pkl").write_bytes(b"broken")
    (tmp_path / "empty").mkdir()
    (tmp_path / "c" / "up").symlink_to(tmp_path)
    found = find_samples(tmp_path)
    assert sorted(found) == sorted(expected) and found == find_samples(str(tmp_path))
    assert sample_names(found, tmp_path) == ["-".join(f.relative_to(tmp_path).parts) for f in found]
    assert find_samples(expected[0]) == [expected[0]]
    assert sample_names([expected[0]], expected[0]) == ["a"]


def test_find_samples_follows_links_to_data_kept_elsewhere(tmp_path):
    dragbench(tmp_path / "elsewhere" / "a")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    assert find_samples(tmp_path / "data") == [tmp_path / "data" / "link" / "a"]


def test_names_are_unique(tmp_path):
    folders = [tmp_path / "a" / "b-c", tmp_path / "a-b" / "c", tmp_path / "a-b-c", tmp_path / "a-b-c-2"]
    assert sample_names(folders, tmp_path) == ["a-b-c", "a-b-c-2", "a-b-c-3", "a-b-c-2-2"]


def test_nothing_found(tmp_path):
    for marker in ("edit.json", "meta_data.pkl", "points.json", "prompt.json"):
        assert marker in message(find_samples, tmp_path)
    assert "is not a folder" in message(find_samples, tmp_path / "none")
    assert "is not a folder" in message(find_samples, BIRD / "meta_data.pkl")


def test_convert(tmp_path):
    source, plain = tmp_path / "source", tmp_path / "plain"
    good, broken = dragbench(source / "animals" / "a"), dragbench(source / "animals" / "b")
    (broken / "meta_data.pkl").write_bytes((broken / "meta_data.pkl").read_bytes()[:-9])
    (source / "sky").symlink_to(NEBULA.parent)
    converted, failures = convert(source, plain)
    assert converted == [plain / "animals" / "a", plain / "sky" / "nature_10"]
    assert [folder for folder, _ in failures] == [broken] and str(broken) in failures[0][1]
    assert same(read_folder(converted[0]), read_dragbench(good))
    assert same(read_folder(converted[1]), read_drag100(NEBULA))
    assert sorted(f.name for f in plain.iterdir()) == ["animals", "sky"]
    assert find_samples(plain) == converted

    converted, failures = convert(source, plain)  # again: what is there stays as it is
    assert not converted and len(failures) == 3
    assert convert(good, tmp_path / "one") == ([tmp_path / "one"], [])
    assert "lies inside" in message(convert, source, source / "plain")
    assert "lies inside" in message(convert, source, source)


# --- pickles ------------------------------------------------------------------------------------------------


def renamed(data, protocol, numpy_version):
    """The pickle as the other major version of numpy would have written it."""
    ours, other = "numpy._core", "numpy.core"
    if numpy_version == 2:
        ours, other = other, ours
    for module in ("multiarray", "numeric"):
        before, after = f"{ours}.{module}".encode(), f"{other}.{module}".encode()
        if protocol >= 4:  # there the text is preceded by its length, and the whole by that of the frame
            before, after = bytes([0x8C, len(before)]) + before, bytes([0x8C, len(after)]) + after
            if data[2:3] == b"\x95":
                data = data[:2] + data[11:]
        data = data.replace(before, after)
    return data


@pytest.mark.parametrize("numpy_version", [1, 2])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_both_numpy_versions_and_all_protocols(tmp_path, protocol, numpy_version):
    mask = picture(24, 32, 0) // 128
    points = [[3, 4], [10.5, 12], [1, 2], [0, 0]]
    for form, array in [
        (points, mask),
        (points, np.asfortranarray(mask)),
        (points, mask[::-1]),
        (points, mask.astype(bool)),
        (points, mask.astype(">u2") * 65535),
        (points, mask.astype(np.float64)),
        (np.array(points), mask),
        (np.array(points, np.float32), mask),
        ([np.array(p) for p in points], mask),
        ([tuple(p) for p in points], mask),
        ([[np.int64(3), np.uint8(4)], [np.float32(10.5), 12], *points[2:]], mask),
    ]:
        data = renamed(
            pickle.dumps({"prompt": "ein Kätzchen", "points": form, "mask": array}, protocol),
            protocol,
            numpy_version,
        )
        assert (b"numpy._core" in data, b"numpy.core" in data) == (numpy_version == 2, numpy_version == 1)
        folder = dragbench(tmp_path)
        (folder / "meta_data.pkl").write_bytes(data)
        sample = read_dragbench(folder)
        assert sample.prompt == "ein Kätzchen"
        assert sample.points.reshape(-1, 2).tolist() == points
        assert np.array_equal(sample.mask, array > 0)


def test_dragbench_mask_that_was_not_drawn(tmp_path):
    assert read_dragbench(dragbench(tmp_path, mask=np.zeros((24, 32), np.uint8))).mask is None


class Calls:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def hostile(trace):
    """Objects that would create the file ``trace`` if they were unpickled carelessly."""
    command, code = f"touch {trace}", f"open({str(trace)!r}, 'w')"
    return {
        "system": Calls(os.system, command),
        "popen": Calls(subprocess.Popen, ["touch", str(trace)]),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "open": Calls(open, str(trace), "w"),
        "getattr": Calls(getattr, "x", "join"),
        "import": Calls(__import__, "os"),
        "touch": Calls(Path.touch, Path(trace)),
        "path": Path(trace),
        "object array": np.array([Calls(os.system, command)], dtype=object),
        "structured array": np.array([(1, None)], dtype=[("a", "i4"), ("b", object)]),
        "date array": np.array(["2020-01-01"], dtype="M8[D]"),
        "text array": np.array(["text"]),
        "void scalar": np.void(b"1234"),
        "array by call": Calls(np.ndarray, (2**20, 2**20)),
        "array of dtype": Calls(np.frombuffer, b"1234"),
        "codec": Calls(__import__("_codecs").encode, "x", "rot13"),
        "set": {1},
        "complex": np.complex64(1),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("case", list(hostile("x")))
def test_hostile_pickles(tmp_path, case, protocol):
    trace = tmp_path / "trace"
    value = hostile(trace)[case]
    harmless = {"prompt": "a cat", "points": [[1, 2], [3, 4]], "mask": box()}
    for meta in (
        value,
        harmless | {"prompt": value},
        harmless | {"mask": value},
        harmless | {"extra": [value]},
    ):
        folder = dragbench(tmp_path / "sample")
        (folder / "meta_data.pkl").write_bytes(pickle.dumps(meta, protocol))
        assert "meta_data.pkl was refused" in message(read_dragbench, folder)
        assert not trace.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b".",
        b"junk",
        b"\x80\x04",
        b"\x80\xff.",
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"(S'true'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"\x80\x02cnumpy\ndtype\n)\x81.",  # NEWOBJ
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02Pid\n.",  # persistent ids
        b"\x80\x02K\x01Q.",
        b"\x80\x05\x97.",  # a buffer out of band
        b"\x80\x02cnumpy\ndtype\n}b.",  # BUILD would alter a function
        b"\x80\x02cnumpy\ndtype\nN}X\x01\x00\x00\x00aK\x01s\x86b.",
        b"\x80\x04\x8c\x05numpy\x8c\x0adtype.type\x93.",
        b"\x80\x02cnumpy.core.multiarray\nfromfile\n.",
        b"\x80\x02N" + b"r\xff\xff\xff\xff" + b".",  # room for four thousand million values
        b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x3f.",  # a bytearray of 4 EiB
        b"\x80\x02" + b"(" * 30000 + b".",
        b"\x80\x04" + b"]" * 19000 + b"a" * 18999 + b".",  # nested too deeply to be anything
    ],
)
def test_malformed_pickles(tmp_path, data):
    folder = dragbench(tmp_path)
    (folder / "meta_data.pkl").write_bytes(data)
    assert "meta_data.pkl" in message(read_dragbench, folder)


def test_every_truncation_of_a_pickle_is_refused(tmp_path):
    whole = pickle.dumps({"prompt": "a cat", "points": [[1, 2], [3, 4]], "mask": box()[:4, :4]}, 4)
    file = tmp_path / "a.pkl"
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert "was refused" in message(load_pickle, file)


class ArrayOf:
    """Pickles as an array of any shape, data and type, be they possible or not."""

    def __init__(self, shape, data, code):
        dtype = Calls(np.dtype, code, False, True)
        self.state = (1, shape, dtype, False, data)

    def __reduce__(self):
        reconstruct = np.empty(0).__reduce__()[0]
        return reconstruct, (np.ndarray, (0,), b"b"), self.state


@pytest.mark.parametrize(
    ("shape", "data", "code", "fits"),
    [
        ((2, 3), b"abcdef", "u1", True),
        ((2, 3), b"abcdefabcdef", "u2", True),
        ((2, 3), b"abcdef", "u2", False),
        ((2**40, 2**40), b"abcdef", "u1", False),
        ((-2, -3), b"abcdef", "u1", False),
        ((2.0, 3), b"abcdef", "u1", False),
        ((1,) * 5 + (6,), b"abcdef", "u1", False),
        ((6,), [1, 2, 3, 4, 5, 6], "u1", False),
        ((6,), "abcdef", "u1", False),
        (6, b"abcdef", "u1", False),
        ((1,), b"abcdefgh", "O8", False),
        ((1,), b"abcdefgh", "O", False),
        ((1,), b"abcdefgh", "M8", False),
        ((1,), b"abcdefgh", "V8", False),
        ((1,), b"abcdefgh", "u1,O", False),
        ((1,), b"abcdefgh", 8, False),
    ],
)
def test_arrays_must_be_what_their_bytes_say(tmp_path, shape, data, code, fits):
    file = tmp_path / "a.pkl"
    file.write_bytes(pickle.dumps(ArrayOf(shape, data, code), 4))
    if fits:
        found = load_pickle(file)
        assert isinstance(found, PickledArray) and found.array.shape == (2, 3)
        assert found.array.tobytes() == data
    else:
        assert "was refused" in message(load_pickle, file)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"prompt": 5}, "the prompt is a int"),
        ({"points": "text"}, "malformed points"),
        ({"points": None}, "malformed points"),
        ({"points": [[1, 2], [3, "4"]]}, "malformed points"),
        ({"points": [[[1, 2], [3, 4]]]}, "malformed points"),
        ({"points": [1, 2]}, "malformed points"),
        ({"points": [[]]}, "malformed points"),
        ({"points": [[1, 2]]}, "the number of points is odd (1)"),
        ({"mask": [[0, 1]]}, "holds no mask"),
        ({"mask": "/etc/hostname"}, "holds no mask"),  # not taken as a path
        ({"mask": None}, "holds no mask"),
        ({"mask": box(10, 10)}, "the mask is 10x10 px"),
    ],
)
def test_dragbench_of_unexpected_values(tmp_path, change, expected):
    folder = dragbench(tmp_path)
    meta = {"prompt": "a cat", "points": [[1, 2], [3, 4]], "mask": box()} | change
    (folder / "meta_data.pkl").write_bytes(pickle.dumps(meta))
    text = message(read_dragbench, folder)
    assert expected in text and str(folder) in text


def test_dragbench_without_points_is_a_sample_without_any(tmp_path):
    folder = dragbench(tmp_path)
    (folder / "meta_data.pkl").write_bytes(pickle.dumps({"prompt": "a cat", "points": [], "mask": box()}))
    assert len(read_dragbench(folder).points) == 0


def test_dragbench_points_that_contain_themselves(tmp_path):
    endless: list = [1]
    endless.append(endless)
    laughs: list = [1, 2]
    for _ in range(60):
        laughs = [laughs, laughs]
    folder = dragbench(tmp_path)
    for points in (endless, laughs, [endless, endless], [laughs, laughs]):
        meta = {"prompt": "a cat", "points": points, "mask": box()}
        (folder / "meta_data.pkl").write_bytes(pickle.dumps(meta))
        assert "malformed points" in message(read_dragbench, folder)


# 2**60 numbers in few bytes: a tuple of the tuple before it, twice, and so on; they keep the index 0.
NESTED = b"K\x01" + b"q\x00h\x00\x86" * 60 + b"q\x00"
ENCODE = b"c_codecs\nencode\n"


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        (b"}" + NESTED + b"Ns", "a key of the type tuple"),
        (b"}(" + NESTED + b"Nu", "a key of the type tuple"),
        (b"}(K\x01N" + NESTED + b"Nu", "a key of the type tuple"),
        (b"})Ns", "a key of the type tuple"),
        (b"}NNs", "a key of the type NoneType"),
        (b"}" + ENCODE + b"Ns", "a key of the type _StandIn"),
        (ENCODE + b"X\x01\x00\x00\x00a" + NESTED + b"\x86R", "encodes a text otherwise"),
        (ENCODE + NESTED + b"h\x00\x86R", "was refused"),
        (NESTED + b"K\x01R", "calls something that is no function"),
        (NESTED + b")R", "calls something that is no function"),
        (NESTED + b"K\x01b", "was refused"),
        (NESTED + b"K\x01a", "was refused"),
        (b"cnumpy\ndtype\n" + NESTED + b"NN\x87R", "was refused"),
        (b"cnumpy.core.numeric\n_frombuffer\n(" + NESTED + b"h\x00h\x00h\x00tR", "malformed array"),
    ],
)
def test_nested_tuples_waste_no_time(tmp_path, instructions, expected):
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02" + instructions + b".")
    text = message(load_pickle, tmp_path / "a.pkl")
    assert expected in text and "was refused" in text


def test_keys_of_dicts_are_texts_and_numbers(tmp_path):
    for protocol in (2, 3, 4, 5):
        for value in ({}, {"a": 1}, {"a": {1: None, 2.5: [(1, 2)]}, -1: {}}):
            (tmp_path / "a.pkl").write_bytes(pickle.dumps(value, protocol))
            assert load_pickle(tmp_path / "a.pkl") == value


def test_pickles_are_bounded_in_size(tmp_path, monkeypatch):
    monkeypatch.setattr(safe_pickle, "MAX_BYTES", 2**20)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(b"x" * 2**20))
    assert "larger than 1 MiB" in message(load_pickle, tmp_path / "a.pkl")


def test_reading_does_not_import_torch():
    code = "import sys, dragdiff.data.readers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_a_pickle_that_copies_one_text_many_times_is_refused(tmp_path):
    """It would take many times its own size in memory."""
    text = b"X" + (2**16).to_bytes(4, "little") + b"a" * 2**16 + b"q\x00X\x06\x00\x00\x00latin1q\x01"
    call = b"c_codecs\nencode\nh\x00h\x01\x86R"
    file = tmp_path / "meta_data.pkl"
    file.write_bytes(b"\x80\x02](" + text + call * 100 + b"e.")
    assert "copies more" in message(load_pickle, file)
    file.write_bytes(b"\x80\x02](" + text + call + b"e.")
    assert load_pickle(file)[2] == b"a" * 2**16
