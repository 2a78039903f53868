"""Random batches, and losses written out sample by sample: oracles for the tests of the methods' steps."""

import torch
import torch.nn.functional as F
from training import make_trainer, seed

from nnunet_ssl.data import Batch


def started(trainer, dataset, **settings):
    """A trainer without deep supervision at the end of its training; its teachers differ from the students."""
    seed()
    made = make_trainer(trainer, dataset, **{"enable_deep_supervision": False, **settings})
    made.on_train_start()
    made.network.train()
    made.step = made.max_steps
    with torch.no_grad():
        for companion in vars(made.companions).values():
            for parameter in companion.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return made


def random_batch(size, shape=(16, 16, 16)):
    images = torch.randn(3, size, 1, *shape)
    labels = (torch.rand(size, 1, *shape) > 0.6).to(torch.int16)
    return Batch(image=images[0], target=labels, unlabeled=images[1], unlabeled_weak=images[2])


def dice(logits, target, mask=None):
    """Mean over the samples of the foreground's soft Dice, (B, 2, *spatial) and (B, 1, *spatial), inside a mask."""
    mask = torch.ones_like(target, dtype=torch.bool) if mask is None else mask
    foreground = logits.softmax(1)[:, 1]
    values = []
    for p, t, m in zip(foreground, target[:, 0].float(), mask[:, 0].float(), strict=True):
        values.append((2 * (p * t * m).sum() + 1e-5) / ((p * m).sum() + (t * m).sum() + 1e-5))
    return torch.stack(values).mean()


def cross_entropy(logits, target, mask=None):
    """Mean over the voxels of a mask."""
    mask = torch.ones_like(target, dtype=torch.bool) if mask is None else mask
    return F.cross_entropy(logits, target[:, 0].long(), reduction="none")[mask[:, 0]].mean()


def dice_and_cross_entropy(logits, target, mask=None):
    """In nnU-Net's scaling."""
    return cross_entropy(logits, target, mask) - dice(logits, target, mask)


def assert_terms(groups, expected):
    """Compares the terms that a method yields, all graphs together, with the expected ones by name."""
    terms = {name: value for group in groups for name, value in group.items()}
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        message = f"{name} is {terms[name]}, expected {value}"
        torch.testing.assert_close(terms[name], torch.as_tensor(value), rtol=1e-4, atol=1e-5, msg=message)
