"""Small changes of an image or of features, random or adversarial: without them consistency has nothing to teach."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def add_noise(x: Tensor, deviation: float) -> Tensor:
    """x plus Gaussian noise that is clipped at two standard deviations: a new tensor, or x itself for a deviation of 0.

    Source: the released code of UA-MT (deviation 0.1, clip 0.2, on z-scored images).

    Args:
        x: any shape.
        deviation: in the unit of x.
    """
    if deviation == 0:
        return x
    return x + torch.randn_like(x).clamp_(-2, 2) * deviation


def adversarial_direction(
    distance: Callable[[Tensor], Tensor | Iterable[Tensor]], x: Tensor, probe: float | Tensor
) -> Tensor:
    """The direction in which x has to move so that a prediction changes most, by one power iteration (VAT).

    Computed in float32 without autocast, also where the caller has one or has no gradients; gradients of weights stay
    as they are. Its length is a root mean square, so that a radius does not depend on the size of the patch: as an L2
    norm it is the radius times the square root of the number of elements. Source: Miyato et al. 2018
    (arXiv:1704.03976), from a uniformly random direction as in the released code of SS-Net.

    Args:
        distance: of the prediction for a changed x to that for x itself, a scalar: the sum over the samples, which must
            not depend on each other. Both in float32 (see `in_float32`): a difference as small as this one is lost in
            the rounding of half precision. Or scalars that have its gradient together: the graph of each is freed
            before the next one is asked for.
        x: (B, ...); without gradient.
        probe: the length of the random change on which the gradient is taken, as a root mean square in the unit of x:
            a number, or one per sample that broadcasts to x. At least a hundredth of x's own, because convolutions may
            round float32 to ten bits (TF32).

    Returns:
        (B, ...) float32 without gradient, root mean square 1 in every sample; 0 in one whose gradient is 0.
    """
    x = x.detach().float()
    with torch.enable_grad(), in_float32(x.device):
        probed = (x + probe * _unit(torch.rand_like(x) - 0.5)).requires_grad_()
        found = distance(probed)
        parts = [found] if isinstance(found, Tensor) else found
        gradient = sum(torch.autograd.grad(part, probed)[0] for part in parts)
    return _unit(gradient)


def in_float32(device: torch.device) -> torch.autocast:
    """A context in which autocast is off; inputs have to be float32."""
    return torch.autocast(device.type, enabled=False)


def _unit(x: Tensor) -> Tensor:
    """Every sample divided by its root mean square; 0 where it is 0."""
    flat = x.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)  # or small squares would be 0
    return (flat / flat.square().mean(1, keepdim=True).sqrt().clamp_min(1e-12)).view_as(x)
