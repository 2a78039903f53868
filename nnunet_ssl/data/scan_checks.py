"""Every scan is read once before anything is written: what is wrong with its files, voxels, geometry and size."""

import re
import shlex
from collections.abc import Collection, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.copies import Copies, Fingerprint, find_copies, fingerprint
from nnunet_ssl.data.nifti import count_not_finite, refuse_colours
from nnunet_ssl.data.plausibility import Expected, expected_scans, size_doubt, smaller_than_patch, value_doubt
from nnunet_ssl.data.scans import files_to_compare, unpacked
from nnunet_ssl.system.pool import run_all
from nnunet_ssl.system.wording import counted, one_line


@dataclass
class Findings:
    """What a scan's files are like.

    Attributes:
        errors: a line per reason why nnU-Net cannot use them.
        doubts: a line per reason why they are most likely a mistake; who knows better says so.
        too_small: configurations whose patch is larger along every axis.
        fingerprints: of the files that can be read.
    """

    errors: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    too_small: list[str] = field(default_factory=list)
    fingerprints: dict[Path, Fingerprint] = field(default_factory=dict)


@dataclass
class Report:
    """What `check_scans` has found: lines of problems and of warnings, and the cases that can be let through."""

    problems: list[str]
    warnings: list[str]
    doubtful: list[str]

    def require_sound(self, verdict: str, images: Path) -> None:
        """Prints the warnings; raises ValueError with the verdict and a line per problem where there are problems."""
        if self.problems:
            text = f"{verdict}. Problems in {images}:\n  " + "\n  ".join(self.problems)
            if self.doubtful:
                text += f"\nLet through what is right as it is: --accept {shlex.join(self.doubtful)}"
            raise ValueError(text)
        for warning in self.warnings:
            print(f"WARNING: {warning}")


def check_accepted(accept: Collection[str], cases: Collection[str], images: Path) -> None:
    """Raises ValueError where a name that shall be let through is no case."""
    unknown = sorted(set(accept) - set(cases))
    if unknown:
        raise ValueError(
            f"--accept {' '.join(unknown)}: no such case in {images}. Give names of cases, without channel and ending, "
            f"as {min(cases, default='CASE')}."
        )


def check_unlabeled(
    pool: Executor | None,
    raw: Path,
    plans: PlansManager,
    configurations: Sequence[str],
    dataset_json: dict,
    unlabeled: dict[str, list[Path]],
    new: dict[str, list[Path]],
    accept: Collection[str] = (),
    chosen: Collection[str] = (),
) -> Report:
    """`check_scans` for unlabeled scans of a dataset, which are no copies of its labeled, test or unlabeled ones.

    Args:
        pool: of `worker_pool`.
        raw: folder of the raw dataset.
        plans: of the dataset.
        configurations: names of those that the scans are wanted for.
        dataset_json: of the dataset.
        unlabeled: all unlabeled scans, per case its files.
        new: those of them that are read.
        accept: cases whose doubts do not count.
        chosen: test scans that are used as unlabeled ones on demand.
    """
    expected = expected_scans(plans, {name: plans.get_configuration(name) for name in configurations}, dataset_json)
    own = [file for files in new.values() for file in files]
    return check_scans(pool, new, files_to_compare(raw, dataset_json, unlabeled, own, chosen), expected, accept)


def check_scans(
    pool: Executor | None,
    scans: dict[str, list[Path]],
    others: dict[Path, str],
    expected: Expected,
    accept: Collection[str] = (),
) -> Report:
    """Reads all files of scans behind a progress bar, and looks for copies among them and of others.

    Args:
        pool: of `worker_pool`.
        scans: per case its files.
        others: files of other scans, with the places that they are in, from `files_to_compare`.
        expected: of the dataset.
        accept: cases whose doubts do not count.
    """
    found = run_all(
        pool, check_scan, {c: (c, files, expected) for c, files in scans.items()}, "Checking unlabeled scans"
    )
    prints = {case: findings.fingerprints for case, findings in found.items()}
    copies = find_copies(pool, prints, others, expected) if scans else Copies({}, [])
    problems, doubtful, small = [], [], {}
    for case in scans:
        doubts = found[case].doubts + copies.doubts.get(case, [])
        problems += found[case].errors
        if doubts and case not in accept:
            problems += doubts
            doubtful.append(case)
        for configuration in found[case].too_small:
            small.setdefault(configuration, []).append(case)
    warnings = [
        f"{counted(len(cases), 'scan is', 'scans are')} smaller than the patch of {name} along every axis: "
        f"{', '.join(cases[:5])}"
        for name, cases in small.items()
    ]
    return Report(problems, warnings + copies.warnings, doubtful)


def check_scan(case: str, files: Sequence[Path], expected: Expected, named: bool = True) -> Findings:
    """Reads the files of a scan; nothing is found in a sound one.

    Args:
        files: one per channel, in order; formats such as RGB images hold several channels in one file.
        expected: of the dataset.
        named: the files' names tell the case and the channels, as in imagesUn; those in a table of dataset.json do not.
    """
    findings, geometries, number = Findings(), {}, 0
    if named and (wrong := name_errors(case, files, expected)):
        return Findings(errors=wrong)
    for file in files:
        try:
            with unpacked(file, expected.ending) as path:
                if expected.ending in (".nii", ".nii.gz"):
                    refuse_colours(path)
                image, properties = expected.reader().read_images([str(path)])
                lost = count_not_finite(path) if expected.ending in (".nii", ".nii.gz") else 0
        except Exception as error:  # a damaged file makes readers raise anything
            reason = one_line(error)
            findings.errors.append(f"{file.name}: cannot be read ({reason})")
            continue
        geometries[file.name] = geometry(image, properties)
        findings.fingerprints[file] = fingerprint(image)
        check_voxels(file.name, image, number, lost, expected, findings)
        number += len(image)
    findings.errors += channel_errors(case, files, number, len(geometries), expected, named)
    findings.errors += geometry_errors(geometries)
    if geometries:
        first = next(iter(geometries.values()))
        doubt = size_doubt(first["shape"], first["spacing"], expected)
        findings.doubts += [f"{case}: {doubt}"] if doubt else []
        findings.too_small = smaller_than_patch(first["shape"], first["spacing"], expected)
    return findings


def check_voxels(name: str, image: np.ndarray, number: int, lost: int, expected: Expected, findings: Findings) -> None:
    """Notes what is wrong with the voxels of a file.

    Args:
        name: of the file.
        image: (C, *spatial) as nnU-Net's reader gives it.
        number: channels in the files before.
        lost: voxels of the file that are NaN or infinite.
        findings: of the scan; is added to.
    """
    if not (np.isfinite(image.min()) and np.isfinite(image.max())):  # both are NaN where one voxel is
        bad = np.count_nonzero(~np.isfinite(image))
        findings.errors.append(f"{name}: {bad} of {image.size} voxels are NaN or infinite")
        return
    if lost:
        findings.doubts.append(f"{name}: {lost} of {image.size} voxels are NaN or infinite; nnU-Net reads them as 0")
    constant = image.min() == image.max()
    for index, channel in enumerate(image, start=number):
        if "RGBTo01Normalization" in expected.normalization[index : index + 1] and not in_bytes(channel):
            findings.errors.append(f"{name}: values outside of 0 to 255, which nnU-Net refuses in color images")
        elif len(image) > 1 and not constant and channel.min() == channel.max():
            continue  # of a color image with transparency, for example
        doubt = value_doubt(channel, index, expected)
        if doubt:
            findings.doubts.append(f"{name}: {doubt}")


def in_bytes(channel: np.ndarray) -> bool:
    """Whether all values lie in 0 to 255."""
    return bool(channel.min() >= 0 and channel.max() <= 255)


def name_errors(case: str, files: Sequence[Path], expected: Expected) -> list[str]:
    """Lines for names that nnU-Net, or its reader, takes for something else."""
    channels, ending = expected.channels, expected.ending
    surplus = [file for file in files if (index := channel_of(file, ending)) is not None and index >= len(channels)]
    if surplus:
        name, others = surplus[0].name, f" (and {len(surplus) - 1} more)" * (len(surplus) > 1)
        digits, of_its_own = name.removesuffix(ending)[-5:], f"{name.removesuffix(ending)}_0000{ending}"
        return [
            f"{name}{others}: nnU-Net takes {digits} for a channel, but dataset.json has {len(channels)} "
            f"({', '.join(channels)}). A scan of its own has to be called {of_its_own}."
        ]
    lost = files[0].is_dir() or files[0].with_name(f"{case}.json").is_file()
    if lost and issubclass(expected.reader, Tiff3DIO) and channel_of(files[0], ending) is None:
        fix = "a DICOM series has to be converted to" if files[0].is_dir() else "rename it to"
        name = f"{case}_0000{ending}"
        return [f"{files[0].name}: nnU-Net finds the spacing, in {case}.json, of the name {name} only; {fix} {name}"]
    return []


def channel_of(file: Path, ending: str) -> int | None:
    """The number of the channel in a file's name; None where there is none."""
    match = re.fullmatch(r".+_(\d{4})" + re.escape(ending), file.name)
    return int(match[1]) if match else None


def channel_errors(
    case: str, files: Sequence[Path], number: int, read: int, expected: Expected, named: bool
) -> list[str]:
    """Lines for channels that are missing or surplus.

    Args:
        files: of the case.
        number: channels that were read.
        read: files that they were in.
        expected: of the dataset.
        named: the files' names tell the channels.
    """
    channels, ending = expected.channels, expected.ending
    if named:
        names = [file.name for file in files]
        if channel_of(files[-1], ending) is None:
            names = [f"{case}_0000{ending}"]
        count = 1 + int(names[-1].removesuffix(ending)[-4:])
        if number == read > 0:  # one channel per file, so there should be a file per channel
            count = max(count, len(channels))
        missing = [name for name in (f"{case}_{index:04d}{ending}" for index in range(count)) if name not in names]
        if missing:
            return [f"{case}: {', '.join(missing)} missing"]
    if read == len(files) and number != len(channels):
        return [f"{case}: {counted(number, 'channel')}, but dataset.json has {len(channels)} ({', '.join(channels)})"]
    return []


def geometry_errors(geometries: dict[str, dict[str, Any]], rtol: float = 1e-5, atol: float = 1e-8) -> list[str]:
    """Lines for files whose `geometry` differs from that of the first one.

    The tolerances are those of allclose, whose defaults nnU-Net's readers compare channels with.
    """
    errors = []
    for name, other in list(geometries.items())[1:]:
        first_name, first = next(iter(geometries.items()))
        for key, value in first.items():
            if np.shape(value) != np.shape(other[key]) or not np.allclose(value, other[key], rtol, atol):
                errors.append(f"{name}: {key} {as_text(other[key])} differs from {as_text(value)} of {first_name}")
    return errors


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
