"""M3HL's step against a direct implementation of the paper's equations, sample by sample."""

import itertools
import math

import pytest
import torch
from equations import CLASSES, EVERY_KIND, assert_terms, started
from tiny_trainers import seed

from nnunet_ssl.blocks.mixing import block_mask
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3, nnUNetTrainerM3HL, nnUNetTrainerM3HLPaper


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("pairs", "dice", "rampup"), [("all", True, 0.0), ("matched", True, 0.0), ("matched", False, 0.75)]
)
def test_a_step_is_that_of_the_equations(labels, labels_dataset, size, pairs, dice, rampup):
    trainer = started(
        nnUNetTrainerM3HL,
        labels_dataset,
        feature_pairs=pairs,
        pseudo_dice=dice,
        pseudo_weight=0.3,
        feature_weight=0.7,
        mask_cells=2,
        unmixed=0.0,
        rampup=rampup,
        num_epochs=4,
    )
    trainer.step = 3  # of 8
    batch = labels.random_batch(size)
    seed(5)
    groups = list(trainer.losses(batch))

    seed(5)
    half = (size + 1) // 2
    masks = block_mask(half, (16, 16, 16), cells=2, ratio=0.5)
    teacher, student = trainer.companions.teacher, trainer.network
    pseudo = labels.hard(teacher(batch.unlabeled_weak))
    # (labeled sample, unlabeled sample, mask) of half a and of half b; 1 keeps the labeled voxel
    order = [(trainer.step * half + i) % size for i in range(size)]  # the samples take turns
    a = [(order[i], order[i], masks[i]) for i in range(half)]
    b = [(order[size - half + i], order[size - half + i], ~masks[i]) for i in range(half)]
    images, targets, keep = [], [], []
    for labeled, unlabeled, mask in a + b:
        images.append(batch.image[labeled] * mask + batch.unlabeled[unlabeled] * ~mask)
        targets.append(torch.where(mask, batch.target[labeled], pseudo[unlabeled]))
        keep.append(mask)
    image, target, keep = torch.stack(images), torch.stack(targets), torch.stack(keep)
    logits = student(image)
    pseudo_loss = labels.dice_and_cross_entropy if dice else labels.cross_entropy
    expected = {
        "labeled": labels.dice_and_cross_entropy(logits, target, keep),
        # exp(-5 (1 - t)^2), where 3 of 6 steps are done
        "pseudo": 0.3 * (math.exp(-1.25) if rampup else 1) * pseudo_loss(logits, target, ~keep),
    }
    skips, teacher_skips = student.encoder(image), teacher.encoder(batch.unlabeled_weak)
    low, high = ([], []), ([], [])
    for s, t in itertools.product("ab", "ab"):
        for i in range(half):
            mixed = i if s == "a" else half + i
            plain = (a if t == "a" else b)[i][1]
            if pairs == "all":
                where = [torch.ones(skips[level].shape[2:], dtype=torch.bool) for level in (1, -1)]
            elif s == t:
                where = [whole_cells(~keep[mixed, 0], skips[level].shape[2:]) for level in (1, -1)]
            else:
                continue
            low[0].append((skips[1][mixed] - teacher_skips[1][plain])[:, where[0]].abs().sum())
            low[1].append(where[0].sum() * skips[1].shape[1])
            x, y = (f[:, where[1]].flatten() for f in (skips[-1][mixed], teacher_skips[-1][plain]))
            if len(x):
                high[0].append(1 - x @ y / x.norm() / y.norm())
    # the paper sums cross entropy and Dice over the halves, the terms above are their means: half the weight
    expected["low"] = 0.7 / 2 * sum(low[0]) / sum(low[1])
    expected["high"] = 0.7 / 2 * sum(high[0]) / len(high[0])
    assert_terms(groups, expected)


def whole_cells(mask, shape):
    """The cells of a coarser grid in which every voxel of a mask is set."""
    steps = [size // cells for size, cells in zip(mask.shape, shape, strict=True)]
    cells = torch.zeros(tuple(shape), dtype=torch.bool)
    for place in itertools.product(*map(range, shape)):
        cells[place] = mask[tuple(slice(p * s, (p + 1) * s) for p, s in zip(place, steps, strict=True))].all()
    return cells


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
@pytest.mark.parametrize(
    ("size", "dice", "rampup"), [(1, True, 0.0), (2, True, 0.0), (2, False, 1.0), (3, True, 0.0), (4, True, 0.0)]
)
def test_the_last_part_of_the_training_is_on_whole_patches(labels, labels_dataset, size, dice, rampup):
    settings = {"pseudo_weight": 0.3, "pseudo_dice": dice, "rampup": rampup, "unmixed": 0.25, "num_epochs": 4}
    trainer = started(nnUNetTrainerM3HL, labels_dataset, **settings)
    batch = labels.random_batch(size)
    half = (size + 1) // 2
    teacher, student = trainer.companions.teacher, trainer.network
    for step, mixed in ((0, True), (5, True), (6, False), (7, False)):  # of 8
        trainer.step = step
        (terms,) = trainer.losses(batch)
        assert ("low" in terms) == ("high" in terms) == mixed
        if not mixed:
            order = [(step * half + i) % size for i in range(size)]  # the samples take turns
            own, other = order[:half], order[size - half :]
            pseudo = labels.hard(teacher(batch.unlabeled_weak[other]))
            logits = student(torch.cat([batch.image[own], batch.unlabeled[other]]))
            pseudo_loss = labels.dice_and_cross_entropy if dice else labels.cross_entropy
            expected = {
                "labeled": labels.dice_and_cross_entropy(logits[:half], batch.target[own]),
                "pseudo": 0.3 * math.exp(-5 * rampup * (1 - step / 8) ** 2) * pseudo_loss(logits[half:], pseudo),
            }
            assert_terms([terms], expected)


@pytest.mark.parametrize("unmixed", [0.0, 1.0])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_every_labeled_sample_of_a_batch_is_used_as_often(size, unmixed, tiny_dataset):
    trainer = started(nnUNetTrainerM3HL, tiny_dataset, feature_weight=0.0, unmixed=unmixed, num_epochs=5)
    batch, uses = CLASSES.random_batch(size), torch.zeros(size)
    batch.image[:] = torch.arange(1.0, size + 1).view(-1, 1, 1, 1, 1)  # a patch says which one it is
    batch.unlabeled[:] = -1
    forward = trainer.network.forward

    def counting(image):
        for patch in image:
            uses[patch[patch > 0].unique().long() - 1] += 1
        return forward(image)

    trainer.network.forward = counting
    for trainer.step in range(2 * size):
        list(trainer.losses(batch))
    assert (uses == uses[0]).all()
    assert uses[0] > 0


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("complementary", [True, False])
def test_the_mask_ratio_is_the_part_that_is_filled_from_labeled_images(ratio, complementary, tiny_dataset):
    trainer = started(nnUNetTrainerM3HL, tiny_dataset, mask_ratio=ratio, complementary_halves=complementary)
    mask = trainer.draw_masks(3, torch.zeros(6, 1, 32, 32, 32))
    part = mask.float().flatten(1).mean(1)
    b = 1 - ratio if complementary else ratio
    assert part.tolist() == [ratio] * 3 + [b] * 3  # the realised part, per sample
    assert len(torch.unique(mask[3:].flatten(1), dim=0)) == 3


def test_with_every_voxel_labeled_the_gradient_is_that_of_supervised_training(tiny_dataset, monkeypatch):
    trainer = started(nnUNetTrainerM3HL, tiny_dataset, feature_weight=0.0, pseudo_weight=0.0, unmixed=0.0)
    batch = CLASSES.random_batch(2)
    everything = torch.ones(2, 1, 16, 16, 16, dtype=torch.bool)
    monkeypatch.setattr(trainer, "draw_masks", lambda *args: everything)
    (terms,) = trainer.losses(batch)
    sum(terms.values()).backward()
    gradients = [p.grad.clone() for p in trainer.network.parameters() if p.grad is not None]
    trainer.network.zero_grad()
    trainer.loss(trainer.network(batch.image), batch.target).backward()
    expected = [p.grad for p in trainer.network.parameters() if p.grad is not None]
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def test_the_variants_of_m3hl_differ_in_attributes_only():
    weights = {"pseudo_weight": 0.5, "pseudo_dice": True, "rampup": 0.0, "feature_weight": 0.5}
    for variant, expected in {
        nnUNetTrainerM3: {"feature_weight": 0.0, "unmixed": 0.4},
        nnUNetTrainerM3HLPaper: {"unmixed": 0.0, "feature_pairs": "all", **weights},
    }.items():
        assert variant.__bases__ == (nnUNetTrainerM3HL,)
        assert {name: value for name, value in vars(variant).items() if not name.startswith("__")} == expected


def test_an_unknown_pairing_is_refused_at_the_start(tiny_dataset):
    with pytest.raises(ValueError, match="feature_pairs"):
        started(nnUNetTrainerM3HL, tiny_dataset, feature_pairs="al")
