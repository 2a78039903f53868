"""What is checked before a training begins, and what the log says about its data."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2 import paths
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.lr_schedule.nnUNetTrainer_warmup import nnUNetTrainer_warmup
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.dataset_json import channel_names
from nnunet_ssl.data.loading import UnlabeledDataset, of_the_system
from nnunet_ssl.data.preprocessed import (
    check_settings,
    find_unlabeled,
    finished_cases,
    predicted_foreground,
    preprocessing_settings,
    transductive_cases,
    unlabeled_folder,
)
from nnunet_ssl.data.scans import find_scans, unlabeled_scans
from nnunet_ssl.data.splits import CROSSVAL_FOLDS, check_fold, read_fold
from nnunet_ssl.system.lock import locked
from nnunet_ssl.system.wording import counted


def only_training(folder: str, rank: int) -> AbstractContextManager[None]:
    """A block in which no other training is in the fold's folder; of rank 0, as other ranks write nothing there.

    Raises: RuntimeError where one is.
    """
    return locked(Path(folder, ".training.lock"), f"training in {folder}") if rank == 0 else nullcontext()


def refuse_unsupported(trainer: type, base: type, configuration: str, cascaded: bool) -> None:
    """Raises NotImplementedError for a trainer whose step is not that of `base`, and for a cascade.

    And for a supervised phase where nnU-Net's schedule of the learning rate has phases of its own.
    """
    owner = next(cls for cls in trainer.__mro__ if "train_step" in vars(cls))
    if not issubclass(owner, base):
        raise NotImplementedError(
            f"{trainer.__name__} would train with {owner.__name__}.train_step, without unlabeled scans. Name the "
            f"semi-supervised trainer first among its base classes."
        )
    if trainer.supervised_part > 0 and issubclass(trainer, nnUNetTrainer_warmup):
        raise NotImplementedError(
            f"{trainer.__name__} has supervised_part = {trainer.supervised_part}, but nnU-Net's learning rate with a "
            f"warm-up has one course over the whole training. Set supervised_part = 0."
        )
    if cascaded:
        raise NotImplementedError(
            f"{trainer.__name__} does not support cascades ({configuration}): the unlabeled scans have no segmentation "
            f"of the previous stage. Train 3d_fullres or 3d_lowres, or nnUNetTrainer for this stage."
        )


def require_cases(folder: Path, plans: PlansManager, configuration: str) -> None:
    """Raises FileNotFoundError where the configuration's folder has no preprocessed case."""
    if not finished_cases(folder):
        raise FileNotFoundError(
            f"{folder} has no preprocessed case. Run: nnUNetv2_preprocess -d {plans.dataset_name[7:10]} "
            f"-plans_name {plans.plans_name} -c {configuration}"
        )


def require_present_format(dataset_class: type, folder: str) -> None:
    """Raises NotImplementedError where nnU-Net reads the folder with the class of an old format."""
    if not issubclass(dataset_class, nnUNetDatasetBlosc2):
        raise NotImplementedError(f"{folder} was preprocessed by an old nnU-Net. Run nnUNetv2_preprocess again.")


def check_numbered_fold(splits: Path, fold: int | str, folder: Path) -> None:
    """Raises ValueError where there is no such fold, or where there are too few cases to draw folds.

    For a fold that does not exist nnU-Net would draw a random split, with cases that are meant to stay unlabeled.

    Args:
        splits: splits_final.json, which may be missing.
        fold: its number, or "all", which is always there.
        folder: with the configuration's preprocessed cases.
    """
    if fold == "all":
        return
    check_fold(splits, fold)
    number = len(finished_cases(folder))
    if not splits.is_file() and number < CROSSVAL_FOLDS:
        raise ValueError(
            f"{folder} has {counted(number, 'case')}, too few for the {CROSSVAL_FOLDS} folds that nnU-Net draws. Write "
            f"a fold into {splits}, as " + '[{"train": ["CASE_A"], "val": ["CASE_B"]}], or train fold all.'
        )


def check_cases(train: list[str], val: list[str], fold: int | str, splits: Path, folder: Path) -> None:
    """Raises FileNotFoundError that names cases of the fold which are not preprocessed in `folder`."""
    missing = sorted({*train, *val} - finished_cases(folder))
    if missing:
        raise FileNotFoundError(
            f"{counted(len(missing), f'case of fold {fold} is', f'cases of fold {fold} are')} not in {folder}, or not "
            f"with all three files: {', '.join(missing[:5])}. Run nnUNetv2_preprocess for this configuration "
            f"again, or correct {splits}."
        )


def refuse_empty_labels(cases: list[str], fold: int | str, folder: Path, labels: LabelManager) -> None:
    """Raises ValueError where no labeled case has any foreground; usually the first file that is read has some."""
    everything = (-1, *labels.all_labels)  # nnU-Net's entry for all annotated voxels
    for case in cases:
        found = load_pickle(str(folder / f"{case}.pkl"))["class_locations"]
        if any(len(voxels) for label, voxels in found.items() if label != everything):
            return
    raise ValueError(
        f"None of the {counted(len(cases), 'labeled case')} of fold {fold} has a voxel of a foreground label: "
        f"{', '.join(cases[:5])}. Check their files in labelsTr, and labels in dataset.json."
    )


def unlabeled_dataset(
    base: Path,
    plans: PlansManager,
    configuration: str,
    fold: int | str,
    known: dict[str, list[str]],
    dataset_json: dict,
) -> UnlabeledDataset:
    """A fold's unlabeled cases from both sources, and where a model has found foreground in them.

    Args:
        base: nnUNet_preprocessed/DatasetXXX_Name.
        plans: of the training.
        configuration: its name.
        fold: a number or "all".
        known: the cases for "training" and for "validation", whose labels are used.
        dataset_json: of the dataset.

    Raises:
        FileNotFoundError: there is none; the message has both ways to provide them.
        ValueError: a case is labeled or for validation or testing as well, or other plans have preprocessed imagesUn.
    """
    manager, splits = plans.get_configuration(configuration), base / "splits_final.json"
    lists = read_fold(splits, fold) if fold != "all" else {"unlabeled": [], "test": []}
    own = unlabeled_folder(base, manager.data_identifier)
    check_settings(own, preprocessing_settings(plans, manager))
    files = find_unlabeled(base, manager.data_identifier, lists["unlabeled"])
    chosen = transductive_cases(own)
    for kind, cases in {**known, "test": set(lists["test"]) - chosen}.items():
        shared = sorted(set(files) & set(cases))
        if shared:
            raise ValueError(
                f"{splits}: unlabeled cases of fold {fold} are {kind} cases too: {', '.join(shared[:5])}. Correct it, "
                f"or remove their files from {own}."
            )
    never_labeled = {case for case, file in files.items() if file.parent == own}
    tests = sorted(never_labeled & scans_for_testing(plans.dataset_name, dataset_json) - chosen)
    if tests:
        raise ValueError(
            f"Unlabeled cases of {own} are in {raw_folder(plans.dataset_name, 'imagesTs')} now: "
            f"{', '.join(tests[:5])}. Remove their files from {own}, or, where test scans are meant to be trained on, "
            f"run nnunet-ssl preprocess with -i imagesTs."
        )
    if not files:
        dataset, number = plans.dataset_name, plans.dataset_name[7:10]
        file = f"CASE_0000{dataset_json['file_ending']}"
        raise FileNotFoundError(
            f"{dataset} has no unlabeled cases for fold {fold}. There are two ways to provide them:\n"
            f"  1. Put the scans into nnUNet_raw/{dataset}/imagesUn, as {file}, without label files, and run\n"
            f"     nnunet-ssl preprocess -d {number} -c {configuration} -p {plans.plans_name}\n"
            f'  2. To hide labels of a labeled dataset (benchmark), write folds with an "unlabeled" list:\n'
            f"     nnunet-ssl split -d {number} --labeled 8 --overwrite"
        )
    predicted = predicted_foreground(plans, manager, None if fold == "all" else known["training"])
    unlabeled = UnlabeledDataset(files, predicted)
    check_channels(unlabeled, len(channel_names(dataset_json)), base / "dataset.json")
    return unlabeled


def check_channels(unlabeled: UnlabeledDataset, channels: int, described: Path) -> None:
    """Looks at one unlabeled case, because a supervised phase may read none for hours.

    Raises:
        ValueError: it has another number of channels than `channels`, which the file `described` says.
        RuntimeError: it cannot be read.
    """
    first = unlabeled.identifiers[0]
    try:
        found = unlabeled.load_image(first).shape[0]
    except Exception as error:  # blosc2 raises anything for a damaged file
        if of_the_system(error):
            raise
        raise unlabeled.damaged(first, error) from error
    if found != channels:
        raise ValueError(
            f"The preprocessed unlabeled cases have {counted(found, 'channel')}, but dataset.json has {channels}. "
            f"Correct {described}, or preprocess again."
        )


def describe(trainer: nnUNetTrainer, base: type, known: dict[str, list[str]], unlabeled: UnlabeledDataset) -> str:
    """What the log says when a training begins: its cases, its batches, the settings of its method, forgotten scans.

    Args:
        trainer: its class attributes, and those of its parents up to `base`, are the method's settings.
        base: the class that all methods share.
        known: see `unlabeled_dataset`.
        unlabeled: the unlabeled cases.
    """
    classes = type(trainer).__mro__[: type(trainer).__mro__.index(base) + 1]
    settings = {
        name: getattr(trainer, name)
        for cls in classes
        for name, value in vars(cls).items()
        if not name.startswith("_") and isinstance(value, int | float | str | bool | tuple)
    }
    numbers = {
        "labeled": len(known["training"]),
        "unlabeled": len(unlabeled),
        "for validation": len(known["validation"]),
    }
    size, patch_size = trainer.batch_size, list(trainer.configuration_manager.patch_size)
    first = trainer.supervised_epochs
    lines = [
        f"Cases: {', '.join(f'{number} {kind}' for kind, number in numbers.items())}.",
        *[f"Supervised phase: {first} of {trainer.num_epochs} epochs, on {size} labeled patches a batch."]
        * (first > 0),
        f"Batches of {size} labeled and {size} unlabeled patches of {patch_size} voxels; {trainer.max_steps} steps.",
        f"{type(trainer).__name__}: {', '.join(f'{name} = {value}' for name, value in sorted(settings.items()))}",
    ]
    if unlabeled.predicted:
        found = f"{len(unlabeled.predicted.keys() & unlabeled.files)} of {counted(len(unlabeled), 'unlabeled case')}"
        lines.append(f"Unlabeled patches are oversampled where a model found foreground, in {found}.")
    return "\n".join(lines + differences(trainer, unlabeled.files))


def differences(trainer: nnUNetTrainer, files: dict[str, Path]) -> list[str]:
    """Lines about scans of imagesUn that are not preprocessed, and about cases that are not, or no longer, there.

    Args:
        files: of the unlabeled cases.
    """
    plans, images = trainer.plans_manager, raw_folder(trainer.plans_manager.dataset_name, "imagesUn")
    try:
        scans = unlabeled_scans(images, trainer.dataset_json)[0] if images else {}
    except OSError as error:  # the training itself needs no raw scans
        return [f"WARNING: nobody knows whether all unlabeled scans are preprocessed ({error})."]
    lines = []
    if missing := scans.keys() - files.keys():
        lines.append(
            f"WARNING: {counted(len(missing), f'scan of {images} is', f'scans of {images} are')} not preprocessed and "
            f"not used. Run: nnunet-ssl preprocess "
            f"-d {plans.dataset_name[7:10]} -c {trainer.configuration_name} -p {plans.plans_name}"
        )
    identifier = trainer.configuration_manager.data_identifier
    own = unlabeled_folder(Path(trainer.preprocessed_dataset_folder_base), identifier)
    surplus = sorted(case for case, file in files.items() if file.parent == own and case not in scans)
    if scans and surplus:
        lines.append(
            f"{counted(len(surplus), 'unlabeled case is', 'unlabeled cases are')} not in {images}: given with -i, or "
            f"removed since ({', '.join(surplus[:5])}). To withdraw a scan, remove its files from {own} too."
        )
    return lines


def raw_folder(dataset: str, name: str) -> Path | None:
    """A folder of the raw dataset, which may be missing; None where nnUNet_raw is not set."""
    return Path(paths.nnUNet_raw) / dataset / name if paths.nnUNet_raw.is_set() else None


def scans_for_testing(dataset: str, dataset_json: dict) -> set[str]:
    """Names of the scans in imagesTs; none where it cannot be read, as a training needs no raw scans."""
    images = raw_folder(dataset, "imagesTs")
    try:
        return set(find_scans(images, dataset_json["file_ending"])[0]) if images else set()
    except OSError as error:
        print(f"WARNING: nobody knows whether unlabeled scans have become test scans ({error}).")
        return set()
