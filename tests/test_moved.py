"""Names of modules, and in modules, that are gone: an import says where what was there is now."""

import importlib
import importlib.util
import re
import subprocess
import sys

import pytest

from dragdiff import moved


@pytest.mark.parametrize("old", moved.MODULES)
def test_an_import_of_an_old_name_says_the_new_one(old):
    assert old not in sys.modules
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module(old)
    assert str(caught.value) == f"{old} has moved: it is {moved.MODULES[old]} now"
    assert caught.value.name == old


@pytest.mark.parametrize("new", sorted({name for text in moved.MODULES.values() for name in re.split(" and ", text)}))
def test_a_new_name_is_one(new):
    assert importlib.util.find_spec(new) is not None


@pytest.mark.parametrize(
    "module, home, name", [(module, home, name) for module, (home, names) in moved.NAMES.items() for name in names]
)
def test_a_name_that_has_left_a_module_says_where_it_is(module, home, name):
    with pytest.raises(ImportError, match=f"^{module}.{name} has moved: it is {home}.{name} now$") as caught:
        exec(f"from {module} import {name}")
    assert caught.value.name == name
    assert hasattr(importlib.import_module(home), name)


def test_another_name_is_missing_as_ever():
    with pytest.raises(ImportError, match="cannot import name 'walks'"):
        exec("from dragdiff.config import walks")
    assert not hasattr(importlib.import_module("dragdiff.config"), "walks")


def test_a_persons_own_script_is_told():
    done = subprocess.run(
        [sys.executable, "-c", "from dragdiff.modules.backbone import StableDiffusion"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: dragdiff.modules.backbone has moved: it is dragdiff.backbones.diffusion and "
        "dragdiff.backbones.stable_diffusion now"
    )


def test_what_never_was_there_is_missing_as_ever():
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'dragdiff\.nothing'$"):
        importlib.import_module("dragdiff.nothing")
    with pytest.raises(ImportError, match="cannot import name 'Backbone'"):
        exec("from dragdiff.backbones.diffusion import Backbone")
