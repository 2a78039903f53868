"""A step on CUDA waits no longer than stock nnU-Net's, and nothing of it is on another device; no GPU is needed."""

import pytest
import torch
from equations import CLASSES, EVERY_KIND
from fake_cuda import fake_step
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_trainers import every_trainer

from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL
from nnunet_ssl.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher

PARTS = (0.0, 0.9)  # of the training that are done: some methods have two phases
PHASES = ("pretraining", "unmixed")  # settings of these methods


@pytest.fixture(scope="module")
def stock():
    """Stock nnU-Net's waits per step, by dataset and configuration."""
    known = {}

    def waits(*data):
        if data not in known:
            known[data] = fake_step(nnUNetTrainer, *data).waits.total()
        return known[data]

    return waits


@pytest.mark.parametrize("labels", EVERY_KIND, indirect=True)
@pytest.mark.parametrize("trainer_class", every_trainer())
def test_a_step_waits_no_longer_than_nnunets(trainer_class, labels, labels_dataset, stock):
    both = labels is CLASSES or any(hasattr(trainer_class, setting) for setting in PHASES)
    for part in PARTS if both else PARTS[1:]:
        watch = fake_step(trainer_class, labels_dataset, "3d_fullres", part)
        assert watch.waits.total() <= stock(labels_dataset, "3d_fullres"), watch.waits
        assert not watch.uploads


@pytest.mark.parametrize("trainer_class", every_trainer())
def test_nor_with_odd_batches_in_2d_nor_with_residual_networks(
    trainer_class, tiny_dataset, tiny_residual_dataset, stock
):
    for *data, batch_size in ((tiny_dataset, "2d", 3), (tiny_residual_dataset, "3d_fullres", 2)):
        watch = fake_step(trainer_class, *data, part=PARTS[-1], batch_size=batch_size)
        assert watch.waits.total() <= stock(*data), watch.waits
        assert not watch.uploads


def test_nor_in_the_last_step_of_an_epoch_which_is_observed(tiny_dataset, stock):
    watch = fake_step(nnUNetTrainerM3HL, tiny_dataset, num_iterations_per_epoch=1, num_epochs=1000)
    assert watch.waits.total() <= stock(tiny_dataset, "3d_fullres"), watch.waits
    assert not watch.uploads


def test_largest_component_waits_once_and_uploads_once(tiny_dataset, stock):
    watch = fake_step(nnUNetTrainerM3HL, tiny_dataset, largest_component=True)
    assert watch.waits.total() == stock(tiny_dataset, "3d_fullres") + 1


class Waits(nnUNetTrainerMeanTeacher):
    def losses(self, batch):
        for terms in super().losses(batch):
            self.last = next(iter(terms.values())).item()
            yield terms


class Uploads(nnUNetTrainerMeanTeacher):
    def losses(self, batch):
        for terms in super().losses(batch):
            yield {name: value * torch.ones(1).to(value.device)[0] for name, value in terms.items()}


class OnTheHost(nnUNetTrainerMeanTeacher):
    def losses(self, batch):
        batch.unlabeled = torch.where(torch.ones(batch.unlabeled.shape) > 0.5, batch.unlabeled, 0)
        yield from super().losses(batch)


def test_what_waits_uploads_or_is_on_the_host_is_seen(tiny_dataset, stock):
    assert fake_step(Waits, tiny_dataset).waits.total() == stock(tiny_dataset, "3d_fullres") + 2  # two terms
    assert fake_step(Uploads, tiny_dataset).uploads == {(1,): 2}
    with pytest.raises(RuntimeError, match="device"):
        fake_step(OnTheHost, tiny_dataset)
