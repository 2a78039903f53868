"""`nnunet-ssl pseudo-label` and what stock nnU-Net makes of the dataset that it writes."""

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
from tiny import preprocess, write_image
from training import make_trainer, seed

from nnunet_ssl.cli import main
from nnunet_ssl.self_training import pseudo_label

LABELED, VALIDATION = ["case_000", "case_001"], ["case_002"]
UNLABELED = [f"case_{i:03d}" for i in range(3, 7)] + ["unlabeled_000", "unlabeled_001"]


@pytest.fixture(scope="module")
def model(tiny_dataset):
    """A model of the stock trainer for fold 0 of Dataset701_Tiny; its folder."""
    seed()
    trainer = make_trainer(nnUNetTrainer, tiny_dataset, num_iterations_per_epoch=20)
    trainer.run_training()
    return Path(trainer.output_folder_base)


@pytest.fixture(scope="module")
def written(model):
    """Dataset981_TinyPseudoLabels, by the command that a user types; its raw folder."""
    assert (
        main(
            [
                "pseudo-label",
                "-d",
                "701",
                "-c",
                "3d_fullres",
                "-f",
                "0",
                "-o",
                "981",
                "-device",
                "cpu",
                "-np",
                "1",
                "--disable_tta",
            ]
        )
        == 0
    )
    folder = Path(paths.nnUNet_raw) / "Dataset981_TinyPseudoLabels"
    yield folder
    for root in (paths.nnUNet_raw, paths.nnUNet_preprocessed):
        shutil.rmtree(Path(root) / folder.name)


def read(file):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def test_labeled_cases_keep_their_labels_and_the_model_labels_the_others(model, written):
    cases = get_filenames_of_train_images_and_targets(str(written))
    assert sorted(cases) == LABELED + VALIDATION + UNLABELED
    source = Path(paths.nnUNet_raw) / "Dataset701_Tiny"
    for case in LABELED + VALIDATION:
        assert Path(cases[case]["label"]).samefile(source / "labelsTr" / f"{case}.nii.gz")
        assert Path(cases[case]["images"][0]).samefile(source / "imagesTr" / f"{case}_0000.nii.gz")

    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,))
    images = [[cases[case]["images"][0]] for case in UNLABELED]
    expected = predictor.predict_from_files_sequential(images, None)
    for case, label in zip(UNLABELED, expected, strict=True):
        file = Path(cases[case]["label"])
        assert file.parent == written / "labelsTr"
        np.testing.assert_array_equal(read(file), label)
        own = source / "labelsTr" / file.name
        assert not own.is_file() or not np.array_equal(read(own), label)  # the hidden label was not copied
    assert any(label.any() for label in expected)


def test_the_dataset_says_which_labels_are_predicted_and_by_what(written):
    description = json.loads((written / "dataset.json").read_text())
    assert description["numTraining"] == 9
    assert description["labels"] == {"background": 0, "blob": 1}
    origin = description["pseudo_labels"]
    assert origin["cases"] == UNLABELED
    assert {key: origin[key] for key in ("dataset", "trainer", "plans", "configuration", "fold", "checkpoint")} == {
        "dataset": "Dataset701_Tiny",
        "trainer": "nnUNetTrainer",
        "plans": "nnUNetPlans",
        "configuration": "3d_fullres",
        "fold": 0,
        "checkpoint": "checkpoint_final.pth",
    }
    splits = json.loads((Path(paths.nnUNet_preprocessed) / written.name / "splits_final.json").read_text())
    assert splits == [{"train": LABELED + UNLABELED, "val": VALIDATION}]


def test_stock_nnunet_preprocesses_with_the_same_plans_and_trains_on_it(written, tiny_dataset):
    folder = Path(paths.nnUNet_preprocessed) / written.name
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    original = json.loads((tiny_dataset / "nnUNetPlans.json").read_text())
    assert plans == original | {"dataset_name": written.name}
    preprocess(981, ["3d_fullres"])
    seed()
    trainer = make_trainer(nnUNetTrainer, folder)
    trainer.run_training()
    train, val = trainer.do_split()
    assert (sorted(train), val) == (LABELED + UNLABELED, VALIDATION)
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").is_file()


def test_an_id_that_is_taken_is_refused(written):
    before = sorted(written.rglob("*"))
    with pytest.raises(FileExistsError, match="Dataset981_TinyPseudoLabels"):
        pseudo_label("701", "3d_fullres", 0, 981, device="cpu")
    assert sorted(written.rglob("*")) == before


def refused(error, match, **arguments):
    arguments = {"fold": 0, "output_id": 982, "device": "cpu", "num_processes": 1, **arguments}
    with pytest.raises(error, match=match):
        pseudo_label("701", "3d_fullres", arguments.pop("fold"), arguments.pop("output_id"), **arguments)
    assert not list(Path(paths.nnUNet_raw).glob("*982*"))
    assert not list(Path(paths.nnUNet_preprocessed).glob("*982*"))


def test_a_model_that_is_missing_is_named_with_the_command_that_trains_it(tiny_dataset):
    refused(FileNotFoundError, "nnUNetv2_train 701 3d_fullres 0 -tr nnUNetTrainerX", trainer="nnUNetTrainerX")


def test_a_fold_that_is_missing_is_refused(model):
    (model / "fold_4").mkdir()
    (model / "fold_4" / "checkpoint_final.pth").touch()
    refused(ValueError, "Fold 4 does not exist: .*splits_final.json has the folds 0 to 0", fold=4)
    shutil.rmtree(model / "fold_4")


@pytest.mark.parametrize("number", [0, 1000, -5])
def test_an_id_that_nnunet_cannot_read_is_refused(tiny_dataset, number):
    refused(ValueError, "three digits", output_id=number)


def test_a_case_that_is_labeled_and_unlabeled_is_refused(model, tiny_dataset):
    file = tiny_dataset / "splits_final.json"
    before = file.read_text()
    folds = json.loads(before)
    folds[0]["unlabeled"].append(VALIDATION[0])
    file.write_text(json.dumps(folds))
    try:
        refused(ValueError, "unlabeled and labeled at once: case_002")
    finally:
        file.write_text(before)


def test_unsound_scans_are_named_before_any_is_labeled(model):
    bad = Path(paths.nnUNet_raw) / "Dataset701_Tiny" / "imagesUn" / "bad_0000.nii.gz"
    write_image(bad, np.full((24, 20, 22), 7.0, np.float32))
    try:
        refused(ValueError, "bad_0000.nii.gz: constant")
    finally:
        bad.unlink()


def test_an_interrupted_run_leaves_no_dataset_and_is_no_obstacle(model, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nnunet_ssl.self_training.predict", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pseudo_label("701", "3d_fullres", 0, 983, device="cpu", num_processes=1)
    assert not list(Path(paths.nnUNet_raw).glob("Dataset983*"))
    assert not list(Path(paths.nnUNet_preprocessed).glob("Dataset983*"))
    folder = pseudo_label("701", "3d_fullres", 0, 983, device="cpu", num_processes=1, mirroring=False)
    assert len(list((folder / "labelsTr").iterdir())) == len(UNLABELED)
    assert not list(Path(paths.nnUNet_raw).glob(".Dataset983*"))
    shutil.rmtree(folder)
    shutil.rmtree(Path(paths.nnUNet_preprocessed) / folder.name)
