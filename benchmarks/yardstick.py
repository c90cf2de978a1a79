"""The pictures of a score of edits, so that a change of the code can show that it changed none of them.

    python benchmarks/yardstick.py make before          # with the code of before
    python benchmarks/yardstick.py make after           # with the code of now
    python benchmarks/yardstick.py compare before after

All cases run through the command line with the embedded model, each with a cache of its own, on one CPU thread. Where
no LoRA is trained the pictures and the tracked distances must be equal; where one is, its losses must agree within 1e-4
(relative) and the pictures within one level of 255. Compare on one machine: bytes differ between kinds of processor.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

LOSSES, LEVELS = 1e-4, 1  # how far trained LoRAs' losses (relative) and their pictures (of 255) may be apart
FEW = ("drag.steps=10", "output.frames_every=0")
TRAINED = ("lora.steps=6", "lora.batch_size=2", "logger.kind=csv", *FEW)
GENERATED = ("generate.enabled=true", "prompt=a red sun in a day sky over a green mountain and green ground")
PAIRS = "points=[[[20,20],[30,24]],[[44,40],[40,30]]]"
STUDY = """question: yardstick
settings: {drag.steps: 6, lora.steps: 4, lora.batch_size: 2}
data: {categories: [sun], scenes: 2, first_seed: 40}
variants:
  - {name: far, ddim.strength: 0.7}
  - {name: near, ddim.strength: 0.5, drag.lr: 0.03}
metrics: {names: [scene, outside]}
"""


def edits(inputs: Path) -> dict[str, list[str]]:
    """The settings of each edit by its name."""
    odd, wide = f"image={inputs / 'odd.png'}", f"image={inputs / 'wide.png'}"
    return {
        "sun": ["sample=example:sun"],
        "tower": ["sample=example:tower", "output.frames_every=0"],
        "fast": ["embedded", "fast", "sample=example:sun"],
        "lora": ["sample=scene:sun-31", *TRAINED],
        "lora-all-features": ["sample=scene:tower-31", *TRAINED, "drag.features=[mid_block,up_blocks.1,up_blocks.2]"],
        "lora-file": ["sample=scene:sun-31", f"lora.path={inputs / 'adapter'}", *FEW],
        "lora-resumed": ["sample=scene:sun-31", f"lora.resume={inputs / 'half' / 'last.ckpt'}", *TRAINED],
        "reference": ["embedded", "reference", wide, "prompt=a room", "points=[[[20,20],[40,20]]]", *TRAINED],
        "low-memory": ["sample=scene:sun-33", "model.memory=low", *FEW],
        "guidance": [*GENERATED, "points=[[[20,20],[34,16]]]", *FEW],
        "freeu": [*GENERATED, "generate.freeu=true", "points=[[[20,20],[34,16]]]", *FEW],
        "dpm": [*GENERATED, "generate.scheduler=dpm++2m", "generate.guidance=1", "points=[[[20,20],[34,16]]]", *FEW],
        "dpm-karras": [*GENERATED, "generate.scheduler=dpm++2m-karras", "points=[[[20,20],[34,16]]]", *FEW],
        "odd-size": [odd, "prompt=a landscape", f"mask={inputs / 'odd-mask.png'}", "points=[[[20,20],[30,24]]]", *FEW],
        "pairs-no-mask": [odd, "prompt=", PAIRS, *FEW],
        "smaller": [wide, "prompt=a room", "data.max_size=48", PAIRS, *FEW],
        "no-control": ["sample=scene:tower-34", "control.enabled=false", "drag.mask_weight=0", *FEW],
        "late-control": ["sample=scene:tower-35", "control.start_layer=7", "control.start_step=4", *FEW],
        "at-target": ["sample=scene:sun-36", "points=[[[30,20],[30,20]]]", *FEW],
        "batch": [f"sample={inputs / 'four'}", "edit.batch=4", "drag.steps=14", "output.frames_every=0"],
        "batch-lora": [f"sample={inputs / 'four'}", "edit.batch=4", *TRAINED],
    }


def prepare(inputs: Path) -> None:
    """Pictures, samples and LoRAs that the cases start from."""
    from dragdiff.data.readers import write_folder
    from dragdiff.data.scenes import make_scene

    inputs.mkdir(parents=True)
    for kind, seed in (("sun", 50), ("tower", 50), ("sun", 51), ("tower", 51)):
        write_folder(make_scene(kind, seed).sample, inputs / "four" / f"{kind}-{seed}")
    landscape, room = (Image.fromarray(np.array(make_scene(kind, 60).sample.image)) for kind in ("sun", "tower"))
    landscape.crop((0, 0, 63, 50)).save(inputs / "odd.png")
    room.resize((96, 60)).save(inputs / "wide.png")
    mask = np.zeros((50, 63), np.uint8)
    mask[5:40, 8:50] = 255
    Image.fromarray(mask).save(inputs / "odd-mask.png")
    sample = ["sample=scene:sun-31", "lora.batch_size=2", "cache.enabled=false", f"output.folder={inputs}"]
    run(["train", *sample, "lora.steps=6", "output.name=adapter"])
    run(["train", *sample, "lora.steps=6", "lora.save_every=3", "output.name=whole"])
    run(["train", *sample, "lora.steps=3", "lora.save_every=3", "output.name=half"])


def run(arguments: Sequence[str]) -> None:
    """One command, which must succeed."""
    from dragdiff.cli import main

    if main(arguments):
        raise SystemExit(f"failed: dragdiff {' '.join(arguments)}")


def make(folder: Path) -> None:
    """All cases, each in a folder of its own."""
    torch.set_num_threads(1)
    prepare(folder / "inputs")
    for name, settings in edits(folder / "inputs").items():
        place = [f"output.folder={folder}", f"output.name={name}", f"cache.folder={folder / 'cache' / name}"]
        run(["edit", *([] if settings[0] == "embedded" else ["embedded"]), *settings, *place])
    again = [f"cache.folder={folder / 'cache' / 'sun'}", f"output.folder={folder}"]  # only drags and denoises
    run(["edit", "embedded", "sample=example:sun", "points=[[[20,20],[34,22]]]", "output.name=again", *FEW, *again])
    repeated = [f"output.folder={folder}", "output.name=repeated", f"cache.folder={folder / 'cache' / 'repeated'}"]
    run(["edit", str(folder / "odd-size" / "config.yaml"), *repeated])
    (folder / "study.yaml").write_text(STUDY)
    run(["study", str(folder / "study.yaml"), f"results={folder / 'studies'}"])


def compare(before: Path, after: Path) -> bool:
    """Say of each case whether it is the same; whether all are."""
    fine = True
    pictures = sorted(path.relative_to(before) for path in before.rglob("edited.png") if "studies" not in path.parts)
    ours, theirs = (studied(folder) for folder in (before, after))
    found = {str(path.parent): (before / path, after / path) for path in pictures}
    found |= {f"study {name}": (picture, theirs.get(name, after / "missing")) for name, picture in ours.items()}
    for name, (one, other) in found.items():
        verdict = difference(one, other) if other.is_file() else "missing"
        fine &= not verdict
        print(f"{name:34} {verdict or 'same'}")
    return fine


def difference(before: Path, after: Path) -> str:
    """What differs between two edits, by their pictures; "" where they are as equal as they must be."""
    one, other = (np.asarray(Image.open(path)).astype(int) for path in (before, after))
    losses, now = (learned(path.parent / "log" / "metrics.csv") for path in (before, after))
    trained = bool(losses) or "studies" in before.parts
    levels = int(np.abs(one - other).max()) if one.shape == other.shape else 256
    if levels > (LEVELS if trained else 0):
        return f"pictures differ by up to {levels} of 255"
    if len(losses) != len(now) or not np.allclose(losses, now, rtol=LOSSES, atol=0):
        return "the LoRA's losses differ"
    facts, theirs = (json.loads(file.read_text()) for file in (facts_of(before), facts_of(after)))
    if not trained and any(facts.get(key) != theirs.get(key) for key in ("points", "steps", "stop_reason")):
        return "distances, steps or the reason to stop differ"
    return ""


def facts_of(picture: Path) -> Path:
    """The file with what was measured of an edit: of a single one, or of one in a study."""
    return next(file for name in ("metrics.json", "edit.json") if (file := picture.with_name(name)).is_file())


def learned(log: Path) -> list[float]:
    """The losses of a LoRA's training."""
    if not log.is_file():
        return []
    with log.open() as opened:
        return [float(row["lora/loss"]) for row in csv.DictReader(opened) if row.get("lora/loss")]


def studied(folder: Path) -> dict[str, Path]:
    """The pictures of the study by sample and settings: their folders are named by hashes, which may change."""
    found = {}
    for config in sorted((folder / "studies").rglob("config.yaml")):
        lines = config.read_text().splitlines()
        wanted = [line.strip() for line in lines if line.startswith("sample:") or line.strip().startswith("strength:")]
        found[" ".join(wanted)] = config.with_name("edited.png")
    return found


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["make", folder]:
            make(Path(folder).absolute())
        case ["compare", before, after]:
            sys.exit(not compare(Path(before), Path(after)))
        case _:
            sys.exit(__doc__)
