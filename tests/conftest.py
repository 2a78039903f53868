"""Every test run gets its own nnU-Net folders."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

from nnunet_ssl.autoregister import register

# Set while pytest loads this file, before any test imports nnunetv2.
_ROOT = tempfile.TemporaryDirectory(prefix="nnunet_ssl_tests_")
for _name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    _folder = Path(_ROOT.name, _name)
    _folder.mkdir()
    os.environ[_name] = str(_folder)
os.environ["nnUNet_n_proc_DA"] = "0"  # no worker processes
os.environ["nnUNet_compile"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"  # threads of tiny networks wait for each other most of the time
# where it is set, every process that a test starts would compile all of torch's files anew
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
register()


def pytest_collection_modifyitems(items):
    """Files with slow tests first, then those with many, so that no process works alone at the end."""
    files = {}
    for item in items:
        files.setdefault(item.path, []).append(item)

    def weight(tests):
        return any(test.get_closest_marker("slow") for test in tests), len(tests)

    items[:] = [test for tests in sorted(files.values(), key=weight, reverse=True) for test in tests]


def pytest_unconfigure():
    _ROOT.cleanup()


@pytest.fixture(scope="session", autouse=True)
def drawing():
    """nnU-Net's and our functions that draw; in tests they are called only where a test is marked `pictures`."""
    from tiny_trainers import DRAWING

    drawing = {}
    with pytest.MonkeyPatch.context() as patch:
        for owner, name, nothing in DRAWING:
            drawing[owner, name] = getattr(owner, name)
            patch.setattr(owner, name, nothing)
        yield drawing


@pytest.fixture(autouse=True)
def pictures(request, drawing, monkeypatch):
    if request.node.get_closest_marker("pictures") is not None:
        for (owner, name), function in drawing.items():
            monkeypatch.setattr(owner, name, function)


@pytest.fixture(scope="session")
def tiny_dataset() -> Path:
    """Dataset701_Tiny, preprocessed in 2d and 3d_fullres: 2 labeled, 1 for validation, 4 + 2 unlabeled, 1 test scan.

    The unlabeled cases come from both sources: 4 of the fold's list, 2 of imagesUn. Returns the preprocessed folder.
    """
    return make_tiny_dataset(701, "Tiny")


@pytest.fixture(scope="session")
def tiny_residual_dataset() -> Path:
    """Dataset702_TinyResidual: the same with residual encoder networks."""
    return make_tiny_dataset(702, "TinyResidual", residual=True)


NESTED = {"background": 0, "whole": [1, 2], "core": 2}


@pytest.fixture(scope="session")
def tiny_ignore_dataset() -> Path:
    """Dataset703_TinyIgnore: two classes, and a part of every scan is not annotated."""
    return make_tiny_dataset(703, "TinyIgnore", labels={"background": 0, "outer": 1, "inner": 2, "ignore": 3})


@pytest.fixture(scope="session")
def tiny_regions_dataset() -> Path:
    """Dataset704_TinyRegions: two nested regions."""
    return make_tiny_dataset(704, "TinyRegions", labels=NESTED, regions_class_order=[1, 2])


@pytest.fixture(scope="session")
def tiny_regions_ignore_dataset() -> Path:
    """Dataset705_TinyRegionsIgnore: two nested regions, and a part of every scan is not annotated."""
    labels = {**NESTED, "ignore": 3}
    return make_tiny_dataset(705, "TinyRegionsIgnore", labels=labels, regions_class_order=[1, 2])


@pytest.fixture
def labels(request):
    """The kind of labels that a test is parametrized with, see equations.EVERY_KIND."""
    return request.param


@pytest.fixture
def labels_dataset(labels, request) -> Path:
    """The tiny dataset of that kind of labels."""
    return request.getfixturevalue(labels.fixture)


def make_tiny_dataset(number: int, name: str, residual: bool = False, **raw) -> Path:
    from tiny import make_raw_dataset, plan

    from nnunet_ssl.commands.preprocess import preprocess_unlabeled
    from nnunet_ssl.data.splits import save_splits

    make_raw_dataset(number, name, cases=7, unlabeled=2, test=1, **raw)
    folder = plan(number, residual=residual)
    cases = [f"case_{i:03d}" for i in range(7)]
    save_splits(folder / "splits_final.json", [{"train": cases[:2], "val": cases[2:3], "unlabeled": cases[3:]}])
    preprocess_unlabeled(str(number), ["2d", "3d_fullres"], num_processes=1)
    return folder
