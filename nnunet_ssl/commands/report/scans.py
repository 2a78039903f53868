"""Files of scans and how they are shown on a page."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.commands.report.page import Key, Picture
from nnunet_ssl.commands.report.pictures import draw_scan, read_volume, window_of
from nnunet_ssl.data.dataset_json import channel_names
from nnunet_ssl.data.scans import unlabeled_scans
from nnunet_ssl.system.wording import one_line
from nnunet_ssl.training.preflight import raw_folder

NONE = "\N{EN DASH}"  # where there is no number
FEW = 5  # classes that have columns of their own


class Reading(NamedTuple):
    """How the files of a dataset are read and shown."""

    reader: type[BaseReaderWriter]
    ending: str
    ignore_label: int | None
    channel: str  # the first one, which is shown
    foreground: dict | None  # its statistics, where numbers have a meaning

    @classmethod
    def of(cls, plans: PlansManager, configuration: str, dataset_json: dict[str, Any]) -> "Reading":
        scheme = plans.get_configuration(configuration).normalization_schemes[0]
        statistics = plans.foreground_intensity_properties_per_channel["0"] if scheme == "CTNormalization" else None
        names, ending = channel_names(dataset_json), dataset_json["file_ending"]
        channel = f"channel {names[0]}, the first of {len(names)}" if len(names) > 1 else ""
        return cls(plans.image_reader_writer_class, ending, dataset_json["labels"].get("ignore"), channel, statistics)


def labeled_images(dataset: str, dataset_json: dict) -> dict[str, Path]:
    """Per labeled case the file of its first channel: in imagesTr, or where dataset.json says it is."""
    images = raw_folder(dataset, "imagesTr")
    if images is None:
        return {}
    table = dataset_json.get("dataset", {}).items()
    # nnU-Net expands environment variables there
    elsewhere = {case: images.parent / os.path.expandvars(entry["images"][0]) for case, entry in table}
    return elsewhere or first_channels([images], dataset_json)


def first_channels(folders: Sequence[Path], dataset_json: dict) -> dict[str, Path]:
    """Per case the file of its first channel, from the first of some folders that has it; folders may be missing."""
    found: dict[str, Path] = {}
    for folder in folders:
        for case, files in unlabeled_scans(folder, dataset_json)[0].items():
            found.setdefault(case, files[0])
    return found


def show(
    image_file: Path | None, files: Sequence[Path], keys: Sequence[Key], how: Reading, caption: str, alt: str
) -> tuple[Picture | None, str]:
    """The picture of a scan with the outlines of label files, or None and a sentence why there is none.

    Args:
        image_file: of the first channel; None where it was not found.
        files: label files, one for each of the keys.
        caption: what to look for.
        alt: begin of what those are told who do not see it.
    """
    if image_file is None:
        return None, "No picture: the file of the scan was not found."
    missing = [file for file in files if not file.is_file()]
    if missing:
        return None, f"No picture: {missing[0]} is missing."
    try:
        image = read_volume(image_file, how.reader, how.ending)
        maps = [read_volume(file, how.reader, how.ending, labels=True).voxels for file in files]
    except Exception as error:  # a damaged file makes readers raise anything
        reason = one_line(error)
        return None, f"No picture: a file cannot be read ({reason})."
    for file, labels in zip(files, maps, strict=True):
        if labels.shape != image.voxels.shape:
            shapes = f"{list(labels.shape)} voxels, the scan {list(image.voxels.shape)}"
            return None, f"No picture: {file} has {shapes}."
    if how.ignore_label is not None:
        maps = [np.where(labels == how.ignore_label, 0, labels) for labels in maps]
    note = "" if any(labels.any() for labels in maps) else "No foreground at all: the picture shows the middle slices."
    drawn = draw_scan(image, maps, keys, window_of(image.voxels, how.foreground))
    planes = "The image itself and with outlines" if image.voxels.shape[0] == 1 else "Slices in three planes"
    lines = ", ".join(f"{key.name} {key.style}" for key in keys)
    return Picture(drawn, f"{alt}. {planes}; outlines: {lines}. {note}".strip(), caption), note


def number(text: str | float, digits: int = 2) -> str:
    """A number as the page shows it; a dash where there is none."""
    value = float(text) if text not in ("", None) else np.nan
    return f"{value:.{digits}f}" if np.isfinite(value) else NONE


def millilitres(value: str | float) -> str:
    """A volume with as many digits as mean something."""
    text = number(value, 3)
    if text == "0.000":
        return "0"
    return text if text == NONE or float(text) < 1 else number(value, 1)
