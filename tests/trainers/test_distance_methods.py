"""Steps of DTC and SASSNet against direct implementations of their equations, and what they need from the base."""

import math

import pytest
import torch
from equations import CLASSES, EVERY_KIND, assert_terms, distances_by_definition, started
from tiny_trainers import make_trainer, seed

from nnunet_ssl.data import loading
from nnunet_ssl.trainers.nnUNetTrainerDTC import nnUNetTrainerDTC
from nnunet_ssl.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunet_ssl.trainers.nnUNetTrainerSASSNet import nnUNetTrainerSASSNet

every_kind = pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
BOTH = [nnUNetTrainerDTC, nnUNetTrainerSASSNet]


def foreground(labels, target):
    """Voxels of every foreground class or region, and those that are annotated."""
    return labels.truth(target)[:, 0 if labels.regions else 1 :].bool(), labels.annotated(target)


def batch_with_distances(labels, size):
    """A random batch in which one class of one sample has no boundary."""
    batch = labels.random_batch(size)
    batch.signed_distance = 2 * torch.rand(foreground(labels, batch.target)[0].shape) - 1
    if size > 1:
        batch.signed_distance[0, -1] = 0
    return batch


def both_heads(trainer, image):
    """Logits and distances, which are read off the last features of the stock network by a hook."""
    found = []
    with_hook = trainer.network.decoder.stages[-1].register_forward_hook(lambda _, __, x: found.append(x))
    logits = trainer.network(image)
    with_hook.remove()
    return logits, torch.tanh(trainer.companions.distance.head(found[0]))


def supervised_terms(labels, batch, logits, distances, weight):
    _, annotated = foreground(labels, batch.target)
    squared = []
    for sample in range(len(batch.image)):
        for said, true in zip(distances[sample], batch.signed_distance[sample], strict=True):
            if (true != 0).any():
                squared.append(((said - true) ** 2)[annotated[sample, 0]])
    distance = weight * torch.cat(squared).mean()
    return {"supervised": labels.dice_and_cross_entropy(logits, batch.target), "labeled_distance": distance}


@every_kind
@pytest.mark.parametrize("size", [1, 3])
def test_dtc(labels, labels_dataset, size):
    settings = {"distance_weight": 0.4, "consistency_weight": 0.7, "steepness": 5.0}
    trainer = started(nnUNetTrainerDTC, labels_dataset, **settings)
    batch = batch_with_distances(labels, size)
    groups = list(trainer.losses(batch))

    logits, distances = both_heads(trainer, batch.image)
    expected = supervised_terms(labels, batch, logits, distances, 0.4)
    other = both_heads(trainer, batch.unlabeled)
    logits, distances = (torch.cat(pair) for pair in zip((logits, distances), other, strict=True))
    said = labels.probabilities(logits)[:, 0 if labels.regions else 1 :]
    expected["consistency"] = 0.7 * ((1 / (1 + (5 * distances).exp()) - said) ** 2).mean()
    assert_terms(groups, expected)


def test_both_heads_of_dtc_learn_from_their_consistency(tiny_dataset):
    trainer = started(nnUNetTrainerDTC, tiny_dataset)
    logits, distances = torch.randn(1, 2, 4, 4, 4), torch.randn(1, 1, 4, 4, 4).tanh() / 100
    logits.requires_grad_(), distances.requires_grad_()
    trainer.consistency(logits, distances).backward()
    assert logits.grad.abs().sum() > 0 < distances.grad.abs().sum()


@every_kind
@pytest.mark.parametrize("size", [1, 3])
def test_sassnet(labels, labels_dataset, size):
    trainer = started(nnUNetTrainerSASSNet, labels_dataset, distance_weight=0.4, adversarial_weight=0.7)
    batch = batch_with_distances(labels, size)
    seed(5)
    groups = list(trainer.losses(batch))

    judge = trainer.companions.discriminator
    logits, distances = both_heads(trainer, batch.image)
    expected = supervised_terms(labels, batch, logits, distances, 0.4)
    _, others = both_heads(trainer, batch.unlabeled)
    verdicts = judge.eval()(others, batch.unlabeled).softmax(1)
    expected["adversarial"] = -0.7 * verdicts[:, 1].log().mean()
    seed(5)
    judge.train()
    verdicts = [judge(*pair).softmax(1) for pair in ((distances, batch.image), (others, batch.unlabeled))]
    expected["discriminator"] = -(verdicts[0][:, 1].log().sum() + verdicts[1][:, 0].log().sum()) / (2 * size)
    assert_terms(groups, expected)


def test_network_and_discriminator_of_sassnet_learn_from_their_own_terms_only(tiny_dataset):
    trainer = started(nnUNetTrainerSASSNet, tiny_dataset)
    student, judge = trainer.network, trainer.companions.discriminator
    learned = []
    for terms in trainer.losses(batch_with_distances(CLASSES, 2)):
        for network in (student, judge, trainer.companions.distance):
            network.zero_grad()
        sum(terms.values()).backward()
        weights = student.encoder.stages[0], trainer.companions.distance, judge
        learned.append([any(p.grad is not None for p in module.parameters()) for module in weights])
        assert judge.training
    assert learned == [[True, True, False], [True, True, False], [False, False, True]]


@pytest.mark.parametrize("trainer", BOTH)
def test_the_unlabeled_weight_is_ramped_up(tiny_dataset, trainer):
    made = started(trainer, tiny_dataset, rampup=0.5, num_epochs=10, num_iterations_per_epoch=10)
    batch, found = batch_with_distances(CLASSES, 2), []
    ramped = "consistency" if trainer is nnUNetTrainerDTC else "adversarial"
    for made.step in (25, 50):
        groups = list(made.losses(batch))
        found.append(sum(terms[ramped].item() for terms in groups if ramped in terms))
        found.append(groups[0]["labeled_distance"].item())
    assert found[0] == pytest.approx(found[2] * math.exp(-5 / 4), rel=1e-4)
    assert found[1] == found[3] > 0


# ---- signed distances as a target of the loader ----


@every_kind
def test_the_loader_gives_the_distances_of_the_augmented_labels(labels, labels_dataset):
    seed(2)
    trainer = make_trainer(nnUNetTrainerDTC, labels_dataset)
    trainer.on_train_start()
    found = []
    for _ in range(3):
        item = next(trainer.dataloader_train)
        expected = distances_by_definition(*foreground(labels, item["target"][0]))
        torch.testing.assert_close(item["signed_distance"], expected)
        batch = trainer._to_device(item)
        assert torch.equal(batch.signed_distance, item["signed_distance"])
        assert torch.equal(batch.rolled(1).signed_distance[0], item["signed_distance"][1])
        found.append(expected)
    assert (torch.stack(found) < 0).any()


def test_who_does_not_ask_for_distances_does_not_pay_for_them(tiny_dataset, monkeypatch):
    def refuse(*_):
        raise AssertionError("distances are computed")

    monkeypatch.setattr(loading, "signed_distances", refuse)
    trainer = make_trainer(nnUNetTrainerMeanTeacher, tiny_dataset)
    trainer.on_train_start()
    item = next(trainer.dataloader_train)
    assert trainer._to_device(item).signed_distance is None
    supervised = make_trainer(nnUNetTrainerDTC, tiny_dataset, supervised_part=0.5)
    supervised.on_train_start()
    assert next(supervised.dataloader_train).keys() == {"data", "target", "keys"}  # as stock nnU-Net's
    next(supervised.dataloader_val)
    supervised.current_epoch = 1
    with pytest.raises(AssertionError, match="distances are computed"):
        supervised.on_train_epoch_start()


def test_distances_come_from_workers_and_beside_augmentation_on_the_device(tiny_dataset, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    monkeypatch.setenv("nnUNet_ssl_augment", "device")
    trainer = make_trainer(nnUNetTrainerDTC, tiny_dataset, num_val_iterations_per_epoch=0)
    trainer.on_train_start()
    try:
        item = next(trainer.dataloader_train)
        assert "unlabeled" not in item
        expected = distances_by_definition(*foreground(CLASSES, item["target"][0]))
        torch.testing.assert_close(trainer._to_device(item).signed_distance, expected)
    finally:
        trainer.dataloader_train._finish()
        trainer.dataloader_val._finish()


# ---- optimizers of their own ----


def weights_of(trainer):
    companions = vars(trainer.companions)
    return {name: torch.cat([p.detach().flatten() for p in c.parameters()]).clone() for name, c in companions.items()}


def test_the_discriminator_takes_steps_of_adam(tiny_dataset):
    trainer = started(nnUNetTrainerSASSNet, tiny_dataset, discriminator_rate=0.003)
    before = weights_of(trainer)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    trainer.train_step(next(trainer.dataloader_train))
    after = weights_of(trainer)
    assert torch.equal(before["distance"], after["distance"])
    # the first step of Adam is as large as its learning rate, whatever the gradient
    moved = (after["discriminator"] - before["discriminator"]).abs()
    assert moved.max().item() == pytest.approx(0.003, rel=1e-3)
    assert moved[moved > 0].median().item() == pytest.approx(0.003, rel=0.02)  # dropout spares some
    trainer.optimizers["discriminator"].param_groups[0]["lr"] = 0.0
    trainer.train_step(next(trainer.dataloader_train))
    assert torch.equal(after["discriminator"], weights_of(trainer)["discriminator"])


def test_gradients_of_a_step_do_not_stay_for_the_next_one(tiny_dataset):
    trainer = started(nnUNetTrainerSASSNet, tiny_dataset)
    item, seen = next(trainer.dataloader_train), []
    for optimizer in (trainer.optimizer, *trainer.optimizers.values()):
        optimizer.step = lambda: None
    for _ in range(2):
        seed(5)
        trainer.train_step(item)
        seen.append([p.grad.clone() for n in trainer.trained_networks() for p in n.parameters() if p.grad is not None])
    torch.testing.assert_close(*seen)
    assert max(torch.cat([g.flatten() for g in seen[0]]).abs()) > 0


def test_the_second_phase_begins_with_new_optimizers_of_the_companions(tiny_dataset):
    seed()
    trainer = make_trainer(nnUNetTrainerSASSNet, tiny_dataset, num_epochs=4, supervised_part=0.5)
    trainer.on_train_start()
    adam = trainer.optimizers["discriminator"]
    trainer.on_train_epoch_start()
    before = weights_of(trainer)
    trainer.train_step(next(trainer.dataloader_train))
    assert torch.equal(before["discriminator"], weights_of(trainer)["discriminator"])
    adam.state[adam.param_groups[0]["params"][0]] = {"step": torch.tensor(7.0)}
    trainer.current_epoch = 2
    trainer.on_train_epoch_start()
    begun = trainer.optimizers["discriminator"]
    assert not begun.state
    held = {id(p) for p in begun.param_groups[0]["params"]}
    assert held == {id(p) for p in trainer.companions.discriminator.parameters()}
    assert not torch.equal(before["discriminator"], weights_of(trainer)["discriminator"])
    trainer.train_step(next(trainer.dataloader_train))
    assert all(state["step"] == 1 for state in begun.state.values())
