"""Random batches, and losses written out sample by sample: oracles for the tests of the methods' steps."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tiny_trainers import make_trainer, seed

from nnunet_ssl.data.loading import Batch


def started(trainer, dataset, **settings):
    """A trainer without deep supervision before its last step; its teachers differ from the students."""
    seed()
    made = make_trainer(trainer, dataset, **{"enable_deep_supervision": False, **settings})
    made.on_train_start()
    made.network.train()
    made.step = made.max_steps - 1
    with torch.no_grad():
        for companion in vars(made.companions).values():
            for parameter in companion.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return made


@dataclass(frozen=True)
class Labels:
    """One kind of labels, the fixture of a dataset that has it, and the losses that nnU-Net takes for it."""

    fixture: str
    channels: int  # of the network
    regions: bool = False
    ignore: bool = False

    def random_batch(self, size, shape=(16, 16, 16)):
        images = torch.randn(3, size, 1, *shape)
        if self.regions:
            target = torch.rand(size, self.channels + self.ignore, *shape) > 0.6
        else:
            target = torch.randint(0, self.channels + self.ignore, (size, 1, *shape)).to(torch.int16)
        return Batch(image=images[0], target=target, unlabeled=images[1], unlabeled_weak=images[2])

    def annotated(self, target):
        """The voxels that count, (B, 1, *spatial)."""
        if not self.ignore:
            return torch.ones_like(target[:, :1], dtype=torch.bool)
        return target[:, -1:] == 0 if self.regions else target != self.channels

    def truth(self, target):
        """The target as probabilities (B, channels, *spatial); anything where the voxel is not annotated."""
        if self.regions:
            return target[:, : self.channels].float()
        return torch.cat([target == value for value in range(self.channels)], 1).float()

    def probabilities(self, logits):
        return 1 / (1 + (-logits).exp()) if self.regions else logits.softmax(1)

    def hard(self, logits):
        """Labels from logits in the form of a target."""
        if not self.regions:
            return logits.argmax(1, keepdim=True)
        return torch.cat([logits > 0] + [torch.zeros_like(logits[:, :1], dtype=torch.bool)] * self.ignore, 1)

    def dice(self, logits, target, mask=None):
        """Mean over samples and foreground classes (or regions) of the soft Dice, inside a mask."""
        counts = self.annotated(target) if mask is None else self.annotated(target) & mask
        first = 0 if self.regions else 1
        p, t = self.probabilities(logits)[:, first:], self.truth(target)[:, first:]
        values = []
        for sample in range(len(p)):
            m = counts[sample, 0].float()
            for a, b in zip(p[sample], t[sample], strict=True):
                values.append((2 * (a * b * m).sum() + 1e-5) / ((a * m).sum() + (b * m).sum() + 1e-5))
        return torch.stack(values).mean()

    def cross_entropy(self, logits, target, mask=None):
        """Mean over the voxels of a mask; of regions the mean too, with an ignore label their sum, as in nnU-Net."""
        counts = (self.annotated(target) if mask is None else self.annotated(target) & mask)[:, 0]
        t = self.truth(target)
        if not self.regions:
            return -(logits.log_softmax(1) * t).sum(1)[counts].mean()
        entropy = -(t * F.logsigmoid(logits) + (1 - t) * F.logsigmoid(-logits))
        return (entropy.sum(1) if self.ignore else entropy.mean(1))[counts].mean()

    def dice_and_cross_entropy(self, logits, target, mask=None):
        """In nnU-Net's scaling."""
        return self.cross_entropy(logits, target, mask) - self.dice(logits, target, mask)


CLASSES = Labels("tiny_dataset", 2)
EVERY_KIND = [
    CLASSES,
    Labels("tiny_ignore_dataset", 3, ignore=True),
    Labels("tiny_regions_dataset", 2, regions=True),
    Labels("tiny_regions_ignore_dataset", 2, regions=True, ignore=True),
]


def distances_by_definition(classes, annotated):
    """Signed distances from every pair of voxels: the nearest annotated voxel of the other side."""
    found = torch.zeros(classes.shape)
    for b, k in ((b, k) for b in range(classes.shape[0]) for k in range(classes.shape[1])):
        inside, outside = classes[b, k] & annotated[b, 0], ~classes[b, k] & annotated[b, 0]
        if not inside.any() or not outside.any():
            continue
        between = torch.cdist(
            inside.nonzero().double(), outside.nonzero().double(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        depth, height = between.amin(1), between.amin(0)
        found[b, k][outside] = (height / height.max()).float()
        found[b, k][inside] = torch.where(depth == 1, 0, -depth / depth.max()).float()
    return found


def assert_terms(groups, expected):
    """Compares the terms that a method yields, summed by name over all graphs, with the expected ones."""
    terms = {}
    for group in groups:
        terms |= {name: terms.get(name, 0) + value for name, value in group.items()}
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        message = f"{name} is {terms[name]}, expected {value}"
        torch.testing.assert_close(terms[name], torch.as_tensor(value), rtol=1e-4, atol=1e-5, msg=message)
