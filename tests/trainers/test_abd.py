"""A step of ABD against a direct implementation of its equations."""

from itertools import product

import pytest
import torch
from equations import CLASSES, EVERY_KIND, assert_terms, started
from tiny_trainers import seed

from nnunet_ssl.blocks.mixing import box_mask
from nnunet_ssl.trainers.nnUNetTrainerABD import displacement, nnUNetTrainerABD

every_kind = pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)


def blocks(shape, cells):
    """Index of every block of a patch whose axes are divided into so many."""
    steps = [size // cells for size in shape]
    return [
        (slice(None), *(slice(i * s, i * s + s) for i, s in zip(at, steps, strict=True)))
        for at in product(range(cells), repeat=len(shape))
    ]


def displaced(labels, views, logits, plain, cells, count):
    """Both images of one sample with their least sure block replaced from the other one, block by block."""
    places = blocks(views[0].shape[1:], cells)
    said = [labels.probabilities(z[None])[0] for z in logits]
    sure = [torch.maximum(p, 1 - p).amin(0, keepdim=True) if labels.regions else p.amax(0, keepdim=True) for p in said]
    sure = [[s[place].mean().item() for place in places] for s in sure]
    means = [[z[place].flatten(1).mean(1) for place in places] for z in logits]
    least = [values.index(min(values)) for values in sure]

    def distance(target, other):
        p, q = labels.probabilities(target[None])[0], labels.probabilities(other[None])[0]
        value = p * (p / q).log()
        return (value + (1 - p) * ((1 - p) / (1 - q)).log()).sum() if labels.regions else value.sum()

    chosen = []
    for own in (0, 1):
        order = sorted(range(len(places)), key=lambda i, own=own: -sure[own][i])[:count]
        replaced = means[1 - own][least[1 - own]]
        chosen.append(order[0] if plain else min(order, key=lambda i, own=own: distance(replaced, means[own][i])))
    results = [view.clone() for view in views]
    for own in (0, 1):
        results[own][places[least[own]]] = views[1 - own][places[chosen[1 - own]]]
    return results


@every_kind
@pytest.mark.parametrize("size", [1, 3])
def test_abd(labels, labels_dataset, size):
    settings = {"pseudo_weight": 0.3, "cross_weight": 0.7, "displaced_weight": 0.9, "candidates": 0.5, "cells": 2}
    trainer = started(nnUNetTrainerABD, labels_dataset, **settings)
    for network in trainer.segmenting_networks().values():
        torch.nn.init.normal_(network.decoder.seg_layers[-1].weight, std=0.7)
    batch = labels.random_batch(size)
    seed(5)
    groups = list(trainer.losses(batch))

    seed(5)
    students, half = (trainer.network, trainer.companions.student_2), (size + 1) // 2
    shift = trainer.step * half % size
    labeled, target, weak, strong = (
        x.roll(-shift, 0) for x in (batch.image, batch.target, batch.unlabeled_weak, batch.unlabeled)
    )
    pseudo = labels.hard(trainer.companions.teacher(weak)).to(target.dtype)
    keep = box_mask(half, (16, 16, 16), side=2 / 3)
    keep, index = torch.cat([keep, ~keep]), [*range(half), *range(size - half, size)]
    views = [torch.where(keep, labeled[index], x[index]) for x in (weak, strong)]
    target = torch.where(keep, target[index], pseudo[index])
    names = ("labeled", "pseudo", "cross", "displaced")
    expected = {f"{name}_{number}": 0 for name in names for number in (1, 2)}
    step = max(1, len(index) // 2)
    coins = []
    for begin in range(0, len(index), step):  # half of the mixes at a time
        part = slice(begin, begin + step)
        share = step / len(index)
        logits = [student(view[part]) for student, view in zip(students, views, strict=True)]
        for number, own in enumerate(logits, start=1):
            expected[f"labeled_{number}"] += share * labels.dice_and_cross_entropy(own, target[part], keep[part])
            known = 0.3 * labels.dice_and_cross_entropy(own, target[part], ~keep[part])
            expected[f"pseudo_{number}"] += share * known
            expected[f"cross_{number}"] += share * 0.7 * -labels.dice(own, labels.hard(logits[2 - number]))
        plain = torch.rand(step, 1) < 0.5
        coins += plain.flatten().tolist()
        for sample in range(step):
            pair = [view[part][sample] for view in views]
            moved = displaced(labels, pair, [z[sample].detach() for z in logits], plain[sample], 2, 4)
            for image in moved:
                own = [student(image[None]) for student in students]
                for number in (1, 2):
                    value = -labels.dice(own[number - 1], labels.hard(own[2 - number]))
                    expected[f"displaced_{number}"] += share / step / 2 * 0.9 * value
    assert size == 1 or set(coins) == {True, False}
    assert_terms(groups, expected)


@pytest.mark.parametrize("regions", [False, True])
@pytest.mark.parametrize("patch", [(32, 32), (19, 23, 31), (1, 40, 40)])
def test_one_block_of_each_image_is_replaced_by_one_of_the_other(patch, regions):
    seed()
    logits = torch.randn(2, 5, 3, *patch)
    order = displacement(*logits, torch.rand(5, 1) < 0.5, 4, 0.25, regions)
    count = order.shape[1] // 2
    for row in order.tolist():
        changed = [place for place, source in enumerate(row) if place != source]
        assert len(changed) == 2
        assert changed[0] < count <= row[changed[0]]
        assert row[changed[1]] < count <= changed[1]


def test_a_sure_block_replaces_the_least_sure_one():
    logits = torch.zeros(2, 1, 2, 8, 32)  # four blocks in a row
    logits[0, :, 1, :, :8] = 3.0  # the least sure of the first image is one of those with 0
    logits[0, :, 0, :, 8:16] = 4.0
    logits[0, :, 0, :, 16:24] = 2.0
    logits[1, :, 1, :, :8] = 5.0
    logits[1, :, 0, :, 8:16] = 4.0
    logits[1, :, 1, :, 16:24] = 1.0
    logits[1, :, 1, :, 24:] = 0.1
    for plain, first, second in ((True, 0, 1), (False, 1, 0)):
        # first image: its block 3 is unsure and has no class; second image: its block 3 leans to class 1
        order = displacement(*logits, torch.tensor([[plain]]), 4, 0.5, False)[0].tolist()
        assert order[:3] == [0, 1, 2]
        assert order[4:7] == [4, 5, 6]
        assert order[3] == 4 + first
        assert order[7] == second


def test_the_second_student_of_abd_is_the_first_one_until_the_first_phase_ends(tiny_dataset):
    trainer = started(nnUNetTrainerABD, tiny_dataset, pretraining=0.5, num_epochs=4, num_iterations_per_epoch=2)
    first, second = (next(n.parameters()).data for n in (trainer.network, trainer.companions.student_2))
    same = []
    for trainer.step in range(8):
        first.add_(1.0)
        trainer.after_step()
        same.append(torch.equal(first, second))
    assert same == [True] * 4 + [False] * 4


def test_the_first_phase_of_abd_is_copy_paste_between_labeled_scans(tiny_dataset):
    trainer = started(nnUNetTrainerABD, tiny_dataset)
    trainer.step = 0
    batch = CLASSES.random_batch(3)
    seed(5)
    groups = list(trainer.losses(batch))
    seed(5)
    keep = box_mask(3, (16, 16, 16), side=2 / 3)
    image, target = (
        torch.stack([torch.where(keep[i], x[i], x[i - 1]) for i in range(3)]) for x in (batch.image, batch.target)
    )
    assert_terms(groups, {"labeled": CLASSES.dice_and_cross_entropy(trainer.network(image), target)})
