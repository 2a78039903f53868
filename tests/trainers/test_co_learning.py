"""Co-learning's step against a direct implementation of the paper's equations."""

import math

import pytest
import torch
import torch.nn.functional as F
from equations import CLASSES, EVERY_KIND, assert_terms, started
from tiny_trainers import make_trainer, seed

from nnunet_ssl.blocks.mixing import box_mask, recorded
from nnunet_ssl.trainers.nnUNetTrainerCoLearning import (
    indmix,
    nnUNetTrainerCoLearning,
    nnUNetTrainerCoLearningPaper,
)


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("with_cross_entropy", [False, True])
@pytest.mark.parametrize("backbones", ["same", "different"])
def test_a_step_is_that_of_the_equations(labels, labels_dataset, size, with_cross_entropy, backbones):
    settings = {"unlabeled_weight": 0.7, "mix_weight": 0.3, "noise": 0.0, "box_side": 0.6}
    settings |= {"cross_entropy": with_cross_entropy, "student_backbones": backbones, "alpha": 0.02, "beta": 0.01}
    settings |= {"patches_per_term": "full"}
    trainer = started(nnUNetTrainerCoLearning, labels_dataset, **settings)
    batch = labels.random_batch(size)
    seed(5)
    groups = list(trainer.losses(batch))

    seed(5)
    companions = trainer.companions
    s1, s2, x_l, y_l, x_u = trainer.network, companions.student_2, batch.image, batch.target, batch.unlabeled
    soft = labels.probabilities(companions.teacher(batch.unlabeled_weak))
    if backbones == "different":
        soft = 2 / 3 * soft + 1 / 3 * labels.probabilities(companions.teacher_2(batch.unlabeled_weak))
    pseudo = labels.hard(soft - 0.5)
    truth, annotated = labels.truth(y_l), labels.annotated(y_l)
    everything = torch.ones_like(annotated)
    hard = [labels.hard(s(x_u)) for s in (s1, s2)]
    assert not torch.equal(*hard)
    assert not torch.equal(hard[0], pseudo)
    expected = {}
    for i, student, other in ((1, s1, hard[1]), (2, s2, hard[0])):
        supervised = -labels.dice(student(x_l), y_l)
        if with_cross_entropy:
            supervised = supervised + labels.cross_entropy(student(x_l), y_l)
        m = box_mask(size, (16, 16, 16), side=0.6)
        # Eq. 11 and 12, with Eq. 13 corrected
        mixed, target, counts = [
            (x_l * m + x_u * ~m, truth * m + soft * ~m, torch.where(m, annotated, everything)),
            (x_u * m + x_l * ~m, soft * m + truth * ~m, torch.where(m, everything, annotated)),
        ][i - 1]
        difference = (labels.probabilities(student(mixed)) - target) ** 2
        expected |= {
            f"supervised_{i}": supervised,
            f"cross_{i}": -0.7 * labels.dice(student(x_u), other),
            f"teacher_{i}": -0.7 * labels.dice(student(x_u), pseudo),
            f"mix_{i}": 0.3 * difference.mean(1)[counts[:, 0]].mean(),
        }
    assert_terms(groups, expected)


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_with_half_batches_one_half_is_learned_unmixed_and_the_other_one_mixed(size, labels, labels_dataset):
    settings = {"noise": 0.0, "unlabeled_weight": 0.7, "mix_weight": 0.3}
    trainer = started(nnUNetTrainerCoLearning, labels_dataset, **settings)
    batch, students = labels.random_batch(size), trainer.trained_networks()
    seed(5)
    groups = list(trainer.losses(batch))

    seed(5)
    half = (size + 1) // 2
    order = [(trainer.step * half + i) % size for i in range(size)]  # the samples take turns
    plain, mixed = order[:half], order[size - half :]
    soft = labels.probabilities(trainer.companions.teacher(batch.unlabeled_weak))
    truth, annotated = labels.truth(batch.target), labels.annotated(batch.target)
    expected = {}
    for number, student, peer in ((1, *students), (2, *students[::-1])):
        keep = box_mask(half, (16, 16, 16), side=0.5)
        keep = ~keep if number == 2 else keep  # 1: the labeled scan
        image = torch.where(keep, batch.image[mixed], batch.unlabeled[mixed])
        difference = labels.probabilities(student(image)) - torch.where(keep, truth[mixed], soft[mixed])
        counts = annotated[mixed] | ~keep
        output = student(batch.unlabeled[plain])
        known = labels.dice_and_cross_entropy(student(batch.image[plain]), batch.target[plain])
        expected |= {
            f"supervised_{number}": known,
            f"cross_{number}": -0.7 * labels.dice(output, labels.hard(peer(batch.unlabeled[plain]))),
            f"teacher_{number}": -0.7 * labels.dice(output, labels.hard(soft[plain] - 0.5)),
            f"mix_{number}": 0.3 * difference.square().mean(1)[counts[:, 0]].mean(),
        }
    assert_terms(groups, expected)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("patch", [(12, 14, 16), (15, 20)])
def test_image_and_target_of_a_mix_take_every_voxel_from_the_same_scan(patch, reverse):
    # the source is encoded in the image and in the target
    labeled, unlabeled = torch.full((3, 2, *patch), 1.0), torch.full((3, 2, *patch), -1.0)
    mask = box_mask(3, patch, side=0.5)
    image, target = indmix(labeled, 10 * labeled, unlabeled, 10 * unlabeled, mask, reverse=reverse)
    assert torch.equal(target, 10 * image)
    from_labeled = (image == 1).all(1, keepdim=True)
    assert torch.equal(from_labeled, mask ^ reverse)  # the box is of the unlabeled scan, in the reverse of the labeled
    assert from_labeled.any()
    assert not from_labeled.all()


@pytest.mark.parametrize("shared", [False, True])
def test_both_mixes_share_a_box_as_in_the_paper_or_have_their_own(shared, tiny_dataset):
    trainer = started(nnUNetTrainerCoLearning, tiny_dataset, shared_mask=shared)
    with recorded() as mixes:
        list(trainer.losses(CLASSES.random_batch(4)))
    first, second = (mixes[i].mask for i in (0, 2))  # image and target of each student
    assert torch.equal(first, second) == shared


def test_the_papers_settings_are_attributes():
    own = {name: value for name, value in vars(nnUNetTrainerCoLearningPaper).items() if not name.startswith("__")}
    loss = {"rampup": 0.0, "cross_entropy": False, "noise": 0.0, "shared_mask": True}
    assert own == {"supervised_part": 0.0, "patches_per_term": "full", **loss}
    assert nnUNetTrainerCoLearningPaper.__bases__ == (nnUNetTrainerCoLearning,)


@pytest.mark.parametrize(("patches", "size", "parts"), [("full", 4, 2), ("half", 4, 1), ("half", 3, 2)])
def test_every_input_of_each_student_has_its_own_noise(patches, size, parts, tiny_dataset):
    trainer = started(nnUNetTrainerCoLearning, tiny_dataset, noise=0.1, patches_per_term=patches)
    batch = CLASSES.random_batch(size)
    seen = {1: [], 2: []}
    for number, network in ((1, trainer.network), (2, trainer.companions.student_2)):
        network.register_forward_pre_hook(lambda module, inputs, number=number: seen[number].append(inputs[0].clone()))
    list(trainer.losses(batch))
    first, second = seen[1], seen[2]
    assert len(first) == len(second) == 2 + parts  # labeled, unlabeled: not more than a batch at a time, mix
    of_a_term = size if patches == "full" else 2
    batch = batch.rolled(trainer.step * of_a_term)
    cleans = (batch.image[:of_a_term], *batch.unlabeled[:of_a_term].chunk(parts))
    for a, b, clean in zip(first[:-1], second[:-1], cleans, strict=True):
        for noisy in (a, b):
            assert 0 < (noisy - clean).abs().max() <= 0.2 + 1e-5
        assert not torch.equal(a, b)


def test_each_student_learns_from_its_own_terms_only(tiny_dataset):
    trainer = started(nnUNetTrainerCoLearning, tiny_dataset)
    students = trainer.trained_networks()
    for group in trainer.losses(CLASSES.random_batch(2)):
        for name, value in group.items():
            for network in students:
                network.zero_grad()
            value.backward(retain_graph=True)
            trained = [any(p.grad is not None and p.grad.abs().sum() > 0 for p in s.parameters()) for s in students]
            assert trained == [name.endswith("_1"), name.endswith("_2")]


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_the_networks_start_equal_and_the_students_part(tiny_dataset):
    seed()
    trainer = make_trainer(nnUNetTrainerCoLearning, tiny_dataset)
    trainer.on_train_start()
    first, second, teacher = trainer.network, trainer.companions.student_2, trainer.companions.teacher
    assert torch.equal(weights(first), weights(second))
    assert torch.equal(weights(first), weights(teacher))
    trainer.network.train()
    trainer.train_step(next(trainer.dataloader_train))
    assert not torch.equal(weights(first), weights(second))


@pytest.mark.parametrize(("alpha", "beta"), [(0.02, 0.01), (0.0, 0.05)])
def test_the_teacher_is_the_weighted_moving_average_of_both_students(tiny_dataset, alpha, beta):
    seed()
    trainer = make_trainer(nnUNetTrainerCoLearning, tiny_dataset, alpha=alpha, beta=beta)
    trainer.on_train_start()
    trainer.network.train()
    teacher, students = trainer.companions.teacher, trainer.trained_networks()
    for step in (0, 1, 2, 1000):
        trainer.step = step
        old = weights(teacher)
        trainer.train_step(next(trainer.dataloader_train))
        decay = min(1 - 1 / (step + 1), 1 - alpha - beta)  # warm start: at step 0 the weighted mean of the students
        part = [(1 - decay) * w / (alpha + beta) for w in (alpha, beta)]
        expected = decay * old + part[0] * weights(students[0]) + part[1] * weights(students[1])
        torch.testing.assert_close(weights(teacher), expected, rtol=1e-5, atol=1e-6)


def test_different_backbones_have_a_teacher_each(tiny_dataset):
    seed()
    trainer = make_trainer(nnUNetTrainerCoLearning, tiny_dataset, student_backbones="different", alpha=0.02, beta=0.01)
    trainer.run_training()
    companions = trainer.companions
    assert not any(isinstance(m, torch.nn.ConvTranspose3d) for m in companions.student_2.modules())
    trainer.step = 1000
    students, teachers = trainer.trained_networks(), (companions.teacher, companions.teacher_2)
    old = [weights(t) for t in teachers]
    trainer.train_step(next(trainer.dataloader_train))
    for teacher, student, before in zip(teachers, students, old, strict=True):
        torch.testing.assert_close(weights(teacher), 0.97 * before + 0.03 * weights(student), rtol=1e-5, atol=1e-6)
    # what is saved fits the stock network
    state = torch.load(f"{trainer.output_folder}/checkpoint_final.pth", weights_only=False)
    assert state["network_weights"].keys() == trainer.network.state_dict().keys()


@pytest.mark.parametrize("rampup", [0.0, 0.5])
def test_the_weights_of_unlabeled_terms_are_ramped_up_where_asked_to(tiny_dataset, rampup):
    settings = {"rampup": rampup, "num_epochs": 10, "num_iterations_per_epoch": 10, "noise": 0.0}
    trainer = started(nnUNetTrainerCoLearning, tiny_dataset, patches_per_term="full", **settings)
    batch = CLASSES.random_batch(2)
    terms = {}
    for step in (25, 100):
        trainer.step = step
        seed(5)
        terms[step] = {}
        for group in trainer.losses(batch):
            terms[step] |= {name: terms[step].get(name, 0) + value.item() for name, value in group.items()}
    for name, full in terms[100].items():
        part = math.exp(-5 / 4) if rampup and not name.startswith("supervised") else 1
        assert terms[25][name] == pytest.approx(part * full, rel=1e-4)


def test_the_supervised_dice_has_deep_supervision(tiny_dataset):
    settings = {"noise": 0.0, "cross_entropy": False, "patches_per_term": "full"}
    trainer = started(nnUNetTrainerCoLearning, tiny_dataset, enable_deep_supervision=True, **settings)
    batch = trainer._to_device(next(trainer.dataloader_train))
    terms = {name: value for group in trainer.losses(batch) for name, value in group.items()}
    output = trainer.network(batch.image)
    scales = zip(trainer.loss.weight_factors, output, batch.target, strict=True)
    expected = sum(w * -batch_dice(o, t) for w, o, t in scales if w)
    torch.testing.assert_close(terms["supervised_1"], expected)


def batch_dice(logits, target):
    """nnU-Net's Dice as the plans ask for it in 3d_fullres: per sample."""
    p, t = logits.softmax(1)[:, 1], target[:, 0].float()
    axes = (1, 2, 3)
    return ((2 * (p * t).sum(axes) + 1e-5) / (p.sum(axes) + t.sum(axes) + 1e-5)).mean()


def test_unknown_backbones_are_refused_at_the_start(tiny_dataset):
    with pytest.raises(ValueError, match="student_backbones"):
        started(nnUNetTrainerCoLearning, tiny_dataset, student_backbones="other")


def test_the_target_of_a_labeled_voxel_is_its_label(tiny_dataset):
    labels = torch.randint(0, 3, (2, 1, 6, 6, 6))
    soft = torch.rand(2, 3, 6, 6, 6).softmax(1)
    image = torch.randn(2, 1, 6, 6, 6)
    mask = torch.ones(2, 1, 6, 6, 6, dtype=torch.bool)
    truth = F.one_hot(labels[:, 0]).movedim(-1, 1).float()
    _, target = indmix(image, truth, image, soft, mask, reverse=False)
    assert torch.equal(target.argmax(1, keepdim=True), labels)
