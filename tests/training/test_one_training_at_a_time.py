"""Two trainings, comparisons or labelings never write into the same folder at once."""

import json
import os
from pathlib import Path

import pytest
from tiny_trainers import make_trainer

from nnunet_ssl.commands.compare import job as job_module
from nnunet_ssl.commands.compare.job import Job, run_job
from nnunet_ssl.system.lock import identity, locked
from nnunet_ssl.trainers.nnUNetTrainerM3 import nnUNetTrainerM3
from nnunet_ssl.training.preflight import only_training


@pytest.fixture
def trainer(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    return make_trainer(nnUNetTrainerM3, tiny_dataset, num_epochs=1, num_iterations_per_epoch=1)


def test_a_second_training_of_a_fold_is_refused_before_it_writes(trainer):
    folder = Path(trainer.output_folder)
    with only_training(trainer.output_folder, 0):
        before = sorted(folder.iterdir())
        with pytest.raises(RuntimeError, match=rf"Process {os.getpid()} on .* has been training in {folder} since"):
            trainer.run_training()
        assert sorted(folder.iterdir()) == before


def test_the_fold_is_locked_while_it_is_trained_and_free_afterwards(trainer, monkeypatch):
    lock, seen = Path(trainer.output_folder, ".training.lock"), []
    ended, begun = trainer.on_train_end, trainer.on_train_start
    monkeypatch.setattr(trainer, "on_train_start", lambda: (seen.append(lock.is_file()), begun()))
    monkeypatch.setattr(trainer, "on_train_end", lambda: (ended(), seen.append(lock.is_file())))
    trainer.run_training()
    assert seen == [True, True]
    assert not lock.exists()


def test_a_training_that_fails_leaves_no_lock(trainer, monkeypatch):
    monkeypatch.setattr(trainer, "train_step", lambda batch: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer.run_training()
    assert not Path(trainer.output_folder, ".training.lock").exists()


def test_a_training_takes_the_lock_of_a_killed_one_over(trainer):
    lock = Path(trainer.output_folder, ".training.lock")
    lock.write_text(
        json.dumps(identity() | {"start": "another", "since": "yesterday", "doing": "training"}), encoding="utf-8"
    )
    trainer.run_training()
    assert not lock.exists()


def test_the_other_ranks_of_a_training_have_no_lock(tmp_path):
    with only_training(str(tmp_path), 0), only_training(str(tmp_path), 1):
        assert len(list(tmp_path.iterdir())) == 1


def test_two_comparisons_do_not_train_the_same_model(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    settings = (tmp_path / "comparison", True, "cpu", 1, True)
    job = Job("Dataset701_Tiny", "3d_fullres", "nnUNetPlans", "nnUNetTrainer", 0, *settings)
    monkeypatch.setattr(job_module, "call", lambda *_: pytest.fail("trained twice"))
    job.model.parent.mkdir(parents=True)
    with (
        locked(job.model.with_name(".fold_0.lock"), "training it"),
        pytest.raises(RuntimeError, match="has been training it since"),
    ):
        run_job(job, lambda step: None)
