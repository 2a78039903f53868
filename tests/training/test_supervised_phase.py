"""The supervised phase: first stock nnU-Net, then the method from its weights, with companions and momentum anew."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.lr_schedule.nnUNetTrainer_warmup import nnUNetTrainer_warmup
from nnunetv2.training.nnUNetTrainer.variants.lr_schedule.nnUNetTrainerCosAnneal import nnUNetTrainerCosAnneal
from tiny_trainers import every_trainer, make_trainer, seed

from nnunet_ssl.blocks.networks import unwrap
from nnunet_ssl.commands.trained_models import network_weights
from nnunet_ssl.data.loading import UnlabeledDataset
from nnunet_ssl.trainers.nnUNetTrainerCoLearning import nnUNetTrainerCoLearning
from nnunet_ssl.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL
from nnunet_ssl.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunet_ssl.trainers.nnUNetTrainerOMF import nnUNetTrainerOMF
from nnunet_ssl.training import preflight
from nnunet_ssl.training.checkpoints import CHECKPOINT_KEY
from nnunet_ssl.training.health import NOT_FINITE_STEPS
from nnunet_ssl.training.history import draw


class DeploysTheTeacher(nnUNetTrainerM3HL):
    def inference_network(self):
        return self.companions.teacher


class WarmsUp(nnUNetTrainerMeanTeacher, nnUNetTrainer_warmup):
    supervised_part = 0.5


TWO_AND_TWO = {"num_epochs": 4, "supervised_part": 0.5, "save_every": 1}


def weights(network):
    return {name: tensor.clone() for name, tensor in unwrap(network).state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def recorded(trainer):
    """Keeps, after every epoch, the weights, the learning rate and, where there is one, the checkpoint."""
    end, kept = trainer.on_epoch_end, []

    def on_epoch_end():
        end()
        latest = Path(trainer.output_folder) / "checkpoint_latest.pth"
        copy = latest.with_name(f"after_{trainer.current_epoch}.pth")
        if latest.is_file() and trainer.current_epoch < trainer.num_epochs:
            shutil.copy(latest, copy)
        rate = trainer.logger.get_value("lrs", step=-1)
        kept.append((weights(trainer.network), rate, copy))

    trainer.on_epoch_end = on_epoch_end
    return kept


def test_the_first_phase_is_stock_nnunet_to_the_bit_and_reads_no_unlabeled_patch(tiny_dataset, monkeypatch):
    seed()
    stock = make_trainer(nnUNetTrainer, tiny_dataset, num_epochs=2)
    stock_epochs = recorded(stock)
    stock.run_training()

    seed()
    trainer = make_trainer(nnUNetTrainerM3HL, tiny_dataset, **TWO_AND_TWO)
    epochs = recorded(trainer)
    read = []
    original = UnlabeledDataset.load_image
    monkeypatch.setattr(
        UnlabeledDataset, "load_image", lambda self, case: read.append(trainer.current_epoch) or original(self, case)
    )
    trainer.run_training()
    assert [rate for _, rate, _ in epochs] == [rate for _, rate, _ in stock_epochs] * 2
    for (ours, _, _), (theirs, _, _) in zip(epochs[:2], stock_epochs, strict=True):
        assert same(ours, theirs)
    assert not same(epochs[2][0], epochs[1][0])
    assert read.count(0) == 1  # one look at one case, when the training starts
    assert read.count(1) == 0
    assert read.count(2) > 0
    assert (trainer.step, trainer.max_steps) == (4, 4)
    log = Path(trainer.log_file).read_text(encoding="utf-8")
    assert "Supervised phase: 2 of 4 epochs" in log
    assert log.count("The semi-supervised phase begins") == 1
    assert "1 supervised epochs left" in log


def test_at_the_boundary_companions_learning_rate_and_momentum_are_new(tiny_dataset):
    seed()
    trainer = make_trainer(nnUNetTrainerCoLearning, tiny_dataset, **TWO_AND_TWO)
    trainer.on_train_start()
    before = weights(trainer.companions.student_2)
    assert trainer._deployed() is trainer.network
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    assert same(weights(trainer.companions.student_2), before)  # it is not trained in the first phase
    assert trainer.optimizer.state
    assert trainer.step == 0
    trainer.current_epoch = 2
    trainer.on_train_epoch_start()
    for companion in vars(trainer.companions).values():
        assert same(weights(companion), weights(trainer.network))
    assert not trainer.optimizer.state
    assert trainer.optimizer.param_groups[0]["lr"] == trainer.initial_lr
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in trainer.companions.student_2.parameters()} <= trained
    trainer.train_step(next(trainer.dataloader_train))
    assert trainer.step == 1
    assert not same(weights(trainer.companions.student_2), weights(trainer.network))


def test_the_best_network_of_the_second_phase_is_rated_by_this_phase_alone(tiny_dataset, monkeypatch):
    seed()
    trainer = make_trainer(nnUNetTrainerM3HL, tiny_dataset, **TWO_AND_TWO)
    dice, saved, validated = iter([0.9, 0.9, 0.5, 0.8]), [], nnUNetTrainer.on_validation_epoch_end

    def on_validation_epoch_end(self, outputs):
        counts = {"tp_hard": 100 * next(dice), "fp_hard": 0, "fn_hard": 0}
        counts["fp_hard"] = counts["fn_hard"] = 100 - counts["tp_hard"]
        validated(self, [{**outputs[0], **{name: np.array([count]) for name, count in counts.items()}}])

    monkeypatch.setattr(nnUNetTrainer, "on_validation_epoch_end", on_validation_epoch_end)
    trainer.save_checkpoint = lambda file: saved.append((trainer.current_epoch, Path(file).stem))
    trainer.run_training()
    averages = trainer.logger.get_value("ema_fg_dice", step=None)
    assert averages == pytest.approx([0.9, 0.9, 0.5, 0.9 * 0.5 + 0.1 * 0.8])
    assert [epoch for epoch, name in saved if name == "checkpoint_best"] == [0, 2, 3]


def test_a_training_continues_before_at_and_after_the_boundary_to_the_bit(tiny_dataset):
    seed()
    trainer = make_trainer(DeploysTheTeacher, tiny_dataset, **TWO_AND_TWO)
    epochs = recorded(trainer)
    trainer.run_training()
    state = torch.load(epochs[0][2], weights_only=False)
    assert same(state["network_weights"], epochs[0][0])
    assert state[CHECKPOINT_KEY]["inference_network"] == "student"
    # companions of the first phase have learnt nothing
    networks = [[*network_weights(torch.load(file, weights_only=False))] for _, _, file in epochs[:3]]
    assert networks == [["student"], ["student"], ["teacher", "student"]]
    for done, number in ((1, 2), (1, 1), (2, 1), (2, 2)):
        shorter = make_trainer(DeploysTheTeacher, tiny_dataset, num_epochs=number, supervised_part=0.5, _continued=True)
        with pytest.raises(ValueError, match=f"first 2 epochs are supervised, and now num_epochs is {number}"):
            shorter.load_checkpoint(str(epochs[done - 1][2]))
    for done in (1, 2, 3):
        seed(99)
        resumed = make_trainer(DeploysTheTeacher, tiny_dataset, num_epochs=4, supervised_part=0.0)
        resumed.load_checkpoint(str(epochs[done - 1][2]))
        if done < 3:  # where the phase ends the student is validated, by any name
            assert same(weights(resumed._deployed()), epochs[done - 1][0])
            assert same(weights(resumed.companions.teacher), epochs[done - 1][0])
        later = recorded(resumed)
        assert resumed.supervised_epochs == 2  # that of the training which is continued
        resumed.run_training()
        assert [rate for _, rate, _ in later] == [rate for _, rate, _ in epochs[done:]]
        for (ours, _, _), (theirs, _, _) in zip(later, epochs[done:], strict=True):
            assert same(ours, theirs), done


def test_a_training_continues_where_it_begins_to_load_other_patches_to_the_bit(tiny_dataset):
    seed()
    trainer = make_trainer(nnUNetTrainerOMF, tiny_dataset, num_epochs=4, pretraining=0.5, save_every=1)
    epochs = recorded(trainer)
    trainer.run_training()
    for done in (1, 2, 3):
        seed(99)
        resumed = make_trainer(nnUNetTrainerOMF, tiny_dataset, num_epochs=4, pretraining=0.5)
        resumed.load_checkpoint(str(epochs[done - 1][2]))
        later = recorded(resumed)
        resumed.run_training()
        for (ours, _, _), (theirs, _, _) in zip(later, epochs[done:], strict=True):
            assert same(ours, theirs), done


@pytest.mark.parametrize(
    ("part", "epochs", "expected"), [(0.0, 4, 0), (0.5, 1, 0), (0.5, 3, 1), (0.3, 10, 3), (0.29, 100, 29)]
)
def test_the_phase_has_whole_epochs_and_leaves_one_for_the_method(part, epochs, expected, tiny_dataset):
    trainer = make_trainer(nnUNetTrainerM3HL, tiny_dataset, num_epochs=epochs, supervised_part=part)
    trainer.initialize()
    assert trainer.supervised_epochs == expected
    assert trainer.max_steps == 2 * (epochs - expected)
    steps = range(trainer.max_steps)  # of the method's phase, of which its schedules are parts
    assert [trainer.is_whole(step) for step in steps] == [step >= (1 - trainer.unmixed) * len(steps) for step in steps]
    trainer.rampup, trainer.step = 0.5, len(steps) // 2
    assert trainer.ramp == 1


def test_the_trainers_that_begin_with_it_are_those_of_the_documents():
    parts = {c.__name__.removeprefix("nnUNetTrainer"): c.supervised_part for c in every_trainer(variants=True)}
    begin = {name: part for name, part in parts.items() if part}
    assert begin == dict.fromkeys(("CoM3HL", "CoLearning", "FixMatch"), 0.5)


@pytest.mark.parametrize("part", [1.0, -0.1])
def test_a_part_that_leaves_nothing_is_refused(part, tiny_dataset):
    trainer = make_trainer(nnUNetTrainerM3HL, tiny_dataset, supervised_part=part)
    with pytest.raises(ValueError, match=f"supervised_part is at least 0 and below 1, not {part}"):
        trainer.initialize()


def test_a_warm_up_of_the_learning_rate_is_refused(tiny_dataset):
    with pytest.raises(NotImplementedError, match=r"WarmsUp has supervised_part = 0\.5, but nnU-Net's learning rate"):
        make_trainer(WarmsUp, tiny_dataset).initialize()


@pytest.mark.parametrize("every", [False, True], ids=["one batch", "every batch"])
def test_patches_that_are_not_finite_cost_their_step_and_at_last_end_the_training(every, tiny_dataset):
    seed()
    trainer = make_trainer(nnUNetTrainerM3HL, tiny_dataset, **TWO_AND_TWO)
    trainer.on_train_start()
    trainer.network.train()
    batch = next(trainer.dataloader_train)
    trainer.train_step(batch)
    before = weights(trainer.network)
    batch["data"][0, 0] = np.nan
    assert np.isnan(trainer.train_step(batch)["loss"])
    assert same(weights(trainer.network), before)
    if every:
        text = f"The loss term loss was NaN .* The last labeled images .{batch['keys'][0]}, .* have voxels that are NaN"
        for _ in range(NOT_FINITE_STEPS - 2):
            trainer.train_step(batch)
        with pytest.raises(RuntimeError, match=text):
            trainer.train_step(batch)
    trainer.train_step(next(trainer.dataloader_train))
    assert not same(weights(trainer.network), before)
    assert all(tensor.isfinite().all() for tensor in weights(trainer.network).values())


class TwoWithWarmUp(nnUNetTrainerCPS, nnUNetTrainer_warmup):
    pass


def test_a_warm_up_of_two_networks_begins_where_a_training_is_continued(tiny_dataset):
    trainer = make_trainer(TwoWithWarmUp, tiny_dataset, num_epochs=4)
    trainer.initialize()
    before = trainer.optimizer
    trainer._restart_optimizer()  # as --c does
    assert trainer.optimizer is not before
    assert len(trainer.optimizer.param_groups) == 2
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [trainer.initial_lr / 50] * 2


class WithCosine(nnUNetTrainerCPS, nnUNetTrainerCosAnneal):
    def configure_optimizers(self):
        optimizer, _ = super().configure_optimizers()
        if self.own_groups == 2:
            *parameters, last = optimizer.param_groups[0]["params"]
            optimizer.param_groups[0]["params"] = parameters
            optimizer.add_param_group({"params": [last]})
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.num_epochs)


@pytest.mark.parametrize("own_groups", [1, 2])
def test_schedulers_of_torch_set_the_learning_rate_of_all_networks(own_groups, tiny_dataset):
    WithCosine.own_groups = own_groups
    trainer = make_trainer(WithCosine, tiny_dataset, num_epochs=4)
    trainer.initialize()
    rates = []
    for epoch in range(4):
        trainer.lr_scheduler.step(epoch)
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
    expected = [trainer.initial_lr * (1 + np.cos(np.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert np.allclose(rates, [[rate] * (own_groups + 1) for rate in expected])


def test_a_loss_that_is_not_finite_is_told(tiny_dataset):
    trainer = make_trainer(nnUNetTrainerM3HL, tiny_dataset, **TWO_AND_TWO)
    trainer.health.end_epoch([{"loss": np.nan}, {"loss": 1.0}])
    text = "WARNING: the loss term loss was NaN or infinite in 1 of 2 steps"
    assert text in Path(trainer.log_file).read_text(encoding="utf-8")


def test_the_picture_marks_the_boundary():
    columns = {"epoch": (0.0, 1.0, 2.0), "loss": (1.0, 0.5, 0.4), "dice_student": (np.nan, np.nan, 0.5)}
    marked, plain = (draw(columns, "teacher", boundary) for boundary in (2, 0))
    lines = [[line.get_xdata()[0] for line in axis.lines if line.get_linestyle() == ":"] for axis in marked.axes]
    assert lines == [[1.5]] * len(marked.axes)
    assert not any(line.get_linestyle() == ":" for axis in plain.axes for line in axis.lines)


def test_both_phases_have_the_cases_with_which_the_training_began(tiny_dataset):
    splits = tiny_dataset / "splits_final.json"
    text, found = splits.read_text(encoding="utf-8"), []
    trainer = make_trainer(nnUNetTrainerMeanTeacher, tiny_dataset, **TWO_AND_TWO)
    describe = preflight.describe

    def noted(trainer, base, known, unlabeled):
        found.append((known["training"], sorted(unlabeled.files)))
        return describe(trainer, base, known, unlabeled)

    [fold] = json.loads(text)
    hidden = fold["train"][1:]
    fold |= {"train": fold["train"][:1], "unlabeled": [*fold["unlabeled"], *hidden]}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(preflight, "describe", noted)
            trainer.on_train_start()
            splits.write_text(json.dumps([fold]))
            trainer.current_epoch = 2
            trainer.on_train_epoch_start()
        assert len(found) == 2
        assert found[0] == found[1]
        assert set(hidden) <= set(found[1][0])
        assert set(hidden) <= set(trainer.do_split()[0])  # and the validation at the end
    finally:
        splits.write_text(text)
