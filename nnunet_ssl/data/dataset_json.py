"""What this package reads of nnU-Net's dataset.json."""

from pathlib import Path
from typing import Any

from nnunet_ssl.system.files import read_json


def read_dataset_json(path: Path, *needed: str) -> dict[str, Any]:
    """A dataset.json in which every entry that this package reads is as nnU-Net's documentation says.

    Args:
        path: the file.
        needed: entries that must be there: "channel_names" (or the older "modality"), "labels", "file_ending".

    Raises: OSError; ValueError that names the file, the entry and what it should be.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be an object with channel_names, labels and file_ending.")
    content_or_needed = {**dict.fromkeys(needed), **content}
    if not content_or_needed.get("channel_names", True):
        content_or_needed["channel_names"] = content.get("modality")
    for name, (is_sound, text) in ENTRIES.items():
        if name in content_or_needed and not is_sound(content_or_needed[name]):
            raise ValueError(f'{path}: "{name}" must be {text}. Correct the file.')
    return content


def channel_names(dataset_json: dict) -> list[str]:
    """Of the images; older dataset.json files call them modality."""
    return list((dataset_json.get("channel_names") or dataset_json["modality"]).values())


def _are_channels(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(name, str) for name in value.values())


def _are_labels(value: Any) -> bool:
    if not isinstance(value, dict) or isinstance(value.get("ignore"), list):
        return False
    return all(v and all(map(_is_class, v)) if isinstance(v, list) else _is_class(v) for v in value.values())


def _is_class(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**15


def _are_cases(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_case, value.values()))


def _is_case(value: Any) -> bool:
    if not (isinstance(value, dict) and isinstance(value.get("label"), str) and isinstance(value.get("images"), list)):
        return False
    return bool(value["images"]) and all(isinstance(image, str) for image in value["images"])


ENTRIES = {
    "channel_names": (_are_channels, 'a name for every channel, as {"0": "CT"}'),
    "modality": (_are_channels, 'a name for every channel, as {"0": "CT"}'),
    "labels": (_are_labels, 'numbers, or lists of them for regions, as {"background": 0, "heart": 1}'),
    "file_ending": (lambda value: isinstance(value, str) and value.startswith("."), 'that of the images, as ".nii.gz"'),
    "dataset": (_are_cases, 'the files of every case, as {"case": {"images": ["..."], "label": "..."}}'),
    "overwrite_image_reader_writer": (lambda value: isinstance(value, str), 'the name of a reader, as "SimpleITKIO"'),
}
