"""Companion networks: frozen copies, EMA, and what a method reads from a network."""

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel


def unwrap(network: nn.Module) -> nn.Module:
    """The plain network inside DistributedDataParallel and torch.compile."""
    if isinstance(network, DistributedDataParallel):
        network = network.module
    if isinstance(network, OptimizedModule):
        network = network._orig_mod
    return network


def frozen_copy(network: nn.Module) -> nn.Module:
    """An independent copy in eval mode whose parameters need no gradient (a teacher); weights equal, not shared."""
    copy = deepcopy(unwrap(network)).eval()
    return copy.requires_grad_(False)


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher = decay * teacher + (1 - decay) * student, for every parameter exactly once; buffers are copied.

    `named_parameters()` lists a tensor that several modules share once. `state_dict()` would list it up to four
    times in nnU-Net's networks, and an update over that would apply the decay as often.

    Args:
        teacher: changed in place.
        student: may be wrapped (DDP, torch.compile).
        decay: in [0, 1]; 0 copies the student, 1 leaves the teacher as it is.

    Raises:
        ValueError: names or shapes of parameters or buffers differ; nothing is changed then.
    """
    student = unwrap(student)
    old, new = dict(teacher.named_parameters()), dict(student.named_parameters())
    buffers, sources = dict(teacher.named_buffers()), dict(student.named_buffers())
    if _shapes(old | buffers) != _shapes(new | sources):
        raise ValueError("An exponential moving average needs networks with the same parameter names and shapes.")
    torch._foreach_lerp_(list(old.values()), [new[name] for name in old], 1.0 - decay)
    for name, buffer in buffers.items():
        buffer.copy_(sources[name])


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def logits(network: nn.Module, x: Tensor) -> Tensor:
    """Full-resolution logits (B, C, *spatial), with deep supervision on or off."""
    output = network(x)
    return output[0] if isinstance(output, list | tuple) else output


def forward_with_features(network: nn.Module, x: Tensor) -> tuple[Tensor | list[Tensor], list[Tensor]]:
    """Output of a U-Net together with its encoder's stage outputs, highest resolution first, bottleneck last.

    Calls encoder and decoder one after the other instead of registering hooks.
    """
    network = unwrap(network)
    skips = network.encoder(x)
    return network.decoder(skips), skips
