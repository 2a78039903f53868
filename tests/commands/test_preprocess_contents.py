"""What is in unlabeled scans is looked at before anything is written; one run at a time writes, as long as it can."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tiny
from tiny import files_up_to

from nnunet_ssl.cli import main
from nnunet_ssl.commands.preprocess import only_run, preprocess_unlabeled
from nnunet_ssl.data.plausibility import NARROW
from nnunet_ssl.data.preprocessed import FILES
from nnunet_ssl.data.scans import unpacked
from nnunet_ssl.system import disk
from nnunet_ssl.system.disk import in_units, say_full_disk

CASES = ("unlabeled_000", "unlabeled_001")
SCAN = "unlabeled_000_0000.nii.gz"


@pytest.fixture(scope="module")
def dataset():
    """Raw and preprocessed folder of a planned dataset with one channel."""
    raw = tiny.make_raw_dataset(944, "Contents", cases=2, unlabeled=2, test=1)
    return raw, tiny.plan(944, ("3d_fullres",))


@pytest.fixture
def images(dataset, tmp_path):
    """A copy of imagesUn to do harm to, for -i."""
    return Path(shutil.copytree(dataset[0] / "imagesUn", tmp_path / "images"))


@pytest.fixture
def target(dataset):
    folder = dataset[1] / "nnUNetPlans_3d_fullres_unlabeled"
    before = set(dataset[1].iterdir())
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name(f"{folder.name}.json").unlink(missing_ok=True)
    shutil.rmtree(folder.with_name(f"{folder.name}.tmp"), ignore_errors=True)
    assert set(dataset[1].iterdir()) == before


def run(**kwargs):
    preprocess_unlabeled("944", ["3d_fullres"], **{"num_processes": 0, **kwargs})


def problems(error):
    return [line for line in str(error.value).splitlines() if line.startswith("  ")]


def finished(target):
    return {file.name.removesuffix(".pkl") for file in target.glob("*.pkl")}


def copy_of(place, name, to=SCAN):
    return lambda raw, images: shutil.copy(raw / place / name, images / to)


def voxels(change):
    """Writes `change(array)` in place of the first scan's voxels."""

    def harm(raw, images):
        image = sitk.ReadImage(str(images / SCAN))
        changed = sitk.GetImageFromArray(change(sitk.GetArrayFromImage(image)))
        changed.CopyInformation(image)
        sitk.WriteImage(changed, str(images / SCAN))

    return harm


def one(value):
    def change(array):
        array[3, 4, 5] = value
        return array

    return voxels(change)


def spacing(*size):
    def harm(raw, images):
        image = sitk.ReadImage(str(images / SCAN))
        image.SetSpacing(size)
        sitk.WriteImage(image, str(images / SCAN))

    return harm


# what is done to unlabeled_000 and what is said
DOUBTS = {
    "labeled": (copy_of("imagesTr", "case_001_0000.nii.gz"), "the same voxels as case_001_0000.nii.gz in imagesTr"),
    "test": (copy_of("imagesTs", "test_000_0000.nii.gz"), "the same voxels as test_000_0000.nii.gz in imagesTs"),
    "label_map": (copy_of("labelsTr", "case_001.nii.gz"), "looks like a label map, every voxel is a label"),
    "nan": (one(np.nan), "1 of 10560 voxels are NaN or infinite; nnU-Net reads them as 0"),
    "infinite": (one(-np.inf), "1 of 10560 voxels are NaN or infinite; nnU-Net reads them as 0"),
    "huge": (one(1e30), "values up to 1e+30 are too large to be normalized"),
    "faint": (voxels(lambda a: a * np.float32(NARROW / 1e6)), "which normalization takes for a constant"),
    "constant": (voxels(lambda a: a * 0 + 7), "constant, every voxel is 7"),
    "large_spacing": (spacing(10, 10, 10), "[240, 200, 220] voxels in the spacing of 3d_fullres, where the median"),
    "small_spacing": (spacing(0.1, 0.1, 0.1), "times fewer along an axis"),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_a_doubtful_scan_is_refused_and_let_through_by_name(doubt, dataset, images, target):
    harm, words = DOUBTS[doubt]
    harm(dataset[0], images)
    with pytest.raises(ValueError, match=f"Nothing was preprocessed. Problems in {images}:\n  unlabeled_000") as error:
        run(images=images)
    assert words in str(error.value)
    assert len(problems(error)) == 1
    assert str(error.value).endswith("\nLet through what is right as it is: --accept unlabeled_000")
    with pytest.raises(ValueError, match="unlabeled_000"):
        run(images=images, accept=["unlabeled_001"])
    assert not target.exists()
    if doubt != "large_spacing":  # which would take seconds
        run(images=images, accept=["unlabeled_000"])
        assert finished(target) == set(CASES)


def test_two_unlabeled_scans_that_are_the_same_are_refused(images, target):
    shutil.copy(images / SCAN, images / "unlabeled_002_0000.nii.gz")
    words = f"unlabeled_002_0000.nii.gz: has the same voxels as {SCAN} in images; remove one of them"
    with pytest.raises(ValueError, match=re.escape(words)):
        run(images=images)
    run(images=images, accept=["unlabeled_002"])
    assert finished(target) == {*CASES, "unlabeled_002"}


def test_a_new_scan_is_compared_with_the_finished_ones_too(images, target):
    run(images=images)
    (images / "again_0000.nii.gz").symlink_to(images / SCAN)
    with pytest.raises(ValueError, match=f"again_0000.nii.gz: has the same voxels as {SCAN} in images"):
        run(images=images)


def test_a_scan_of_another_part_is_compared_too(images, target):
    shutil.copy(images / SCAN, images / "unlabeled_001_0000.nii.gz")
    with pytest.raises(ValueError, match=r"unlabeled_001_0000\.nii\.gz: has the same voxels as"):
        run(images=images, num_parts=2, part_id=1)


def test_all_doubts_and_problems_are_in_one_report(dataset, images, target):
    one(np.nan)(dataset[0], images)
    shutil.copy(dataset[0] / "imagesTr" / "case_000_0000.nii.gz", images / "unlabeled_001_0000.nii.gz")
    (images / "unlabeled_002_0000.nii.gz").write_bytes(b"not an image")
    (images / "notes.txt").touch()
    with pytest.raises(ValueError, match="Nothing was preprocessed") as error:
        run(images=images)
    assert len(problems(error)) == 4
    for words in ("notes.txt: not a scan", "voxels are NaN", "case_000_0000", "unlabeled_002_0000.nii.gz: cannot be"):
        assert words in str(error.value)
    assert str(error.value).endswith("--accept unlabeled_000 unlabeled_001")


def test_scans_are_let_through_on_the_command_line(dataset, images, target, capsys):
    for case in CASES:
        copy_of("imagesTs", "test_000_0000.nii.gz", f"{case}_0000.nii.gz")(dataset[0], images)
    command = ["preprocess", "-d", "944", "-c", "3d_fullres", "-np", "1", "-i", str(images)]
    assert main(command) == 1
    *_, advice = capsys.readouterr().err.splitlines()
    assert main(command + advice.partition(": ")[2].split()) == 0
    assert finished(target) == set(CASES)


def test_what_cannot_be_preprocessed_is_not_let_through(images, target):
    (images / SCAN).write_bytes(b"not an image")
    with pytest.raises(ValueError, match="cannot be read") as error:
        run(images=images, accept=["unlabeled_000"])
    assert "--accept" not in str(error.value)


def test_a_name_to_accept_that_is_no_case_is_refused(images, target):
    with pytest.raises(ValueError, match=rf"--accept nobody {SCAN}: no such case in {images}\. .* as unlabeled_000\."):
        run(images=images, accept=["nobody", SCAN, "unlabeled_000"])
    assert not target.exists()


def test_scans_smaller_than_the_patch_are_a_warning(dataset, target, capsys):
    file = dataset[1] / "nnUNetPlans.json"
    kept = file.read_text()
    plans = json.loads(kept)
    plans["configurations"]["3d_fullres"]["patch_size"] = [32, 32, 32]
    file.write_text(json.dumps(plans))
    try:
        run()
    finally:
        file.write_text(kept)
    words = "WARNING: 2 scans are smaller than the patch of 3d_fullres along every axis: unlabeled_000, unlabeled_001"
    assert words in capsys.readouterr().out
    assert finished(target) == set(CASES)


# ---- two at once ----


def test_a_second_run_is_refused_and_told_of_the_first(target, capsys):
    with only_run(target, 0, 1):
        assert main(["preprocess", "-d", "944", "-c", "3d_fullres", "-np", "1"]) == 1
    error = capsys.readouterr().err
    assert f"Process {os.getpid()} on " in error
    assert f"has been preprocessing scans into {target} since " in error
    assert not target.exists()
    run()


PARTS = {  # part and number of parts of two runs: whether both may go on
    ((0, 2), (1, 2)): True,
    ((1, 12), (11, 12)): True,
    ((0, 2), (0, 2)): False,
    ((0, 1), (1, 2)): False,
    ((1, 2), (0, 1)): False,
    ((0, 2), (2, 3)): False,
    ((0, 2), (1, 12)): False,
}


@pytest.mark.parametrize(("runs", "both"), PARTS.items())
def test_only_parts_of_as_many_go_side_by_side(tmp_path, runs, both):
    first, second = runs
    target = tmp_path / "nnUNetPlans_2d_unlabeled"
    with only_run(target, *first):
        if both:
            with only_run(target, *second):
                assert len(list(tmp_path.iterdir())) == 2
        else:
            with pytest.raises(RuntimeError, match="has been preprocessing"), only_run(target, *second):
                pytest.fail("two at once")
        with only_run(tmp_path / "nnUNetPlans_3d_fullres_unlabeled", *second):
            pass
    assert list(tmp_path.iterdir()) == []


# ---- a full disk ----

LIMITED = """
import resource, sys
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunet_ssl.cli import main
original, done = DefaultPreprocessor.run_case_save, []
def limited(*arguments):
    if done:  # the second case finds the disk full
        sys.dont_write_bytecode = True
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    done.append(arguments)
    original(*arguments)
DefaultPreprocessor.run_case_save = limited
sys.exit(main("preprocess -d 944 -c 3d_fullres -np 1".split()))
"""


def test_a_full_folder_of_temporary_files_is_no_fault_of_the_scan(images):
    words = rf"no room to unpack {SCAN} \(File too large\)\. Set TMPDIR"
    with files_up_to(3000), pytest.raises(OSError, match=words), unpacked(images / SCAN, ".nii.gz"):
        pytest.fail("not unpacked")


def test_a_full_disk_is_said_with_folder_and_bytes_and_finished_cases_stay(target):
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 1
    scratch = target.with_name(f"{target.name}.tmp")
    words = rf"{scratch} has no room \(File too large\): [\d.e+]+ \w+ are free on its disk, up to 63.4 kB are needed"
    assert re.search(words, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert finished(target) == {"unlabeled_000"}
    assert {file.name for file in target.iterdir()} == {"unlabeled_000" + suffix for suffix in FILES}
    assert list(scratch.iterdir()) == []
    run()
    assert finished(target) == set(CASES)


def test_another_failure_is_not_blamed_on_the_disk(tmp_path):
    with pytest.raises(ZeroDivisionError), say_full_disk(tmp_path, lambda: 10_000_000):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_whether_a_disk_is_full_is_tried_to_the_last_byte(tmp_path):
    with files_up_to(3_000_000):
        assert disk.why_not_written(tmp_path, 3_000_000) is None
        assert disk.why_not_written(tmp_path, 3_000_001) == "File too large"
    assert list(tmp_path.iterdir()) == []


def test_bytes_are_written_for_people():
    sizes = {999: "999 bytes", 63_360: "63.4 kB", 1_500_000_000: "1.5 GB", 5 * 10**15: "5e+03 TB"}
    assert {size: in_units(size) for size in sizes} == sizes
