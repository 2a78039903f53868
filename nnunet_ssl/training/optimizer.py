"""The update of the weights, nnU-Net's, for several networks and backward passes; its learning rate in two phases."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from nnunet_ssl.blocks.networks import average_gradients, is_distributed


def adam(network: nn.Module, learning_rate: float, betas: tuple[float, float]) -> Optimizer:
    """Adam for one network, for which no host waits.

    GradScaler asks the GPU whether gradients are finite, once for every optimizer, but a fused one finds out there.
    """
    parameters = [*network.parameters()]
    return torch.optim.Adam(parameters, learning_rate, betas, fused=parameters[0].device.type == "cuda")


def add_networks(optimizer: Optimizer, networks: Iterable[nn.Module], others: Iterable[Optimizer]) -> None:
    """Adds what networks have to be trained, one group of parameters each, but for what other optimizers train."""
    taken = {id(p) for other in others for group in other.param_groups for p in group["params"]}
    for network in networks:
        own = [p for p in network.parameters() if p.requires_grad and id(p) not in taken]
        if own:
            optimizer.add_param_group({"params": own})


def accumulate_gradients(
    losses: Iterator[dict[str, Tensor]], precision: Callable[[], AbstractContextManager], grad_scaler: GradScaler | None
) -> dict[str, Tensor]:
    """Back-propagates the terms of a step, and frees the graph of every dict before it asks for the next.

    Args:
        losses: dicts of scalar terms, which are computed while they are asked for.
        precision: makes the context in which they are computed: as in nnU-Net, the backward pass runs outside of it.
        grad_scaler: scales what is back-propagated; None: nothing does.

    Returns:
        The terms by name, without gradient; of a name that comes again the sum.
    """
    terms: dict[str, Tensor] = {}
    while True:
        with precision():
            group = next(losses, None)
            total = sum(group.values()) if group else None
        if group is None:
            return terms
        if not group:
            continue
        (total if grad_scaler is None else grad_scaler.scale(total)).backward()
        for name, value in group.items():
            terms[name] = terms.get(name, 0) + value.detach()
        del group, total, value


def update_weights(
    optimizers: Sequence[Optimizer], networks: Sequence[nn.Module], max_norm: float, grad_scaler: GradScaler | None
) -> None:
    """Averages the gradients over the GPUs, clips those of every network by itself, and makes the optimizers' steps.

    An optimizer without any gradient makes none. Where a gradient is not finite, GradScaler leaves the step of its
    optimizer out (CUDA), and so do we on a CPU with all of them: weights and momentum stay good, and teachers average
    good weights. On MPS the step is always made, because to ask would make the host wait: the weights are lost then,
    the teachers with them, and `checkpoints.save` keeps the earlier files.

    Args:
        optimizers: of all networks; no parameter is in two of them.
        networks: those that are trained.
        max_norm: largest norm of the gradients of one network.
        grad_scaler: nnU-Net's on CUDA, which has scaled the gradients; None elsewhere.
    """
    optimizers = [each for each in optimizers if has_gradient(each)]
    if is_distributed():
        average_gradients(networks)
    for optimizer in optimizers if grad_scaler is not None else ():
        grad_scaler.unscale_(optimizer)
    norms = [nn.utils.clip_grad_norm_(network.parameters(), max_norm) for network in networks]
    if grad_scaler is not None:
        for optimizer in optimizers:
            grad_scaler.step(optimizer)
        grad_scaler.update()
    elif next(networks[0].parameters()).device.type != "cpu" or all(norm.isfinite() for norm in norms):
        for optimizer in optimizers:
            optimizer.step()


def keep_finite(optimizer: Optimizer) -> None:
    """On a CPU, makes an optimizer leave out steps with a gradient that is not finite, as GradScaler does on CUDA."""

    def forget(*_) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if not all(p.grad.isfinite().all() for p in parameters):
            optimizer.zero_grad(set_to_none=True)  # then there is nothing to do for it

    if optimizer.param_groups[0]["params"][0].device.type == "cpu":
        optimizer.register_step_pre_hook(forget)


def has_gradient(optimizer: Optimizer) -> bool:
    """Whether any of its parameters has a gradient."""
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


class PhaseScheduler:
    """nnU-Net's scheduler for a phase of the training and for all trained networks.

    Args:
        scheduler: of nnU-Net, which asks nothing else of it than the step to an epoch.
        optimizer: what it sets. Groups of parameters that are added from now on have the learning rate of the first
            one: torch's schedulers refuse them.
        begin: the epoch of the training that is the scheduler's epoch 0.
    """

    def __init__(self, scheduler: LRScheduler, optimizer: Optimizer, begin: int):
        self.scheduler, self.optimizer, self.begin = scheduler, optimizer, begin
        self.own = len(optimizer.param_groups)

    def step(self, epoch: int) -> None:
        with first_groups_only(self.optimizer, self.own):
            self.scheduler.step(epoch - self.begin)
        for group in self.optimizer.param_groups[self.own :]:
            group["lr"] = self.optimizer.param_groups[0]["lr"]


@contextmanager
def first_groups_only(optimizer: Optimizer, number: int = 1) -> Iterator[None]:
    """In the block, the optimizer has its first groups of parameters only: those of nnU-Net's own network."""
    further = optimizer.param_groups[number:]
    del optimizer.param_groups[number:]
    try:
        yield
    finally:
        optimizer.param_groups.extend(further)
