"""The update of the weights, nnU-Net's, for several networks and backward passes; its learning rate in two phases."""

from collections.abc import Sequence

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nnunet_ssl.blocks.networks import average_gradients, is_distributed


def update_weights(
    optimizer: Optimizer, networks: Sequence[nn.Module], max_norm: float, grad_scaler: GradScaler | None
) -> None:
    """Averages the gradients over the GPUs, clips those of every network by itself, and makes the optimizer's step.

    Where a gradient is not finite, GradScaler leaves the step out (CUDA), and so do we on a CPU: weights and momentum
    stay good, and teachers average good weights. On MPS the step is always made, because to ask would make the host
    wait: the weights are lost then, the teachers with them, and `checkpoints.save` keeps the earlier files.

    Args:
        optimizer: of all networks.
        networks: those that are trained.
        max_norm: largest norm of the gradients of one network.
        grad_scaler: nnU-Net's on CUDA, which has scaled the gradients; None elsewhere.
    """
    if is_distributed():
        average_gradients(networks)
    if grad_scaler is not None:
        grad_scaler.unscale_(optimizer)
    norms = [nn.utils.clip_grad_norm_(network.parameters(), max_norm) for network in networks]
    if grad_scaler is not None:
        grad_scaler.step(optimizer)
        grad_scaler.update()
    elif next(networks[0].parameters()).device.type != "cpu" or all(norm.isfinite() for norm in norms):
        optimizer.step()


class LaterScheduler:
    """A scheduler whose first epoch is a later one of the training.

    Args:
        scheduler: of nnU-Net, which asks nothing else of it than the step to an epoch.
        begin: the epoch of the training that is the scheduler's epoch 0.
    """

    def __init__(self, scheduler: LRScheduler, begin: int):
        self.scheduler, self.begin = scheduler, begin

    def step(self, epoch: int) -> None:
        self.scheduler.step(epoch - self.begin)
