"""Steps of MC-Net, URPC, OMF, AD-MT and PSC against direct implementations of their equations."""

import math

import pytest
import torch
import torch.nn.functional as F
from equations import CLASSES, EVERY_KIND, assert_terms, started
from tiny_trainers import make_trainer, seed

from nnunet_ssl.blocks.mixing import box_mask, random_order
from nnunet_ssl.blocks.schedules import turn
from nnunet_ssl.trainers.nnUNetTrainerADMT import nnUNetTrainerADMT
from nnunet_ssl.trainers.nnUNetTrainerMCNet import nnUNetTrainerMCNet
from nnunet_ssl.trainers.nnUNetTrainerOMF import nnUNetTrainerOMF
from nnunet_ssl.trainers.nnUNetTrainerPSC import nnUNetTrainerPSC
from nnunet_ssl.trainers.nnUNetTrainerURPC import nnUNetTrainerURPC

every_kind = pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)


@every_kind
@pytest.mark.parametrize(("size", "decoders"), [(1, 2), (3, 3)])
def test_mcnet(labels, labels_dataset, size, decoders):
    trainer = started(nnUNetTrainerMCNet, labels_dataset, consistency_weight=0.7, decoders=decoders, temperature=0.2)
    batch = labels.random_batch(size)
    groups = list(trainer.losses(batch))

    others = [trainer.companions.decoder_2, *([trainer.companions.decoder_3] if decoders == 3 else [])]
    network = trainer.network
    logits = [[d(network.encoder(x)) for d in (network.decoder, *others)] for x in (batch.image, batch.unlabeled)]
    found = [labels.probabilities(torch.cat(both)) for both in zip(*logits, strict=True)]
    sharp = [p**5 / (p**5 + (1 - p) ** 5) for p in found]
    pairs = [(found[i], sharp[j]) for i in range(decoders) for j in range(decoders) if i != j]
    expected = {"consistency": 0.7 * sum(((p - s) ** 2).mean() for p, s in pairs)}
    for number, output in enumerate(logits[0], start=1):
        # of halves of the batch; that of 3 is of 1, 1 and 1
        samples = [labels.dice_and_cross_entropy(output[i : i + 1], batch.target[i : i + 1]) for i in range(size)]
        expected[f"labeled_{number}"] = sum(samples) / size / decoders
    assert_terms(groups, expected)


def test_a_decoder_of_mcnet_learns_from_the_others_and_does_not_teach_itself(tiny_dataset):
    trainer = started(nnUNetTrainerMCNet, tiny_dataset)
    batch = CLASSES.random_batch(2)
    first, second = trainer.outputs(batch.unlabeled)
    # where the second decoder's weights move the loss, it is by its own prediction alone
    frozen = second.detach()
    value = trainer.mutual([first, frozen], 1.0)
    gradients = torch.autograd.grad(value, [first], retain_graph=True)
    p, sharp = first.softmax(1), (frozen.softmax(1) ** 10) / (frozen.softmax(1) ** 10 + (1 - frozen.softmax(1)) ** 10)
    torch.testing.assert_close(gradients, torch.autograd.grad(((p - sharp) ** 2).mean(), [first]), rtol=1e-3, atol=1e-8)


def test_mcnet_has_two_or_three_decoders(tiny_dataset):
    with pytest.raises(ValueError, match="decoders is 2 or 3, not 4"):
        make_trainer(nnUNetTrainerMCNet, tiny_dataset, decoders=4).initialize()


@every_kind
@pytest.mark.parametrize("size", [1, 2])
def test_urpc(labels, labels_dataset, size):
    trainer = started(nnUNetTrainerURPC, labels_dataset, consistency_weight=0.7, dropout=(0.0, 0.0))
    for head in trainer.network.decoder.seg_layers:
        torch.nn.init.normal_(head.weight)  # the heads disagree
    batch = labels.random_batch(size)
    groups = list(trainer.losses(batch))

    trainer.network.decoder.deep_supervision = True
    fine, coarse = trainer.network(batch.image)[:2]
    small = batch.target[..., 1::2, 1::2, 1::2]  # what the nearest neighbour takes
    labeled = (labels.dice_and_cross_entropy(fine, batch.target) + labels.dice_and_cross_entropy(coarse, small)) / 2
    consistency = 0
    for sample in batch.unlabeled:
        heads = trainer.network(sample[None])[:2]
        said = [labels.probabilities(F.interpolate(head, (16, 16, 16), mode="trilinear")) for head in heads]
        mean = (said[0] + said[1]) / 2
        for own in said:
            each = mean * (mean / own).log()
            if labels.regions:
                each = each + (1 - mean) * ((1 - mean) / (1 - own)).log()
            divergence = each.sum(1)
            weight = (-divergence).exp()
            squared = (((mean - own) ** 2).mean(1) * weight).mean() / weight.mean()
            consistency += (squared + divergence.mean()) / 2 / size
    assert_terms(groups, {"labeled": labeled, "consistency": 0.7 * consistency})


def test_urpc_drops_channels_in_front_of_its_heads(tiny_dataset):
    trainer = started(nnUNetTrainerURPC, tiny_dataset, dropout=(0.0, 1.0))
    fine, coarse = trainer.outputs(CLASSES.random_batch(1).unlabeled)
    assert coarse.flatten(2).std(2).max() == 0 < fine.flatten(2).std(2).min()  # what is left is the bias of the head
    assert trainer.network.state_dict().keys() == trainer.new_network().state_dict().keys()


@pytest.mark.parametrize("dropout", [(0.5,), ()])
def test_urpc_refuses_a_single_head(tiny_dataset, dropout):
    with pytest.raises(NotImplementedError, match="two heads or more"):
        make_trainer(nnUNetTrainerURPC, tiny_dataset, dropout=dropout).initialize()


def pasted(first, mask):
    """Every sample of a batch with the voxels of the sample before it where that one's mask is True."""
    return torch.stack([torch.where(mask[i - 1], first[i - 1], first[i]) for i in range(len(first))])


@every_kind
@pytest.mark.parametrize("size", [1, 3])
def test_omf_pastes_foreground_of_labeled_scans_at_first(labels, labels_dataset, size):
    trainer = started(nnUNetTrainerOMF, labels_dataset, pasted_weight=0.3)
    trainer.step = 0
    batch = labels.random_batch(size)
    groups = list(trainer.losses(batch))

    student = trainer.network
    foreground = labels.truth(batch.target)[:, 0 if labels.regions else 1 :].bool().any(1, keepdim=True)
    foreground &= labels.annotated(batch.target)
    image, target = pasted(batch.image, foreground), pasted(batch.target, foreground)
    expected = {
        "supervised": labels.dice_and_cross_entropy(student(batch.image), batch.target),
        "labeled": 0.3 * labels.dice_and_cross_entropy(student(image), target),
    }
    assert_terms(groups, expected)


@every_kind
@pytest.mark.parametrize("size", [1, 3])
def test_omf_looks_through_foreground_of_unlabeled_scans_then(labels, labels_dataset, size):
    trainer = started(nnUNetTrainerOMF, labels_dataset, consistency_weight=0.7)
    batch = labels.random_batch(size)
    batch.image = batch.target = None
    groups = list(trainer.losses(batch))

    said = trainer.companions.teacher_frozen(batch.unlabeled_weak)
    found = labels.hard(said)
    foreground = (found[:, : labels.channels] > 0).any(1, keepdim=True)
    image = pasted(batch.unlabeled, foreground)
    difference = labels.probabilities(trainer.network(image)) - labels.probabilities(said)
    assert_terms(groups, {"consistency": 0.7 * (difference**2).mean()})


def test_the_teacher_of_omf_follows_in_the_first_phase_and_is_frozen_then(tiny_dataset):
    trainer = started(nnUNetTrainerOMF, tiny_dataset, pretraining=0.5, num_epochs=10, num_iterations_per_epoch=2)
    weight, moved = next(trainer.companions.teacher_frozen.parameters()), []
    for trainer.step in range(20):
        before = weight.clone()
        next(trainer.network.parameters()).data.add_(1.0)
        trainer.after_step()
        moved.append(not torch.equal(weight, before))
    assert moved == [True] * 10 + [False] * 10


@every_kind
@pytest.mark.parametrize(("size", "teacher"), [(1, 0), (3, 0), (1, 1), (3, 1)])
def test_admt(labels, labels_dataset, size, teacher):
    trainer = started(nnUNetTrainerADMT, labels_dataset, unlabeled_weight=0.7, threshold=0.6)
    trainer.rampup = 0.0
    trainer.step = next(step for step in range(100) if turn(step, 19) == teacher)
    for network in trainer.segmenting_networks().values():
        torch.nn.init.normal_(network.decoder.seg_layers[-1].weight, std=0.7)
    batch = labels.random_batch(size)
    seed(5)
    groups = list(trainer.losses(batch))

    seed(5)
    student, weak = trainer.network, batch.unlabeled_weak
    said = [labels.probabilities(n(weak)) for n in (trainer.companions.teacher, trainer.companions.teacher_2)]
    if labels.regions:
        bits = [-(p * p.log2() + (1 - p) * (1 - p).log2()).sum(1, keepdim=True) for p in said]
    else:
        bits = [-(p * p.log2()).sum(1, keepdim=True) for p in said]
    weights = [(-h).exp() for h in bits]
    both = (weights[0] * said[0] + weights[1] * said[1]) / (weights[0] + weights[1])
    own, image = labels.probabilities(student(weak)), batch.unlabeled
    hard = [(p > 0.5) if labels.regions else p.argmax(1, keepdim=True) for p in said]
    conflict = (hard[0] != hard[1]).any(1, keepdim=True)
    if teacher == 1:
        keep = box_mask(size, (16, 16, 16), side=0.7)

        def mixed(x):
            return torch.stack([torch.where(keep[i], x[i], x[i - 1]) for i in range(size)])

        image, both, own, conflict = mixed(weak), mixed(both), mixed(own), mixed(conflict)

    def sure(p):
        return torch.maximum(p, 1 - p).amin(1, keepdim=True) if labels.regions else p.amax(1, keepdim=True)

    override = conflict & (sure(own) > sure(both))
    assert override.any()
    final = torch.where(override, own, both)
    assert 0 < (sure(final) >= 0.6).float().mean() < 1
    pseudo, counts = labels.hard(final.logit() if labels.regions else final), sure(final) >= 0.6
    expected = {
        "supervised": labels.dice_and_cross_entropy(student(batch.image), batch.target),
        "pseudo": 0.7 * labels.dice_and_cross_entropy(student(image), pseudo, counts),
    }
    assert_terms(groups, expected)


def test_the_teachers_of_admt_are_updated_in_turns(tiny_dataset):
    trainer = started(nnUNetTrainerADMT, tiny_dataset, longest_turn=3)
    teachers = [next(t.parameters()) for t in (trainer.companions.teacher, trainer.companions.teacher_2)]
    moved = []
    for trainer.step in range(40):
        before = [p.clone() for p in teachers]
        next(trainer.network.parameters()).data.add_(1.0)
        trainer.after_step()
        moved.append([not torch.equal(a, b) for a, b in zip(before, teachers, strict=True)])
    assert moved == [[turn(step, 3) == 0, turn(step, 3) == 1] for step in range(40)]
    assert 10 < sum(first for first, _ in moved) < 30


@every_kind
@pytest.mark.parametrize("size", [1, 3])
def test_psc(labels, labels_dataset, size):
    settings = {"consistency_weight": 0.7, "pseudo_weight": 0.3}
    trainer = started(nnUNetTrainerPSC, labels_dataset, **settings)
    batch = labels.random_batch(size)
    seed(5)
    groups = list(trainer.losses(batch))

    seed(5)
    student, said = trainer.network, trainer.companions.teacher(batch.unlabeled_weak)
    pseudo, soft = labels.hard(said), labels.probabilities(said)
    images = shuffled(batch.image, batch.unlabeled, order := random_order(size, (16, 16, 16)))
    targets = shuffled(batch.target, pseudo.to(batch.target.dtype), order)
    own = torch.ones(size, 1, 16, 16, 16)
    masks = shuffled(own, 0 * own, order)
    expected = {"labeled": 0, "pseudo": 0}
    for image, target, mask in zip(images, targets, masks, strict=True):
        logits = student(image)
        expected["labeled"] += labels.dice_and_cross_entropy(logits, target, mask == 1) / 2
        expected["pseudo"] += 0.3 * labels.dice_and_cross_entropy(logits, target, mask == 0) / 2
    pairs = {1: [(0, 0)], 3: [(0, 1), (1, 2)]}[size]
    order = random_order(len(pairs), (16, 16, 16))
    first, second = zip(*pairs, strict=True)
    image = torch.cat([*shuffled(batch.unlabeled[[*first]], batch.unlabeled[[*second]], order)])
    target = torch.cat([*shuffled(soft[[*first]], soft[[*second]], order)])
    expected["consistency"] = 0.7 * ((labels.probabilities(student(image)) - target) ** 2).mean()
    assert_terms(groups, expected)


def shuffled(first, second, order):
    """Two images of 16 voxels per axis, whose cells of 8 voxels go to the places of `order`, cell by cell."""
    places = [(slice(None), *(slice(8 * i, 8 * i + 8) for i in at)) for at in cells()]
    result = torch.empty_like(torch.stack([first, second]))
    for sample in range(len(first)):
        for new, old in enumerate(order[sample].tolist()):
            source = (first, second)[old // 8][sample]
            result[new // 8, sample][places[new % 8]] = source[places[old % 8]]
    return result


def cells():
    return [(i, j, k) for i in range(2) for j in range(2) for k in range(2)]


@pytest.mark.parametrize("trainer", [nnUNetTrainerMCNet, nnUNetTrainerURPC, nnUNetTrainerADMT, nnUNetTrainerPSC])
def test_the_unlabeled_weight_is_ramped_up(tiny_dataset, trainer):
    made = started(trainer, tiny_dataset, rampup=0.5, num_epochs=10, num_iterations_per_epoch=10)
    batch, terms = CLASSES.random_batch(2), {}
    for made.step in (25, 50):
        if trainer is nnUNetTrainerADMT:
            made.longest_turn = 1 + 10**6  # one teacher's turn lasts
        seed(5)
        terms[made.step] = {}
        for group in made.losses(batch):
            for name, value in group.items():
                terms[made.step][name] = terms[made.step].get(name, 0) + value.item()
    ramped = "pseudo" if trainer is nnUNetTrainerADMT else "consistency"
    for name, full in terms[50].items():
        assert terms[25][name] == pytest.approx(full * (math.exp(-5 / 4) if name == ramped else 1), rel=1e-4)
