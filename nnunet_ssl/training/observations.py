"""What networks and pseudo labels are like, measured now and then: a falling loss alone proves nothing."""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import Tensor, autocast, nn

from nnunet_ssl.blocks.networks import finest, forward_with_features, has_stages, logits, of_all_ranks, unwrap
from nnunet_ssl.blocks.perturbations import in_float32
from nnunet_ssl.blocks.pseudo_labels import hard_labels, probabilities
from nnunet_ssl.data.loading import Batch, foreground


@torch.no_grad()
def observe(student: nn.Module, labeler: nn.Module, batch: Batch, label_manager: LabelManager) -> dict[str, Tensor]:
    """What student and pseudo labels are like on one batch. Costs about a training step; nothing waits for a GPU.

    Args:
        student: wrapped or not.
        labeler: the network of which the pseudo labels are; the student itself where there is no other.
        batch: on the device of both. Where it has no labeled or no unlabeled patches, what is of them is missing.
        label_manager: nnU-Net's.

    Returns:
        labeled_foreground, pseudo_foreground: foreground voxels of labels and of pseudo labels, part of all voxels. A
            pseudo_foreground that falls to 0 is the usual way in which self-training fails.
        pseudo_confidence: mean probability of the pseudo labels in their foreground; NaN where there is none.
        agreement: Dice of both networks' foreground on unlabeled patches; not where there is one network.
        feature_distance: mean of 1 - cosine of the student's bottleneck features of different patches, in [0, 2]; 0
            means that the features have collapsed. Not for networks without encoder stages, nor of a single patch.
    """
    student, labeler = unwrap(student), unwrap(labeler)
    view = batch.unlabeled if batch.unlabeled_weak is None else batch.unlabeled_weak
    regions = label_manager.has_regions
    values: dict[str, Tensor] = {}
    if batch.image is not None:
        found, annotated = foreground(batch.labels, label_manager)
        values["labeled_foreground"] = (found & annotated).any(1).sum() / annotated.sum()
    if view is None:
        return values
    patches = view if batch.image is None else torch.cat([view, batch.image[:1]])  # two for the distance
    features = None
    with ExitStack() as stack:
        stack.enter_context(autocast("cuda") if patches.is_cuda else nullcontext())
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # nothing is compiled for one batch in an epoch
        for network in {student, labeler}:
            stack.enter_context(evaluating(network))
        if has_stages(student):
            output, skips = forward_with_features(student, patches)
            own, features = finest(output), skips[-1]
            del output, skips
        else:
            own = logits(student, patches)
        own = own[: len(view)]
        pseudo = own if labeler is student else logits(labeler, view)
    if features is not None and len(patches) > 1:
        # in float32: near 0 is where a collapse shows
        with in_float32(features.device):
            features = F.normalize(features.float().flatten(1))
            pairs = len(patches) * (len(patches) - 1)
            values["feature_distance"] = (1 - features @ features.T).sum() / pairs  # 0 on the diagonal
    found = any_foreground(pseudo, regions)
    confidence = probabilities(pseudo, regions=regions).amax(1)
    values["pseudo_foreground"] = found.float().mean()
    values["pseudo_confidence"] = (confidence * found).sum() / found.sum()
    if labeler is not student:
        mine = any_foreground(own, regions)
        values["agreement"] = 2 * (mine & found).sum() / (mine.sum() + found.sum())
    return values


def pseudo_labeler(networks: dict[str, nn.Module]) -> str:
    """Name of the network whose labels the student learns from: the first teacher, else a further student, else itself.

    Args:
        networks: those that segment: "student", and companions called student... or teacher....
    """
    companions = [name for name in networks if name != "student"]
    return min(companions, key=lambda name: not name.startswith("teacher"), default="student")


def any_foreground(logits: Tensor, regions: bool) -> Tensor:
    """Voxels of logits (B, *spatial) that are of any class but the background, or of any region: bool."""
    return (hard_labels(logits, regions=regions) > 0).any(1)


def mean_dice(counts: list[dict[str, np.ndarray]]) -> float:
    """Dice of the summed counts that nnU-Net's validation steps return, mean over classes or regions.

    NaN where no class is in any batch, neither in labels nor in predictions.
    """
    tp, fp, fn = (np.sum([step[key] for step in counts], 0) for key in ("tp_hard", "fp_hard", "fn_hard"))
    total = 2 * tp + fp + fn
    dice = 2 * tp[total > 0] / total[total > 0]
    return float(dice.mean()) if len(dice) else math.nan


def dice_by_network(counts: dict[str, list[dict[str, np.ndarray]]]) -> dict[str, float]:
    """`mean_dice` of every network over the validation steps of all ranks."""
    ranks = of_all_ranks(counts)
    return {name: mean_dice([step for rank in ranks for step in rank[name]]) for name in counts}


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards every part in the mode in which it was."""
    modes = [(module, module.training) for module in network.modules()]  # a part may be in another mode on purpose
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
