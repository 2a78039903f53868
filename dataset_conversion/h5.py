"""The h5 files in which the semi-supervised community passes datasets on: one image and its label each."""

from pathlib import Path

import numpy as np


def read_h5(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """The datasets `image` and `label` of a file, as they are stored.

    Raises:
        ImportError: h5py is not installed.
        ValueError: names a file that is damaged or lacks one of the two.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"Reading {file} needs h5py: pip install h5py") from error
    try:
        with h5py.File(file) as content:
            absent = {"image", "label"} - set(content)
            if not absent:
                return content["image"][()], content["label"][()]
            found = ", ".join(content)
    except OSError as error:
        raise ValueError(f"{file} is cut off or no h5 file ({error}). Restore it.") from error
    raise ValueError(f"{file} has no {' and no '.join(sorted(absent))}; it holds: {found}.")
