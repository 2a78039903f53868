"""Scans that are others under another name are found by their voxels, and others are not read for it."""

import gzip
import shutil
import struct
import time

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tiny
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_ssl.data import copies
from nnunet_ssl.data.copies import find_copies, fingerprint, fingerprint_in_file, read
from nnunet_ssl.data.nifti import count_not_finite
from nnunet_ssl.data.plausibility import Expected
from nnunet_ssl.data.scans import files_to_compare

EXPECTED = Expected(("MR",), ".nii.gz", SimpleITKIO)
SHAPE = (6, 7, 8)


def image(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(np.float32)


def write(file, array, **kwargs):
    tiny.write_image(file, array, **kwargs)
    return file


def found(folder, expected=EXPECTED, places=("others",)):
    """`find_copies` of all files in `folder`/new among those of the places."""
    scans = {f.name.split("_")[0]: {f: fingerprint(read(f, expected))} for f in sorted((folder / "new").iterdir())}
    others = {file: place for place in places for file in sorted((folder / place).glob("*"))}
    return find_copies(None, scans, others, expected)


@pytest.fixture
def folder(tmp_path):
    for name in ("new", "others"):
        (tmp_path / name).mkdir()
    return tmp_path


CHANGES = {
    "the same file": lambda source, target: shutil.copy(source, target),
    "other spacing": lambda source, target: write(target, image(), spacing=(2, 3, 4)),
    "other type": lambda source, target: write(target, image().astype(np.int16)),
    "double": lambda source, target: write(target, image().astype(np.float64)),
    "not packed": lambda source, target: target.write_bytes(gzip.decompress(source.read_bytes())),
    "big-endian": lambda source, target: nibabel.save(
        nibabel.Nifti1Image(image().T.astype(">f4"), np.diag([-1, -1, 1, 1])), target
    ),
    "scaled": lambda source, target: scaled(target),
}


def scaled(target):
    """Stored as 2 v + 6, with the slope and intercept that undo it."""
    tiny.write_image(target.with_name("plain.nii"), (2 * image() + 6).astype(np.int16))
    content = bytearray(target.with_name("plain.nii").read_bytes())
    content[112:120] = struct.pack("<2f", 0.5, -3)
    target.with_name("plain.nii").unlink()
    target.write_bytes(gzip.compress(content))


@pytest.mark.parametrize("changed", ["new", "others"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_copy_is_found_however_it_was_saved(folder, change, changed):
    files = {"new": folder / "new" / "a_0000.nii.gz", "others": folder / "others" / "case_0000.nii.gz"}
    source = write(files["new" if changed == "others" else "others"], image())
    CHANGES[change](source, files[changed])
    assert found(folder).doubts == {
        "a": ["a_0000.nii.gz: has the same voxels as case_0000.nii.gz in others; remove one of them"]
    }


def test_scans_that_differ_in_one_voxel_are_no_copies(folder):
    other = image()
    other[-1, -1, -1] += 1  # far behind what fingerprints look at
    write(folder / "others" / "case_0000.nii.gz", image(shape=(40, 40, 40)))
    big = image(shape=(40, 40, 40))
    big[-1, -1, -1] += 1
    write(folder / "new" / "a_0000.nii.gz", big)
    write(folder / "new" / "b_0000.nii.gz", image(seed=1, shape=(40, 40, 40)))
    assert fingerprint(big[None]) == fingerprint(image(shape=(40, 40, 40))[None])
    assert found(folder) == copies.Copies({}, [])


def test_of_two_unlabeled_scans_that_are_the_same_the_later_one_is_the_copy(folder):
    for name in ("b", "a"):
        write(folder / "new" / f"{name}_0000.nii.gz", image())
    assert list(found(folder).doubts) == ["b"]


def test_a_channel_may_be_given_twice(folder):
    for channel in range(2):
        write(folder / "new" / f"a_{channel:04d}.nii.gz", image())
    scans = {"a": {f: fingerprint(read(f, EXPECTED)) for f in (folder / "new").iterdir()}}
    assert find_copies(None, scans, {}, EXPECTED).doubts == {}


@pytest.mark.parametrize("ending", [".nrrd", ".mha"])
def test_other_formats_are_compared_too(folder, ending):
    expected = Expected(("MR",), ending, SimpleITKIO)
    write(folder / "others" / f"case_0000{ending}", image())
    write(folder / "others" / f"other_0000{ending}", image(seed=2))
    write(folder / "new" / f"a_0000{ending}", image())
    assert list(found(folder, expected).doubts) == ["a"]


def test_a_dicom_series_is_compared_too(folder):
    write(folder / "new" / "a_0000.nii.gz", image())
    tiny.write_dicom(sitk.GetImageFromArray(image()), folder / "others" / "series")
    assert found(folder).doubts["a"] == ["a_0000.nii.gz: has the same voxels as series in others; remove one of them"]


def test_readers_that_turn_images_are_compared_as_they_read(folder):
    expected = Expected(("MR",), ".nii.gz", NibabelIOWithReorient)
    straight = nibabel.Nifti1Image(image().T, np.eye(4))
    nibabel.save(straight, folder / "new" / "a_0000.nii.gz")
    nibabel.save(straight.as_reoriented([[1, 1], [0, -1], [2, 1]]), folder / "others" / "case_0000.nii.gz")
    assert list(found(folder, expected).doubts) == ["a"]


def test_nifti_2_is_compared_as_its_reader_reads_it(folder):
    expected = Expected(("MR",), ".nii.gz", NibabelIO)  # ITK does not read it
    nibabel.save(nibabel.Nifti1Image(image().T, np.eye(4)), folder / "others" / "case_0000.nii.gz")
    nibabel.save(nibabel.Nifti2Image(image().T, np.eye(4)), folder / "new" / "a_0000.nii.gz")
    assert list(found(folder, expected).doubts) == ["a"]


def test_only_headers_of_scans_of_other_shapes_are_read_and_only_beginnings_of_the_others(folder, monkeypatch):
    write(folder / "new" / "a_0000.nii.gz", image())
    for name, other in (("shape", image(shape=(6, 7, 9))), ("voxels", image(seed=3))):
        write(folder / "others" / f"{name}_0000.nii.gz", other)
    scans = {"a": {folder / "new" / "a_0000.nii.gz": fingerprint(image()[None])}}
    monkeypatch.setattr(copies, "read", lambda *_: pytest.fail("a whole file is read"))
    others = dict.fromkeys((folder / "others").iterdir(), "others")
    assert find_copies(None, scans, others, EXPECTED) == copies.Copies({}, [])


def test_the_background_tells_no_scans_apart(folder):
    """Skull-stripped scans begin with the same zeros."""
    images = np.zeros((2, 60, 60, 60), np.float32)
    images[:, 50] = 1 + np.random.default_rng(0).random((2, 60, 60))
    first, second = (fingerprint(array[None]) for array in images)
    assert first != second
    assert first[:2] == ((60, 60, 60), 50 * 3600)
    file = write(folder / "new" / "a_0000.nii.gz", images[0])
    assert fingerprint_in_file(file, {(60, 60, 60)}, EXPECTED) == first
    assert fingerprint_in_file(file, {(60, 60, 61)}, EXPECTED) is None


def test_files_in_the_table_of_a_dataset_may_be_behind_an_environment_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("ELSEWHERE", str(tmp_path / "disk"))
    table = {"a": {"images": ["$ELSEWHERE/a_0000.nii.gz"]}, "b": {"images": ["imagesTr/b_0000.nii.gz"]}}
    found = files_to_compare(tmp_path, {"file_ending": ".nii.gz", "dataset": table}, {}, [], [])
    assert found == {tmp_path / file: "dataset.json" for file in ("disk/a_0000.nii.gz", "imagesTr/b_0000.nii.gz")}


def test_a_labeled_scan_that_cannot_be_read_is_warned_of(folder):
    write(folder / "new" / "a_0000.nii.gz", image())
    (folder / "others" / "case_0000.nii.gz").write_bytes(b"not an image")
    result = found(folder)
    assert result.doubts == {}
    assert "1 file cannot be read, so nobody knows" in result.warnings[0]
    assert "case_0000.nii.gz in others" in result.warnings[0]


def test_ten_thousand_labeled_scans_are_compared_in_seconds(folder):
    source = write(folder / "case.nii.gz", image(seed=1))
    for number in range(10_000):
        (folder / "others" / f"case{number}_0000.nii.gz").symlink_to(source)
    write(folder / "new" / "a_0000.nii.gz", image())
    begin = time.process_time()
    assert found(folder) == copies.Copies({}, [])
    assert time.process_time() - begin < 10


@pytest.mark.parametrize(("dtype", "number"), [(np.float32, 3), (np.float64, 3), (np.int16, 0)])
def test_voxels_that_are_no_numbers_are_counted_in_the_file_itself(tmp_path, dtype, number):
    array = np.arange(24, dtype=dtype).reshape(2, 3, 4)
    if number:
        array[0, 0, :3] = np.nan, np.inf, -np.inf
    file = write(tmp_path / "a.nii", array)
    assert np.isfinite(sitk.GetArrayFromImage(sitk.ReadImage(str(file)))).all()  # ITK hides them
    assert count_not_finite(file) == number


def test_large_finite_voxels_are_numbers(tmp_path):
    assert count_not_finite(write(tmp_path / "a.nii", np.full((4, 5, 6), 3e38, np.float32))) == 0
