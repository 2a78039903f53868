"""Warnings of a training that goes wrong while its loss falls, and the end of one whose loss is not finite."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from nnunet_ssl.blocks.networks import of_all_ranks, unwrap
from nnunet_ssl.training.checkpoints import CHECKPOINTS

MUCH_FOREGROUND = 0.5  # of the voxels of pseudo labels; less is not warned of, however little the labels have
LAGGING = 0.05  # Dice by which a teacher may be below every student without a warning
NOT_FINITE_STEPS = 20  # steps in a row with the same term NaN or infinite, after which a training is stopped


def ends(network: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """The first and the last parameter: in nnU-Net's networks, of the encoder and of a segmentation head."""
    parameters = [*unwrap(network).parameters()]
    return parameters[0], parameters[-1]


class Health:
    """What is watched over the steps of a training.

    Args:
        log: prints a line to the training's log.
    """

    def __init__(self, log: Callable[[str], object]):
        self.log = log
        self.not_finite: dict[str, int] = {}  # loss term to the steps in a row in which it was not finite
        self.foreground: float | Tensor = 0.0  # sum over this epoch's pseudo labels of their part of foreground
        self.pseudo_labels = 0  # of this epoch

    def note_pseudo_labels(self, labels: Tensor) -> None:
        """Remembers how much foreground pseudo labels (B, C, *spatial) have; no GPU waits for it."""
        self.foreground = self.foreground + (labels > 0).any(1).float().mean()
        self.pseudo_labels += 1

    def check_terms(self, values: dict[str, float], images: dict[str, Tensor], epoch: int, folder: Path) -> None:
        """Stops a training of which a term is not finite for NOT_FINITE_STEPS.

        A few such steps are harmless, and told at the end of the epoch. Nothing is saved here: weights that give NaN
        for so many batches are not worth more than those of the last checkpoint.

        Args:
            values: the terms of this step, on the host already.
            images: what they are computed from, by a name for the message.
            epoch: the present one.
            folder: with the checkpoints.

        Raises:
            RuntimeError: names the terms, images that are not finite themselves, and the last good checkpoint.
        """
        for name, value in values.items():
            self.not_finite[name] = 0 if np.isfinite(value) else self.not_finite.get(name, 0) + 1
        names = [name for name, steps in self.not_finite.items() if steps >= NOT_FINITE_STEPS]
        if not names:
            return
        text = (
            f"The loss term {' and '.join(names)} was NaN or infinite for {NOT_FINITE_STEPS} steps in a row, in epoch "
            f"{epoch}. "
        )
        for name, image in images.items():
            if not image.isfinite().all():
                text += f"The last {name} have voxels that are NaN or infinite: check them. "
        kept = [name for name in CHECKPOINTS[1:] if (folder / name).is_file()]
        text += (
            f"{folder / kept[0]} is the last good state, from which --c continues once the cause is removed."
            if kept
            else "There is no checkpoint yet. Start again once the cause is removed."
        )
        raise RuntimeError(text)

    def end_epoch(self, steps: list[dict[str, float]]) -> dict[str, float]:
        """Warns of pseudo labels without foreground and of terms that were not finite, and starts anew.

        Args:
            steps: of this epoch: "loss" and the terms that it had, which need not be the same in all.

        Returns:
            Their means over the steps that had them, and over the GPUs.
        """
        if self.pseudo_labels and float(self.foreground) == 0:
            self.log(
                "WARNING: all pseudo labels of this epoch are background: unlabeled scans teach nothing else now. That "
                "is usual in the first epochs only."
            )
        self.foreground, self.pseudo_labels = 0.0, 0
        names = dict.fromkeys(name for step in steps for name in step)
        outputs = {name: [step[name] for step in steps if name in step] for name in names}
        for name, values in outputs.items():
            bad = np.sum(~np.isfinite(values))
            if bad and (name != "loss" or len(outputs) == 1):  # the sum of the terms, where there are some
                self.log(
                    f"WARNING: the loss term {name} was NaN or infinite in {bad} of {len(values)} steps of this epoch."
                )
        ranks = of_all_ranks({name: float(np.mean(values)) for name, values in outputs.items()})
        means = {name: float(np.mean([rank[name] for rank in ranks])) for name in names}
        self.log(f"losses {', '.join(f'{name} {value:.4f}' for name, value in means.items())}")
        return means

    def compare_dice(self, dice: dict[str, float]) -> None:
        """Warns of teachers that are more than LAGGING below every student.

        Args:
            dice: of the networks that segment, by their names.
        """
        worst = min((value for name, value in dice.items() if name.startswith("student")), default=0.0)
        for name, value in dice.items():
            if name.startswith("teacher") and value < worst - LAGGING:
                self.log(
                    f"WARNING: on validation patches the {name.replace('_', ' ')} has a Dice of {value:.3f}, every "
                    f"student {worst:.3f} or more: its labels hold the students back."
                )

    def compare_foreground(self, observations: Mapping[str, float | Tensor]) -> None:
        """Warns of pseudo labels that call most voxels foreground, and more than twice as many as the labels.

        Silent where the labels are foreground in half of the voxels or more.

        Args:
            observations: of `observe`. Without labeled or unlabeled patches there is nothing to compare.
        """
        names = ("labeled_foreground", "pseudo_foreground")
        labeled, pseudo = (float(observations.get(name, math.nan)) for name in names)
        if pseudo > MUCH_FOREGROUND and pseudo > 2 * labeled:
            self.log(
                f"WARNING: pseudo labels call {pseudo:.0%} of the voxels foreground, the labels {labeled:.0%}: "
                f"unlabeled scans teach to find it everywhere. That is usual in the first epochs only."
            )

    def check_heads(self, network: nn.Module, first_weights: Sequence[Tensor]) -> None:
        """Warns where weights were loaded from elsewhere, but not those of the segmentation heads, as nnU-Net does.

        Args:
            network: the student.
            first_weights: its `ends` when it was built.
        """
        heads = [name for name, _ in unwrap(network).named_modules() if name.endswith("seg_layers")]
        encoder, head = (torch.equal(*pair) for pair in zip(ends(network), first_weights, strict=True))
        if heads and head and not encoder:
            self.log(
                f"WARNING: -pretrained_weights leaves out the segmentation heads ({', '.join(heads)}). They start with "
                f"random weights, in the student and in its companions: the first pseudo labels mean nothing."
            )
