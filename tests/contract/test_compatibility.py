"""What users of nnU-Net rely on, with every trainer. docs/compatibility.md has a row for every test of this file."""

import functools
import inspect
import json
import multiprocessing
import multiprocessing.dummy
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from nnunetv2.evaluation.find_best_configuration import find_best_configuration
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.model_sharing.model_import import install_model_from_zip_file
from nnunetv2.paths import nnUNet_raw, nnUNet_results
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import AbstractPrimus
from tiny import make_raw_dataset, plan, preprocess
from tiny_trainers import EVERY_STREAM, every_trainer, make_trainer, seed

from nnunet_ssl.blocks.networks import unwrap
from nnunet_ssl.commands.preprocess import preprocess_unlabeled
from nnunet_ssl.data.augmentation import split_transforms
from nnunet_ssl.data.splits import save_splits
from nnunet_ssl.trainer import SemiSupervisedTrainer
from nnunet_ssl.trainers.nnUNetTrainerCoLearning import nnUNetTrainerCoLearning
from nnunet_ssl.trainers.nnUNetTrainerCoM3HL import nnUNetTrainerCoM3HL
from nnunet_ssl.trainers.nnUNetTrainerCPS import nnUNetTrainerCPS
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3, nnUNetTrainerM3HL
from nnunet_ssl.training.history import NAMES

pytestmark = pytest.mark.slow
every = pytest.mark.parametrize("trainer_class", every_trainer())
one_with_and_one_without_teacher = pytest.mark.parametrize("trainer_class", [nnUNetTrainerM3HL, nnUNetTrainerCPS])


@pytest.fixture(scope="session")
def tiny_special_dataset() -> Path:
    """Dataset706_TinySpecial: much that is rare at once, in 3d_fullres and 3d_lowres.

    Two channels, one of which is normalised inside a mask, thick slices (so dummy 2D augmentation), three samples per
    batch and Dice of the batch.
    """
    make_raw_dataset(
        706, "TinySpecial", cases=5, unlabeled=2, test=1, channels=2, shape=(10, 30, 32), spacing=(4.0, 1.0, 1.0)
    )
    folder = plan(706, ["3d_fullres"], {"3d_fullres": (4, 16, 16)}, batch_size=3, preprocess_cases=False)
    plans = json.loads((folder / "nnUNetPlans.json").read_text(encoding="utf-8"))
    full = plans["configurations"]["3d_fullres"]
    full |= {"batch_dice": True, "use_mask_for_norm": [True, False]}
    low = {"data_identifier": "nnUNetPlans_3d_lowres", "spacing": [4.0, 2.0, 2.0], "patch_size": [4, 12, 16]}
    plans["configurations"]["3d_lowres"] = full | low
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    preprocess(706, ["3d_fullres", "3d_lowres"])
    cases = [f"case_{i:03d}" for i in range(5)]
    save_splits(folder / "splits_final.json", [{"train": cases[:2], "val": cases[2:3], "unlabeled": cases[3:]}])
    preprocess_unlabeled("706", ["3d_fullres", "3d_lowres"], num_processes=1)
    return folder


@pytest.fixture
def in_process(monkeypatch, tmp_path):
    """nnU-Net's functions in this process, with threads for its worker processes, short trainings, own results."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda *_: multiprocessing.dummy)
    settings = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "save_every": 1}
    for name, value in settings.items():
        monkeypatch.setattr(SemiSupervisedTrainer, name, value, raising=False)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))


def started(trainer_class, dataset, configuration="3d_fullres", **settings):
    seed()
    trainer = make_trainer(trainer_class, dataset, configuration, **settings)
    trainer.on_train_start()
    trainer.network.train()
    return trainer


def predicted(model, dataset, folds=(0,), checkpoint="checkpoint_final.pth"):
    """The segmentation of the first test scan, by stock nnU-Net."""
    predictor = nnUNetPredictor(tile_step_size=1, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), folds, checkpoint)
    files = sorted(str(f) for f in Path(nnUNet_raw, dataset.name, "imagesTs").glob("test_000_*"))
    image, properties = SimpleITKIO().read_images(files)
    return predictor.predict_single_npy_array(image, properties)


def trained_and_predicted(trainer_class, dataset, configuration="3d_fullres", **settings):
    seed()
    trainer = make_trainer(trainer_class, dataset, configuration, **settings)
    trainer.run_training()
    labels = set(np.unique(predicted(trainer.output_folder_base, dataset)))
    assert labels <= set(trainer.label_manager.all_labels)  # never the ignore label
    assert trainer.step == trainer.max_steps
    return trainer


def trains(trainer, steps=2):
    """Takes steps; every loss is finite, and every student changes."""
    before = [torch.cat([p.detach().flatten() for p in s.parameters()]).clone() for s in trainer.trained_networks()]
    for _ in range(steps):
        losses = trainer.train_step(next(trainer.dataloader_train))
        assert all(np.isfinite(value) for value in losses.values())
    for student, old in zip(trainer.trained_networks(), before, strict=True):
        assert not torch.equal(torch.cat([p.detach().flatten() for p in student.parameters()]), old)


# ---- labels ----


@every
def test_regions(trainer_class, tiny_regions_dataset):
    trainer = trained_and_predicted(trainer_class, tiny_regions_dataset)
    assert next(trainer.dataloader_val)["target"][0].shape[1] == 2


@every
def test_ignore_label(trainer_class, tiny_ignore_dataset):
    trained_and_predicted(trainer_class, tiny_ignore_dataset)


@every
def test_regions_with_ignore_label(trainer_class, tiny_regions_ignore_dataset):
    trained_and_predicted(trainer_class, tiny_regions_ignore_dataset)


@every
@pytest.mark.parametrize("dataset", ["tiny_ignore_dataset", "tiny_regions_ignore_dataset"])
def test_ignored_voxels_teach_nothing(trainer_class, dataset, request):
    """With no labeled voxel that is annotated, the terms of labeled scans have no gradient."""
    for step in (0, 10**6):  # pretraining as well
        trainer = started(trainer_class, request.getfixturevalue(dataset), **EVERY_STREAM)
        trainer.step = step
        if not trainer.streams()[0]:
            continue
        batch = trainer._to_device(next(trainer.dataloader_train))
        assert largest_gradient_of_labels(trainer, batch) > 0
        for target in batch.target:
            if trainer.label_manager.has_regions:
                target[:, :-1], target[:, -1] = 0, 1
            else:
                target.fill_(trainer.label_manager.ignore_label)
        assert largest_gradient_of_labels(trainer, batch) == 0


def largest_gradient_of_labels(trainer, batch):
    """Of the terms that compare labeled scans with their labels, with respect to the students' weights."""
    largest = 0.0
    for group in trainer.losses(batch):
        for name, value in group.items():
            if name.startswith(("supervised", "labeled")) and value.requires_grad:
                parameters = [p for student in trainer.trained_networks() for p in student.parameters()]
                found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
                largest = max([largest, *(g.abs().max().item() for g in found if g is not None)])
    return largest


# ---- configurations ----


@every
@pytest.mark.parametrize("configuration", ["3d_fullres", "3d_lowres"])
def test_anisotropic_two_channels_mask_normalised_batch_dice_odd_batch(
    trainer_class, configuration, tiny_special_dataset
):
    trainer = trained_and_predicted(trainer_class, tiny_special_dataset, configuration)
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[1]  # dummy 2D augmentation
    batch = next(trainer.dataloader_train)
    images = [batch[name] for name in ("data", "unlabeled") if name in batch]
    assert images
    assert all(image.shape[:2] == (3, 2) for image in images)


def described(transform):
    """Type and settings of a transform and of those inside."""
    inner = getattr(transform, "transforms", None) or filter(None, [getattr(transform, "transform", None)])
    settings = {name: repr(value) for name, value in vars(transform).items() if " at 0x" not in repr(value)}
    return type(transform).__name__, settings, [described(t) for t in inner]


@pytest.mark.parametrize("configuration", ["3d_fullres", "3d_lowres"])
def test_patches_are_augmented_as_by_nnunet(configuration, tiny_special_dataset):
    trainer = started(nnUNetTrainerM3HL, tiny_special_dataset, configuration)
    ours, (stock, _) = trainer.dataloader_train.data_loader, nnUNetTrainer.get_dataloaders(trainer)
    expected = stock.data_loader.transforms
    assert described(ours.labeled.transforms) == described(expected)
    found = (ours.unlabeled.geometry, ours.unlabeled.intensity, ours.unlabeled.masking)
    assert [*map(described, found)] == [*map(described, split_transforms(expected))]


@every
def test_without_deep_supervision(trainer_class, tiny_dataset):
    trainer = started(trainer_class, tiny_dataset, enable_deep_supervision=False)
    trains(trainer)
    assert not any(unwrap(network).decoder.deep_supervision for network in trainer.segmenting_networks().values())


@every
def test_batch_of_one(trainer_class, tiny_dataset, tmp_path, monkeypatch):
    copy = tmp_path / tiny_dataset.name
    shutil.copytree(tiny_dataset, copy)
    plans = json.loads((copy / "nnUNetPlans.json").read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"]["batch_size"] = 1
    (copy / "nnUNetPlans.json").write_text(json.dumps(plans))
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    trainer = started(trainer_class, copy, **EVERY_STREAM)
    assert len(next(trainer.dataloader_train)["unlabeled"]) == 1
    trains(trainer)


@every
def test_cascade_is_refused(trainer_class, tiny_dataset):
    trainer = make_trainer(trainer_class, tiny_dataset, is_cascaded=True)
    with pytest.raises(NotImplementedError, match=f"{trainer_class.__name__} does not support cascades"):
        trainer.initialize()


# their default settings need no stages
OPTIONAL_STAGES = (nnUNetTrainerCoLearning, nnUNetTrainerCoM3HL, nnUNetTrainerM3)


class TinyPrimus(AbstractPrimus):
    """nnU-Net's transformer trainer, with a tiny transformer."""

    @staticmethod
    def build_network_architecture(plans_manager, configuration, inputs, outputs, enable_deep_supervision=True):
        kwargs = {"embed_dim": 24, "patch_embed_size": (8, 8, 8), "num_classes": outputs, "eva_depth": 1}
        return Primus(inputs, eva_numheads=2, input_shape=tuple(configuration.patch_size), **kwargs)


@pytest.mark.parametrize("trainer_class", [*every_trainer(), nnUNetTrainerM3])  # which compares no features
def test_transformer(trainer_class, tiny_dataset):
    # its learning rate has a warm-up, which has no room for a supervised phase
    bases, settings = (trainer_class, TinyPrimus), {"supervised_part": 0.0}
    mixed = types.new_class(f"{trainer_class.__name__}Primus", bases, exec_body=lambda body: body.update(settings))
    if "require_stages" in vars(inspect.getmodule(trainer_class)) and trainer_class not in OPTIONAL_STAGES:
        with pytest.raises(NotImplementedError, match=r"needs a U-Net with encoder stages .* not a Primus"):
            make_trainer(mixed, tiny_dataset).initialize()
        return
    trainer = started(mixed, tiny_dataset, max_gradient_norm=1)
    assert isinstance(trainer.network, Primus)
    trains(trainer)
    supervised_only = types.new_class("WrongOrder", (TinyPrimus, trainer_class))
    with pytest.raises(
        NotImplementedError, match=r"WrongOrder would train with AbstractPrimus.train_step, without unl"
    ):
        make_trainer(supervised_only, tiny_dataset).initialize()


# ---- torch.compile, worker processes, devices ----


@pytest.mark.parametrize("workers", [1, 4])
def test_worker_processes(workers, tiny_dataset, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", str(workers))
    trainer = started(every_trainer()[-1], tiny_dataset)
    try:
        assert trainer.dataloader_train.num_processes == min(workers, os.cpu_count())
        trains(trainer)
    finally:
        trainer.dataloader_train._finish()
        trainer.dataloader_val._finish()


@every
def test_weights_and_biases(trainer_class, tiny_dataset, monkeypatch):
    """nnU-Net's logger, with every call of wandb recorded."""
    logged = {}
    run = types.SimpleNamespace(log=lambda values, **_: logged.update(values), summary={}, config={}, step=0)
    wandb = types.SimpleNamespace(init=lambda **_: run, Image=lambda *_: None)
    monkeypatch.setattr(sys.modules["nnunetv2.training.logging.nnunet_logger"], "wandb", wandb)
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    monkeypatch.setenv("nnUNet_wandb_mode", "offline")
    trainer = make_trainer(trainer_class, tiny_dataset, num_epochs=1)
    trainer.run_training()
    columns = (Path(trainer.output_folder) / "losses.csv").read_text(encoding="utf-8").splitlines()[0].split(",")[1:]
    observed = [name for name in columns if name in NAMES or name.startswith("dice_")]
    groups = {name: "semi_supervised" if name in observed else "losses" for name in columns}
    assert set(groups.values()) == {"semi_supervised", "losses"}
    assert {f"{group}/{name}" for name, group in groups.items()} <= logged.keys()
    assert "train_losses" in logged  # nnU-Net's own


# ---- commands ----


@one_with_and_one_without_teacher
def test_options_of_the_training_command(trainer_class, tiny_dataset, in_process):
    name = trainer_class.__name__
    train = functools.partial(run_training, "701", "3d_fullres", trainer_class_name=name, device=torch.device("cpu"))
    model = Path(nnUNet_results, tiny_dataset.name, f"{name}__nnUNetPlans__3d_fullres")

    train("0", export_validation_probabilities=True)  # --npz
    validation, final = model / "fold_0" / "validation", model / "fold_0" / "checkpoint_final.pth"
    assert [f.name for f in validation.glob("*.npz")] == ["case_002.npz"]
    assert len(json.loads((validation / "summary.json").read_text(encoding="utf-8"))["metric_per_case"]) == 1
    for options in ({}, {"val_with_best": True}):  # --val, --val_best
        shutil.rmtree(validation)
        train("0", only_run_validation=True, **options)
        assert (validation / "summary.json").is_file()

    train("all", pretrained_weights=str(final))  # -pretrained_weights, fold all
    train("0", continue_training=True)  # --c, of a training that has ended
    assert set(np.unique(predicted(model, tiny_dataset, ("all",)))) <= {0, 1}
    shutil.rmtree(model)
    train("0", disable_checkpointing=True)
    assert not list(model.rglob("*.pth"))


@every
def test_pretrained_weights_reach_the_teacher(trainer_class, tiny_dataset, in_process):
    source = started(trainer_class, tiny_dataset)
    source.train_step(next(source.dataloader_train))
    source.logger.local_logger.my_fantastic_logging["mean_fg_dice"].append(0.5)
    source.save_checkpoint(str(Path(source.output_folder) / "weights.pth"))
    seed(1)
    trainer = make_trainer(trainer_class, tiny_dataset)
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(Path(source.output_folder) / "weights.pth"))
    trainer.on_train_start()
    # nnU-Net leaves the last layers out: their shape depends on the classes
    given, head = source.network.state_dict(), "seg_layers"
    students = {"student": trainer.network}
    started_from_them = {k: v for k, v in trainer.segmenting_networks().items() if k != "student_2"} | students
    if trainer_class.__name__ == "nnUNetTrainerCoLearning":
        started_from_them["student_2"] = trainer.companions.student_2
    for network in started_from_them.values():
        weights = network.state_dict()
        assert all(torch.equal(weights[key], given[key]) for key in given if head not in key)
        assert all(torch.equal(weights[key], trainer.network.state_dict()[key]) for key in weights)


@one_with_and_one_without_teacher
def test_sharing_as_zip(trainer_class, tiny_dataset, in_process, tmp_path, monkeypatch):
    name = trainer_class.__name__
    run_training("701", "3d_fullres", "0", name, device=torch.device("cpu"))
    model = f"{tiny_dataset.name}/{name}__nnUNetPlans__3d_fullres"
    expected = predicted(Path(nnUNet_results, model), tiny_dataset)
    export_pretrained_model("701", str(tmp_path / "model.zip"), ("3d_fullres",), name, folds=(0,))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "elsewhere"))
    install_model_from_zip_file(str(tmp_path / "model.zip"))
    assert np.array_equal(predicted(tmp_path / "elsewhere" / model, tiny_dataset), expected)


def test_best_configuration_and_ensemble_of_two_trainers(tiny_dataset, in_process):
    models = []
    for name in ("nnUNetTrainerM3", "nnUNetTrainerMeanTeacher"):
        run_training("701", "3d_fullres", "0", name, export_validation_probabilities=True, device=torch.device("cpu"))
        models.append({"plans": "nnUNetPlans", "configuration": "3d_fullres", "trainer": name})
    find_best_configuration(701, tuple(models), num_processes=1, folds=(0,))
    information = json.loads(
        Path(nnUNet_results, tiny_dataset.name, "inference_information.json").read_text(encoding="utf-8")
    )
    names = list(information["all_results"])
    assert len(names) == 3  # both and their ensemble
    assert any("M3" in name and "MeanTeacher" in name for name in names)


# ---- nnU-Net itself, and the table of all this ----

STOCK = """
import json, multiprocessing.dummy, random, sys
from pathlib import Path
{block}
import numpy as np, torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform, blur_dimension
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

MetaLogger.plot_progress_png = lambda *_: None  # takes longer than the training, as do processes for one scan
multiprocessing.get_context = lambda *_: multiprocessing.dummy
GaussianBlurTransform._benchmark_wrapper = staticmethod(blur_dimension)  # it takes the faster of two ways
torch.set_num_threads(1)
torch.manual_seed(0), np.random.seed(0), random.seed(0)
folder = Path(sys.argv[1])
plans = json.loads((folder / "nnUNetPlans.json").read_text(encoding="utf-8")) | {{"continue_training": False}}
dataset = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
stock = recursive_find_trainer_class_by_name("nnUNetTrainer")
trainer = stock(plans, "3d_fullres", 0, dataset, torch.device("cpu"))
trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 3, 1
trainer.run_training()
predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
image = np.random.default_rng(0).standard_normal((1, 24, 20, 22)).astype(np.float32)
labels = predictor.predict_single_npy_array(image, {{"spacing": [1.0, 1.0, 1.0]}})
state = torch.load(trainer.output_folder + "/checkpoint_final.pth", weights_only=False)
loaded = sorted(name for name in sys.modules if name.startswith("nnunet_ssl") and sys.modules[name])
Path(sys.argv[2]).write_text(json.dumps([
    trainer.logger.get_value("train_losses", None), labels.tolist(), sorted(state),
    [w.double().sum().item() for w in state["network_weights"].values()], loaded,
], default=float))
"""


def test_the_stock_trainer_is_as_it_was(tiny_dataset, tmp_path):
    """Its losses, weights, checkpoint and prediction are the same bits where our package is hidden."""
    results = []
    for block, registered in (("", "0"), ("sys.modules['nnunet_ssl'] = None", "1")):
        environment = {**os.environ, "NNUNET_SSL_NO_AUTOREGISTER": registered}
        if registered == "1":
            environment.pop("nnUNet_extTrainer")
        environment["nnUNet_results"] = str(tmp_path / f"results{registered}")
        file = tmp_path / f"{registered}.json"
        command = [sys.executable, "-c", STOCK.format(block=block), str(tiny_dataset), str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        *values, loaded = json.loads(file.read_text(encoding="utf-8"))
        assert "nnunet_ssl.trainer" not in loaded
        results.append(values)
    assert results[0] == results[1]
