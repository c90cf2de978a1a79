"""Write the shipped examples: one scene of each kind of edit, in the plain sample format.

    python experiments/embedded_model/examples.py

`scene.json` beside each sample names its kind and seed, so that the true edit can be rendered again. The seeds are
picked by eye from those that the settings were chosen on (0 to 11); how the model does on scenes that nobody picked is
what evaluate.py measures.
"""

from __future__ import annotations

import json
import shutil

from dragdiff.assets import EXAMPLES
from dragdiff.data.readers import write_folder
from dragdiff.data.scenes import make_scene

SEEDS = {"sun": 10, "tower": 5}

if __name__ == "__main__":
    for kind, seed in SEEDS.items():
        folder = EXAMPLES / kind
        shutil.rmtree(folder, ignore_errors=True)
        write_folder(make_scene(kind, seed).sample, folder)
        (folder / "scene.json").write_text(json.dumps({"kind": kind, "seed": seed}) + "\n")
        print(f"wrote {folder}")
