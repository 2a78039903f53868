"""Feature vectors of single voxels, and a memory of them per class (SS-Net)."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_ssl.blocks.networks import is_distributed


def random_voxels(masks: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Random voxels of every mask, without repetition; the shapes do not depend on the values, so no GPU waits.

    Args:
        masks: (B, K, *spatial) bool, K masks in the voxels of a batch.
        count: voxels of each at most.

    Returns:
        Their numbers in the batch, sample by sample, (K, n) int64, and which of them are in the mask, (K, n) bool; n is
        `count`, or the number of voxels in the batch where that is smaller. All that a mask has come first.
    """
    rows = masks.transpose(0, 1).flatten(1)
    order = torch.rand(rows.shape[1], device=masks.device)
    # one class after the other: of all at once the orders would need as much memory as the network's output
    chosen = [torch.where(row, order, -1).topk(min(count, len(order))) for row in rows]
    return torch.stack([c.indices for c in chosen]), torch.stack([c.values for c in chosen]) >= 0


def at_voxels(features: Tensor, voxels: Tensor) -> Tensor:
    """Features (B, F, *spatial) of the voxels of `random_voxels`, (K, n): (K, n, F)."""
    flat = features.flatten(2)
    return flat[voxels // flat.shape[2], :, voxels % flat.shape[2]]


class ClassMemory(nn.Module):
    """Up to `size` feature vectors of every class, which are replaced together; equal on all ranks.

    Buffers: `vectors` (classes, size, width), and `filled` (classes, size), False where there is none yet.
    """

    def __init__(self, classes: int, size: int, width: int):
        super().__init__()
        self.register_buffer("vectors", torch.zeros(classes, size, width))
        self.register_buffer("filled", torch.zeros(classes, size, dtype=torch.bool))
        self.eval()  # nothing of it is trained

    @torch.no_grad()
    def refill(self, vectors: Tensor, scores: Tensor, valid: Tensor) -> None:
        """Every class that has new vectors on any rank keeps the best of them; the others keep what they have.

        Args:
            vectors: (classes, n, width). Those that are not finite are left out.
            scores: (classes, n), the higher the better.
            valid: (classes, n) bool, which of them there are.
        """
        valid = valid & vectors.isfinite().all(2) & scores.isfinite()
        new = self._best(vectors.float(), scores.float(), valid)
        if is_distributed():
            new = self._best(*(torch.cat(_gathered(part), 1) for part in new))
        vectors, _, valid = new
        change = valid.any(1, keepdim=True)
        self.vectors.copy_(torch.where(change[:, :, None], vectors, self.vectors))
        self.filled.copy_(torch.where(change, valid, self.filled))

    def _best(self, vectors: Tensor, scores: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        missing = max(0, self.filled.shape[1] - scores.shape[1])
        scores = F.pad(torch.where(valid, scores, -torch.inf), (0, missing), value=-torch.inf)
        vectors = F.pad(torch.where(valid[:, :, None], vectors, 0), (0, 0, 0, missing))
        scores, places = scores.topk(self.filled.shape[1], dim=1)
        return vectors.gather(1, places[:, :, None].expand(-1, -1, vectors.shape[2])), scores, scores > -torch.inf


def _gathered(x: Tensor) -> list[Tensor]:
    """What every rank of torch.distributed has passed, by rank."""
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x.contiguous())
    return found


class PrototypeHeads(nn.Module):
    """Projector, predictor, and two selectors per class, which say how much a vector counts (SS-Net).

    Layer normalisation in place of the released code's batch normalisation: voxels do not depend on each other.

    Args:
        features: channels of the features.
        classes: how many have selectors.
        width: of the vectors.
    """

    def __init__(self, features: int, classes: int, width: int):
        super().__init__()
        self.projector = _two_layers(features, width, width, nn.ReLU())
        self.predictor = _two_layers(width, width, width, nn.ReLU())
        self.selectors, self.memory_selectors = (
            nn.ModuleList(_two_layers(width, width, 1, nn.LeakyReLU(0.2)) for _ in range(classes)) for _ in range(2)
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(classes, n, features) to projected and predicted vectors, (classes, n, width) each."""
        projected = self.projector(features)
        return projected, self.predictor(projected)


def _two_layers(inputs: int, hidden: int, outputs: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), activation, nn.Linear(hidden, outputs))


def scores(selectors: Iterable[nn.Module], vectors: Tensor) -> Tensor:
    """What the selector of every class says of its vectors: (classes, n, width) to (classes, n) float32 in (0, 1).

    The vectors get no gradient.
    """
    found = [selector(own) for selector, own in zip(selectors, vectors.detach(), strict=True)]
    return torch.stack(found).float().sigmoid().squeeze(2)


def class_separation(vectors: Tensor, weights: Tensor, memory: Tensor, memory_weights: Tensor) -> Tensor:
    """Weighted mean of 1 - cosine between the vectors of a class and those of its memory, the mean over the classes.

    All pairs of a class count by the product of their weights. A class without any vector or memory has the value 0;
    so has everything where there are no classes with both. Source: SS-Net (arXiv:2203.01324), class-level separation.

    Args:
        vectors: (K, n, width).
        weights: (K, n), not negative, 0 where there is no vector.
        memory: (K, m, width); no gradient.
        memory_weights: (K, m), not negative, 0 where there is none.

    Returns:
        Scalar in [0, 2], float32.
    """
    # the mean over all pairs of a product is the product of the means
    cosine = (_mean_direction(vectors, weights) * _mean_direction(memory.detach(), memory_weights)).sum(1)
    both = (weights.sum(1) > 0) & (memory_weights.sum(1) > 0)
    return torch.where(both, 1 - cosine, 0).mean()


def _mean_direction(vectors: Tensor, weights: Tensor) -> Tensor:
    weights = weights / weights.sum(1, keepdim=True).clamp_min(1e-8)
    return (F.normalize(vectors.float(), dim=2) * weights[:, :, None]).sum(1)
