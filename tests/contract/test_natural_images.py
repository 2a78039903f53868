"""RGB images as PNG files, labeled and unlabeled, from the files to a prediction."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2 import paths
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from PIL import Image
from tiny import plan
from tiny_trainers import make_trainer, seed

from nnunet_ssl.cli import main
from nnunet_ssl.commands.preview import preview
from nnunet_ssl.data.splits import save_splits
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL

SHAPE = (28, 32)
pytestmark = pytest.mark.slow  # begins early: its few tests take long


def write_case(raw, folder, name, rng):
    """A disk that is red where the background is green; the label is the disk."""
    rows, columns = np.indices(SHAPE)
    disk = np.hypot(rows - rng.integers(10, 18), columns - rng.integers(12, 20)) < 8
    image = rng.integers(0, 60, (*SHAPE, 3))
    image[..., 0] += 150 * disk
    image[..., 1] += 150 * ~disk
    (raw / f"images{folder}").mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.astype(np.uint8)).save(raw / f"images{folder}" / f"{name}_0000.png")
    if folder == "Tr":
        (raw / "labelsTr").mkdir(exist_ok=True)
        Image.fromarray(disk.astype(np.uint8)).save(raw / "labelsTr" / f"{name}.png")


@pytest.fixture(scope="module")
def dataset():
    """Dataset708_Photos: 3 labeled images, 4 without label in imagesUn."""
    raw, rng = Path(paths.nnUNet_raw) / "Dataset708_Photos", np.random.default_rng(0)
    for folder, name, number in (("Tr", "photo", 3), ("Un", "new", 4)):
        for index in range(number):
            write_case(raw, folder, f"{name}{index}", rng)
    description = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "disk": 1},
        "numTraining": 3,
        "file_ending": ".png",
    }
    (raw / "dataset.json").write_text(json.dumps(description))
    folder = plan(708, ["2d"])
    save_splits(folder / "splits_final.json", [{"train": ["photo0", "photo1"], "val": ["photo2"]}])
    assert main(["preprocess", "-d", "708", "-c", "2d", "-np", "1"]) == 0
    return folder


def test_png_images_train_and_predict(dataset, tmp_path):
    seed()
    trainer = make_trainer(nnUNetTrainerM3HL, dataset, "2d", num_epochs=2)
    trainer.run_training()
    assert "2 labeled, 4 unlabeled, 1 for validation" in Path(trainer.log_file).read_text(encoding="utf-8")
    assert preview("708", "2d", 0, "nnUNetTrainerM3HL", tmp_path / "preview.png") == 2
    predictor = nnUNetPredictor(tile_step_size=1, use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,))
    images = Path(paths.nnUNet_raw) / dataset.name / "imagesUn"
    (tmp_path / "out").mkdir()
    predictor.predict_from_files_sequential(str(images), str(tmp_path / "out"))
    for index in range(4):
        with Image.open(tmp_path / "out" / f"new{index}.png") as label:
            assert label.size == SHAPE[::-1]


def test_all_three_channels_are_used(dataset):
    seed()
    trainer = make_trainer(nnUNetTrainerM3HL, dataset, "2d")
    trainer.on_train_start()
    batch = trainer._to_device(next(trainer.dataloader_train))
    assert batch.unlabeled.shape[1] == batch.image.shape[1] == 3
    # red where the disk is, green around it: the two have opposite signs in every patch
    for patch in (*batch.image, *batch.unlabeled):
        assert torch.corrcoef(patch[:2].flatten(1))[0, 1] < -0.3
