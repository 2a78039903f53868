"""Preprocess scans that have no label file, with the plans and the preprocessor that their dataset already has."""

import math
import os
import shutil
from collections.abc import Collection, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from nnunetv2 import paths
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_ssl.data.dataset_json import read_dataset_json
from nnunet_ssl.data.preprocessed import (
    FILES,
    check_settings,
    finished_cases,
    load_plans,
    preprocessing_settings,
    transductive_cases,
    unlabeled_folder,
    write_settings,
)
from nnunet_ssl.data.scan_checks import check_accepted, check_unlabeled
from nnunet_ssl.data.scans import changed_at, name_problems, no_scan, reserved_names, unlabeled_scans, unpacked
from nnunet_ssl.system.disk import say_full_disk
from nnunet_ssl.system.lock import check_part, locked_part, part_suffix
from nnunet_ssl.system.pool import run_all, worker_pool
from nnunet_ssl.system.wording import counted

NO_SCANS = """No unlabeled scans in {images}. There are two ways to give some, which can be used together:
  1. Put scans without any label file into {default}, named CASE_0000{ending} (CASE_0001{ending}, ... for further
     channels), and run this command again. Scans with one channel may be named CASE{ending}, or be a folder CASE
     with one DICOM series in it.
  2. Hide the labels of labeled cases: an "unlabeled" list in the folds of splits_final.json, which
     `nnunet-ssl split -d {dataset_id} --labeled N` writes. These are preprocessed already: do not run this command."""


def preprocess_unlabeled(
    dataset: str,
    configurations: Sequence[str],
    plans_identifier: str = "nnUNetPlans",
    images: Path | None = None,
    num_processes: int = 4,
    num_parts: int = 1,
    part_id: int = 0,
    accept: Collection[str] = (),
) -> None:
    """Check the scans in `imagesUn`, then write them to `<data_identifier>_unlabeled` as nnU-Net preprocesses a scan.

    A run that was interrupted goes on where it stopped: complete cases are neither read nor written again; a warning
    names those whose scan is newer. Nothing is written unless every scan is sound: can be read, is no copy of another
    one, and has values and a size as the labeled ones have.

    Args:
        dataset: id or name, as in nnU-Net's commands.
        configurations: names in the plans, for example 2d and 3d_fullres.
        plans_identifier: name of the plans file; it is read, never made or changed.
        images: folder of the scans, in place of the raw dataset's `imagesUn`. The dataset's own `imagesTs` is possible
            too: results on these test scans are transductive then.
        num_processes: worker processes; with 0 or 1 everything happens in this one.
        num_parts: the scans are shared by so many runs, on one machine or several with the same disk; each case is
            done by one.
        part_id: which of them this run is, from 0.
        accept: cases whose voxels and size are right, whatever they look like.

    Raises:
        FileNotFoundError: no dataset, no plans, no such folder or no scans in it.
        ValueError: an unknown configuration, part or case to accept, unsound scans (one message lists all of them with
            the reasons), or cases that other plans have preprocessed.
        RuntimeError: another run is at the same cases, a worker died, or a case could not be preprocessed.
    """
    check_part(part_id, num_parts)
    name = str(maybe_convert_to_dataset_name(dataset))
    raw, folder = Path(paths.nnUNet_raw) / name, Path(paths.nnUNet_preprocessed) / name
    plans = load_plans(folder, plans_identifier, configurations)
    dataset_json = read_dataset_json(folder / "dataset.json", "channel_names", "file_ending")
    # A cascade's second stage shares the data of 3d_fullres, hence one entry per folder.
    targets = {unlabeled_folder(folder, c.data_identifier): c for c in map(plans.get_configuration, configurations)}
    for target, configuration in targets.items():
        check_settings(target, preprocessing_settings(plans, configuration))

    images = raw / "imagesUn" if images is None else existing_folder(Path(images))
    scans, unrecognised = unlabeled_scans(images, dataset_json)
    if not scans and not unrecognised:
        words = {"images": images, "default": raw / "imagesUn", "ending": dataset_json["file_ending"]}
        raise FileNotFoundError(NO_SCANS.format(**words, dataset_id=convert_dataset_name_to_id(name)))
    check_accepted(accept, scans, images)
    transductive = images.resolve() == (raw / "imagesTs").resolve()
    if transductive:
        print(f"Test scans become unlabeled training scans: results on {images} are transductive. Say so with them.")
    share = dict(list(scans.items())[part_id::num_parts])
    with ExitStack() as stack:
        for target in targets:
            stack.enter_context(only_run(target, part_id, num_parts))
        finished = {target: finished_cases(target) for target in targets}
        jobs = [(target, case) for target, cases in finished.items() for case in share if case not in cases]
        used = [cases & transductive_cases(target) for target, cases in finished.items()]
        chosen = set().union(*used, scans if transductive else ())
        problems = [no_scan(file, dataset_json["file_ending"]) for file in unrecognised]
        problems += misnamed(images, scans, share, finished, chosen, raw, folder, dataset_json)
        pool = stack.enter_context(worker_pool(min(num_processes, len(jobs))))
        unread = {case: scans[case] for _, case in jobs}
        report = check_unlabeled(pool, raw, plans, configurations, dataset_json, scans, unread, accept, chosen)
        report.problems[:0] = problems
        report.require_sound("Nothing was preprocessed", images)
        for target, configuration in targets.items():
            target.mkdir(parents=True, exist_ok=True)
            write_settings(target, preprocessing_settings(plans, configuration), chosen)
        unfinished = {target: temporary_folder(target, part_id, num_parts) for target in targets}
        write_cases(pool, share, jobs, targets, unfinished, plans, dataset_json)
    before = set.intersection(*finished.values()) & share.keys()
    if before and images != raw / "imagesUn":
        are = counted(len(before), "case of the same name is", "cases of the same names are")
        print(f"Not all of {images} was read: {are} there already. If these are other scans, rename them.")
    for target, cases in finished.items():
        print(f"Unlabeled cases in {target}: {len(cases | share.keys())}, {len(share.keys() - cases)} of them new.")
        name_changed(target, cases, share)
        if cases - scans.keys():
            print(f"Still there and in use, though not in {images}: {', '.join(sorted(cases - scans.keys()))}")


def name_changed(target: Path, cases: set[str], scans: dict[str, list[Path]]) -> None:
    """Prints a warning with those of a folder's complete cases whose scans are newer."""
    written = {case: (target / f"{case}.pkl").stat().st_mtime_ns for case in cases & scans.keys()}
    there = {case: [file for file in scans[case] if file.exists()] for case in written}  # a link may lead nowhere
    changed = [case for case, files in there.items() if any(changed_at(file) > written[case] for file in files)]
    if changed:
        print(
            f"WARNING: {counted(len(changed), 'scan is', 'scans are')} newer than the preprocessed cases: "
            f"{', '.join(sorted(changed)[:5])}. To preprocess them again, remove {target}/CASE.* and "
            f"{target}/CASE_seg.*, and run this again."
        )


def only_run(target: Path, part_id: int, num_parts: int) -> AbstractContextManager[None]:
    """No other run preprocesses into the folder during the block, but those that have other parts of as many."""
    return locked_part(target, part_id, num_parts, f"preprocessing scans into {target}")


def misnamed(
    images: Path,
    scans: dict[str, list[Path]],
    share: Collection[str],
    finished: dict[Path, set[str]],
    chosen: set[str],
    raw: Path,
    folder: Path,
    dataset_json: dict,
) -> list[str]:
    """Lines of `name_problems` for the scans of a run and for finished cases whose scans are gone.

    Args:
        images: folder of the scans.
        scans: all of them.
        share: those of this run.
        finished: per folder its cases.
        chosen: test scans that are used as unlabeled ones on demand.
        raw: of the dataset, as `folder`, which is the preprocessed one.
        dataset_json: of the dataset.
    """
    identifiers = {target.name.removesuffix("_unlabeled") for target in finished}
    reserved = reserved_names(raw, folder, dataset_json, identifiers)
    reserved[str(raw / "imagesTs")] -= chosen
    problems = name_problems(share, f"rename or remove it in {images}", reserved)
    for target, cases in finished.items():
        problems += name_problems(cases - scans.keys(), f"remove its files from {target}", reserved)
    return problems


def existing_folder(images: Path) -> Path:
    """The folder itself; raises FileNotFoundError where it is missing, or a file."""
    if not images.is_dir():
        kind = "is a file" if images.exists() else "does not exist"
        raise FileNotFoundError(f"-i {images} {kind}. Give the folder that the scans are in.")
    return images


def write_cases(
    pool: Executor | None,
    scans: dict[str, list[Path]],
    jobs: list[tuple[Path, str]],
    targets: dict[Path, ConfigurationManager],
    unfinished: dict[Path, Path],
    plans: PlansManager,
    dataset_json: dict,
) -> None:
    """Preprocesses scans behind a progress bar; a case appears in its folder when it is complete.

    Args:
        pool: of `worker_pool`.
        scans: per case its files.
        jobs: folders with the cases that they lack.
        targets: per folder what it is preprocessed for.
        unfinished: per folder one for half-written files, which is emptied before and removed afterwards.
        plans: of all configurations.
        dataset_json: of the dataset.
    """
    for scratch in unfinished.values():
        shutil.rmtree(scratch, ignore_errors=True)  # what an interrupted run has left
        scratch.mkdir()
    arguments = {
        f"{case} ({target.name})": (
            case,
            scans[case],
            target,
            unfinished[target],
            plans,
            targets[target],
            dataset_json,
        )
        for target, case in jobs
    }
    run_all(pool, preprocess_case, arguments, "Preprocessing unlabeled scans")
    for scratch in unfinished.values():
        shutil.rmtree(scratch)


def temporary_folder(target: Path, part_id: int, num_parts: int) -> Path:
    """Where cases are written before they are moved; on the same disk, outside of what nnU-Net and the loader read."""
    return target.with_name(f"{target.name}{part_suffix(part_id, num_parts)}.tmp")


def preprocess_case(
    case: str,
    files: Sequence[Path],
    target: Path,
    scratch: Path,
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: dict,
    label: Path | None = None,
) -> None:
    """Preprocess one scan with nnU-Net, with its label file if there is one, and move its files into `target`.

    They are written into the folder `scratch` first.

    Raises: OSError with the folder and the bytes where its disk is full; nothing of the scan stays then.
    """
    preprocessor = configuration.preprocessor_class(verbose=False)
    try:
        with ExitStack() as stack:
            images = [str(stack.enter_context(unpacked(file, dataset_json["file_ending"]))) for file in files]
            stack.enter_context(say_full_disk(scratch, lambda: largest_size(images, plans, configuration)))
            seg = None if label is None else str(label)
            preprocessor.run_case_save(str(scratch / case), images, seg, plans, configuration, dataset_json)
        for suffix in FILES:
            os.replace(scratch / f"{case}{suffix}", target / f"{case}{suffix}")
    finally:
        for suffix in FILES:
            (scratch / f"{case}{suffix}").unlink(missing_ok=True)


def largest_size(images: list[str], plans: PlansManager, configuration: ConfigurationManager) -> int:
    """Bytes of a preprocessed scan before compression: nnU-Net writes float32 images and an int16 segmentation.

    Args:
        images: files of the scan, as readers take them.
        plans: of the dataset.
        configuration: what it is preprocessed for.
    """
    image, properties = plans.image_reader_writer_class().read_images(images)
    order = plans.transpose_forward
    shape, spacing = ([values[axis] for axis in order] for values in (image.shape[1:], properties["spacing"]))
    target_spacing = [*spacing[: 3 - len(configuration.spacing)], *configuration.spacing]
    voxels = math.prod(int(size) for size in compute_new_shape(shape, spacing, target_spacing))
    return voxels * (4 * len(image) + 2)
