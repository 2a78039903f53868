"""Losses that are not finite, pseudo labels without foreground, and a seed."""

import copy
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_trainers import make_trainer, seed

from nnunet_ssl.blocks.networks import frozen_copy, logits, update_ema
from nnunet_ssl.trainer import SemiSupervisedTrainer
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3
from nnunet_ssl.training.health import NOT_FINITE_STEPS, Health
from nnunet_ssl.training.random_state import seed_from_environment


class Breaks(SemiSupervisedTrainer):
    """A term that is NaN in chosen steps, and a teacher."""

    bad = range(0)

    def build_companions(self):
        return {"teacher": frozen_copy(self.network)}

    def losses(self, batch):
        yield {"supervised": self.loss(self.network(batch.image), batch.target)}
        output = logits(self.network, batch.unlabeled)
        self.hard_labels(output)
        yield {"broken": output.mean() * (float("nan") if self.step in self.bad else 1.0)}

    def after_step(self):
        update_ema(self.companions.teacher, self.network, 0.5)


def started(dataset, **attributes):
    seed()
    trainer = make_trainer(type("Breaks", (Breaks,), attributes), dataset)
    trainer.on_train_start()
    trainer.network.train()
    trainer.logger.local_logger.my_fantastic_logging["mean_fg_dice"].append(0.5)
    return trainer


def steps(trainer, number):
    return [trainer.train_step(next(trainer.dataloader_train)) for _ in range(number)]


def weights(trainer):
    networks = [trainer.network, trainer.companions.teacher]
    return torch.cat([p.detach().flatten() for network in networks for p in network.parameters()]).clone()


def momentum(trainer):
    return torch.cat([state["momentum_buffer"].flatten() for state in trainer.optimizer.state.values()]).clone()


@pytest.mark.parametrize("scaled", [False, True], ids=["no scaler", "GradScaler"])
def test_a_step_that_is_not_finite_is_left_out_and_teachers_stay_good(scaled, tiny_dataset):
    trainer = started(tiny_dataset, bad=[2])
    if scaled:  # as on CUDA
        trainer.grad_scaler = torch.amp.GradScaler("cpu")
    steps(trainer, 2)
    student, kept = copy.deepcopy(trainer.network.state_dict()), momentum(trainer)
    losses = steps(trainer, 1)[0]
    assert np.isnan(losses["broken"])
    assert all(torch.equal(value, student[name]) for name, value in trainer.network.state_dict().items())
    assert torch.equal(momentum(trainer), kept)
    before = weights(trainer)
    assert before.isfinite().all()
    steps(trainer, 1)
    assert weights(trainer).isfinite().all()
    assert not torch.equal(weights(trainer), before)  # the next step counts again


def test_a_term_that_stays_not_finite_stops_the_training_with_its_name(tiny_dataset):
    trainer = started(tiny_dataset, bad=range(3, 10**6))
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    steps(trainer, 3 + NOT_FINITE_STEPS - 1)
    with pytest.raises(RuntimeError) as error:
        steps(trainer, 1)
    text = str(error.value)
    assert "The loss term broken was NaN or infinite for 20 steps in a row" in text
    assert "supervised" not in text
    assert f"{trainer.output_folder}/checkpoint_latest.pth is the last good state" in text
    assert "images" not in text  # they are sound
    assert weights(trainer).isfinite().all()


def test_steps_that_are_not_in_a_row_do_not_stop_it(tiny_dataset):
    trainer = started(tiny_dataset, bad=[step for step in range(60) if step % 20])
    steps(trainer, 60)


def test_a_term_that_is_missing_in_some_steps_is_counted_over_those_that_have_it(tmp_path):
    health = Health(print)
    terms = [{"supervised": 1.0}, {"supervised": 1.0, "late": math.nan}] * NOT_FINITE_STEPS
    for step_terms in terms[:-1]:
        health.check_terms(step_terms, {}, 0, tmp_path)
    with pytest.raises(RuntimeError, match="The loss term late was NaN"):
        health.check_terms(terms[-1], {}, 0, tmp_path)


def test_without_a_checkpoint_the_message_says_so(tiny_dataset):
    trainer = started(tiny_dataset, bad=range(100))
    for file in Path(trainer.output_folder).glob("*.pth"):
        file.unlink()
    with pytest.raises(RuntimeError, match="There is no checkpoint yet"):
        steps(trainer, NOT_FINITE_STEPS)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(which, tiny_dataset, tmp_path):
    trainer = started(tiny_dataset)
    file = tmp_path / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(file))
    before = file.read_bytes()
    network = trainer.network if which == "student" else trainer.companions.teacher
    with torch.no_grad():
        next(network.parameters()).view(-1)[0] = float("inf")
    with pytest.raises(RuntimeError, match=f"was not written, .* weights of {which} are NaN or infinite"):
        trainer.save_checkpoint(str(file))
    assert file.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == [file.name]


def test_an_epoch_tells_how_many_steps_were_not_finite(tiny_dataset):
    trainer = started(tiny_dataset, bad=[1])
    trainer.on_train_epoch_end(steps(trainer, 3))
    text = "WARNING: the loss term broken was NaN or infinite in 1 of 3 steps of this epoch."
    assert text in Path(trainer.log_file).read_text(encoding="utf-8")


def end_epoch(trainer):
    trainer.on_train_epoch_end([{"loss": 1.0}])
    trainer.current_epoch += 1
    return (
        Path(trainer.log_file)
        .read_text(encoding="utf-8")
        .count("WARNING: all pseudo labels of this epoch are background")
    )


@pytest.mark.parametrize("dataset", ["tiny_dataset", "tiny_regions_ignore_dataset"])
def test_pseudo_labels_without_foreground_are_told_once_per_epoch(dataset, request):
    trainer = started(request.getfixturevalue(dataset))
    empty = torch.full((2, trainer.label_manager.num_segmentation_heads, 4, 4, 4), -1.0)
    if not trainer.label_manager.has_regions:
        empty[:, 0] = 1
    one_voxel = empty.clone()
    one_voxel[0, 1, 0, 0, 0] = 5
    for _ in range(3):
        trainer.hard_labels(empty)
    assert end_epoch(trainer) == 1
    trainer.hard_labels(empty)
    trainer.hard_labels(one_voxel)
    assert end_epoch(trainer) == 1  # some foreground
    assert end_epoch(trainer) == 1  # a method without pseudo labels
    trainer.hard_labels(empty)
    assert end_epoch(trainer) == 2


def test_counting_foreground_reads_nothing_from_the_device(tiny_dataset):
    trainer = started(tiny_dataset)
    # tensors of the meta device have no values: to read one raises
    trainer.hard_labels(torch.zeros((2, 2, 4, 4, 4), device="meta"))
    assert trainer.health.foreground.device.type == "meta"


# ---- nnUNet_ssl_seed ----


def run(dataset, number, monkeypatch):
    """Losses of a training with this seed, from another random state each time."""
    if number is None:
        monkeypatch.delenv("nnUNet_ssl_seed", raising=False)
    else:
        monkeypatch.setenv("nnUNet_ssl_seed", number)
    torch.manual_seed(random.SystemRandom().randrange(2**31))
    np.random.seed(random.SystemRandom().randrange(2**31))
    random.seed()
    trainer = make_trainer(nnUNetTrainerM3, dataset, num_iterations_per_epoch=4)
    trainer.run_training()
    return [trainer.logger.get_value(name, None) for name in ("train_losses", "val_losses")]


def test_two_runs_with_the_same_seed_have_the_same_losses(tiny_dataset, monkeypatch):
    first = run(tiny_dataset, "7", monkeypatch)
    assert run(tiny_dataset, "7", monkeypatch) == first
    assert run(tiny_dataset, "8", monkeypatch) != first
    assert run(tiny_dataset, None, monkeypatch) != run(tiny_dataset, None, monkeypatch)


def test_every_rank_has_a_seed_of_its_own(monkeypatch):
    monkeypatch.setenv("nnUNet_ssl_seed", "7")
    drawn = {seed_from_environment(rank): torch.rand(1).item() for rank in (0, 1)}
    assert drawn.keys() == {7, 8}
    assert len(set(drawn.values())) == 2


def test_with_a_seed_nothing_depends_on_measured_times(tiny_dataset, monkeypatch):
    """nnU-Net's blur measures two ways and takes the faster one; tests of this folder turn that off for themselves."""
    for number, measures in (("1", False), (None, True)):
        monkeypatch.delenv("nnUNet_ssl_seed", raising=False)
        if number:
            monkeypatch.setenv("nnUNet_ssl_seed", number)
        trainer = started(tiny_dataset)
        loader = trainer.dataloader_train.data_loader
        transforms = [*loader.labeled.transforms.transforms, *loader.unlabeled.intensity.transforms]
        found = [getattr(t, "transform", t) for t in transforms]
        assert [t.benchmark for t in found if hasattr(t, "benchmark")] == [measures] * 2
