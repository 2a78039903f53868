"""The base trainer: what it does to nnU-Net's loop, whatever the method."""

import csv
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from tiny_trainers import make_trainer, seed
from torch import nn

from nnunet_ssl.blocks.networks import forward_with_features, frozen_copy, logits
from nnunet_ssl.commands.export import export_model
from nnunet_ssl.trainer import SemiSupervisedTrainer, epoch_variants
from nnunet_ssl.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL
from nnunet_ssl.training.checkpoints import CHECKPOINT_KEY
from nnunet_ssl.training.history import NAMES


class TwoGraphs(SemiSupervisedTrainer):
    """Two groups of terms, the second one on the unlabeled images; a companion that is trained is left out."""

    num_epochs = 3
    initial_lr = 0.02
    factor = 0.5

    def losses(self, batch):
        yield {"supervised": self.loss(self.network(batch.image), batch.target)}
        self.between = [p.grad.clone() for p in self.network.parameters() if p.grad is not None]
        output = logits(self.network, batch.unlabeled)
        yield {"small": self.factor * output.square().mean(), "flat": 0.1 * output.abs().mean()}


def started(trainer, dataset, **settings):
    seed()
    made = make_trainer(trainer, dataset, **settings)
    made.on_train_start()
    made.network.train()
    return made


def read_csv(trainer):
    with open(Path(trainer.output_folder) / "losses.csv", encoding="utf-8", newline="") as f:
        return list(csv.DictReader(f))


def test_every_group_is_back_propagated_before_the_next_one_and_the_gradients_add_up(tiny_dataset, monkeypatch):
    trainer = started(TwoGraphs, tiny_dataset)
    raw = next(trainer.dataloader_train)
    batch = trainer._to_device(raw)
    supervised = trainer.loss(trainer.network(batch.image), batch.target)
    first = torch.autograd.grad(supervised, list(trainer.network.parameters()), allow_unused=True)
    output = logits(trainer.network, batch.unlabeled)
    total = trainer.loss(trainer.network(batch.image), batch.target)
    total = total + 0.5 * output.square().mean() + 0.1 * output.abs().mean()
    expected = torch.autograd.grad(total, list(trainer.network.parameters()), allow_unused=True)

    seen = []
    monkeypatch.setattr(
        "nnunet_ssl.trainer.update_weights", lambda *_: seen.extend(p.grad for p in trainer.network.parameters())
    )
    result = trainer.train_step(raw)
    torch.testing.assert_close(trainer.between, [g for g in first if g is not None])
    torch.testing.assert_close(seen, list(expected))
    assert result["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert set(result) == {"loss", "supervised", "small", "flat"}


def test_class_attributes_win_over_what_nnunet_sets_in_its_constructor(tiny_dataset):
    plans = json.loads((tiny_dataset / "nnUNetPlans.json").read_text(encoding="utf-8")) | {"continue_training": False}
    dataset_json = json.loads((tiny_dataset / "dataset.json").read_text(encoding="utf-8"))
    trainer = TwoGraphs(plans, "3d_fullres", 0, dataset_json, torch.device("cpu"))
    assert (trainer.num_epochs, trainer.initial_lr, trainer.weight_decay) == (3, 0.02, 3e-5)
    assert trainer.max_steps == 750


def test_the_gradients_are_clipped_as_in_nnunet(tiny_dataset, monkeypatch):
    clipped = []
    trainer = started(TwoGraphs, tiny_dataset)

    def clip(parameters, norm):
        clipped.append((len([*parameters]), norm))
        return torch.zeros(())

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", clip)
    trainer.train_step(next(trainer.dataloader_train))
    assert clipped == [(len(list(trainer.network.parameters())), 12)]


def test_losses_are_written_for_every_epoch_and_term(tiny_dataset):
    seed()
    trainer = make_trainer(TwoGraphs, tiny_dataset, num_epochs=2)
    trainer.run_training()
    rows = read_csv(trainer)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert list(rows[0])[:5] == ["epoch", "loss", "supervised", "small", "flat"]
    assert set(list(rows[0])[5:]) <= NAMES.keys()
    for row in rows:
        total = sum(float(row[name]) for name in ("supervised", "small", "flat"))
        assert float(row["loss"]) == pytest.approx(total, rel=1e-4)
    assert [float(r["loss"]) for r in rows] == pytest.approx(trainer.logger.get_value("train_losses", None), rel=1e-5)
    log = Path(trainer.log_file).read_text(encoding="utf-8")
    assert "Cases: 2 labeled, 6 unlabeled, 1 for validation." in log
    assert "Batches of 2 labeled and 2 unlabeled patches of [16, 16, 16] voxels; 4 steps." in log
    assert "factor = 0.5" in log
    assert re.findall(r"(\d+) epochs left, until about \d{4}-\d\d-\d\d \d\d:\d\d", log) == ["1"]


class DeploysTheTeacher(nnUNetTrainerM3HL):
    def inference_network(self):
        return self.companions.teacher


def test_a_deployed_teacher_is_validated_and_the_student_kept(tiny_dataset, tmp_path, monkeypatch):
    trainer = started(DeploysTheTeacher, tiny_dataset)
    for _ in range(2):
        trainer.train_step(next(trainer.dataloader_train))
    batch = next(trainer.dataloader_val)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        shown = trainer.validation_step({k: [t.clone() for t in v] if k == "target" else v for k, v in batch.items()})
        teacher = trainer.loss(trainer.companions.teacher(batch["data"]), batch["target"])
        student = trainer.loss(trainer.network(batch["data"]), batch["target"])
    assert shown["loss"] == pytest.approx(teacher.item(), rel=1e-5)
    assert shown["loss"] != pytest.approx(student.item(), rel=1e-5)
    assert trainer.network.training  # the student was not switched to eval mode in passing

    validated = []
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda self, _: validated.append(self.network))
    trainer.perform_actual_validation()
    assert validated == [trainer.companions.teacher]

    trainer.logger.local_logger.my_fantastic_logging["mean_fg_dice"].append(0.0)
    trainer.save_checkpoint(str(tmp_path / "c.pth"))
    state = torch.load(tmp_path / "c.pth", weights_only=False)
    ours = state[CHECKPOINT_KEY]
    assert ours["inference_network"] == "teacher"
    name = "encoder.stages.0.0.convs.0.conv.weight"
    assert torch.equal(state["network_weights"][name], trainer.companions.teacher.state_dict()[name])
    assert torch.equal(ours["student"][name], trainer.network.state_dict()[name])
    # the deployed weights are stored once, not a second time under companions
    shared = state["network_weights"][name].untyped_storage().data_ptr()
    assert ours["companions"]["teacher"][name].untyped_storage().data_ptr() == shared


class DeploysTheSecond(nnUNetTrainerCPS):
    def inference_network(self):
        return self.companions.student_2


def test_a_deployed_second_student_learns_in_train_mode_after_its_validation(tiny_dataset):
    trainer = started(DeploysTheSecond, tiny_dataset)
    trainer.on_validation_epoch_start()
    assert not trainer.companions.student_2.training
    trainer.on_train_epoch_start()
    assert trainer.companions.student_2.training


def test_pretrained_weights_reach_the_companions(tiny_dataset):
    seed()
    trainer = make_trainer(nnUNetTrainerM3HL, tiny_dataset)
    trainer.initialize()
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.fill_(0.01)  # what nnU-Net does to self.network for -pretrained_weights
    trainer.on_train_start()
    assert all((p == 0.01).all() for p in trainer.companions.teacher.parameters())


def test_a_stock_checkpoint_starts_the_companions_from_its_weights(tiny_dataset, tmp_path):
    stock = started(nnUNetTrainer, tiny_dataset)
    stock.save_checkpoint(str(tmp_path / "stock.pth"))
    trainer = make_trainer(nnUNetTrainerM3HL, tiny_dataset)
    trainer.load_checkpoint(str(tmp_path / "stock.pth"))
    weights = stock.network.state_dict()
    assert all(torch.equal(w, weights[name]) for name, w in trainer.companions.teacher.state_dict().items())
    assert trainer.step == trainer.current_epoch * trainer.num_iterations_per_epoch == 2


def test_disabled_checkpointing_writes_nothing(tiny_dataset, tmp_path):
    trainer = started(nnUNetTrainerM3HL, tiny_dataset, disable_checkpointing=True)
    trainer.save_checkpoint(str(tmp_path / "c.pth"))
    assert list(tmp_path.iterdir()) == []


class TwoStudents(SemiSupervisedTrainer):
    """A second network that is trained as well."""

    def build_companions(self):
        return {"second": frozen_copy(self.network).requires_grad_(True)}

    def losses(self, batch):
        yield {"first": self.loss(self.network(batch.image), batch.target)}
        yield {"second": self.loss(self.companions.second(batch.image), batch.target)}


def test_a_second_student_is_trained_and_starts_from_pretrained_weights(tiny_dataset):
    seed()
    trainer = make_trainer(TwoStudents, tiny_dataset)
    trainer.initialize()
    with torch.no_grad():
        for parameter in trainer.network.parameters():
            parameter.mul_(0.9)
    trainer.on_train_start()
    second = trainer.companions.second
    pairs = list(zip(trainer.network.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    trainer.train_step(next(trainer.dataloader_train))
    # same weights, same batch, same optimizer: the same step
    assert all(torch.equal(a, b) for a, b in pairs)
    assert any((p != q).any() for p, q in zip(second.parameters(), make_trainer_weights(trainer), strict=True))
    assert len(trainer.trained_networks()) == len(trainer.optimizer.param_groups) == 2


def make_trainer_weights(trainer):
    """The second student's weights before its step, undone from the optimizer's momentum (Nesterov, first step)."""
    group = trainer.optimizer.param_groups[1]
    scale = group["lr"] * (1 + group["momentum"])
    state = trainer.optimizer.state
    return [p + scale * state[p]["momentum_buffer"] if p in state else p for p in group["params"]]


class WithHead(SemiSupervisedTrainer):
    """A companion that is trained but does not segment: it takes bottleneck features."""

    def build_companions(self):
        return {"head": nn.Conv3d(16, 2, 1)}

    def losses(self, batch):
        output, skips = forward_with_features(self.network, torch.cat([batch.image, batch.unlabeled]))
        yield {
            "supervised": self.loss([scale[: len(batch.image)] for scale in output], batch.target),
            "head": self.companions.head(skips[-1]).square().mean(),
        }


def test_a_head_is_trained_observed_validated_resumed_and_left_out_of_an_export(tiny_dataset, tmp_path, monkeypatch):
    trainer = started(WithHead, tiny_dataset)
    before = trainer.companions.head.weight.detach().clone()
    trainer.train_step(next(trainer.dataloader_train))
    assert not torch.equal(trainer.companions.head.weight, before)

    trainer = make_trainer(WithHead, tiny_dataset)
    trainer.run_training()
    assert {"head", "feature_distance"} <= read_csv(trainer)[0].keys()
    assert "agreement" not in read_csv(trainer)[0]

    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    resumed = [make_trainer(WithHead, tiny_dataset, num_epochs=3) for _ in range(2)]
    steps = []
    for made in resumed:
        made.load_checkpoint(str(file))
        assert torch.equal(made.companions.head.weight, trainer.companions.head.weight)
        momentum = [t.optimizer.state[t.companions.head.weight]["momentum_buffer"] for t in (made, trainer)]
        assert torch.equal(*momentum)
        made.on_train_start()
        made.network.train()
        steps.append(made.train_step(next(made.dataloader_train)))
    assert steps[0] == steps[1]

    monkeypatch.setattr("nnunet_ssl.commands.export.recursive_find_trainer_class_by_name", lambda name: WithHead)
    assert export_model("701", "3d_fullres", "WithHead", tmp_path / "exported") == {"fold_0": "student"}
    exported = torch.load(tmp_path / "exported" / "fold_0" / "checkpoint_final.pth", weights_only=False)
    assert exported["network_weights"].keys() == trainer.network.state_dict().keys()


class SometimesTerms(SemiSupervisedTrainer):
    """A term in every step, one in every second step, and one from the second epoch on; groups may be empty."""

    def losses(self, batch):
        yield {"always": self.constant(batch, 1)}
        yield {"second": self.constant(batch, 2)} if self.step % 2 else {}
        if self.current_epoch:
            yield {"late": self.constant(batch, 3)}

    def constant(self, batch, value):
        return 0 * self.network(batch.image)[0].mean() + value


def test_terms_may_be_missing_in_some_steps_or_epochs(tiny_dataset):
    trainer = make_trainer(SometimesTerms, tiny_dataset)
    trainer.run_training()
    first, last = read_csv(trainer)
    assert (first["always"], first["second"], first["late"]) == ("1.0", "2.0", "")
    assert (last["always"], last["second"], last["late"]) == ("1.0", "2.0", "3.0")  # means of the steps that have it
    assert (first["loss"], last["loss"]) == ("2.0", "5.0")


def test_a_step_without_any_term_is_refused_in_words(tiny_dataset):
    trainer = started(SometimesTerms, tiny_dataset)
    trainer.losses = lambda batch: iter(())
    with pytest.raises(RuntimeError, match=r"SometimesTerms\.losses gave no term in step 0"):
        trainer.train_step(next(trainer.dataloader_train))


def test_the_log_says_that_pretrained_weights_have_no_heads(tiny_dataset, tmp_path):
    stock = make_trainer(nnUNetTrainer, tiny_dataset)
    stock.initialize()
    for name in ("mean_fg_dice", "ema_fg_dice"):
        stock.logger.local_logger.my_fantastic_logging[name].append(0.5)
    stock.save_checkpoint(str(tmp_path / "stock.pth"))
    trained = {name: weights + 0.1 for name, weights in stock.network.state_dict().items()}
    said = []
    for loaded in ("nothing", "heads too", "as by nnUNetv2_train"):  # trainings of one second share a log
        trainer = make_trainer(nnUNetTrainerM3HL, tiny_dataset)
        trainer.initialize()
        if loaded == "as by nnUNetv2_train":
            load_pretrained_weights(trainer.network, str(tmp_path / "stock.pth"))
        elif loaded == "heads too":
            trainer.network.load_state_dict(trained)
        trainer.on_train_start()
        said.append(
            "-pretrained_weights leaves out the segmentation heads"
            in Path(trainer.log_file).read_text(encoding="utf-8")
        )
    assert said == [False, False, True]


def test_scans_that_are_not_preprocessed_are_named_in_the_log(tiny_dataset, tmp_path, monkeypatch):
    images = tmp_path / "Dataset701_Tiny" / "imagesUn"
    images.mkdir(parents=True)
    for case in ("unlabeled_000", "late"):
        (images / f"{case}_0000.nii.gz").touch()
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    trainer = started(TwoGraphs, tiny_dataset)
    log = Path(trainer.log_file).read_text(encoding="utf-8")
    assert "WARNING: 1 scan of" in log
    assert "Run: nnunet-ssl preprocess -d 701 -c 3d_fullres -p nnUNetPlans" in log
    assert f"not in {images}: given with -i, or removed since (unlabeled_001" in log
    assert "unlabeled_000" not in log


def test_raw_scans_that_cannot_be_read_are_no_reason_to_end(tiny_dataset, tmp_path, monkeypatch):
    folder = tmp_path / "Dataset701_Tiny"
    for name in ("imagesUn", "imagesTs"):
        (folder / name).mkdir(parents=True)
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    find = Path.iterdir

    def iterdir(path):
        if path.parent == folder:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return find(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    log = Path(started(TwoGraphs, tiny_dataset).log_file).read_text(encoding="utf-8")
    assert "WARNING: nobody knows whether all unlabeled scans are preprocessed" in log


# ---- what is refused, before any epoch ----


def test_cascades_are_refused_in_words(tiny_dataset):
    trainer = make_trainer(nnUNetTrainerM3HL, tiny_dataset, is_cascaded=True)
    with pytest.raises(NotImplementedError, match="nnUNetTrainerM3HL does not support cascades"):
        trainer.initialize()


def copied(dataset, tmp_path, monkeypatch, folds):
    copy = tmp_path / dataset.name
    shutil.copytree(dataset, copy)
    (copy / "splits_final.json").write_text(json.dumps(folds))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    return copy


def test_without_unlabeled_cases_the_error_has_both_ways_to_provide_them(tiny_dataset, tmp_path, monkeypatch):
    copy = copied(tiny_dataset, tmp_path, monkeypatch, [{"train": ["case_000", "case_001"], "val": ["case_002"]}])
    shutil.rmtree(copy / "nnUNetPlans_3d_fullres_unlabeled")
    with pytest.raises(FileNotFoundError) as error:
        make_trainer(nnUNetTrainerM3HL, copy).on_train_start()
    assert "nnunet-ssl preprocess -d 701 -c 3d_fullres -p nnUNetPlans\n" in str(error.value)
    assert "Dataset701_Tiny/imagesUn, as CASE_0000.nii.gz" in str(error.value)
    assert "nnunet-ssl split -d 701" in str(error.value)


@pytest.mark.parametrize(("kind", "case"), [("training", "case_000"), ("validation", "case_002")])
def test_an_unlabeled_case_that_is_in_use_already_is_refused(kind, case, tiny_dataset, tmp_path, monkeypatch):
    fold = {"train": ["case_000", "case_001"], "val": ["case_002"], "unlabeled": [case, "case_003"]}
    copy = copied(tiny_dataset, tmp_path, monkeypatch, [fold])
    with pytest.raises(ValueError, match=f"splits_final.json: unlabeled cases of fold 0 are {kind} cases too:.*{case}"):
        make_trainer(nnUNetTrainerM3HL, copy).on_train_start()


@pytest.mark.parametrize("where", ["imagesTs", "the fold"])
def test_a_scan_that_became_a_test_scan_is_no_unlabeled_one(where, tiny_dataset, tmp_path, monkeypatch):
    fold = {"train": ["case_000", "case_001"], "val": ["case_002"], "test": ["unlabeled_000"] * (where == "the fold")}
    copy = copied(tiny_dataset, tmp_path, monkeypatch, [fold])
    if where == "imagesTs":
        images = tmp_path / "raw" / "Dataset701_Tiny" / "imagesTs"
        images.mkdir(parents=True)
        (images / "unlabeled_000_0000.nii.gz").touch()
        monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    words = "are in .*imagesTs now: unlabeled_000" if where == "imagesTs" else "test cases too: unlabeled_000"
    with pytest.raises(ValueError, match=words):
        make_trainer(nnUNetTrainerM3HL, copy).on_train_start()
    own = copy / "nnUNetPlans_3d_fullres_unlabeled"
    settings = json.loads(own.with_suffix(".json").read_text())
    own.with_suffix(".json").write_text(json.dumps(settings | {"transductive": ["unlabeled_000"]}))
    make_trainer(nnUNetTrainerM3HL, copy).on_train_start()  # somebody wanted it so


def test_a_labeled_case_may_have_the_name_of_a_test_scan(tiny_dataset, tmp_path, monkeypatch):
    images = tmp_path / "Dataset701_Tiny" / "imagesTs"
    images.mkdir(parents=True)
    hidden = json.loads((tiny_dataset / "splits_final.json").read_text())[0]["unlabeled"]
    for case in hidden:
        (images / f"{case}_0000.nii.gz").touch()  # as nnU-Net allows; its label is hidden here for a benchmark
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    assert hidden
    assert set(hidden) <= set(started(TwoGraphs, tiny_dataset)._unlabeled.files)


def test_a_fold_that_does_not_exist_is_refused_instead_of_drawn_at_random(tiny_dataset):
    with pytest.raises(ValueError, match=r"Fold 4 does not exist: .*splits_final\.json has the folds 0 to 0"):
        make_trainer(nnUNetTrainerM3HL, tiny_dataset, fold=4).on_train_start()


# ---- variants ----


def test_any_number_of_epochs_has_a_variant():
    find = epoch_variants({"__name__": "m", "nnUNetTrainerM3HL": nnUNetTrainerM3HL, "frozen_copy": frozen_copy})
    variant = find("nnUNetTrainerM3HL_37epochs")
    assert issubclass(variant, nnUNetTrainerM3HL)
    assert (variant.__name__, variant.num_epochs) == ("nnUNetTrainerM3HL_37epochs", 37)
    for name in (
        "nnUNetTrainerM3HL_0epochs",
        "nnUNetTrainerM3HL_xepochs",
        "nnUNetTrainerM3HL_5",
        "frozen_copy_5epochs",
    ):
        with pytest.raises(AttributeError, match=name):
            find(name)


def test_the_supervised_baseline_has_them_too(tiny_dataset):
    variant = recursive_find_trainer_class_by_name("nnUNetTrainer_7epochs")
    assert variant.__name__ == "nnUNetTrainer_7epochs"
    trainer = make_trainer(variant, tiny_dataset, num_epochs=7)
    assert isinstance(trainer, nnUNetTrainer)
    assert not isinstance(trainer, SemiSupervisedTrainer)
    plans = json.loads((tiny_dataset / "nnUNetPlans.json").read_text(encoding="utf-8")) | {"continue_training": False}
    dataset_json = json.loads((tiny_dataset / "dataset.json").read_text(encoding="utf-8"))
    made = variant(plans, "3d_fullres", 0, dataset_json, torch.device("cpu"))
    assert made.num_epochs == 7
    assert made.my_init_kwargs["configuration"] == "3d_fullres"
    assert recursive_find_trainer_class_by_name("nnUNetTrainer_5epochs").__module__.startswith("nnunetv2")


# ---- separate processes: workers, interruption, killing ----

SCRIPT = """
if __name__ == "__main__":  # the workers, which import this file, need nothing of what follows
    import multiprocessing, sys
    multiprocessing.set_start_method("forkserver")  # it pickles what spawning does, as on Windows and macOS,
    multiprocessing.set_forkserver_preload(["nnunet_ssl.trainer"])  # but imports nnU-Net once for all workers
    sys.path.insert(0, {tests!r})
    from pathlib import Path
    import torch
    from tiny_trainers import make_trainer, seed, draw_nothing
    from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL
    torch.set_num_threads(1)
    draw_nothing()
    seed()
    settings = dict(num_iterations_per_epoch=3, num_epochs=4, supervised_part=0.25)
    trainer = make_trainer(nnUNetTrainerM3HL, Path({dataset!r}), **settings)
    trainer.run_training()
    print("finished", flush=True)
"""


def kill_in_epoch(trainer):
    original = trainer.train_step

    def step(batch):
        if trainer.step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(batch)

    trainer.train_step = step


def kill_in_write(trainer):
    original = torch.save

    def save(state, file):
        original(state, file)
        if trainer.current_epoch == 2 and not hasattr(file, "getvalue"):
            data = Path(file).read_bytes()
            Path(file).write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save


def losses_of(folder):
    with open(folder / "losses.csv", encoding="utf-8", newline="") as f:
        return list(csv.reader(f))


@pytest.fixture(scope="module")
def uninterrupted(tiny_dataset, tmp_path_factory):
    results = tmp_path_factory.mktemp("uninterrupted") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_ssl_seed", "0")
        process = faults.start(tiny_dataset, results)
        assert faults.finish(process) == 0, process.log.read_text(encoding="utf-8")
    return losses_of(faults.fold_folder(tiny_dataset, results))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the trainings")
@pytest.mark.parametrize("kill", [kill_in_epoch, kill_in_write])
def test_a_killed_training_continues_with_the_same_losses(kill, uninterrupted, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_ssl_seed", "0")
    results = tmp_path / "results"
    folder = faults.fold_folder(tiny_dataset, results)
    process = faults.start(tiny_dataset, results, inside=kill)
    assert faults.finish(process) == -signal.SIGKILL, process.log.read_text(encoding="utf-8")
    for checkpoint in folder.glob("checkpoint_*.pth"):
        torch.load(checkpoint, weights_only=False)  # whatever has a checkpoint's name is whole

    monkeypatch.setenv("nnUNet_ssl_seed", "1")  # the random numbers are those of the checkpoint
    process = faults.start(tiny_dataset, results, continued=True)
    assert faults.finish(process) == 0, process.log.read_text(encoding="utf-8")
    assert losses_of(folder) == uninterrupted
    assert not list(folder.glob(".*"))  # no temporary file of the killed process
    assert len(uninterrupted) == 5


def children(pid):
    return [int(p.name) for p in Path("/proc").iterdir() if p.name.isdecimal() and parent(p) == pid]


def parent(process):
    try:
        return int((process / "stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[1])
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the process table from /proc")
def test_two_workers_serve_both_phases_and_end_with_the_training(tiny_dataset, tmp_path):
    file = tmp_path / "script.py"
    file.write_text(SCRIPT.format(tests=str(Path(__file__).parent), dataset=str(tiny_dataset)))
    environment = {**os.environ, "nnUNet_results": str(tmp_path), "OMP_NUM_THREADS": "1", "nnUNet_n_proc_DA": "2"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8"}
    process = subprocess.Popen([sys.executable, str(file)], env=environment, start_new_session=True, **pipes)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert "finished" in output
    (folder,) = tmp_path.glob("Dataset701_Tiny/nnUNetTrainerM3HL__nnUNetPlans__3d_fullres/fold_0")
    columns, *epochs = losses_of(folder)
    pseudo = [row[columns.index("pseudo")] for row in epochs]
    assert [value != "" for value in pseudo] == [False, True, True, True]  # after one supervised epoch
    deadline = time.time() + 30  # the last to go, Python's own tracker of resources, sees the end of the others first
    while faults.group(process.pid) and time.time() < deadline:
        time.sleep(0.1)
    assert faults.group(process.pid) == []


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the process table from /proc")
def test_control_c_leaves_no_worker_behind(tiny_dataset, tmp_path):
    in_step = tmp_path / "in_step"

    def stay_in_a_step(trainer):  # matplotlib may swallow the exception where an epoch's pictures are drawn
        def train_step(batch):
            in_step.touch()
            time.sleep(faults.PATIENCE)

        trainer.train_step = train_step

    process = faults.start(tiny_dataset, tmp_path / "results", workers=2, inside=stay_in_a_step)
    try:
        assert faults.wait_for(in_step.is_file, process)
        workers = children(process.pid)
        assert len(workers) >= 3  # two for training, one for validation
        os.kill(process.pid, signal.SIGINT)
        assert faults.finish(process) == 1
    finally:
        process.kill()
    assert "KeyboardInterrupt" in process.log.read_text(encoding="utf-8")
    assert faults.group(process.pid) == []


def test_an_error_ends_the_workers_though_the_process_goes_on(tiny_dataset, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    trainer, workers = make_trainer(nnUNetTrainerM3HL, tiny_dataset), []

    def broken(batch):
        workers.extend(multiprocessing.active_children())
        raise RuntimeError("broken")

    trainer.train_step = broken
    with pytest.raises(RuntimeError, match="broken"):
        trainer.run_training()
    assert len(workers) >= 3  # two for training, one for validation
    assert not [worker for worker in workers if worker.is_alive()]


def test_the_method_in_the_documents_is_the_trainer_as_it_is():
    root = Path(__file__).parents[1]
    shown = (root / "docs" / "adding_a_method.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert (root / "trainers" / "nnUNetTrainerMeanTeacher.py").read_text(encoding="utf-8").endswith(shown)


def test_what_is_no_fault_of_the_results_folder_is_not_blamed_on_it(tiny_dataset, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("the server of Weights & Biases is away")

    monkeypatch.setattr("nnunetv2.training.logging.nnunet_logger.MetaLogger.__init__", offline)
    with pytest.raises(ConnectionError, match=r"^the server of Weights & Biases is away$"):
        make_trainer(nnUNetTrainerM3HL, tiny_dataset)
