"""Small random changes of an image or of features, without which a consistency loss has nothing to learn."""

import torch
from torch import Tensor


def add_noise(x: Tensor, deviation: float) -> Tensor:
    """x plus Gaussian noise that is clipped at two standard deviations; a new tensor, 0 gives x itself.

    Source: the released code of UA-MT (deviation 0.1, clip 0.2, on z-scored images).

    Args:
        x: any shape.
        deviation: in the unit of x.
    """
    if deviation == 0:
        return x
    return x + torch.randn_like(x).clamp_(-2, 2) * deviation
