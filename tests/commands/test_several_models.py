"""`nnunet-ssl pseudo-label` with several models: their mean, where they disagree, and what is done about it."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2 import paths
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tiny import preprocess
from tiny_trainers import make_trainer, seed

from nnunet_ssl.cli import main
from nnunet_ssl.commands.labeling import changed_part
from nnunet_ssl.commands.pseudo_label import with_ignore_label

UNLABELED = [f"case_{i:03d}" for i in range(3, 7)] + ["unlabeled_000", "unlabeled_001"]
COMMAND = ["pseudo-label", "-d", "701", "-c", "3d_fullres", "-f", "0", "-o", "984"]
COMMAND += ["-device", "cpu", "-np", "1", "--disable_tta"]


@pytest.fixture(scope="module")
def models(tiny_dataset, tmp_path_factory):
    """Model folders of two seeds of the stock trainer for fold 0; the first one in nnUNet_results."""
    folders = []
    for number in (0, 1):
        with pytest.MonkeyPatch.context() as patch:
            if number:
                patch.setenv("nnUNet_results", str(tmp_path_factory.mktemp("other_seed")))
            seed(number)
            trainer = make_trainer(nnUNetTrainer, tiny_dataset, num_iterations_per_epoch=12)
            trainer.run_training()
            folders.append(Path(trainer.output_folder_base))
    return folders


@pytest.fixture
def command(models):
    """The command with both models; what it writes is removed."""
    yield [*COMMAND, "--also", str(models[1])]
    for root in (paths.nnUNet_raw, paths.nnUNet_preprocessed, paths.nnUNet_results):
        for folder in Path(root).glob("*Dataset984*"):
            shutil.rmtree(folder)


def written():
    return Path(paths.nnUNet_raw) / "Dataset984_TinyPseudoLabels"


def description():
    return json.loads((written() / "dataset.json").read_text(encoding="utf-8"))


def read(case):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(written() / "labelsTr" / f"{case}.nii.gz")))


def table():
    with (written() / "disagreement.csv").open(newline="") as f:
        return {row["case"]: (float(row["disagreement"]), row["used"]) for row in csv.DictReader(f)}


@pytest.fixture(scope="module")
def expected(models):
    """Per unlabeled case the label maps of both models, and that of the mean of their probabilities."""
    cases = get_filenames_of_train_images_and_targets(str(Path(paths.nnUNet_raw) / "Dataset701_Tiny"))
    own = Path(paths.nnUNet_raw) / "Dataset701_Tiny/imagesUn"
    images = {c: cases[c]["images"] if c in cases else [str(own / f"{c}_0000.nii.gz")] for c in UNLABELED}
    found = {case: ([], []) for case in UNLABELED}
    for folder in models:
        predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(folder), (0,))
        predicted = predictor.predict_from_files_sequential([*images.values()], None, save_probabilities=True)
        for case, (labels, probabilities) in zip(images, predicted, strict=True):
            found[case][0].append(labels)
            found[case][1].append(probabilities)
    return {case: (maps, np.argmax(sum(soft), 0)) for case, (maps, soft) in found.items()}


def test_the_label_is_that_of_the_mean_and_the_disagreement_is_written(command, expected):
    assert main(command) == 0
    for case, (maps, mean) in expected.items():
        assert (read(case) != mean).mean() < 1e-3  # the mean is taken before the scan is resampled
        assert table()[case] == (pytest.approx(changed_part(maps), abs=1e-4), "yes")
    assert any((maps[0] != maps[1]).any() for maps, _ in expected.values())
    assert [*table()] == sorted(table(), key=lambda case: (-table()[case][0], case))
    origin = description()["pseudo_labels"]
    assert (origin["trainer"], origin["fold"]) == ("nnUNetTrainer", 0)
    assert origin["also"] == [command[-1]]
    assert not (written() / "disagreement").exists()


def test_voxels_on_which_the_models_disagree_are_ignored_and_stock_nnunet_trains(command, expected):
    assert main([*command, "--uncertain", "ignore"]) == 0
    assert description()["labels"] == {"background": 0, "blob": 1, "ignore": 2}
    for case, (maps, _) in expected.items():
        np.testing.assert_array_equal(read(case) == 2, maps[0] != maps[1])
        np.testing.assert_array_equal(read(case)[maps[0] == maps[1]], maps[0][maps[0] == maps[1]])
    preprocess(984, ["3d_fullres"])
    trainer = make_trainer(nnUNetTrainer, Path(paths.nnUNet_preprocessed) / written().name)
    trainer.run_training()
    assert trainer.label_manager.ignore_label == 2
    assert unwrapped_heads(trainer) == 2  # none for what is ignored


def unwrapped_heads(trainer):
    return trainer.network.decoder.seg_layers[-1].out_channels


def test_the_worst_scans_are_left_out(command, expected):
    assert main([*command, "--drop-worst", "2"]) == 0
    worst = sorted(expected, key=lambda case: (-round(changed_part(expected[case][0]), 6), case))[:2]
    assert [case for case, (_, used) in table().items() if used == "no"] == worst
    kept = sorted(set(UNLABELED) - set(worst))
    assert description()["pseudo_labels"]["cases"] == kept
    splits = Path(paths.nnUNet_preprocessed) / written().name / "splits_final.json"
    [fold] = json.loads(splits.read_text())
    assert fold["train"] == ["case_000", "case_001", *kept]
    assert not set(worst) & description()["dataset"].keys()


@pytest.mark.slow
def test_an_interrupted_run_keeps_labels_and_disagreements(command, expected, monkeypatch):
    original, calls = nnUNetPredictor.predict_logits_from_preprocessed_data, []

    def interrupted(predictor, data):
        if len(calls) == 5:  # in the middle of the third scan
            raise KeyboardInterrupt
        calls.append(data)
        return original(predictor, data)

    with monkeypatch.context() as patch:
        patch.setattr(nnUNetPredictor, "predict_logits_from_preprocessed_data", interrupted)
        with pytest.raises(KeyboardInterrupt):
            main(command)
    assert not written().exists()
    calls.clear()
    monkeypatch.setattr(
        nnUNetPredictor,
        "predict_logits_from_preprocessed_data",
        lambda predictor, data: calls.append(data) or original(predictor, data),
    )
    assert main(command) == 0
    assert len(calls) == 8  # four scans, two models
    assert [*table()] == sorted(table(), key=lambda case: (-table()[case][0], case))
    assert {case: value for case, (value, _) in table().items()} == {
        case: pytest.approx(changed_part(maps), abs=1e-4) for case, (maps, _) in expected.items()
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--uncertain ignore", "One model does not disagree with itself: give several, with -f 0 1 2, -tr or --also."),
        ("--drop-worst 1", "One model does not disagree with itself"),
        ("--also {models[1]} --drop-worst 6", "--drop-worst 6 leaves none of 6 unlabeled scans."),
        ("--also {other}", "has other plans than"),
        ("--also {nothing}", "plans.json is missing. --also takes model folders."),
        ("--also {empty}", "fold_0/checkpoint_final.pth is missing."),
    ],
)
def test_what_several_models_cannot_do_is_refused(options, message, models, tmp_path, capsys):
    for name in ("other", "nothing", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "other/plans.json").write_text("{}")
    shutil.copy(models[0] / "plans.json", tmp_path / "empty")
    folders = {name: tmp_path / name for name in ("other", "nothing", "empty")}
    assert main([*COMMAND, *options.format(models=models, **folders).split()]) == 1
    assert message in capsys.readouterr().err
    assert not list(Path(paths.nnUNet_raw).glob("*984*"))


@pytest.mark.parametrize(("key", "value"), [("configuration", "2d"), ("fold", 1)])
def test_a_model_of_another_configuration_or_fold_is_refused(key, value, models, tmp_path, capsys):
    other = tmp_path / models[1].name
    shutil.copytree(models[1], other)
    file = other / "fold_0/checkpoint_final.pth"
    state = torch.load(file, weights_only=False)
    state["init_args"][key] = value
    torch.save(state, file)
    assert main([*COMMAND, "--also", str(other)]) == 1
    assert f"{file} was trained as fold" in capsys.readouterr().err
    assert not list(Path(paths.nnUNet_raw).glob("*984*"))


def test_folds_that_hide_different_labels_are_refused(models, tiny_dataset, capsys):
    file = tiny_dataset / "splits_final.json"
    before = file.read_text(encoding="utf-8")
    folds = json.loads(before)
    folds.append({**folds[0], "unlabeled": folds[0]["unlabeled"][1:]})
    shutil.copytree(models[0] / "fold_0", models[0] / "fold_1")
    try:
        file.write_text(json.dumps(folds))
        assert main([*COMMAND[:7], "1", *COMMAND[7:]]) == 1  # -f 0 1
        assert "Folds 0 and 1 of Dataset701_Tiny have different unlabeled cases" in capsys.readouterr().err
    finally:
        file.write_text(before)
        shutil.rmtree(models[0] / "fold_1")


def test_the_ignore_label_is_the_highest_number_or_the_one_that_is_there():
    regions = {"labels": {"background": 0, "whole": [1, 2, 3], "core": [3]}, "regions_class_order": [1, 3]}
    extended, number = with_ignore_label(regions)
    assert number == 4
    assert extended == {**regions, "labels": {**regions["labels"], "ignore": 4}}
    assert with_ignore_label(extended) == (extended, 4)
