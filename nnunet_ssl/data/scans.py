"""Scans as files: finding them, what is wrong with their names, and opening them; scan_checks.py looks inside."""

import gzip
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_ssl.data.dataset_json import channel_names
from nnunet_ssl.data.nifti import CUT_OFF, cut_off, is_complete, is_packed, require_complete
from nnunet_ssl.data.preprocessed import finished_cases
from nnunet_ssl.data.splits import read_splits
from nnunet_ssl.system.disk import FullDisk, is_full

POSITION = "0020|0032"  # of a DICOM slice: its first voxel, in mm


def find_scans(folder: Path, ending: str, single_channel: bool = False) -> tuple[dict[str, list[Path]], list[str]]:
    """Sort a folder's files into cases (identifier to its files by channel) and names that no scan has.

    Hidden files are passed over, like `CASE.json` beside a scan: nnU-Net reads the spacing of TIFF files from it.
    Both are empty where there is no folder. With `single_channel` files without a channel number are scans too, and so
    are folders, of a DICOM series each.
    """
    pattern = re.compile(r"(.+)_\d{4}" + re.escape(ending))
    scans: dict[str, list[Path]] = {}
    others = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        match = pattern.fullmatch(path.name)
        if path.name.startswith("."):
            continue
        if match:
            scans.setdefault(match[1], []).append(path)
        elif single_channel and (path.is_dir() or path.name.endswith(ending)):
            scans.setdefault(path.name.removesuffix(ending), []).append(path)
        else:
            others.append(path.name)
    return scans, [name for name in others if not (name.endswith(".json") and name.removesuffix(".json") in scans)]


def no_scan(name: str, ending: str) -> str:
    """What is wrong with a file's name that is no scan's."""
    if name.lower().endswith(ending.lower()) and not name.endswith(ending):
        return f"{name}: nnU-Net reads {ending}; rename it, the letters' case counts"
    return f"{name}: not a scan; expected CASE_0000{ending}, CASE_0001{ending}, ..."


def unlabeled_scans(folder: Path, dataset_json: dict) -> tuple[dict[str, list[Path]], list[str]]:
    """`find_scans` as a dataset's unlabeled scans are found, by every command and by the training.

    Args:
        folder: imagesUn, or another one; it may be missing.
        dataset_json: of the dataset.
    """
    return find_scans(folder, dataset_json["file_ending"], len(channel_names(dataset_json)) == 1)


def reserved_names(raw: Path, folder: Path, dataset_json: dict, data_identifiers: set[str]) -> dict[str, set[str]]:
    """The identifiers that an unlabeled scan must not have, by the place that has them."""
    ending = dataset_json["file_ending"]
    splits_file = folder / "splits_final.json"
    folds = read_splits(splits_file)
    return {
        str(raw / "imagesTr"): find_scans(raw / "imagesTr", ending)[0].keys() | dataset_json.get("dataset", {}).keys(),
        **{str(folder / own): finished_cases(folder / own) for own in sorted(data_identifiers)},
        f"a val or test list of {splits_file}": {
            case for fold in folds for key in ("val", "test") for case in fold.get(key, [])
        },
        str(raw / "imagesTs"): set(find_scans(raw / "imagesTs", ending)[0]),
    }


def name_problems(cases: Iterable[str], fix: str, reserved: dict[str, set[str]]) -> list[str]:
    """One line per case that is labeled, validated or tested on, or whose files nnU-Net would take for another's."""
    problems = []
    for case in sorted(cases):
        places = [place for place, names in reserved.items() if case in names]
        if places:
            problems.append(f"{case}: also in {' and in '.join(places)}; {fix}")
        if case.endswith("_seg"):
            problems.append(f"{case}: nnU-Net takes CASE_seg for the segmentation of CASE; {fix}")
    return problems


def files_to_compare(
    raw: Path, dataset_json: dict, unlabeled: dict[str, list[Path]], own: Iterable[Path], chosen: Iterable[str]
) -> dict[Path, str]:
    """Files of scans that an unlabeled one must not be a copy of, and the places that they are in.

    Args:
        raw: folder of the raw dataset.
        dataset_json: of the dataset.
        unlabeled: all unlabeled scans.
        own: files of those that are compared with the others; they are left out.
        chosen: test scans that are used as unlabeled ones on demand; they are left out.
    """
    ending = dataset_json["file_ending"]
    table = dataset_json.get("dataset", {}).values()
    # nnU-Net expands environment variables there
    others = {raw / os.path.expandvars(image): "dataset.json" for entry in table for image in entry["images"]}
    for name in ("imagesTr", "imagesTs"):
        scans = find_scans(raw / name, ending)[0]
        left = scans if name == "imagesTr" else scans.keys() - set(chosen)
        others |= {file: name for case in left for file in scans[case]}
    others |= {file: file.parent.name for files in unlabeled.values() for file in files}
    left_out = {os.path.abspath(file) for file in own}
    return {file: place for file, place in others.items() if os.path.abspath(file) not in left_out}


def changed_at(scan: str | Path) -> int:
    """When a scan was written, in ns; of a DICOM series its newest file."""
    files = [scan, *Path(scan).iterdir()] if os.path.isdir(scan) else [scan]
    return max(os.stat(file).st_mtime_ns for file in files)


@contextmanager
def unpacked(file: Path, ending: str, to_keep: bool = False) -> Iterator[Path]:
    """A scan's file as readers take it; what is unpacked or converted for them is removed afterwards.

    A folder of DICOM files becomes one image file with the ending, but for its .gz where it is not `to_keep`. A packed
    NIfTI file is unpacked: SimpleITK alone takes three times as long as Python's gzip and SimpleITK together.

    Raises: ValueError where a NIfTI file is cut off, where the folder does not hold exactly one DICOM series, or slices
        are missing in it; OSError without room to unpack.
    """
    if not file.is_dir():
        if not is_packed(file):
            require_complete(file)
            yield file
            return
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, file.name.removesuffix(".gz"))
            with gzip.open(file) as source, path.open("wb") as unpacked:
                try:
                    shutil.copyfileobj(source, unpacked, 2**20)
                except CUT_OFF as error:
                    raise cut_off(file) from error
                except OSError as error:
                    if not is_full(error):  # a damaged file, or a drive that fails
                        raise
                    text = f"{scratch} has no room to unpack {file.name} ({error.strerror})"
                    raise FullDisk(f"{text}. Set TMPDIR to a folder with room.") from error
            if not is_complete(path):
                raise cut_off(file)
            yield path
        return
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(file))
    if len(series) != 1:
        raise ValueError(f"{len(series)} DICOM series in the folder, expected one")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, f"{file.name}_0000{ending if to_keep else ending.removesuffix('.gz')}")
        sitk.WriteImage(read_series(file, series[0]), str(path))
        if not is_complete(path):
            text = f"{scratch} has no room for the DICOM series {file.name}"
            raise FullDisk(f"{text}. Set TMPDIR to a folder with room.")
        yield path


def read_series(folder: Path, series: str) -> sitk.Image:
    """A DICOM series as one image.

    Raises: ValueError where slices are missing, or at one place: SimpleITK would give all of them the mean distance.
    """
    reader = sitk.ImageSeriesReader()
    reader.MetaDataDictionaryArrayUpdateOn()
    reader.SetFileNames(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series))
    image = reader.Execute()
    numbers = range(len(reader.GetFileNames()))
    positions = [numbers_in(reader.GetMetaData(i, POSITION)) for i in numbers if reader.HasMetaDataKey(i, POSITION)]
    if len(positions) == len(numbers) > 2 and all(len(position) == 3 for position in positions):
        gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
        if gaps.max() > 1.5 * np.median(gaps) or gaps.min() <= 0.5 * np.median(gaps):  # headers may be rounded
            raise ValueError(
                f"its slices are {gaps.min():.2f} to {gaps.max():.2f} mm apart: some are missing, twice there or of "
                f"another series"
            )
    return image


def numbers_in(value: str) -> list[float]:
    """The numbers of a DICOM element; none where it is empty, or not of numbers."""
    try:
        return [float(part) for part in value.split("\\")]
    except ValueError:
        return []
