"""Preprocess scans that have no label file, with the plans and the preprocessor that their dataset already has."""

import gzip
import json
import multiprocessing
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from nnunetv2 import paths
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from tqdm import tqdm

from nnunet_ssl.dataset_json import channel_names, read_dataset_json
from nnunet_ssl.files import read_json, replacing
from nnunet_ssl.splits import read_splits

FILES = ("_seg.b2nd", ".b2nd", ".pkl")  # of a preprocessed case; moved into place in this order, the last one marks it
# What decides how a preprocessed image looks. Patch size, batch size and network may change without harm.
SETTINGS = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg",
    "resampling_fn_seg_kwargs",
)
NO_SCANS = """No unlabeled scans in {images}. There are two ways to give some, which can be used together:
  1. Put scans without any label file into {default}, named CASE_0000{ending} (CASE_0001{ending}, ... for further
     channels), and run this command again. Scans with one channel may be named CASE{ending}, or be a folder CASE
     with one DICOM series in it.
  2. Hide the labels of labeled cases: an "unlabeled" list in the folds of splits_final.json, which
     `nnunet-ssl split -d {dataset_id} --labeled N` writes. These are preprocessed already: do not run this command."""


def unlabeled_folder(preprocessed_dataset_folder: Path, data_identifier: str) -> Path:
    """Where preprocessed unlabeled scans are: beside the configuration's own folder, all of which nnU-Net trains on."""
    return Path(preprocessed_dataset_folder) / f"{data_identifier}_unlabeled"


def preprocess_unlabeled(
    dataset: str,
    configurations: Sequence[str],
    plans_identifier: str = "nnUNetPlans",
    images: Path | None = None,
    num_processes: int = 4,
    num_parts: int = 1,
    part_id: int = 0,
) -> None:
    """Check the scans in `imagesUn`, then write them to `<data_identifier>_unlabeled` as nnU-Net preprocesses a scan.

    A run that was interrupted goes on where it stopped: complete cases are neither read nor written again, even if
    their scan has changed since. Nothing is written unless every scan is sound.

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

    Raises:
        FileNotFoundError: no dataset, no plans or no scans.
        ValueError: an unknown configuration or part, unsound scans (one message lists all of them with the reasons),
            or cases that other plans have preprocessed.
        RuntimeError: a worker died, or a case could not be preprocessed.
    """
    if not 0 <= part_id < num_parts:
        raise ValueError(f"-part_id must be from 0 to {num_parts - 1} where -num_parts is {num_parts}, not {part_id}.")
    name = str(maybe_convert_to_dataset_name(dataset))
    raw, folder = Path(paths.nnUNet_raw) / name, Path(paths.nnUNet_preprocessed) / name
    plans = load_plans(folder, plans_identifier, configurations)
    dataset_json = read_dataset_json(folder / "dataset.json", "channel_names", "file_ending")
    ending, channels = dataset_json["file_ending"], channel_names(dataset_json)
    # A cascade's second stage shares the data of 3d_fullres, hence one entry per folder.
    targets = {unlabeled_folder(folder, c.data_identifier): c for c in map(plans.get_configuration, configurations)}
    for target, configuration in targets.items():
        check_settings(target, preprocessing_settings(plans, configuration))

    images = raw / "imagesUn" if images is None else Path(images)
    scans, strangers = find_scans(images, ending, len(channels) == 1)
    if not scans and not strangers:
        dataset_id = convert_dataset_name_to_id(name)
        text = NO_SCANS.format(images=images, default=raw / "imagesUn", ending=ending, dataset_id=dataset_id)
        raise FileNotFoundError(text)
    transductive = images.resolve() == (raw / "imagesTs").resolve()
    if transductive:
        print(f"Test scans become unlabeled training scans: results on {images} are transductive. Say so with them.")
    everything = scans.keys()
    scans = dict(list(scans.items())[part_id::num_parts])
    finished = {target: finished_cases(target) for target in targets}
    jobs = [(target, case) for target, cases in finished.items() for case in scans if case not in cases]
    unread = {case: scans[case] for _, case in jobs}

    taken = taken_names(raw, folder, dataset_json, {c.data_identifier for c in targets.values()})
    chosen = set().union(*(transductive_cases(target) for target in targets), everything if transductive else ())
    taken[str(raw / "imagesTs")] -= chosen
    problems = [f"{file}: not a scan; expected CASE_0000{ending}, CASE_0001{ending}, ..." for file in strangers]
    problems += name_problems(scans, f"rename or remove it in {images}", taken)
    for target, cases in finished.items():
        problems += name_problems(cases - everything, f"remove its files from {target}", taken)
    reader = plans.image_reader_writer_class
    with worker_pool(min(num_processes, len(jobs))) as pool:
        checks = {case: (case, files, channels, ending, reader) for case, files in unread.items()}
        found = run_all(pool, scan_problems, checks, "Checking unlabeled scans")
        problems += [problem for case in unread for problem in found[case]]
        if problems:
            raise ValueError(
                f"Nothing was preprocessed: {len(problems)} problems in {images}\n  " + "\n  ".join(problems)
            )

        for target, configuration in targets.items():
            target.mkdir(parents=True, exist_ok=True)
            write_settings(target, preprocessing_settings(plans, configuration), chosen)
        unfinished = {target: temporary_folder(target, part_id, num_parts) for target in targets}
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
    for target, cases in finished.items():
        shutil.rmtree(unfinished[target])
        print(f"{len(cases | scans.keys())} unlabeled cases in {target}, {len(scans.keys() - cases)} of them new.")
        if cases - everything:
            print(f"Still there and in use, though not in {images}: {', '.join(sorted(cases - everything))}")


def load_plans(folder: Path, plans_identifier: str, configurations: Sequence[str]) -> PlansManager:
    """Read the plans of a preprocessed dataset folder.

    Raises: FileNotFoundError without plans, ValueError where they lack a configuration; both name the fix.
    """
    file = folder / f"{plans_identifier}.json"
    if not file.is_file():
        others = sorted(path.stem for path in folder.glob("*Plans*.json") if not path.stem.endswith("_unlabeled"))
        raise FileNotFoundError(
            f"{file} is missing. Plan and preprocess the labeled scans first: nnUNetv2_plan_and_preprocess "
            f"-d {convert_dataset_name_to_id(folder.name)} -c {' '.join(configurations)}"
            + (f"; or choose existing plans: -p {' | '.join(others)}" if others else "")
        )
    content = read_json(file)
    if not isinstance(content, dict) or not isinstance(content.get("configurations"), dict):
        raise ValueError(f"{file} is not a plans file. Plan again: nnUNetv2_plan_experiment")
    plans = PlansManager(content)
    unknown = [name for name in configurations if name not in plans.available_configurations]
    if unknown:
        known = " ".join(plans.available_configurations)
        raise ValueError(
            f"{file} has no configuration {', '.join(unknown)}. Choose among those that it has: nnunet-ssl preprocess "
            f"-d {convert_dataset_name_to_id(folder.name)} -p {plans_identifier} -c {known}"
        )
    return plans


def preprocessing_settings(plans: PlansManager, configuration: ConfigurationManager) -> dict[str, Any]:
    """The part of the plans that decides how a preprocessed image looks, as JSON has it."""
    return {key: configuration.configuration.get(key) for key in SETTINGS} | {
        "image_reader_writer": plans.plans["image_reader_writer"],
        "transpose_forward": plans.transpose_forward,
        "intensity_properties": plans.foreground_intensity_properties_per_channel,
    }


def settings_file(target: Path) -> Path:
    """Which settings a folder of unlabeled cases was made with; beside it, as nnU-Net refuses foreign files inside."""
    return target.with_name(f"{target.name}.json")


def check_settings(target: Path, settings: dict[str, Any]) -> None:
    """Refuse to use cases that other plans have preprocessed; nothing to refuse where there are no complete cases.

    Raises: ValueError with the folder to remove.
    """
    if not finished_cases(target):
        return
    fix = f"Remove {target} and run nnunet-ssl preprocess again."
    file = settings_file(target)
    if not file.is_file():
        raise ValueError(
            f"{target} holds cases, but {file.name}, which tells how they were preprocessed, is gone. {fix}"
        )
    stored = read_settings(file)
    # Compared as text: statistics can be NaN, which differs from itself.
    changed = [key for key, value in settings.items() if json.dumps(stored.get(key)) != json.dumps(value)]
    if changed:
        raise ValueError(
            f"The cases in {target} were preprocessed with other plans: {', '.join(changed)} changed. {fix}"
        )


def write_settings(target: Path, settings: dict[str, Any], transductive: Iterable[str] = ()) -> None:
    """Note the settings beside the folder, in one step, and the test scans that are used as unlabeled ones."""
    with replacing(settings_file(target)) as temporary:
        temporary.write_text(json.dumps(settings | {"transductive": sorted(transductive)}, indent=1))


def read_settings(file: Path) -> dict[str, Any]:
    """What `write_settings` has noted; raises ValueError with the file where it is damaged."""
    settings = read_json(file)
    if not isinstance(settings, dict) or not isinstance(settings.get("transductive", []), list):
        target = file.with_suffix("")
        raise ValueError(f"{file} is damaged. Remove it and {target}, and run nnunet-ssl preprocess again.")
    return settings


def transductive_cases(target: Path) -> set[str]:
    """Test scans that were preprocessed as unlabeled ones on demand; empty where there is no folder."""
    file = settings_file(target)
    return set(read_settings(file).get("transductive", [])) if file.is_file() else set()


def finished_cases(target: Path) -> set[str]:
    """Identifiers of the completely written cases of a folder; empty where there is no folder."""
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    cases = {name.removesuffix(".pkl") for name in names if name.endswith(".pkl")}
    return {case for case in cases if names.issuperset(case + suffix for suffix in FILES)}


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


def taken_names(raw: Path, folder: Path, dataset_json: dict, data_identifiers: set[str]) -> dict[str, set[str]]:
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


def name_problems(cases: Iterable[str], fix: str, taken: dict[str, set[str]]) -> list[str]:
    """One line per case that is labeled, validated or tested on, or whose files nnU-Net would take for another's."""
    problems = []
    for case in sorted(cases):
        places = [place for place, names in taken.items() if case in names]
        if places:
            problems.append(f"{case}: also in {' and in '.join(places)}; {fix}")
        if case.endswith("_seg"):
            problems.append(f"{case}: nnU-Net takes CASE_seg for the segmentation of CASE; {fix}")
    return problems


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
            with readable(file, ending) as path:
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
def readable(file: Path, ending: str) -> Iterator[Path]:
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


def temporary_folder(target: Path, part_id: int = 0, num_parts: int = 1) -> Path:
    """Where cases are written before they are moved; on the same disk, outside of what nnU-Net and the loader read."""
    part = f".{part_id}of{num_parts}" if num_parts > 1 else ""
    return target.with_name(f"{target.name}{part}.tmp")


def preprocess_case(
    case: str,
    files: Sequence[Path],
    target: Path,
    scratch: Path,
    plans: PlansManager,
    configuration: ConfigurationManager,
    dataset_json: dict,
) -> None:
    """Preprocess one scan with nnU-Net, into the folder `scratch`, and move its files into `target`."""
    preprocessor = configuration.preprocessor_class(verbose=False)
    with ExitStack() as stack:
        images = [str(stack.enter_context(readable(file, dataset_json["file_ending"]))) for file in files]
        preprocessor.run_case_save(str(scratch / case), images, None, plans, configuration, dataset_json)
    for suffix in FILES:
        os.replace(scratch / f"{case}{suffix}", target / f"{case}{suffix}")


@contextmanager
def worker_pool(num_processes: int) -> Iterator[Executor | None]:
    """Worker processes that end with this block and with this process; None, for in-process work, below 2."""
    if num_processes < 2:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=exit_with_parent)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def exit_with_parent() -> None:
    """End this worker when its parent is killed; it would wait for work for ever, or write beside a restarted run."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_all(pool: Executor | None, function: Callable, jobs: dict[str, tuple], description: str) -> dict[str, Any]:
    """Call `function` with every job's arguments, behind a progress bar; results under the jobs' names.

    Raises: RuntimeError that names the job whose call failed, or says that a worker died.
    """
    results, name = {}, None
    with tqdm(total=len(jobs), desc=description, unit="case", disable=not jobs) as bar:
        try:
            for name, result in calls(pool, function, jobs):
                results[name] = result()
                bar.update()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "A worker process died without an error, most likely because memory ran out. Run the same command "
                "again with fewer processes (-np 1 needs the least): complete cases are kept."
            ) from error
        except Exception as error:
            raise RuntimeError(f"{description} failed at {name}: {type(error).__name__}: {error}") from error
    return results


def calls(pool: Executor | None, function: Callable, jobs: dict[str, tuple]) -> Iterator[tuple[str, Callable]]:
    """Names of the jobs, each with a function that gives its result, in the order in which they are done."""
    if pool is None:
        for name, arguments in jobs.items():
            yield name, lambda arguments=arguments: function(*arguments)
    else:
        futures = {pool.submit(function, *arguments): name for name, arguments in jobs.items()}
        for future in as_completed(futures):
            yield futures[future], future.result
