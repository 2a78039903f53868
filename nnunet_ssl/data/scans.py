"""Scans as files: finding them, and what can be wrong with them."""

import gzip
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunet_ssl.data.dataset_json import channel_names
from nnunet_ssl.data.preprocessed import finished_cases
from nnunet_ssl.data.splits import read_splits
from nnunet_ssl.system.pool import run_all


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


def reading_problems(
    pool: Executor | None, scans: dict[str, Sequence[str | Path]], dataset_json: dict, reader: type[BaseReaderWriter]
) -> list[str]:
    """One line per problem of scans, all of whose files are read behind a progress bar, see `scan_problems`.

    Args:
        pool: of `worker_pool`.
        scans: per case its files.
        dataset_json: of the dataset.
        reader: nnU-Net's class for the files.
    """
    channels, ending = channel_names(dataset_json), dataset_json["file_ending"]
    checks = {case: (case, list(map(Path, files)), channels, ending, reader) for case, files in scans.items()}
    found = run_all(pool, scan_problems, checks, "Checking unlabeled scans")
    return [problem for case in scans for problem in found[case]]


def scan_problems(
    case: str, files: Sequence[Path], channels: Sequence[str], ending: str, reader: type[BaseReaderWriter]
) -> list[str]:
    """Read the files of a scan and say in one line each what is wrong with them; empty for a sound scan.

    Args:
        files: one per channel, in order; formats such as RGB images hold several channels in one file.
        channels: names of the expected channels.
    """
    problems, geometries, number = [], {}, 0
    for file in files:
        try:
            with unpacked(file, ending) as path:
                image, properties = reader().read_images([str(path)])
        except Exception as error:  # a damaged file makes readers raise anything
            problems.append(f"{file.name}: cannot be read ({' '.join(str(error).split()) or type(error).__name__})")
            continue
        number += len(image)
        geometries[file.name] = geometry(image, properties)
        bad = np.count_nonzero(~np.isfinite(image))
        if bad:
            problems.append(f"{file.name}: {bad} of {image.size} voxels are NaN or infinite")
        elif image.min() == image.max():
            problems.append(f"{file.name}: constant, every voxel is {image.min():g}")
    numbered = re.fullmatch(r".*_\d{4}" + re.escape(ending), files[-1].name)
    names = [file.name for file in files] if numbered else [f"{case}_0000{ending}"]
    count = 1 + int(names[-1].removesuffix(ending)[-4:])
    if number == len(geometries) > 0:  # one channel per file, so there should be a file per channel
        count = max(count, len(channels))
    missing = [name for name in (f"{case}_{index:04d}{ending}" for index in range(count)) if name not in names]
    if missing:
        problems.append(f"{case}: {', '.join(missing)} missing")
    elif len(geometries) == len(files) and number != len(channels):
        problems.append(f"{case}: {number} channels, but dataset.json has {len(channels)} ({', '.join(channels)})")
    for name, other in list(geometries.items())[1:]:
        first_name, first = next(iter(geometries.items()))
        for key, value in first.items():
            # allclose with its defaults is what nnU-Net's readers compare with
            if np.shape(value) != np.shape(other[key]) or not np.allclose(value, other[key]):
                problems.append(f"{name}: {key} {as_text(other[key])} differs from {as_text(value)} of {first_name}")
    return problems


def geometry(image: np.ndarray, properties: dict[str, Any]) -> dict[str, Any]:
    """Shape, spacing and, as far as the reader tells, origin and direction (or affine) of an image (C, *spatial)."""
    details = {key: value for stuff in properties.values() if isinstance(stuff, dict) for key, value in stuff.items()}
    details.pop("original_orientation", None)  # these two are of the file: readers that reorient compare the result
    if "reoriented_affine" in details:
        details.pop("original_affine", None)
    return {"shape": image.shape[1:], **details, "spacing": properties["spacing"]}


def as_text(value: Any) -> str:
    """Numbers rounded to 6 decimals, for messages."""
    return str(np.round(np.asarray(value, dtype=float), 6).tolist())


@contextmanager
def unpacked(file: Path, ending: str) -> Iterator[Path]:
    """A scan's file as readers take it; what is unpacked or converted for them is removed afterwards.

    A folder of DICOM files becomes one image file with the ending. A packed NIfTI file is unpacked: SimpleITK alone
    takes three times as long as Python's gzip and SimpleITK together.

    Raises: ValueError where the folder does not hold exactly one DICOM series.
    """
    if not file.is_dir():
        with file.open("rb") as stream:
            packed = file.name.endswith(".nii.gz") and stream.read(2) == b"\x1f\x8b"
        if not packed:
            yield file
            return
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, file.name.removesuffix(".gz"))
            with gzip.open(file) as source, path.open("wb") as unpacked:
                shutil.copyfileobj(source, unpacked, 2**20)
            yield path
        return
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(file))
    if len(series) != 1:
        raise ValueError(f"{len(series)} DICOM series in the folder, expected one")
    slices = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(file), series[0])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, f"{file.name}_0000{ending}")
        sitk.WriteImage(sitk.ReadImage(slices), str(path))
        yield path
