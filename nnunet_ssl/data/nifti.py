"""NIfTI files as they are stored: nnU-Net's readers replace what is no number, and fill up what is cut off."""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

CUT_OFF = (EOFError, zlib.error)  # what gzip raises where a file ends too early
HEADERS = {348: Nifti1Header, 540: Nifti2Header}  # by the number of bytes, which the first four say


def is_packed(file: Path) -> bool:
    """Whether a file is a NIfTI file with gzip around it; some that are called .nii.gz are not packed."""
    if not file.name.endswith(".nii.gz"):
        return False
    with file.open("rb") as stream:
        return stream.read(2) == b"\x1f\x8b"


@dataclass(frozen=True)
class Stored:
    """How a file stores its voxels: shape (*spatial, slices first), type, first byte, whether values are scaled."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    scaled: bool


def stored(stream: BinaryIO) -> Stored | None:
    """What the header of an open, unpacked file says; None where it is no NIfTI file with header and voxels in one.

    Raises: EOFError where the header is cut off.
    """
    begin = stream.read(4)
    size = min(int.from_bytes(begin, "little"), int.from_bytes(begin, "big"))
    if size not in HEADERS:
        return None
    text = begin + stream.read(size - 4)
    if len(text) < size:
        raise EOFError("the header is cut off")
    header = HEADERS[size](text, check=False)
    if not bytes(header["magic"]).startswith(b"n+"):
        return None
    shape = tuple(int(number) for number in reversed(header.get_data_shape()))
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError):  # not known
        return None
    try:
        scaled = header.get_slope_inter() not in ((None, None), (1, 0))
    except HeaderDataError:  # an odd one, of which readers make what they want
        scaled = True
    return Stored(shape, dtype, header.get_data_offset(), scaled)


def is_complete(file: Path) -> bool:
    """Whether a file, packed or not, has all the voxels of its header; True for other formats than NIfTI.

    SimpleITK writes to a full disk without an error, and reads 0 where voxels are missing.
    """
    if not file.name.endswith((".nii", ".nii.gz")):
        return True
    with opened(file) as stream:
        try:
            how = stored(stream)
            end = 1 if how is None else how.offset + int(np.prod(how.shape)) * how.dtype.itemsize
            stream.seek(end - 1)
            return bool(stream.read(1))
        except CUT_OFF:
            return False


def require_complete(file: Path) -> None:
    """Raises `cut_off` for a file that is not complete."""
    if not is_complete(file):
        raise cut_off(file)


def cut_off(file: Path) -> ValueError:
    """What there is to say of a file that is not complete."""
    return ValueError(f"{file} is cut off or damaged: it was copied or written in part, or a disk was full")


def refuse_colours(file: Path) -> None:
    """Raises ValueError where the voxels of an unpacked file are colours, which nnU-Net takes for an axis."""
    with file.open("rb") as stream:
        how = stored(stream)
    # either every voxel is a record of colours, or the fifth axis holds them
    if how is not None and (how.dtype.names or len(how.shape) > 4):
        raise ValueError(
            "its voxels are colours or vectors; save gray values, or every colour as a channel of its own: CASE_0000, "
            "CASE_0001, ..."
        )


def count_not_finite(file: Path) -> int:
    """Voxels of a complete, unpacked file that are NaN or infinite; 0 where it is no NIfTI file."""
    with file.open("rb") as stream:
        how = stored(stream)
    if how is None or how.dtype.kind != "f":
        return 0
    voxels = np.memmap(file, how.dtype, "r", how.offset, (int(np.prod(how.shape)),))
    with np.errstate(over="ignore", invalid="ignore"):  # one pass: the sum is NaN or infinite if one voxel is
        total = voxels.sum(dtype=voxels.dtype)
    return 0 if np.isfinite(total) else int(np.count_nonzero(~np.isfinite(voxels)))


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """A file, packed or not, as a stream of what is in it."""
    with gzip.open(file) if is_packed(file) else file.open("rb") as stream:
        yield stream


def parts(stream: BinaryIO, how: Stored, size: int) -> Iterator[np.ndarray]:
    """Voxels of an open file in parts of `size`, in its order; no more is read than is asked for."""
    stream.seek(how.offset)
    left = int(np.prod(how.shape))
    while left > 0:
        part = np.frombuffer(stream.read(min(size, left) * how.dtype.itemsize), how.dtype)
        if len(part) == 0:
            raise ValueError("cut off")
        left -= len(part)
        yield part
