"""Checkpoint files: nnU-Net's, with everything of ours under one key, written at once and read with care."""

import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nnunet_ssl.blocks.networks import unwrap
from nnunet_ssl.system.files import replacing
from nnunet_ssl.training.random_state import get_random_state

CHECKPOINT_KEY = "nnunet_ssl"  # everything of ours in nnU-Net's checkpoint lies under this one key
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")  # in the order of --c


def save(
    file: Path,
    write_stock: Callable[[io.BytesIO], object],
    networks: dict[str, nn.Module],
    optimizer: Optimizer,
    further: dict[str, Optimizer],
    deployed: nn.Module,
    progress: dict,
    epoch: int,
) -> None:
    """Writes nnU-Net's checkpoint with our state in it, as a whole or not at all.

    Args:
        file: of the checkpoint.
        write_stock: nnU-Net's own `save_checkpoint`.
        networks: "student" and the companions, not wrapped.
        optimizer: of all that are trained, but for what further optimizers train.
        further: these, by name.
        deployed: one of the networks, which becomes nnU-Net's.
        progress: what tells how far the training is, and on which cases.
        epoch: the present one, for the message.

    Raises:
        RuntimeError: weights are not finite; OSError: the file cannot be written. The file stays as it was.
    """
    # tensors that are shared between the entries are stored once
    states = {name: network.state_dict() for name, network in networks.items()}
    require_finite(file, states, epoch)
    optimizer_state = optimizer.state_dict()
    stock = io.BytesIO()
    with without_states(networks["student"], optimizer):
        write_stock(stock)
    stock.seek(0)
    checkpoint = torch.load(stock, map_location="cpu", weights_only=False)
    name = next(name for name, network in networks.items() if network is deployed)
    checkpoint = with_our_state(checkpoint, states, optimizer_state, name, progress)
    checkpoint[CHECKPOINT_KEY]["optimizers"] = {name: each.state_dict() for name, each in further.items()}
    write(checkpoint, file)


def restore(state: dict, networks: dict[str, nn.Module], optimizer: Optimizer, further: dict[str, Optimizer]) -> None:
    """Loads our part of a checkpoint into all networks and optimizers.

    Args:
        state: what lies under CHECKPOINT_KEY.
        networks: "student" and the companions, wrapped or not.
        optimizer: of all that are trained, but for what further optimizers train.
        further: these, by name. They keep their settings, which belong to the trainer and its device.
    """
    optimizer.load_state_dict(state["optimizer"])
    for name, each in further.items():
        each.load_state_dict({**state["optimizers"][name], "param_groups": each.state_dict()["param_groups"]})
    for name, weights in {"student": state["student"], **state["companions"]}.items():
        unwrap(networks[name]).load_state_dict(weights)


def require_finite(file: Path, states: dict[str, dict[str, Tensor]], epoch: int) -> None:
    """Raises RuntimeError, which names the networks, where weights that `file` would get are NaN or infinite."""
    lost = [name for name, state in states.items() if not all(is_finite(tensor) for tensor in state.values())]
    if lost:
        raise RuntimeError(
            f"{file} was not written, and stays as it was if it is there: weights of {' and '.join(lost)} are "
            f"NaN or infinite in epoch {epoch}. Remove the cause and continue with --c."
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite; True of an empty tensor."""
    # a finite sum has finite terms only, and needs no memory; the sum of finite ones may be infinite
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


@contextmanager
def without_states(network: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """In the block, `state_dict()` of both is empty: what nnU-Net writes then is small, and has all its other keys."""
    hooks = [owner.register_state_dict_post_hook(lambda _, state, *__: state.clear()) for owner in (network, optimizer)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def with_our_state(
    stock: dict, states: dict[str, dict[str, Tensor]], optimizer: dict, deployed: str, progress: dict
) -> dict:
    """nnU-Net's checkpoint with ours: the stock trainer loads it, and predicts with the deployed network.

    Args:
        stock: as nnU-Net writes it, with or without weights and optimizer state; changed in place.
        states: weights of "student" and of every companion.
        optimizer: state of the optimizer of all that are trained.
        deployed: which of them becomes nnU-Net's "network_weights".
        progress: what tells how far the training is, and on which cases; it becomes keys of ours.

    Returns:
        `stock`.
    """
    stock["network_weights"] = states[deployed]
    # the stock trainer's optimizer has one group: that of the first student
    first = optimizer["param_groups"][0]
    own = {number: state for number, state in optimizer["state"].items() if number in first["params"]}
    stock["optimizer_state"] = {"state": own, "param_groups": [first]}
    stock[CHECKPOINT_KEY] = {
        "inference_network": deployed,
        **progress,
        "optimizer": optimizer,
        "student": states["student"],
        "companions": {name: state for name, state in states.items() if name != "student"},
        "random_state": get_random_state(),
    }
    return stock


def write(checkpoint: dict, file: Path) -> None:
    """Writes a checkpoint as a whole or not at all; OSError names a file that cannot be written."""
    try:
        with replacing(file) as temporary:
            torch.save(checkpoint, temporary)
    except (OSError, RuntimeError) as error:  # torch calls a full disk an "unexpected pos"
        raise OSError(
            f"{file} could not be written ({error}). Is the disk full? An earlier checkpoint of this name is "
            f"kept. Free some space and continue with --c."
        ) from error


def read_checkpoint(file: Path) -> dict:
    """A checkpoint of nnU-Net or of ours, on the CPU.

    Raises: OSError where the file cannot be opened; ValueError that names it where it is damaged.
    """
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=False)
        # torch does not look at the checksums that it writes
        damaged = zipfile.ZipFile(file).testzip() if zipfile.is_zipfile(file) else None
        if "network_weights" in checkpoint and damaged is None:
            return checkpoint
        problem = "no network_weights in it" if damaged is None else f"wrong checksum of {damaged}"
    except OSError:
        raise
    except Exception as error:  # torch and pickle raise anything for a damaged file
        problem = str(error).partition("\n")[0]
    raise ValueError(f"{file} is cut off or damaged ({problem}). Restore a backup, or train again.")


def labeled_cases(checkpoint: dict) -> list[str] | None:
    """Whose labels a checkpoint has learnt; None where it does not say: nnU-Net's, older ones, those of start-from."""
    return checkpoint.get(CHECKPOINT_KEY, {}).get("labeled")


def require_trained_as(file: Path, checkpoint: dict, configuration: str, fold: int | str) -> None:
    """Raises ValueError where a checkpoint is of another configuration or fold than its folder says.

    `nnunet-ssl export` gives folds new numbers, and people copy folders: which labels a model has seen would be wrong.
    """
    made = checkpoint["init_args"]
    if (made["configuration"], str(made["fold"])) != (configuration, str(fold)):
        raise ValueError(
            f"{file} was trained as fold {made['fold']} of {made['configuration']}, not as fold {fold} of "
            f"{configuration}. Give a model of this fold and configuration."
        )


def read_newest(file: Path, continued: bool, log: Callable[[str], object]) -> tuple[Path, dict]:
    """The checkpoint, or, where it is damaged and a training is continued, the next one that --c would take.

    Only damage counts: a file that cannot be opened for other reasons (rights, a network drive) raises OSError,
    because the training would go on from an older state and write over the better one.

    Args:
        file: of the checkpoint.
        continued: a training goes on from it.
        log: prints a line to the training's log; it gets a warning where another file is taken.

    Returns:
        The file that was read, and the checkpoint. ValueError where all are damaged.
    """
    files = [file]
    if continued and file.name in CHECKPOINTS:
        later = CHECKPOINTS[CHECKPOINTS.index(file.name) + 1 :]
        files += [file.with_name(name) for name in later if file.with_name(name).is_file()]
    damaged = []
    for candidate in files:
        try:
            checkpoint = read_checkpoint(candidate)
        except ValueError:
            damaged.append(str(candidate))
            continue
        if damaged:
            log(
                f"WARNING: cut off or damaged: {', '.join(damaged)}. Training continues from {candidate} instead, "
                f"with epoch {checkpoint['current_epoch']}."
            )
        return candidate, checkpoint
    raise ValueError(
        f"Cut off or damaged: {', '.join(damaged)}. Restore a backup, or remove what is named here and "
        f"{'start the training again without --c' if continued else 'train again'}."
    )


def check_networks(file: Path, checkpoint: dict, networks: dict[str, nn.Module], training: tuple[str, ...]) -> None:
    """Raises ValueError where a checkpoint's networks are not those of the training.

    Args:
        file: of the checkpoint, for the message.
        checkpoint: of ours, or nnU-Net's own.
        networks: "student" and the companions, wrapped or not.
        training: names of its trainer, plans and configuration.
    """
    mismatched = mismatched_networks(checkpoint, networks)
    if not mismatched:
        return
    arguments = checkpoint.get("init_args", {})
    plans, configuration = arguments.get("plans", {}).get("plans_name"), arguments.get("configuration")
    raise ValueError(
        f"{file} is of {checkpoint.get('trainer_name')}, {plans}, {configuration}; its networks do not fit "
        f"{', '.join(training)} ({', '.join(mismatched)}). Continue with the trainer, plans and configuration that "
        f"wrote it, or move the file away and start without --c."
    )


def mismatched_networks(checkpoint: dict, networks: dict[str, nn.Module]) -> list[str]:
    """Names of the networks that only one side has, or whose weights have other names or shapes.

    Args:
        checkpoint: of ours, or nnU-Net's own, which is compared with "student" alone.
        networks: "student" and the companions, wrapped or not.
    """
    ours = checkpoint.get(CHECKPOINT_KEY)
    if ours is None:
        weights = {"student": checkpoint.get("network_weights", {})}
        networks = {"student": networks["student"]}
    else:
        weights = {"student": ours["student"], **ours["companions"]}
    different = [*(weights.keys() ^ networks.keys())]
    for name in weights.keys() & networks.keys():
        own = {key: tensor.shape for key, tensor in unwrap(networks[name]).state_dict().items()}
        given = {key.removeprefix("module."): tensor.shape for key, tensor in weights[name].items()}
        if own != given:
            different.append(name)
    return sorted(different)
