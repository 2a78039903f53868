"""A supervised model in place of the supervised phase: the second phase starts the same, and no other model will do."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_trainers import make_trainer, seed

from nnunet_ssl.blocks.networks import unwrap
from nnunet_ssl.cli import main
from nnunet_ssl.commands.start_from import last_epochs, require_known_cases, require_same
from nnunet_ssl.trainer import SemiSupervisedTrainer
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL
from nnunet_ssl.training.preflight import only_training

OURS = "nnUNetTrainerM3HL_4epochs"
ARGUMENTS = ["start-from", "-d", "701", "-c", "3d_fullres", "-f", "0", "-tr", OURS]


@pytest.fixture(scope="module")
def supervised(tiny_dataset, tmp_path_factory):
    """Results of nnUNetTrainer, of two epochs."""
    results = tmp_path_factory.mktemp("supervised")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(results))
        seed()
        make_trainer(nnUNetTrainer, tiny_dataset).run_training()
    return results


@pytest.fixture
def results(supervised, tmp_path, monkeypatch):
    """A copy of these results; two of the four epochs of M3HL are supervised."""
    folder = tmp_path / "results"
    shutil.copytree(supervised, folder)
    monkeypatch.setattr(SemiSupervisedTrainer, "supervised_part", 0.5)
    monkeypatch.setenv("nnUNet_results", str(folder))
    return folder


def model(results, trainer="nnUNetTrainer"):
    return results / "Dataset701_Tiny" / f"{trainer}__nnUNetPlans__3d_fullres"


def weights(network):
    return {name: tensor.clone() for name, tensor in unwrap(network).state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def continued(checkpoint, name=OURS):
    trainer = get_trainer_from_args("701", "3d_fullres", 0, name, device=torch.device("cpu"), continue_training=True)
    trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 2, 1
    trainer.load_checkpoint(str(checkpoint))
    return trainer


def first_losses(trainer):
    """Of the first step behind the boundary, on the batch and with the masks of one seed."""
    trainer._resume_random_state = None
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    seed(3)
    return trainer.train_step(next(trainer.get_dataloaders()[0]))


def test_the_second_phase_starts_as_behind_a_supervised_phase(results, tiny_dataset, capsys):
    assert main([*ARGUMENTS, "--model", "nnUNetTrainer"]) == 0
    written = model(results, OURS) / "fold_0/checkpoint_latest.pth"
    said = capsys.readouterr().out
    assert f"nnUNetv2_train 701 3d_fullres 0 -tr {OURS} -p nnUNetPlans --c" in said
    assert "Isensee" not in said  # nnU-Net's citation
    assert "Trying" not in said  # its search for the trainer
    ours = continued(written)
    assert (ours.current_epoch, ours.supervised_epochs, ours.step) == (2, 2, 0)
    final = torch.load(model(results) / "fold_0/checkpoint_final.pth", weights_only=False)
    for network in (ours.network, ours.companions.teacher):
        assert same(weights(network), final["network_weights"])  # the segmentation heads too
    ours_first = first_losses(ours)

    seed()
    whole = make_trainer(nnUNetTrainerM3HL, tiny_dataset, num_epochs=4, supervised_part=0.5)
    save = whole.save_checkpoint
    boundary = Path(whole.output_folder) / "boundary.pth"
    whole.on_train_epoch_end = lambda outputs, end=whole.on_train_epoch_end: (
        end(outputs),
        save(str(boundary)) if whole.current_epoch == 1 else None,
    )
    whole.run_training()
    within = continued(boundary)
    assert same(weights(within.network), weights(continued(written).network))
    within_first = first_losses(within)
    assert ours_first == within_first


def test_the_second_phase_trains_to_its_end_and_keeps_the_models_curves(results):
    assert main([*ARGUMENTS, "--model", str(model(results))]) == 0
    trainer = continued(model(results, OURS) / "fold_0/checkpoint_latest.pth")
    seen = []
    trainer.on_epoch_start = lambda start=trainer.on_epoch_start: (seen.append(trainer.current_epoch), start())
    trainer.run_training()
    assert seen == [2, 3]
    assert trainer.step == 4
    final = torch.load(model(results) / "fold_0/checkpoint_final.pth", weights_only=False)
    assert trainer.logger.get_value("train_losses", step=None)[:2] == final["logging"]["train_losses"]
    assert "-pretrained_weights leaves out" not in Path(trainer.log_file).read_text(encoding="utf-8")


def test_without_a_supervised_part_the_whole_training_is_the_second_phase(results, monkeypatch):
    monkeypatch.setattr(SemiSupervisedTrainer, "supervised_part", 0.0)
    assert main([*ARGUMENTS, "--model", "nnUNetTrainer"]) == 0
    trainer = continued(model(results, OURS) / "fold_0/checkpoint_latest.pth")
    assert (trainer.current_epoch, trainer.step, trainer.max_steps) == (0, 0, 8)
    trainer.run_training()
    assert trainer.step == 8
    # the heads are the model's
    assert "-pretrained_weights leaves out" not in Path(trainer.log_file).read_text(encoding="utf-8")


@pytest.mark.parametrize(("number", "expected"), [(0, []), (2, [2, 3]), (5, [1, 1, 1, 2, 3])])
def test_the_curves_are_those_of_the_models_last_epochs(number, expected):
    assert last_epochs({"lrs": [1, 2, 3]}, number) == {"lrs": expected}


def changed(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def other_labels(state):
    state["init_args"]["dataset_json"]["labels"] = {"background": 0, "other": 1}


def other_channels(state):
    state["init_args"]["dataset_json"]["channel_names"] = {"0": "T1", "1": "T2"}


def other_spacing(state):
    state["init_args"]["plans"]["configurations"]["3d_fullres"]["spacing"] = [9.0, 9.0, 9.0]


def other_weights(state):
    name = next(iter(state["network_weights"]))
    state["network_weights"][name] = state["network_weights"][name][:1]


def other_fold(state):
    state["init_args"]["fold"] = 2  # as `export` leaves it, when it makes several networks folds 0, 1, ...


REFUSED = {
    "fold": (other_fold, "was trained as fold 2 of 3d_fullres, not as fold 0 of 3d_fullres"),
    "labels": (other_labels, "was trained with another labels than that of Dataset701_Tiny"),
    "channels": (other_channels, "was trained with another channel_names than"),
    "spacing": (other_spacing, "was trained with another spacing than"),
    "weights": (other_weights, f"the network is not that of {OURS} with nnUNetPlans, 3d_fullres"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_is_refused(name, results, capsys):
    change, message = REFUSED[name]
    file = model(results) / "fold_0/checkpoint_final.pth"
    state = torch.load(file, weights_only=False)
    change(state)
    torch.save(state, file)
    assert main([*ARGUMENTS, "--model", "nnUNetTrainer"]) == 1
    assert message in capsys.readouterr().err
    assert not list((results / "Dataset701_Tiny").rglob(f"{OURS}*/fold_0/checkpoint*"))


@pytest.mark.parametrize("scheme", ["CTNormalization", "ZScoreNormalization"])
def test_other_statistics_count_where_they_normalize(scheme, tiny_dataset, tmp_path):
    plans, dataset_json = (
        json.loads((tiny_dataset / f"{name}.json").read_text()) for name in ("nnUNetPlans", "dataset")
    )
    plans["configurations"]["3d_fullres"]["normalization_schemes"] = [scheme]
    (tmp_path / "dataset.json").write_text(json.dumps(dataset_json))
    (tmp_path / "nnUNetPlans.json").write_text(json.dumps(plans))
    plans["foreground_intensity_properties_per_channel"]["0"]["mean"] = -1000
    made = {"plans": plans, "dataset_json": dataset_json, "configuration": "3d_fullres"}
    words = "was trained with another foreground_intensity_properties_per_channel than"
    refusal = pytest.raises(ValueError, match=words) if scheme == "CTNormalization" else nullcontext()
    with refusal:
        require_same(Path("model.pth"), made, "3d_fullres", tmp_path, "nnUNetPlans")


def test_a_model_of_other_cases_is_refused(results, tiny_dataset, capsys):
    splits = tiny_dataset / "splits_final.json"
    other = tiny_dataset.with_name("Dataset798_Others")
    other.mkdir()
    try:
        folds = json.loads(splits.read_text())
        folds[0]["train"] = [*folds[0]["train"], "case_of_others"]
        (other / "splits_final.json").write_text(json.dumps(folds))
        file = model(results) / "fold_0/checkpoint_final.pth"
        state = torch.load(file, weights_only=False)
        state["init_args"]["plans"]["dataset_name"] = other.name
        torch.save(state, file)
        assert main([*ARGUMENTS, "--model", "nnUNetTrainer"]) == 1
        assert "may have seen labels that this fold must not know: case_of_others." in capsys.readouterr().err
        (other / "splits_final.json").unlink()
        assert main([*ARGUMENTS, "--model", "nnUNetTrainer"]) == 1
        assert "its training cases are not known" in capsys.readouterr().err
    finally:
        shutil.rmtree(other)


def test_cases_that_a_checkpoint_names_need_no_fold_of_its_own(tiny_dataset):
    cases = json.loads((tiny_dataset / "splits_final.json").read_text())[0]["train"]
    for learnt in (cases, [*cases, "hidden"]):
        refusal = pytest.raises(ValueError, match="must not know: hidden") if "hidden" in learnt else nullcontext()
        with refusal:
            require_known_cases(Path("model.pth"), 0, "all", tiny_dataset, "Dataset700_Elsewhere", learnt)
    with pytest.raises(ValueError, match="Fold -1 does not exist"):
        require_known_cases(Path("model.pth"), -1, 0, tiny_dataset, "Dataset700_Elsewhere", cases)


def test_a_stock_model_of_more_labels_than_the_fold_has_now_is_refused(results, tiny_dataset, capsys):
    splits = tiny_dataset / "splits_final.json"
    before = splits.read_text()
    folds = json.loads(before)
    folds[0]["unlabeled"] = [*folds[0].get("unlabeled", []), folds[0]["train"].pop()]
    try:
        splits.write_text(json.dumps(folds))
        assert main([*ARGUMENTS, "--model", "nnUNetTrainer"]) == 1
    finally:
        splits.write_text(before)
    assert "has learnt labels that fold 0 of" in capsys.readouterr().err
    assert not model(results, OURS).exists()


def test_a_running_training_is_left_alone(results, capsys):
    fold = model(results, OURS) / "fold_0"
    fold.mkdir(parents=True)
    with only_training(str(fold), 0):
        assert main([*ARGUMENTS, "--model", "nnUNetTrainer", "--overwrite"]) == 1
    assert f"has been training in {fold}" in capsys.readouterr().err
    assert not list(fold.glob("checkpoint*"))


def test_the_training_itself_is_no_model_by_any_name(results, capsys, monkeypatch):
    fold = model(results, OURS) / "fold_0"
    shutil.copytree(model(results) / "fold_0", fold)
    monkeypatch.chdir(fold.parent)
    assert main([*ARGUMENTS, "--model", ".", "--overwrite"]) == 1
    assert "is of the training itself" in capsys.readouterr().err
    assert (fold / "checkpoint_final.pth").is_file()


def test_a_missing_model_and_a_trainer_of_nnunet_are_named(results, capsys):
    assert main([*ARGUMENTS, "--model", "nnUNetTrainerNoMirroring"]) == 1
    assert "checkpoint_final.pth is missing. --model is a trainer, or the folder" in capsys.readouterr().err
    stock = [word if word != OURS else "nnUNetTrainerNoMirroring" for word in ARGUMENTS]
    assert main([*stock, "--model", "nnUNetTrainer"]) == 1
    assert "nnUNetTrainerNoMirroring is not a semi-supervised trainer" in capsys.readouterr().err
    assert not model(results, "nnUNetTrainerNoMirroring").exists()


def test_a_training_that_is_there_is_replaced_only_when_told(results, capsys):
    fold = model(results, OURS) / "fold_0"
    fold.mkdir(parents=True)
    for name in ("checkpoint_final.pth", "checkpoint_best.pth"):
        (fold / name).write_bytes(b"precious")
    (fold / "losses.csv").write_text("epoch,loss\n0,1.5\n", encoding="utf-8")
    assert main([*ARGUMENTS, "--model", "nnUNetTrainer"]) == 1
    assert "has a training already. Pass --overwrite" in capsys.readouterr().err
    assert (fold / "checkpoint_final.pth").read_bytes() == b"precious"
    assert main([*ARGUMENTS, "--model", "nnUNetTrainer", "--overwrite"]) == 0
    assert [file.name for file in fold.glob("checkpoint*")] == ["checkpoint_latest.pth"]
    assert not (fold / "losses.csv").exists()  # of the training that is gone


def test_self_supervised_weights_are_the_start_of_the_supervised_phase(results, tiny_dataset, tmp_path):
    # a file of nnssl's layout: weights without segmentation heads, and a plan for the adaptation
    seed()
    trainer = make_trainer(nnUNetTrainerM3HL, tiny_dataset, num_epochs=4, supervised_part=0.5)
    trainer.initialize()
    pretrained = {name: torch.full_like(t, 0.01) for name, t in weights(trainer.network).items()}
    pretrained = {name: tensor for name, tensor in pretrained.items() if ".seg_layers." not in name}
    torch.save({"network_weights": pretrained, "nnssl_adaptation_plan": {}}, tmp_path / "pretrained.pth")
    heads = {name: t for name, t in weights(trainer.network).items() if ".seg_layers." in name}
    load_pretrained_weights(trainer.network, str(tmp_path / "pretrained.pth"))
    trainer.on_train_start()
    assert trainer.supervised_phase
    assert same(weights(trainer.network), {**weights(trainer.network), **pretrained, **heads})
    assert "-pretrained_weights leaves out" not in Path(trainer.log_file).read_text(encoding="utf-8")
