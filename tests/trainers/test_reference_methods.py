"""Steps of Mean Teacher, UA-MT, CPS, BCP, FixMatch and CutMix against direct implementations of their equations."""

import math

import pytest
import torch
from equations import CLASSES, EVERY_KIND, assert_terms, started
from tiny_trainers import make_trainer, seed

from nnunet_ssl.blocks.mixing import box_mask
from nnunet_ssl.trainers.nnUNetTrainerBCP import nnUNetTrainerBCP
from nnunet_ssl.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunet_ssl.trainers.nnUNetTrainerCutMixMT import nnUNetTrainerCutMixMT
from nnunet_ssl.trainers.nnUNetTrainerFixMatch import nnUNetTrainerFixMatch
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL
from nnunet_ssl.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunet_ssl.trainers.nnUNetTrainerUAMT import nnUNetTrainerUAMT

RAMPED = [nnUNetTrainerMeanTeacher, nnUNetTrainerUAMT, nnUNetTrainerCPS, nnUNetTrainerCutMixMT]


def clipped_noise(x, deviation):
    return (torch.randn_like(x) * deviation).clamp(-2 * deviation, 2 * deviation)


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
@pytest.mark.parametrize("size", [1, 3])
def test_mean_teacher(labels, labels_dataset, size):
    trainer = started(nnUNetTrainerMeanTeacher, labels_dataset, consistency_weight=0.7, noise=0.3)
    batch = labels.random_batch(size)
    seed(5)
    groups = list(trainer.losses(batch))

    seed(5)
    student, teacher = trainer.network, trainer.companions.teacher
    target = labels.probabilities(teacher(batch.unlabeled_weak + clipped_noise(batch.unlabeled_weak, 0.3)))
    prediction = labels.probabilities(student(batch.unlabeled))
    expected = {
        "supervised": labels.dice_and_cross_entropy(student(batch.image), batch.target),
        "consistency": 0.7 * ((prediction - target) ** 2).mean(),
    }
    assert_terms(groups, expected)


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
@pytest.mark.parametrize("size", [1, 2])
def test_uamt(labels, labels_dataset, size):
    settings = {"consistency_weight": 0.7, "noise": 0.3, "passes": 3, "initial_threshold": 0.6, "dropout": 0.4}
    trainer = started(nnUNetTrainerUAMT, labels_dataset, **settings)
    trainer.step = trainer.max_steps // 2
    trainer.rampup = 0.0
    for network in (trainer.network, trainer.companions.teacher):
        torch.nn.init.normal_(network.decoder.seg_layers[-1].weight)  # neither sure everywhere nor nowhere
    batch = labels.random_batch(size)
    seed(5)
    groups = list(trainer.losses(batch))

    seed(5)
    student, teacher, weak = trainer.network, trainer.companions.teacher, batch.unlabeled_weak
    target = labels.probabilities(teacher(weak + clipped_noise(weak, 0.3)))
    mean = 0
    for _ in range(3):
        skips = teacher.encoder(weak + clipped_noise(weak, 0.3))
        kept = torch.empty_like(skips[-1]).bernoulli_(0.6)
        mean = mean + labels.probabilities(teacher.decoder([*skips[:-1], skips[-1] * kept / 0.6])) / 3
    if labels.regions:
        uncertainty = -(mean * mean.log() + (1 - mean) * (1 - mean).log()).mean(1) / math.log(2)
    else:
        uncertainty = -(mean * mean.log()).sum(1) / math.log(labels.channels)
    sure = uncertainty < 0.6 + 0.4 * math.exp(-5 * 0.25)
    assert 0.02 < sure.float().mean() < 0.98  # both kinds are there
    difference = (labels.probabilities(student(batch.unlabeled)) - target) ** 2
    expected = {
        "supervised": labels.dice_and_cross_entropy(student(batch.image), batch.target),
        "consistency": 0.7 * (difference.sum(1) * sure).sum() / (labels.channels * sure.sum()),
    }
    assert_terms(groups, expected)


def test_dropout_makes_the_passes_of_uamt_differ(tiny_dataset):
    trainer = started(nnUNetTrainerUAMT, tiny_dataset, noise=0.0)
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert not torch.equal(trainer.stochastic_pass(image), trainer.stochastic_pass(image))
        trainer.dropout = 0.0
        assert torch.equal(trainer.stochastic_pass(image), trainer.stochastic_pass(image))


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
@pytest.mark.parametrize("size", [1, 3])
def test_cps(labels, labels_dataset, size):
    trainer = started(nnUNetTrainerCPS, labels_dataset, cross_weight=0.7)
    batch = labels.random_batch(size)
    groups = list(trainer.losses(batch))
    first, second = trainer.network, trainer.companions.student_2
    hard = [labels.hard(network(batch.unlabeled)) for network in (first, second)]
    assert not torch.equal(*hard)
    expected = {
        "supervised": labels.dice_and_cross_entropy(first(batch.image), batch.target),
        "cross": 0.7 * labels.cross_entropy(first(batch.unlabeled), hard[1]),
        "supervised_2": labels.dice_and_cross_entropy(second(batch.image), batch.target),
        "cross_2": 0.7 * labels.cross_entropy(second(batch.unlabeled), hard[0]),
    }
    assert_terms(groups, expected)


@pytest.mark.parametrize(("size", "parts"), [(1, [1]), (2, [1, 1]), (3, [1, 1, 1]), (4, [2, 2]), (7, [2, 2, 3])])
def test_both_graphs_of_a_part_are_no_larger_than_one_of_the_batch(tiny_dataset, size, parts):
    trainer, seen = started(nnUNetTrainerCPS, tiny_dataset), []
    trainer.companions.student_2.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    for _ in trainer.losses(CLASSES.random_batch(size)):
        pass
    assert seen == [size, *parts]


def test_a_batch_whose_samples_depend_on_each_other_is_one_part(tiny_dataset):
    trainer = started(nnUNetTrainerCPS, tiny_dataset)
    assert trainer.half_batches(4) == [slice(0, 2), slice(2, 4)]
    trainer.is_ddp = True
    assert len(trainer.half_batches(4)) == 2
    trainer.configuration_manager.configuration["batch_dice"] = True  # nnU-Net's Dice waits for the other ranks
    assert trainer.half_batches(4) == [slice(0, 4)]
    trainer.is_ddp = False
    assert len(trainer.half_batches(4)) == 2
    trainer.network = torch.nn.Sequential(torch.nn.BatchNorm3d(1))
    assert trainer.half_batches(4) == [slice(0, 4)]


def test_each_student_of_cps_learns_from_its_own_terms_only(tiny_dataset):
    trainer = started(nnUNetTrainerCPS, tiny_dataset)
    networks = (trainer.network, trainer.companions.student_2)
    for group in trainer.losses(CLASSES.random_batch(2)):
        for name, value in group.items():
            for network in networks:
                network.zero_grad()
            value.backward(retain_graph=True)
            trained = [any(p.grad is not None and p.grad.abs().sum() > 0 for p in n.parameters()) for n in networks]
            assert trained == [not name.endswith("_2"), name.endswith("_2")]


def test_the_students_of_cps_start_from_independent_weights(tiny_dataset):
    seed()
    made = make_trainer(nnUNetTrainerCPS, tiny_dataset)
    made.initialize()
    first, second = (torch.cat([c.weight.detach().flatten() for c in convolutions(n)]) for n in made.trained_networks())
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.05
    assert second.std() == pytest.approx(first.std().item(), rel=0.05)  # as nnU-Net draws them


def convolutions(network):
    return [m for m in network.modules() if isinstance(m, torch.nn.Conv3d)]


@pytest.mark.parametrize("trainer", RAMPED)
def test_the_unlabeled_weight_follows_the_ramp_and_the_supervised_one_does_not(tiny_dataset, trainer):
    made = started(trainer, tiny_dataset, rampup=0.5, num_epochs=10, num_iterations_per_epoch=10, noise=0.0)
    if trainer is nnUNetTrainerUAMT:
        made.initial_threshold = 1.0  # every voxel counts at every step
    batch = CLASSES.random_batch(2)
    terms = {}
    for step in (0, 25, 50, 100):
        made.step = step
        seed(5)
        terms[step] = {name: value.item() for group in made.losses(batch) for name, value in group.items()}
    for name, full in terms[100].items():
        ramped = not name.startswith("supervised")
        for step, part in ((0, math.exp(-5)), (25, math.exp(-5 / 4)), (50, 1)):
            assert terms[step][name] == pytest.approx(full * (part if ramped else 1), rel=1e-4)


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
@pytest.mark.parametrize(("size", "step"), [(1, 0), (2, 0), (2, 1), (3, 1), (4, 0)])
def test_bcp_mixes_labeled_and_unlabeled_scans(labels, labels_dataset, size, step):
    trainer = started(nnUNetTrainerBCP, labels_dataset, pseudo_weight=0.3, box_side=0.6)
    trainer.step += step
    batch = labels.random_batch(size)
    seed(5)
    groups = list(trainer.losses(batch))

    seed(5)
    half = (size + 1) // 2
    mask = box_mask(half, (16, 16, 16), side=0.6)
    student, teacher = trainer.network, trainer.companions.teacher
    pseudo = labels.hard(teacher(batch.unlabeled_weak))
    order = [(trainer.step * half + i) % size for i in range(size)]  # the samples take turns
    samples = [(order[i], mask[i]) for i in range(half)] + [(order[size - half + i], ~mask[i]) for i in range(half)]
    image = torch.stack([batch.image[i] * m + batch.unlabeled[i] * ~m for i, m in samples])
    target = torch.stack([torch.where(m, batch.target[i], pseudo[i]) for i, m in samples])
    keep = torch.stack([m for _, m in samples])
    logits = student(image)
    expected = {
        "labeled": labels.dice_and_cross_entropy(logits, target, keep),
        "pseudo": 0.3 * labels.dice_and_cross_entropy(logits, target, ~keep),
    }
    assert_terms(groups, expected)


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_bcp_begins_with_copy_paste_between_labeled_scans(labels, labels_dataset, size):
    trainer = started(nnUNetTrainerBCP, labels_dataset, pretraining=0.5, num_epochs=2, num_iterations_per_epoch=4)
    batch = labels.random_batch(size)
    batch.unlabeled.requires_grad_()
    for step, pretraining in ((0, True), (3, True), (4, False), (7, False)):
        trainer.step = step
        seed(5)
        (terms,) = trainer.losses(batch)
        gradient = torch.autograd.grad(sum(terms.values()), batch.unlabeled, allow_unused=True)[0]
        if not pretraining:
            assert gradient.abs().sum() > 0
            continue
        assert gradient is None
        seed(5)
        mask = box_mask(size, (16, 16, 16), side=2 / 3)
        own = [(step * ((size + 1) // 2) + i) % size for i in range(size)]  # the samples take turns
        others = [own[i - size // 2] for i in range(size)]
        image = batch.image[own] * mask + batch.image[others] * ~mask
        target = torch.where(mask, batch.target[own], batch.target[others])
        assert_terms([terms], {"labeled": labels.dice_and_cross_entropy(trainer.network(image), target)})


@pytest.mark.parametrize("trainer", [nnUNetTrainerBCP, nnUNetTrainerM3HL])
def test_the_student_learns_from_cleaned_pseudo_labels_where_asked_to(tiny_dataset, monkeypatch, trainer):
    made = started(trainer, tiny_dataset, largest_component=True)
    batch = CLASSES.random_batch(2)

    def pseudo_loss(clean):
        monkeypatch.setitem(trainer.losses.__globals__, "keep_largest_component", clean)
        seed(5)
        (terms,) = made.losses(batch)
        return terms["pseudo"].item()

    as_they_are, all_background = pseudo_loss(lambda labels: labels), pseudo_loss(torch.zeros_like)
    made.largest_component = False
    assert pseudo_loss(torch.zeros_like) == as_they_are != all_background


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
@pytest.mark.parametrize("size", [1, 3])
def test_fixmatch(labels, labels_dataset, size):
    trainer = started(nnUNetTrainerFixMatch, labels_dataset, unlabeled_weight=0.7)
    batch = labels.random_batch(size)
    seed(5)
    groups = list(trainer.losses(batch))

    seed(5)
    student = trainer.network
    keep = box_mask(size, (16, 16, 16), side=0.5)
    pseudo = labels.hard(student(batch.unlabeled_weak))
    images, targets = [], []
    for i in range(size):
        images.append(torch.where(keep[i], batch.unlabeled[i], batch.unlabeled[i - 1]))
        targets.append(torch.where(keep[i], pseudo[i], pseudo[i - 1]))
    expected = {
        "supervised": labels.dice_and_cross_entropy(student(batch.image), batch.target),
        "pseudo": 0.7 * labels.dice_and_cross_entropy(student(torch.stack(images)), torch.stack(targets)),
    }
    assert_terms(groups, expected)


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
@pytest.mark.parametrize("size", [1, 3])
def test_cutmix(labels, labels_dataset, size):
    trainer = started(nnUNetTrainerCutMixMT, labels_dataset, consistency_weight=0.7)
    batch = labels.random_batch(size)
    seed(5)
    groups = list(trainer.losses(batch))

    seed(5)
    student, teacher = trainer.network, trainer.companions.teacher
    keep = box_mask(size, (16, 16, 16), side=0.5 ** (1 / 3))
    assert keep[0].float().mean() == pytest.approx(0.5, abs=0.05)
    said = labels.probabilities(teacher(batch.unlabeled_weak))
    images, targets = [], []
    for i in range(size):
        images.append(torch.where(keep[i], batch.unlabeled[i], batch.unlabeled[i - 1]))
        targets.append(torch.where(keep[i], said[i], said[i - 1]))
    difference = labels.probabilities(student(torch.stack(images))) - torch.stack(targets)
    expected = {
        "supervised": labels.dice_and_cross_entropy(student(batch.image), batch.target),
        "consistency": 0.7 * (difference**2).mean(),
    }
    assert_terms(groups, expected)
