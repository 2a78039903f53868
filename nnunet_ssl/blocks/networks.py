"""Companion networks: frozen copies, EMA, and what a method reads from a network."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.modules.batchnorm import _BatchNorm
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


def trainable_copy(network: nn.Module) -> nn.Module:
    """An independent copy with the same weights, to be trained as well (a second student)."""
    return deepcopy(unwrap(network))


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """In the block, the network is in eval mode, and what it computes leaves no gradient in its parameters.

    Gradients go through it to its input. They are left out also where they are back-propagated after the block.
    """
    training, trained = network.training, [p for p in network.parameters() if p.requires_grad]
    network.eval().requires_grad_(False)
    try:
        yield
    finally:
        network.train(training)
        for parameter in trained:
            parameter.requires_grad_(True)


def update_ema(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher = decay * teacher + (1 - decay) * student, for every parameter exactly once; buffers are copied.

    Args:
        teacher: changed in place.
        student: may be wrapped (DDP, torch.compile).
        decay: in [0, 1]; 0 copies the student, 1 leaves the teacher as it is.

    Raises:
        ValueError: names or shapes of parameters or buffers differ; nothing is changed then.
    """
    update_weighted_ema(teacher, [student], [1.0 - decay])


@torch.no_grad()
def update_weighted_ema(teacher: nn.Module, students: Sequence[nn.Module], weights: Sequence[float]) -> None:
    """teacher = (1 - sum of weights) * teacher + sum of weight * student (co-learning, Eq. 1).

    Every parameter is updated exactly once: `named_parameters()` lists a tensor that several modules share once.
    `state_dict()` would list it up to four times in nnU-Net's networks, and an update over that would apply the decay
    as often. Buffers (of batch normalisation) are copied from the first student.

    Args:
        teacher: changed in place.
        students: each may be wrapped (DDP, torch.compile). Averaging weights means something only for networks that
            started from the same ones; independently initialised networks have no common order of features.
        weights: of the students, not negative, sum at most 1.

    Raises:
        ValueError: names or shapes of parameters or buffers differ, or the weights are out of range; nothing is
            changed then.
    """
    if min(weights) < 0 or sum(weights) > 1 + 1e-6:
        raise ValueError(f"The weights of a moving average are not negative and sum to at most 1, not {weights}.")
    parameters, buffers = dict(teacher.named_parameters()), dict(teacher.named_buffers())
    students = [unwrap(student) for student in students]
    sources = [dict(student.named_parameters()) for student in students]
    first = dict(students[0].named_buffers())
    for student, source in zip(students, sources, strict=True):
        if _shapes(parameters | buffers) != _shapes(source | dict(student.named_buffers())):
            raise ValueError("An exponential moving average needs networks with the same parameter names and shapes.")
    tensors = list(parameters.values())
    later = 1.0  # what the updates that follow leave of this one
    updates = []
    for source, weight in reversed(list(zip(sources, weights, strict=True))):
        share = min(weight / later, 1.0) if later > 0 else 0.0
        updates.append(([source[name] for name in parameters], share))
        later -= weight
    for source, share in reversed(updates):
        torch._foreach_lerp_(tensors, source, share)
    for name, buffer in buffers.items():
        buffer.copy_(first[name])


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def has_batch_norm(network: nn.Module) -> bool:
    """Whether the samples of a batch depend on each other by batch normalisation."""
    return any(isinstance(module, _BatchNorm) for module in network.modules())


def is_distributed() -> bool:
    """Whether this is one of several processes of torch.distributed, as in nnU-Net's multi-GPU training."""
    return dist.is_available() and dist.is_initialized()


def average_gradients(networks: Sequence[nn.Module]) -> None:
    """Replaces the gradients by their mean over the ranks of torch.distributed, in one exchange.

    Every rank must have gradients for the same parameters; those without one are left out.
    """
    gradients = [p.grad for network in networks for p in network.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    means = flat.div_(dist.get_world_size()).split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [m.view_as(g) for m, g in zip(means, gradients, strict=True)])


def broadcast(networks: Iterable[nn.Module]) -> None:
    """Gives every rank of torch.distributed the parameters and buffers of rank 0; nothing to do for one process."""
    for network in networks if is_distributed() else ():
        for tensor in (*network.parameters(), *network.buffers()):
            dist.broadcast(tensor.detach(), 0)


def of_all_ranks(value: Any) -> list[Any]:
    """What every rank of torch.distributed has passed, by rank; the value alone where there is one process."""
    if not is_distributed():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def set_deep_supervision(networks: Iterable[nn.Module], enabled: bool) -> None:
    """Turns the outputs of several scales on or off; what has no decoder, such as a transformer, has none."""
    for network in networks:
        decoder = getattr(unwrap(network), "decoder", None)
        if decoder is not None:
            decoder.deep_supervision = enabled


def logits(network: nn.Module, x: Tensor) -> Tensor:
    """Full-resolution logits (B, C, *spatial), with deep supervision on or off."""
    return finest(network(x))


def finest(output: Tensor | Sequence[Tensor]) -> Tensor:
    """The full-resolution logits of an output, with deep supervision on or off."""
    return output[0] if isinstance(output, list | tuple) else output


def samples_of(output: Tensor | Sequence[Tensor], samples: slice) -> Tensor | list[Tensor]:
    """Some samples of an output, with deep supervision at every scale."""
    return [scale[samples] for scale in output] if isinstance(output, list | tuple) else output[samples]


def forward_with_features(
    network: nn.Module, x: Tensor, change: Callable[[list[Tensor]], list[Tensor]] | None = None
) -> tuple[Tensor | list[Tensor], list[Tensor]]:
    """Output of a U-Net together with its encoder's stage outputs, highest resolution first, bottleneck last.

    Calls encoder and decoder one after the other instead of registering hooks. `change` replaces the stage outputs
    before the decoder sees them, for instance by dropout.
    """
    network = unwrap(network)
    skips = network.encoder(x)
    if change is not None:
        skips = change(skips)
    return network.decoder(skips), skips


def has_stages(network: nn.Module) -> bool:
    """Whether the network has an encoder that gives a decoder the outputs of its stages.

    nnU-Net's PlainConvUNet and ResidualEncoderUNet have one; its Primus has not.
    """
    inner = unwrap(network)
    return hasattr(inner, "encoder") and hasattr(getattr(inner, "decoder", None), "transpconvs")


def require_stages(network: nn.Module, purpose: str) -> None:
    """Raises NotImplementedError where a network has no such stages."""
    if not has_stages(network):
        raise NotImplementedError(
            f"{purpose} needs a U-Net with encoder stages (PlainConvUNet or ResidualEncoderUNet), not a "
            f"{type(unwrap(network)).__name__}."
        )


def compile_in_place(network: nn.Module) -> None:
    """Compiles what a network computes, encoder and decoder each, without a wrapper around it.

    Its type, the names of its weights and `forward_with_features` stay as they are. Networks of one architecture share
    the compiled code. A deepcopy is not compiled. Sizes are fixed: a batch of another size is compiled anew.
    """
    # networks of one class share the versions that torch allows, 8 by itself, of which training and validation have one
    # each; what comes later would not be compiled
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    network = unwrap(network)
    for part in (network.encoder, network.decoder) if has_stages(network) else (network,):
        part.compile(dynamic=False)


def with_interpolation(network: nn.Module) -> nn.Module:
    """A copy of a U-Net whose decoder upsamples by linear interpolation and a convolution, not by a transposed one.

    The convolutions are new and random, everything else is a copy.
    """
    copy = deepcopy(unwrap(network))
    _interpolate(copy.decoder, copy.initialize, nearest=False)
    return copy


def further_decoder(network: nn.Module, *, nearest: bool = False) -> nn.Module:
    """A second decoder for the encoder of a U-Net, which upsamples by interpolation and a convolution (MC-Net).

    The convolutions are new and random, everything else is a copy. It takes the stage outputs of the encoder, which is
    no part of it, where nnU-Net's own decoders register the encoder once more.

    Args:
        network: the U-Net, perhaps wrapped.
        nearest: interpolate by the nearest neighbour, not linearly.
    """
    network = unwrap(network)
    decoder = deepcopy(network.decoder, {id(network.encoder): nn.Identity()})
    del decoder.encoder
    _interpolate(decoder, network.initialize, nearest=nearest)
    return decoder


def _interpolate(decoder: nn.Module, initialize: Callable[[nn.Module], None], *, nearest: bool) -> None:
    for index, transposed in enumerate(decoder.transpconvs):
        upsampling = InterpolationConv(transposed, nearest=nearest)
        upsampling.apply(initialize)
        decoder.transpconvs[index] = upsampling


class InterpolationConv(nn.Module):
    """Interpolation by the stride of a transposed convolution, then a convolution with 3 voxels per axis."""

    def __init__(self, transposed: nn.Module, *, nearest: bool = False):
        super().__init__()
        conv, linear = {
            nn.ConvTranspose2d: (nn.Conv2d, "bilinear"),
            nn.ConvTranspose3d: (nn.Conv3d, "trilinear"),
        }[type(transposed)]
        self.mode = "nearest" if nearest else linear
        self.scale = tuple(float(stride) for stride in transposed.stride)
        where = {"device": transposed.weight.device, "dtype": transposed.weight.dtype}
        bias = transposed.bias is not None
        self.conv = conv(transposed.in_channels, transposed.out_channels, 3, padding=1, bias=bias, **where)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, *spatial) to (B, out, *spatial times stride)."""
        return self.conv(F.interpolate(x, scale_factor=self.scale, mode=self.mode))


class Pyramid(nn.Module):
    """A U-Net's decoder with dropout of whole channels in front of its segmentation heads (URPC).

    It consists of the modules of the U-Net and has no weights of its own. The heads are those of deep supervision,
    whether it is on or off.

    Args:
        network: a U-Net with encoder stages.
        dropout: probabilities for the heads, highest resolution first; further heads give no output.
    """

    def __init__(self, network: nn.Module, dropout: Sequence[float]):
        super().__init__()
        decoder = unwrap(network).decoder
        # a list of tuples, so that nothing is registered
        self.parts = [*zip(decoder.transpconvs, decoder.stages, decoder.seg_layers, strict=True)]
        self.dropout = tuple(dropout)[: len(self.parts)]
        self.eval()  # nothing of it is trained

    def forward(self, skips: list[Tensor]) -> list[Tensor]:
        """Stage outputs of the encoder to the logits of every head, highest resolution first."""
        x, outputs = skips[-1], []
        for level, (upsample, convolve, head) in zip(reversed(range(len(self.parts))), self.parts, strict=True):
            x = convolve(torch.cat([upsample(x), skips[level]], 1))
            if level < len(self.dropout):
                outputs.append(head(torch.feature_dropout(x, self.dropout[level], True)))
        return outputs[::-1]
