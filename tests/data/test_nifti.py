"""A NIfTI file without all of its voxels is refused: SimpleITK writes and reads one without a word."""

import struct
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import tiny
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from tiny import files_up_to

from nnunet_ssl.commands.interrupted_labels import RECORD, finished_labels
from nnunet_ssl.commands.labeling import write_labels
from nnunet_ssl.data.nifti import require_complete
from nnunet_ssl.data.scans import unpacked
from nnunet_ssl.dataset_conversion.staging import write_image
from nnunet_ssl.system.disk import FullDisk

LABELS = np.random.default_rng(0).integers(0, 3, (20, 20, 20)).astype(np.uint8)


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_every_missing_voxel_counts(name, tmp_path):
    file = tmp_path / name
    tiny.write_image(file, LABELS)
    with unpacked(file, ".nii.gz"):
        require_complete(file)
    whole = file.read_bytes()
    for part in (whole[:-1] if name == "scan.nii" else whole[:-20], whole[: len(whole) // 2], whole[:40], b""):
        file.write_bytes(part)
        with pytest.raises(ValueError, match=f"{file} is cut off or damaged"):
            require_complete(file)
        with pytest.raises(ValueError, match=f"{file} is cut off or damaged"), unpacked(file, ".nii.gz"):
            pass
    require_complete(tmp_path / "scan.nrrd")  # whose readers say so themselves


def test_odd_headers_are_left_to_the_readers(tmp_path):
    file = tmp_path / "scan.nii"
    tiny.write_image(file, LABELS)
    whole = bytearray(file.read_bytes())
    for place, value in ((112, struct.pack("<2f", 1, np.nan)), (70, struct.pack("<h", 3))):  # slope, voxel type
        odd = whole.copy()
        odd[place : place + len(value)] = value
        file.write_bytes(odd)
        require_complete(file)


def test_labels_that_a_full_disk_has_cut_off_are_said_and_do_not_count(tmp_path):
    plans, properties = SimpleNamespace(image_reader_writer_class=lambda: SimpleITKIO()), {}
    properties["sitk_stuff"] = {"spacing": (1, 1, 1), "origin": (0, 0, 0), "direction": np.eye(3).ravel()}
    (tmp_path / "labelsTr").mkdir()
    (tmp_path / RECORD).write_text("model")
    scans = {case: [tmp_path / f"{case}.nii.gz"] for case in ("a", "b")}
    for file in scans.values():
        file[0].touch()
    where = properties, plans, {"file_ending": ".nii.gz"}, tmp_path / "labelsTr", tmp_path / "scratch"
    write_labels("a", LABELS, *where)
    with files_up_to(1500), pytest.raises(FullDisk, match="has no room"):
        write_labels("b", LABELS, *where)
    assert finished_labels(tmp_path, "model", scans, ".nii.gz") == {"a"}


def test_a_converted_dataset_is_not_half_written(tmp_path):
    file = tmp_path / "a.nii.gz"
    with files_up_to(1500), pytest.raises(ValueError, match=r"a\.nii\.gz is cut off or damaged"):
        write_image(sitk.GetImageFromArray(LABELS), file)


def test_a_dicom_series_that_found_no_room_is_said(tmp_path):
    tiny.write_dicom(sitk.GetImageFromArray(LABELS.astype(np.int16)), tmp_path / "series")
    words = r"no room for the DICOM series series\. Set TMPDIR"
    for ending in (".nii", ".nii.gz"):
        file = unpacked(tmp_path / "series", ending, to_keep=True)
        with files_up_to(1500), pytest.raises(FullDisk, match=words), file:
            pytest.fail("cut off")
