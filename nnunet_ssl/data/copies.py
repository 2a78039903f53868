"""Which scans are others under another name, found without reading all of them.

A training on a copy of a validation or test scan is a leak that no name shows. Files are told apart by the shape in
their headers first, then by the first voxels that are not the background; only those that agree in both are read and
hashed.
"""

from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_ssl.data import nifti
from nnunet_ssl.data.plausibility import Expected
from nnunet_ssl.data.scans import unpacked
from nnunet_ssl.system.pool import run_all
from nnunet_ssl.system.wording import counted, one_line

# shape without axes of size 1; first voxel that differs from the first one of all; hash of it and of those behind it
Fingerprint = tuple[tuple[int, ...], int, bytes]
BEHIND = 1024  # voxels behind the first one that differs
PART = 2**16  # voxels read at once
CHUNK = 100  # files that a worker compares at once


@dataclass
class Copies:
    """Lines of doubt by case, and warnings about files that could not be compared."""

    doubts: dict[str, list[str]]
    warnings: list[str]


def fingerprint(image: np.ndarray) -> Fingerprint:
    """Of an image (C, *spatial) as nnU-Net's reader gives it."""
    flat = image.reshape(-1)
    return fingerprint_of(image.shape, (flat[begin : begin + PART] for begin in range(0, flat.size, PART)))


def fingerprint_of(shape: Iterable[int], parts: Iterable[np.ndarray]) -> Fingerprint:
    """Of voxels that come in parts, of which only the first ones are taken; a constant image has nothing hashed."""
    first, start, voxels = None, 0, np.empty(0, np.float32)
    for part in parts:
        part = np.asarray(part, np.float32) + np.float32(0)  # there is no negative zero
        if len(voxels):
            voxels = np.concatenate([voxels, part])
        else:
            first = part[0] if first is None else first
            different = np.flatnonzero(part != first)
            start += int(different[0]) if len(different) else len(part)
            voxels = part[different[0] :] if len(different) else voxels
        if len(voxels) > BEHIND:
            break
    return without_ones(shape), start, digest(voxels[: BEHIND + 1])


def without_ones(shape: Iterable[int]) -> tuple[int, ...]:
    """A shape without its axes of one voxel, which some formats leave out."""
    return tuple(int(size) for size in shape if size != 1)


def digest(voxels: np.ndarray) -> bytes:
    """Of float32 values; equal for equal values."""
    return blake2b(np.ascontiguousarray(voxels, np.float32) + np.float32(0), digest_size=16).digest()


def find_copies(
    pool: Executor | None,
    scans: dict[str, dict[Path, Fingerprint]],
    others: dict[Path, str],
    expected: Expected,
) -> Copies:
    """Files of scans whose voxels are those of a file of another scan.

    Args:
        pool: of `worker_pool`.
        scans: per case its files with their fingerprints.
        others: further files, with the places that they are in. Those that cannot be read are warned of.
        expected: of the dataset.

    Returns:
        A line for every file that is a copy: of another file, or of one of a case that comes before in the alphabet.
    """
    own = {file: case for case in sorted(scans) for file in scans[case]}
    prints = {file: scans[case][file] for file, case in own.items()}
    shapes, left = {tuple(sorted(shape)) for shape, _, _ in prints.values()}, list(others)
    chunks = {str(left[i]): (left[i : i + CHUNK], shapes, expected) for i in range(0, len(left), CHUNK)}
    alike: dict[Fingerprint, list[Path]] = {}
    for file, mark in prints.items():
        alike.setdefault(mark, []).append(file)
    reasons = {}
    compared = run_all(pool, compare_headers, chunks if prints else {}, "Looking for copies", f"{CHUNK} files")
    for marks, unreadable in compared.values():
        reasons |= unreadable
        for file, mark in marks.items():
            if mark in alike:
                alike[mark].append(file)
    # files of the same case may be the same: a channel given twice
    groups = [files for files in alike.values() if len({own.get(file, file) for file in files}) > 1]
    jobs = {str(file): (file, expected) for files in groups for file in files}
    hashes = run_all(pool, voxel_hash, jobs, "Reading likely copies", "file")
    doubts: dict[str, list[str]] = {}
    for files in groups:
        known: dict[bytes, list[Path]] = {}
        for file in sorted(files, key=lambda file: file in own):  # stable: others first, then cases in their order
            code, reason = hashes[str(file)]
            if reason:
                reasons[file] = reason
                continue
            originals = [other for other in known.get(code, []) if own.get(other, other) != own.get(file, file)]
            if file in own and originals:
                names = " and ".join(f"{other.name} in {others.get(other, other.parent.name)}" for other in originals)
                line = f"{file.name}: has the same voxels as {names}; remove one of them"
                doubts.setdefault(own[file], []).append(line)
            known.setdefault(code, []).append(file)
    warnings = [
        f"{counted(len(reasons), 'file')} cannot be read, so nobody knows whether an unlabeled scan is a copy: "
        f"{file.name} in {others.get(file, file.parent.name)} ({reason})"
        for file, reason in list(reasons.items())[:1]
    ]
    return Copies(doubts, warnings)


def compare_headers(
    files: list[Path], shapes: set[tuple[int, ...]], expected: Expected
) -> tuple[dict[Path, Fingerprint], dict[Path, str]]:
    """Fingerprints of the files that have one of the sorted shapes, and why files cannot be read."""
    prints, reasons = {}, {}
    for file in files:
        try:
            found = fingerprint_in_file(file, shapes, expected)
        except Exception as error:  # a damaged file makes readers raise anything
            reasons[file] = one_line(error)
        else:
            if found is not None:
                prints[file] = found
    return prints, reasons


def fingerprint_in_file(file: Path, shapes: set[tuple[int, ...]], expected: Expected) -> Fingerprint | None:
    """A file's fingerprint, from as little of it as possible; None where it has none of the sorted shapes."""
    how = None
    if expected.ending in (".nii", ".nii.gz") and file.is_file():
        with nifti.opened(file) as stream:
            how = nifti.stored(stream)
            if how is not None and tuple(sorted(without_ones(how.shape))) not in shapes:
                return None
            # these two readers give the voxels in the order of the file
            if how is not None and not how.scaled and expected.reader in (SimpleITKIO, NibabelIO):
                parts = nifti.parts(stream, how, PART)
                if expected.reader is SimpleITKIO and how.dtype.kind == "f":
                    parts = (np.nan_to_num(part, nan=0, posinf=0, neginf=0) for part in parts)  # as ITK does
                return fingerprint_of(how.shape, parts)
    if how is None and shape_in_header(file) not in (None, *shapes):
        return None
    return fingerprint(read(file, expected))


def shape_in_header(file: Path) -> tuple[int, ...] | None:
    """Sorted shape of an image file or of a DICOM series, without axes of size 1; None where ITK does not know it."""
    slices = [path for path in file.iterdir() if not path.name.startswith(".")] if file.is_dir() else [file]
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(slices[0]))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None  # nnU-Net's reader may know the format
    return tuple(sorted(without_ones([*reader.GetSize(), reader.GetNumberOfComponents(), len(slices)])))


def read(file: Path, expected: Expected) -> np.ndarray:
    """The image (C, *spatial) in a file or DICOM series."""
    with unpacked(file, expected.ending) as path:
        return expected.reader().read_images([str(path)])[0]


def voxel_hash(file: Path, expected: Expected) -> tuple[bytes, str]:
    """Hash of all voxels and the shape of a file, or why it cannot be read."""
    try:
        image = read(file, expected)
    except Exception as error:  # a damaged file makes readers raise anything
        return b"", one_line(error)
    return digest(image) + repr(without_ones(image.shape)).encode(), ""
