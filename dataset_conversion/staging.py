"""A raw dataset that appears only when every case of it is written."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import SimpleITK as sitk
from nnunetv2 import paths
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

from nnunet_ssl.data.nifti import require_complete


def target_folder(dataset_id: int, name: str, overwrite: bool) -> Path:
    """`nnUNet_raw/DatasetXXX_name`.

    Raises: ValueError for an impossible id; FileExistsError where the id is taken, or the folder not empty and
    `overwrite` False.
    """
    if not 1 <= dataset_id <= 999:
        raise ValueError(f"Dataset id {dataset_id} is not possible: nnU-Net's ids go from 1 to 999.")
    raw = Path(paths.nnUNet_raw) / f"Dataset{dataset_id:03d}_{name}"
    others = sorted({str(other) for other in find_candidate_datasets(dataset_id)} - {raw.name})
    if others:
        raise FileExistsError(f"Dataset id {dataset_id} is taken by {', '.join(others)}: choose another id.")
    if raw.exists() and any(raw.iterdir()) and not overwrite:
        raise FileExistsError(f"{raw} is not empty: choose another id, or pass --overwrite to replace it.")
    return raw


@contextmanager
def staging(raw: Path) -> Iterator[Path]:
    """A hidden sibling of `raw` on the same disk, whose content takes its place in `raw` when the block has succeeded.

    So nnU-Net never sees half a dataset, and bad input leaves nothing behind. What is in `raw` under other names stays.
    """
    raw.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw.parent, prefix=".convert-") as folder:
        yield Path(folder)
        raw.mkdir(exist_ok=True)
        for written in Path(folder).iterdir():
            target = raw / written.name
            if target.is_dir():
                shutil.rmtree(target)
            written.replace(target)


def write_image(image: sitk.Image, file: Path) -> None:
    """Writes a NIfTI file; raises ValueError where a full disk has cut it off, of which SimpleITK says nothing."""
    sitk.WriteImage(image, file)
    require_complete(file)


def read_image(file: Path) -> sitk.Image:
    """A NIfTI file with all its voxels; raises ValueError naming the file where some are missing."""
    require_complete(file)
    return sitk.ReadImage(file)
