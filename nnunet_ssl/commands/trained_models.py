"""Models in nnUNet_results or in folders of their own, as several commands take them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2 import paths
from nnunetv2.utilities.file_path_utilities import get_output_folder
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnunet_ssl.data.preprocessed import load_plans
from nnunet_ssl.data.splits import require_hidden
from nnunet_ssl.system.files import read_json
from nnunet_ssl.training.checkpoints import CHECKPOINT_KEY, labeled_cases, read_checkpoint, require_trained_as


@dataclass(frozen=True)
class Model:
    """A fold of a model folder: the file of its weights is folder/fold_<fold>/checkpoint."""

    folder: Path
    fold: int | str
    checkpoint: str

    @property
    def file(self) -> Path:
        return self.folder / f"fold_{self.fold}" / self.checkpoint


@dataclass(frozen=True)
class Network:
    """A network of a model's checkpoint: "student", "teacher" or another one; None is the deployed one."""

    model: Model
    name: str | None = None


def network_weights(checkpoint: dict) -> dict[str, dict[str, Tensor]]:
    """Weights of a checkpoint's trained networks by name, the deployed one first.

    There is a student alone in a checkpoint of nnU-Net's own, and in one of a supervised phase, in which no other
    network learns.
    """
    ours = checkpoint.get(CHECKPOINT_KEY)
    if ours is None or ours.get("step") == 0 < ours.get("supervised_epochs", 0):
        return {"student": checkpoint["network_weights"]}
    deployed = {ours["inference_network"]: checkpoint["network_weights"]}
    return deployed | {n: w for n, w in {"student": ours["student"], **ours["companions"]}.items() if n not in deployed}


def trained_folds(folder: Path, checkpoint: str) -> list[int | str]:
    """The numbered folds of a model folder that have the checkpoint; where there is none, "all" if it has it."""
    trained = {file.parent.name.removeprefix("fold_") for file in folder.glob(f"fold_*/{checkpoint}")}
    return sorted(int(fold) for fold in trained if fold.isdecimal()) or sorted(trained & {"all"})


def further_models(
    folders: Sequence[Path], first: Path, checkpoint: str, folds: Sequence[int | str] | None = None
) -> list[Model]:
    """The models of --also: folds of further model folders, whose networks are joined with those of a first one.

    Args:
        folders: of the further models.
        first: folder of the first model.
        checkpoint: file name in the folders of the folds.
        folds: of every folder; None: all that are trained.

    Raises:
        FileNotFoundError: a folder is no model folder, or a fold is not trained.
        ValueError: a folder has other plans than the first one.
    """
    found = []
    for folder in folders:
        plans = folder / "plans.json"
        if plans.is_file() and read_json(plans) != read_json(first / "plans.json"):
            raise ValueError(f"{folder} has other plans than {first}. Only models with the same plans can be joined.")
        models = [Model(folder, fold, checkpoint) for fold in folds or trained_folds(folder, checkpoint) or ["*"]]
        missing = [file for file in (plans, *(model.file for model in models)) if not file.is_file()]
        if missing:
            raise FileNotFoundError(f"{missing[0]} is missing. --also takes model folders.")
        found += models
    return found


def trained_models(
    name: str,
    configuration: str,
    folds: Sequence[int | str],
    trainers: Sequence[str],
    plans_identifier: str,
    checkpoint: str,
    also: Sequence[Path],
) -> list[Model]:
    """The models of all trainers and folders, every fold of each.

    Raises: FileNotFoundError, with the command that trains it, where one is missing; ValueError where a further folder
        has other plans.
    """
    found = []
    for trainer in trainers:
        folder = Path(get_output_folder(name, trainer, plans_identifier, configuration))
        for fold in folds:
            found.append(Model(folder, fold, checkpoint))
            if not found[-1].file.is_file():
                command = f"nnUNetv2_train {name[7:10]} {configuration} {fold} -tr {trainer} -p {plans_identifier}"
                raise FileNotFoundError(f"{found[-1].file} is missing. Train the model first: {command}")
    return found + further_models(also, found[0].folder, checkpoint, folds)


def require_fitting(model: Model, checkpoint: dict, configuration: str) -> None:
    """Raises ValueError where a model is of another configuration or fold, or has learnt labels that its fold hides."""
    require_trained_as(model.file, checkpoint, configuration, model.fold)
    folder = Path(paths.nnUNet_preprocessed) / checkpoint["init_args"]["plans"]["dataset_name"]
    require_hidden(folder / "splits_final.json", model.fold, model.file, labeled_cases(checkpoint))


def states_of(models: Sequence[Model], configuration: str) -> list[tuple[int, int]]:
    """Size and time of change of the models' files, all of which are read once: they are used after all checks."""
    for model in models:
        require_fitting(model, read_checkpoint(model.file), configuration)
    return [(model.file.stat().st_size, model.file.stat().st_mtime_ns) for model in models]


def all_networks(
    models: Sequence[Model], configuration: str, wanted: Sequence[str] = ()
) -> dict[str, tuple[Network, int, int]]:
    """The networks of models that segment, by names that tell them apart, with size and time of change of their file.

    They are the deployed network of every model, first, and those that are called student or teacher. A name consists
    of the trainer, the fold and the network, as far as not all are the same: "teacher", or "fold_1_student". Every
    file is read once: it is used after all checks.

    Args:
        wanted: names of networks in the checkpoints; none: all that segment.

    Raises:
        ValueError: a checkpoint is damaged, of another configuration or fold, has learnt labels that its fold hides
            now, or has no such network.
    """
    found = []
    for model in models:
        checkpoint = read_checkpoint(model.file)
        require_fitting(model, checkpoint, configuration)
        names = [n for i, n in enumerate(network_weights(checkpoint)) if i == 0 or n.startswith(("student", "teacher"))]
        if unknown := [name for name in wanted if name not in names]:
            raise ValueError(f"{model.file} has no network {unknown[0]!r}; it has {', '.join(sorted(names))}.")
        state = model.file.stat()
        found += [(Network(model, name), state.st_size, state.st_mtime_ns) for name in wanted or names]
    parts = [(n.model.folder.name.partition("__")[0], f"fold_{n.model.fold}", n.name) for n, _, _ in found]
    differing = [any(part[i] != parts[0][i] for part in parts) for i in range(3)]
    named = {}
    for part, network in zip(parts, found, strict=True):
        name = "_".join(p for p, differs in zip(part, differing, strict=True) if differs) or part[2]
        number = next(i for i in range(1, len(found) + 1) if (name if i == 1 else f"{name}_seed_{i}") not in named)
        named[name if number == 1 else f"{name}_seed_{number}"] = network
    return named


def plans_without_cascade(preprocessed: Path, identifier: str, configuration: str) -> PlansManager:
    """The plans; raises NotImplementedError where the configuration is a cascade."""
    plans = load_plans(preprocessed, identifier, [configuration])
    if plans.get_configuration(configuration).previous_stage_name is not None:
        raise NotImplementedError(f"{configuration} is a cascade. Label the scans with 3d_fullres or 3d_lowres.")
    return plans
