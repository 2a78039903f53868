"""Every method in half precision with a gradient scaler, as nnU-Net trains on CUDA; on a CPU, with real numbers."""

import contextlib
from copy import deepcopy

import pytest
import torch
from tiny_trainers import EVERY_STREAM, every_trainer, make_trainer, seed

from nnunet_ssl import trainer as base
from nnunet_ssl.blocks.networks import logits
from nnunet_ssl.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher

every = pytest.mark.parametrize("trainer_class", every_trainer())
PARTS = (0.0, 0.45, 0.95)  # of the training that are done


@pytest.fixture
def half(monkeypatch):
    """Switches `train_step` to half precision, where it has single precision on a CPU.

    Returns the encoders whose weights older versions of torch would have cast without gradient, and would go on with.
    """

    def switch(on: bool) -> set:
        stale, clear = set(), torch.clear_autocast_cache

        @contextlib.contextmanager
        def autocast():
            with torch.autocast("cpu", torch.float16):
                yield
            stale.clear()

        monkeypatch.setattr(base, "nullcontext", autocast if on else contextlib.nullcontext)
        monkeypatch.setattr(torch, "clear_autocast_cache", lambda: (stale.clear(), clear()))
        return stale

    return switch


def watch(encoder, stale):
    def before(*_):
        if torch.is_autocast_enabled("cpu"):
            assert encoder not in stale or not torch.is_grad_enabled()
            stale.update(() if torch.is_grad_enabled() else {encoder})

    encoder.register_forward_pre_hook(before)


def started(trainer_class, dataset, scaled):
    seed()
    trainer = make_trainer(trainer_class, dataset, num_iterations_per_epoch=1000, **EVERY_STREAM)
    trainer.on_train_start()
    trainer.network.train()
    # per voxel of these patches as much as nnU-Net's first scale, 2^16, per voxel of two patches of 128^3
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7) if scaled else None
    return trainer


def gradients(trainer, batch, monkeypatch):
    """The unscaled gradients of a step, one per trained parameter, None where it has none."""
    found = []

    def keep(optimizer, networks, *_):
        found.extend(p.grad for network in networks for p in network.parameters())

    monkeypatch.setattr(base, "update_weights", keep)
    seed(1)
    trainer.train_step(deepcopy(batch))
    scale = 1 if trainer.grad_scaler is None else trainer.grad_scaler.get_scale()
    return [None if g is None else g / scale for g in found]


def compared(trainer_class, dataset, half, monkeypatch):
    """Cosine between the gradients in single and in half precision at every part of the training."""
    cosines = []
    for part in PARTS:
        found = []
        for on in (False, True):
            stale = half(on)
            trainer = started(trainer_class, dataset, on)
            for network in trainer.trained_networks():
                if hasattr(network, "encoder"):
                    watch(network.encoder, stale)
            batch = next(trainer.dataloader_train)
            trainer.step = int(part * trainer.max_steps)
            found.append(gradients(trainer, batch, monkeypatch))
        assert [g is None for g in found[0]] == [g is None for g in found[1]]
        one, other = (torch.cat([g.flatten() for g in each if g is not None]) for each in found)
        cosines.append(torch.nn.functional.cosine_similarity(one, other, dim=0).item())
    return cosines


@every
def test_gradients_are_those_of_single_precision(trainer_class, tiny_ignore_dataset, half, monkeypatch):
    assert all(cosine > 0.999 for cosine in compared(trainer_class, tiny_ignore_dataset, half, monkeypatch))


@every
def test_an_infinite_image_costs_a_step_and_changes_nothing(trainer_class, tiny_dataset, half):
    half(True)
    trainer = started(trainer_class, tiny_dataset, True)
    trainer.train_step(next(trainer.dataloader_train))
    networks = {"student": trainer.network, **vars(trainer.companions)}
    before = {name: deepcopy(network.state_dict()) for name, network in networks.items()}
    batch, scale = next(trainer.dataloader_train), trainer.grad_scaler.get_scale()
    for name in {"data", "unlabeled", "unlabeled_weak"} & batch.keys():
        batch[name][:] = torch.inf
    trainer.step = trainer.max_steps // 2
    students = [name for name, network in networks.items() if any(p.requires_grad for p in network.parameters())]
    trainer.train_step(batch)
    assert trainer.grad_scaler.get_scale() == scale / 2
    for name, network in networks.items():
        for key, value in network.state_dict().items():
            assert value.isfinite().all()
            assert name not in students or torch.equal(before[name][key], value)


class SoftmaxInHalfPrecision(nnUNetTrainerMeanTeacher):
    """A softmax by hand, which torch does not compute in single precision as its own, of a sure network."""

    def losses(self, batch):
        odds = (30 * logits(self.network, batch.unlabeled)).exp()
        yield {"consistency": (odds / odds.sum(1, keepdim=True)).square().mean()}


def test_a_softmax_in_half_precision_is_seen(tiny_dataset, half, monkeypatch):
    assert not all(cosine > 0.999 for cosine in compared(SoftmaxInHalfPrecision, tiny_dataset, half, monkeypatch))
