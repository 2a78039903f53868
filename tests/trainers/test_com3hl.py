"""Co-M3HL's step against its equations written out, and what each student sees."""

import pytest
import torch
from equations import CLASSES, EVERY_KIND, assert_terms, started
from test_m3hl import whole_cells
from tiny_trainers import make_trainer, seed

from nnunet_ssl.blocks.mixing import block_mask
from nnunet_ssl.trainers.nnUNetTrainerCoM3HL import nnUNetTrainerCoM3HL

PLAIN = {"noise": 0.0, "pseudo_weight": 0.3, "peer_weight": 0.2, "mask_cells": 2, "num_epochs": 4}


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("masks", ["same", "complementary"])
def test_a_step_on_mixes_is_that_of_the_equations(labels, labels_dataset, size, masks):
    trainer = started(nnUNetTrainerCoM3HL, labels_dataset, **PLAIN, masks=masks, unmixed=0.0)
    batch = labels.random_batch(size)
    seed(5)
    groups = list(trainer.losses(batch))

    seed(5)
    half = (size + 1) // 2
    drawn = block_mask(half, (16, 16, 16), cells=2)
    companions, students = trainer.companions, (trainer.network, trainer.companions.student_2)
    pseudo = labels.hard(companions.teacher(batch.unlabeled_weak))
    order = [(trainer.step * half + i) % size for i in range(size)]  # the samples take turns
    expected = {}
    for rows, own in ((order[:half], drawn), (order[size - half :], ~drawn)):
        for number, student, other in ((1, *students), (2, *students[::-1])):
            keep = ~own if (masks, number) == ("complementary", 2) else own
            image = torch.where(keep, batch.image[rows], batch.unlabeled[rows])
            target = torch.where(keep, batch.target[rows], pseudo[rows])
            terms = {
                "labeled": labels.dice_and_cross_entropy(student(image), target, keep),
                "pseudo": 0.3 * labels.dice_and_cross_entropy(student(image), target, ~keep),
            }
            if masks == "same":
                peer = labels.hard(other(image))
                terms["peer"] = 0.2 * labels.dice_and_cross_entropy(student(image), peer, ~keep)
            for name, value in terms.items():
                expected[f"{name}_{number}"] = expected.get(f"{name}_{number}", 0) + value / 2
    assert_terms(groups, expected)


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_last_part_of_the_training_is_on_whole_patches(labels, labels_dataset, size):
    trainer = started(nnUNetTrainerCoM3HL, labels_dataset, **PLAIN, unmixed=0.25)
    batch = labels.random_batch(size)
    half = (size + 1) // 2
    order = [(trainer.step * half + i) % size for i in range(size)]
    own, other = order[:half], order[size - half :]
    students = (trainer.network, trainer.companions.student_2)
    pseudo = labels.hard(trainer.companions.teacher(batch.unlabeled_weak[other]))
    expected = {}
    for number, student, peer in ((1, *students), (2, *students[::-1])):
        known, output = student(batch.image[own]), student(batch.unlabeled[other])
        peers = labels.hard(peer(batch.unlabeled[other]))
        expected |= {
            f"labeled_{number}": labels.dice_and_cross_entropy(known, batch.target[own]),
            f"pseudo_{number}": 0.3 * labels.dice_and_cross_entropy(output, pseudo),
            f"peer_{number}": 0.2 * labels.dice_and_cross_entropy(output, peers),
        }
    seen = []
    trainer.companions.teacher.register_forward_pre_hook(lambda _, images: seen.append(len(images[0])))
    assert_terms(list(trainer.losses(batch)), expected)
    assert seen == [half]  # the teacher labels what a loss uses


def test_the_feature_terms_compare_a_mix_with_the_teacher_where_both_show_the_unlabeled_patch(tiny_dataset):
    trainer = started(nnUNetTrainerCoM3HL, tiny_dataset, **PLAIN, feature_weight=0.8, unmixed=0.0)
    batch = CLASSES.random_batch(2)
    seed(5)
    groups = list(trainer.losses(batch))

    seed(5)
    [drawn] = block_mask(1, (16, 16, 16), cells=2)
    taught = trainer.companions.teacher.encoder(batch.unlabeled_weak)
    expected = dict.fromkeys(("low_1", "high_1", "low_2", "high_2"), 0)
    order = [(trainer.step + i) % 2 for i in (0, 1)]
    for sample, keep in zip(order, (drawn, ~drawn), strict=True):
        image = torch.where(keep, batch.image[sample], batch.unlabeled[sample])[None]
        for number, student in ((1, trainer.network), (2, trainer.companions.student_2)):
            own = student.encoder(image)
            cells = [whole_cells(~keep[0], own[level].shape[2:]) for level in (1, -1)]
            low = (own[1][0] - taught[1][sample])[:, cells[0]].abs().mean()
            x, y = (features[:, cells[1]].flatten() for features in (own[-1][0], taught[-1][sample]))
            # 0.8 / 2, as in M3HL, and half of the batch each
            expected[f"low_{number}"] += 0.4 * low / 2
            expected[f"high_{number}"] += 0.4 * (1 - x @ y / x.norm() / y.norm()) / 2
    assert_terms([{name: value for name, value in group.items() if name in expected} for group in groups], expected)


def test_complementary_masks_show_the_students_together_every_voxel_of_both_scans(tiny_dataset):
    trainer = started(nnUNetTrainerCoM3HL, tiny_dataset, noise=0.0, masks="complementary", unmixed=0.0)
    batch, seen = CLASSES.random_batch(2), {1: [], 2: []}
    for number, network in ((1, trainer.network), (2, trainer.companions.student_2)):
        network.register_forward_pre_hook(lambda module, inputs, number=number: seen[number].append(inputs[0].clone()))
    list(trainer.losses(batch))
    for first, second in zip(seen[1], seen[2], strict=True):
        sample = next(i for i in (0, 1) if (first[0] == batch.image[i]).any())
        labeled = first[0] == batch.image[sample]
        assert torch.equal(labeled, second[0] == batch.unlabeled[sample])
        assert labeled.any()
        assert not labeled.all()


def test_the_students_have_noise_of_their_own_and_part(tiny_dataset):
    seed()
    trainer = make_trainer(nnUNetTrainerCoM3HL, tiny_dataset)
    trainer.on_train_start()
    first, second = (torch.cat([p.detach().flatten() for p in s.parameters()]) for s in trainer.trained_networks())
    assert torch.equal(first, second)
    trainer.train_step(next(trainer.dataloader_train))
    first, second = (torch.cat([p.detach().flatten() for p in s.parameters()]) for s in trainer.trained_networks())
    assert not torch.equal(first, second)


def test_an_unknown_kind_of_masks_is_refused(tiny_dataset):
    with pytest.raises(ValueError, match='masks is "same" or "complementary", not \'other\''):
        make_trainer(nnUNetTrainerCoM3HL, tiny_dataset, masks="other").initialize()
