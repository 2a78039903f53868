"""M3HL's step against a direct implementation of the paper's equations, sample by sample."""

import itertools

import pytest
import torch
from equations import CLASSES, EVERY_KIND, assert_terms, started
from training import seed

from nnunet_ssl.mixing import block_mask
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3, nnUNetTrainerM3HL


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("pairs", ["all", "matched"])
def test_a_step_is_that_of_the_equations(labels, labels_dataset, size, pairs):
    trainer = started(
        nnUNetTrainerM3HL,
        labels_dataset,
        feature_pairs=pairs,
        pseudo_weight=0.3,
        feature_weight=0.7,
        mask_cells=2,
        unmixed=0.0,
    )
    batch = labels.random_batch(size)
    seed(5)
    groups = list(trainer.losses(batch))

    seed(5)
    half = (size + 1) // 2
    masks = block_mask(half, (16, 16, 16), cells=2, ratio=0.5)
    teacher, student = trainer.companions.teacher, trainer.network
    pseudo = labels.hard(teacher(batch.unlabeled_weak))
    # (labeled sample, unlabeled sample, mask) of half a and of half b; 1 keeps the labeled voxel
    a = [(i, i, masks[i]) for i in range(half)]
    b = [(size - half + i, size - half + i, ~masks[i]) for i in range(half)]
    images, targets, keep = [], [], []
    for labeled, unlabeled, mask in a + b:
        images.append(batch.image[labeled] * mask + batch.unlabeled[unlabeled] * ~mask)
        targets.append(torch.where(mask, batch.target[labeled], pseudo[unlabeled]))
        keep.append(mask)
    image, target, keep = torch.stack(images), torch.stack(targets), torch.stack(keep)
    logits = student(image)
    expected = {
        "labeled": labels.dice_and_cross_entropy(logits, target, keep),
        "pseudo": 0.3 * labels.dice_and_cross_entropy(logits, target, ~keep),
    }
    skips, teacher_skips = student.encoder(image), teacher.encoder(batch.unlabeled_weak)
    combinations = list(itertools.product("ab", "ab")) if pairs == "all" else [("a", "a"), ("b", "b")]
    low = high = 0
    for s, t in combinations:
        for i in range(half):
            mixed = i if s == "a" else half + i
            plain = (a if t == "a" else b)[i][1]
            low = low + (skips[1][mixed] - teacher_skips[1][plain]).abs().mean() / half
            x, y = skips[-1][mixed].flatten(), teacher_skips[-1][plain].flatten()
            high = high + (1 - x @ y / x.norm() / y.norm()) / half
    # the paper sums cross entropy and Dice over the halves, the terms above are their means: half the weight
    expected["low"] = 0.7 / 2 * low / len(combinations)
    expected["high"] = 0.7 / 2 * high / len(combinations)
    assert_terms(groups, expected)


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_last_part_of_the_training_is_on_whole_patches(labels, labels_dataset, size):
    trainer = started(nnUNetTrainerM3HL, labels_dataset, pseudo_weight=0.3, unmixed=0.25, num_epochs=4)
    batch = labels.random_batch(size)
    half = (size + 1) // 2
    teacher, student = trainer.companions.teacher, trainer.network
    for step, mixed in ((0, True), (5, True), (6, False), (7, False)):  # of 8
        trainer.step = step
        (terms,) = trainer.losses(batch)
        assert (terms["low"] > 0) == (terms["high"] > 0) == mixed
        if not mixed:
            image = torch.cat([batch.image[:half], batch.unlabeled[size - half :]])
            pseudo = labels.hard(teacher(batch.unlabeled_weak[size - half :]))
            logits = student(image)
            expected = {
                "labeled": labels.dice_and_cross_entropy(logits[:half], batch.target[:half]),
                "pseudo": 0.3 * labels.dice_and_cross_entropy(logits[half:], pseudo),
            }
            assert_terms([terms], {**expected, "low": 0.0, "high": 0.0})


def test_with_every_voxel_labeled_the_gradient_is_that_of_supervised_training(tiny_dataset, monkeypatch):
    trainer = started(nnUNetTrainerM3HL, tiny_dataset, feature_weight=0.0, pseudo_weight=0.0, unmixed=0.0)
    batch = CLASSES.random_batch(2)
    everything = torch.ones(2, 1, 16, 16, 16, dtype=torch.bool)
    nothing_mixed = batch.image, batch.labels, everything
    monkeypatch.setitem(type(trainer).mixed.__globals__, "mix_halves", lambda *args: nothing_mixed)
    (terms,) = trainer.losses(batch)
    sum(terms.values()).backward()
    gradients = [p.grad.clone() for p in trainer.network.parameters() if p.grad is not None]
    trainer.network.zero_grad()
    trainer.loss(trainer.network(batch.image), batch.target).backward()
    expected = [p.grad for p in trainer.network.parameters() if p.grad is not None]
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


def test_m3_differs_from_m3hl_in_attributes_only():
    own = {name: value for name, value in vars(nnUNetTrainerM3).items() if not name.startswith("__")}
    assert own == {"feature_weight": 0.0, "unmixed": 0.4}
    assert nnUNetTrainerM3.__bases__ == (nnUNetTrainerM3HL,)


def test_an_unknown_pairing_is_refused_at_the_start(tiny_dataset):
    with pytest.raises(ValueError, match="feature_pairs"):
        started(nnUNetTrainerM3HL, tiny_dataset, feature_pairs="al")
