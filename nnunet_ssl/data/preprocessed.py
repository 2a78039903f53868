"""Folders of preprocessed cases, and the settings that they were made with."""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nnunetv2 import paths
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_ssl.data.dataset_json import read_dataset_json
from nnunet_ssl.data.splits import read_splits
from nnunet_ssl.system.files import read_json, replacing
from nnunet_ssl.system.wording import counted

PREDICTED_FOREGROUND = "nnUNet_ssl_predicted_foreground"  # environment variable: a dataset that pseudo-label has made
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


# of nnU-Net's normalizations those that do not look at the intensities of all labeled scans
WITHOUT_STATISTICS = {"ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization"}


def unlabeled_folder(preprocessed_dataset_folder: Path, data_identifier: str) -> Path:
    """Where preprocessed unlabeled scans are: beside the configuration's own folder, all of which nnU-Net trains on."""
    return Path(preprocessed_dataset_folder) / f"{data_identifier}_unlabeled"


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
            f"{file} has no configuration {', '.join(unknown)}. Choose among those that it has: -c {known}"
        )
    return plans


def preprocessing_settings(plans: PlansManager, configuration: ConfigurationManager) -> dict[str, Any]:
    """The part of the plans that decides how a preprocessed image looks, as JSON has it."""
    return {key: configuration.configuration.get(key) for key in SETTINGS} | {
        "image_reader_writer": plans.plans["image_reader_writer"],
        "transpose_forward": plans.transpose_forward,
        "intensity_properties": plans.foreground_intensity_properties_per_channel,
    }


def deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Of `preprocessing_settings` those that an image depends on."""
    unused = set() if uses_statistics(settings) else {"intensity_properties"}
    return {key: value for key, value in settings.items() if key not in unused}


def uses_statistics(configuration: dict[str, Any]) -> bool:
    """Whether the plans' intensity statistics, which every new labeled scan changes, decide how an image looks."""
    return not set(configuration["normalization_schemes"]) <= WITHOUT_STATISTICS


def settings_text(plans: PlansManager, configuration: ConfigurationManager) -> str:
    """What is the same where images are; text, because statistics can be NaN, which differs from itself."""
    return json.dumps(deciding(preprocessing_settings(plans, configuration)))


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
    # compared as text: statistics can be NaN, which differs from itself
    changed = [key for key, value in deciding(settings).items() if json.dumps(stored.get(key)) != json.dumps(value)]
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


def labeled_folders(folder: Path) -> dict[Path, tuple[PlansManager, str]]:
    """The folders with preprocessed labeled cases, with plans and a configuration that they were made with.

    Raises: FileNotFoundError where there is none.
    """
    targets = {}
    for file in sorted(folder.glob("*.json")):
        content = read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("configurations"), dict):
            continue
        plans = PlansManager(content)
        for name in plans.available_configurations:
            target = folder / plans.get_configuration(name).data_identifier
            if finished_cases(target):
                targets.setdefault(target, (plans, name))
    if not targets:
        raise FileNotFoundError(
            f"{folder} has no preprocessed cases. Plan and preprocess the labeled scans first: "
            f"nnUNetv2_plan_and_preprocess -d {folder.name[7:10]}"
        )
    return targets


def find_unlabeled(dataset_folder: Path, data_identifier: str, fold_cases: Sequence[str]) -> dict[str, Path]:
    """Preprocessed images of all unlabeled cases of a fold: `imagesUn` and the fold's own "unlabeled" list.

    Args:
        dataset_folder: nnUNet_preprocessed/DatasetXXX_Name.
        data_identifier: of the configuration.
        fold_cases: the fold's "unlabeled" list; preprocessed with the labeled cases. Empty: only imagesUn.

    Returns:
        Case identifier to file; empty where there is neither source.

    Raises:
        FileNotFoundError: cases of the fold are not preprocessed.
        ValueError: a case is in both sources.
    """
    folder, own = dataset_folder / data_identifier, unlabeled_folder(dataset_folder, data_identifier)
    listed = {case: folder / f"{case}.b2nd" for case in fold_cases}
    present = {p.name for p in folder.glob("*.b2nd")} if listed else set()
    missing = [case for case, path in listed.items() if path.name not in present]
    if missing:
        raise FileNotFoundError(
            f"{counted(len(missing), 'unlabeled case of the fold is', 'unlabeled cases of the fold are')} not in "
            f"{folder}: {', '.join(missing[:5])}. "
            f"Run nnUNetv2_preprocess for this configuration again, or correct splits_final.json."
        )
    cases = finished_cases(own)
    twice = sorted(cases & set(listed))
    if twice:
        raise ValueError(
            f"Cases in {own} and in the fold's unlabeled list: {', '.join(twice[:5])}. Remove one of them."
        )
    return {**listed, **{case: own / f"{case}.b2nd" for case in cases}}


def predicted_foreground(
    plans: PlansManager, configuration: ConfigurationManager, labeled: Sequence[str] | None
) -> dict[str, Path]:
    """Files with the class locations of unlabeled cases as a model predicted them.

    `nnunet-ssl pseudo-label` and nnUNetv2_preprocess have made them, in the dataset that the environment variable
    PREDICTED_FOREGROUND names. Cases whose labels are true are not among them.

    Args:
        plans: of the training, as `configuration`.
        configuration: what is trained.
        labeled: cases whose labels may be known; None: all.

    Returns:
        Case identifier to file; empty where the variable is not set.

    Raises:
        ValueError: the variable names no such dataset, or one of another dataset or other plans, or its model has seen
            labels of other cases.
        FileNotFoundError: cases of it are not preprocessed.
    """
    number = os.environ.get(PREDICTED_FOREGROUND, "")
    if not number:
        return {}
    problem = f"{PREDICTED_FOREGROUND}={number}"
    advice = f"Set {PREDICTED_FOREGROUND} to the id of a dataset that nnunet-ssl pseudo-label made, or unset it."
    try:
        name = str(maybe_convert_to_dataset_name(int(number)))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{problem} is no dataset. {advice}") from error
    folder = Path(paths.nnUNet_preprocessed) / name
    model = read_dataset_json(folder / "dataset.json").get("pseudo_labels")
    if model is None:
        raise ValueError(f"{problem}: the labels of {name} are not predicted ones. {advice}")
    if model["dataset"] != plans.dataset_name:
        raise ValueError(f"{problem}: {name} was labeled by a model of {model['dataset']}. {advice}")
    if labeled is not None:
        folds = read_splits(folder / "splits_final.json")  # none where the model has seen all labels
        seen = {case for fold in folds for case in fold["train"]}
        hidden = sorted(seen - set(model["cases"]) - set(labeled)) if folds else ["all cases"]
        if hidden:
            raise ValueError(
                f"{problem}: {name} was labeled by a model that has seen labels which this fold must not know, of "
                f"{', '.join(hidden[:5])}. {advice}"
            )
    others = load_plans(folder, model["plans"], [model["configuration"]])
    identifier, settings = configuration.data_identifier, settings_text(plans, configuration)
    alike = [
        key
        for key, other in ((key, others.get_configuration(key)) for key in others.available_configurations)
        if other.data_identifier == identifier and settings_text(others, other) == settings
    ]
    if not alike:
        raise ValueError(f"{problem}: {name} was preprocessed with other plans. {advice}")
    files = {case: folder / identifier / f"{case}.pkl" for case in model["cases"]}
    missing = sorted(files.keys() - finished_cases(folder / identifier))
    if missing:
        raise FileNotFoundError(
            f"{counted(len(missing), f'case of {name} is', f'cases of {name} are')} not in "
            f"{folder / identifier}: {', '.join(missing[:5])}. Run: "
            f"nnUNetv2_preprocess -d {number} -plans_name {model['plans']} -c {alike[0]}"
        )
    return files
