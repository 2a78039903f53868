"""An existing supervised model in place of a training's supervised phase."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from nnunetv2 import paths
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.data.preprocessed import uses_statistics
from nnunet_ssl.data.splits import read_fold, require_hidden
from nnunet_ssl.system.files import read_json
from nnunet_ssl.system.quiet import quiet
from nnunet_ssl.trainer import SemiSupervisedTrainer
from nnunet_ssl.training.checkpoints import (
    CHECKPOINTS,
    labeled_cases,
    mismatched_networks,
    read_checkpoint,
    require_trained_as,
)
from nnunet_ssl.training.preflight import only_training

# of dataset.json and of a configuration: where they differ, a network's input or output means something else
DATASET_KEYS = ("labels", "channel_names", "regions_class_order")
PLANS_KEYS = ("spacing", "normalization_schemes", "use_mask_for_norm", "architecture")
INTENSITIES = "foreground_intensity_properties_per_channel"


def start_from(
    dataset: str,
    configuration: str,
    fold: int | str,
    trainer_name: str,
    model: str,
    plans_identifier: str = "nnUNetPlans",
    checkpoint: str = "checkpoint_final.pth",
    overwrite: bool = False,
    model_fold: int | str | None = None,
) -> Path:
    """Writes a checkpoint from which `nnUNetv2_train ... --c` trains the semi-supervised phase of a method.

    It has the model's weights, segmentation heads included, which -pretrained_weights leaves out; companions, optimizer
    and schedules are those of a training whose supervised phase has just ended.

    Args:
        dataset: id or name of the dataset, which is preprocessed.
        configuration: as 3d_fullres.
        fold: of the training.
        trainer_name: one of ours.
        model: the trainer of a model of this dataset, or a model folder, with plans.json, dataset.json and the fold.
        plans_identifier: of the training; of the model where that is a trainer.
        checkpoint: of the model.
        overwrite: replace the checkpoints of a training that is there.
        model_fold: of the model; None: the same. Its labeled cases must be among those of the training's fold, as after
            `nnunet-ssl split --add`.

    Returns:
        The checkpoint that was written.

    Raises:
        FileNotFoundError: there is no such model.
        FileExistsError: the fold has a training already.
        ValueError: the trainer is none of ours, or the model has other plans, labels, channels, weights or cases.
    """
    name, model_fold = str(maybe_convert_to_dataset_name(dataset)), fold if model_fold is None else model_fold
    target = Path(get_output_folder(name, trainer_name, plans_identifier, configuration, fold))
    folder = Path(model)
    if not folder.is_dir():
        folder = Path(get_output_folder(name, model, plans_identifier, configuration))
    file = folder / f"fold_{model_fold}" / checkpoint
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing. --model is a trainer, or the folder of a model with this fold.")
    if file.resolve().parent == target.resolve():
        raise ValueError(f"{file} is of the training itself. Give another --model.")
    state = read_checkpoint(file)
    require_trained_as(file, state, configuration=state["init_args"]["configuration"], fold=model_fold)
    preprocessed = Path(paths.nnUNet_preprocessed) / name
    require_same(file, state["init_args"], configuration, preprocessed, plans_identifier)
    trained_on = state["init_args"]["plans"]["dataset_name"]
    require_known_cases(file, fold, model_fold, preprocessed, trained_on, labeled_cases(state))
    with quiet():  # nnU-Net says every file in which it looks for the trainer
        trainer_class = recursive_find_trainer_class_by_name(trainer_name)
    if not issubclass(trainer_class, SemiSupervisedTrainer):
        raise ValueError(f"{trainer_name} is not a semi-supervised trainer. See: nnunet-ssl trainers")
    target.mkdir(parents=True, exist_ok=True)
    with only_training(str(target), 0):
        existing = [target / other for other in CHECKPOINTS if (target / other).is_file()]
        if existing and not overwrite:
            raise FileExistsError(f"{target} has a training already. Pass --overwrite to start it anew.")
        trainer = boundary(file, state, (name, configuration, fold, trainer_name, plans_identifier))
        written = target / "checkpoint_latest.pth"
        trainer.save_checkpoint(str(written))
        for other in [*existing, target / "losses.csv", target / "semi_supervised.png"]:
            if other != written:
                other.unlink(missing_ok=True)
    return written


def boundary(file: Path, state: dict, training: tuple) -> SemiSupervisedTrainer:
    """The trainer of a training whose supervised phase has just ended with the weights of a checkpoint.

    Args:
        file: of the checkpoint, for messages.
        state: the checkpoint.
        training: dataset, configuration, fold, trainer and plans, as nnU-Net's command takes them.

    Raises: ValueError where its network is another.
    """
    name, configuration, fold, trainer_name, plans_identifier = training
    # nothing is computed, a CPU is enough
    device = torch.device("cpu")
    with quiet():  # nnU-Net cites itself
        trainer = get_trainer_from_args(name, configuration, fold, trainer_name, plans_identifier, device=device)
    trainer.initialize()
    weights = {"network_weights": state["network_weights"]}
    if mismatched_networks(weights, {"student": trainer.network}):
        raise ValueError(f"{file}: the network is not that of {trainer_name} with {plans_identifier}, {configuration}.")
    trainer.network.load_state_dict(weights["network_weights"])
    phase = trainer.supervised_epochs
    trainer.current_epoch = phase - 1  # the last one that is done
    trainer.inference_allowed_mirroring_axes = state["inference_allowed_mirroring_axes"]
    trainer.logger.load_checkpoint(last_epochs(state["logging"], phase))
    return trainer


def last_epochs(logging: dict[str, list], number: int) -> dict[str, list]:
    """The last values of what nnU-Net logs every epoch, so many of each; the first one again where there are fewer."""
    values = {key: list(series)[-number:] if number else [] for key, series in logging.items()}
    return {key: series[:1] * (number - len(series)) + series for key, series in values.items()}


def require_same(file: Path, made: dict, configuration: str, preprocessed: Path, plans_identifier: str) -> None:
    """Raises ValueError that names what of a model's labels, channels and plans is not that of the dataset.

    Args:
        file: the model's checkpoint, for the message.
        made: arguments with which its trainer was made.
        configuration: of the training.
        preprocessed: the dataset's folder in nnUNet_preprocessed.
        plans_identifier: of the training.
    """
    plans, dataset_json = (read_json(preprocessed / f"{name}.json") for name in (plans_identifier, "dataset"))
    theirs, ours = (
        PlansManager(each).get_configuration(name).configuration
        for each, name in ((made["plans"], made["configuration"]), (plans, configuration))
    )
    pairs = [(made["dataset_json"].get(key), dataset_json.get(key), key) for key in DATASET_KEYS]
    if uses_statistics(ours):
        pairs.append((made["plans"].get(INTENSITIES), plans.get(INTENSITIES), INTENSITIES))
    pairs += [(theirs.get(key), ours.get(key), key) for key in PLANS_KEYS]
    for other, own, key in pairs:
        if other is not None and own is not None and json.dumps(other) != json.dumps(own):
            raise ValueError(  # compared as text: statistics can be NaN, which differs from itself
                f"{file} was trained with another {key} than that of {preprocessed.name}, {plans_identifier}, "
                f"{configuration}: {shortened(other)}, not {shortened(own)}. Give a model with the same plans."
            )


def shortened(value: object) -> str:
    """A value as text, cut off after 80 characters."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]} ..."


def require_known_cases(
    file: Path,
    fold: int | str,
    model_fold: int | str,
    preprocessed: Path,
    trained_on: str,
    learnt: Sequence[str] | None,
) -> None:
    """Raises ValueError where the model was trained on cases that are not among those of the fold.

    It has seen their labels, which the fold validates on or hides. Fewer cases are no harm.

    Args:
        file: the model's checkpoint.
        fold: of the training.
        model_fold: of the model.
        preprocessed: the dataset's folder in nnUNet_preprocessed.
        trained_on: name of the model's dataset.
        learnt: its labeled cases; where they are not known, those of its fold now count, if its log has no more.
    """
    own, other = (folder / "splits_final.json" for folder in (preprocessed, preprocessed.with_name(trained_on)))
    if fold == "all" and own == other:
        return
    if learnt is None:
        require_hidden(other, model_fold, file)
    train = []
    for splits, number in [(own, fold), (other, model_fold)][: 2 if learnt is None else 1]:
        if number == "all" or not splits.is_file():
            raise ValueError(f"{file}: its training cases are not known, {splits} has no fold {number}.")
        train.append(set(read_fold(splits, number)["train"]))
    if seen := (train[1] if learnt is None else set(learnt)) - train[0]:
        raise ValueError(
            f"{file} was trained on other cases than fold {fold} of {own}, and may have seen labels that this fold "
            f"must not know: {', '.join(sorted(seen)[:5])}."
        )
    if learnt is None and other.stat().st_mtime > file.stat().st_mtime:
        print(
            f"WARNING: {other} is newer than {file}: see that fold {model_fold} had no other cases when it was trained."
        )
