"""What version 0.1.0 wrote is read by this one: checkpoints, models, notes beside preprocessed scans.

tests/version_0_1_0 has the files of a training of nnUNetTrainerM3HL on the tiny dataset in 2D, two epochs of two steps.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tiny_trainers import make_trainer

from nnunet_ssl.data.preprocessed import FILES, check_settings, preprocessing_settings
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL

WRITTEN = Path(__file__).parents[1] / "version_0_1_0"
CHECKPOINT = WRITTEN / "checkpoint_final.pth"


def test_a_training_goes_on(tiny_dataset):
    trainer = make_trainer(nnUNetTrainerM3HL, tiny_dataset, "2d", num_epochs=3)
    trainer.load_checkpoint(str(CHECKPOINT))
    state = torch.load(CHECKPOINT, weights_only=False)["nnunet_ssl"]
    for name, network in trainer.segmenting_networks().items():
        weights = state["student"] if name == "student" else state["companions"][name]
        assert all(torch.equal(tensor, weights[key]) for key, tensor in network.state_dict().items())
    assert len(trainer.optimizer.state) == len(state["optimizer"]["state"]) > 0
    assert (trainer.step, trainer.current_epoch) == (4, 2)
    trainer.run_training()
    assert trainer.step == 6


def test_a_model_predicts(tmp_path):
    (tmp_path / "fold_0").mkdir()
    shutil.copy(CHECKPOINT, tmp_path / "fold_0")
    checkpoint = torch.load(CHECKPOINT, weights_only=False)
    for name in ("plans", "dataset_json"):
        file = tmp_path / f"{name.removesuffix('_json')}.json"
        file.write_text(json.dumps(checkpoint["init_args"][name]))
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(tmp_path), (0,))
    image = np.random.default_rng(0).normal(100, 40, (1, 3, 20, 22)).astype(np.float32)
    labels = predictor.predict_single_npy_array(image, {"spacing": [1.0, 1.0, 1.0]})
    assert labels.shape == image.shape[1:]
    assert 0 < (labels == 1).mean() < 1


def test_preprocessed_scans_are_used(tmp_path):
    plans = PlansManager(str(WRITTEN / "nnUNetPlans.json"))
    settings = preprocessing_settings(plans, plans.get_configuration("2d"))
    written = json.loads((WRITTEN / "nnUNetPlans_2d_unlabeled.json").read_text(encoding="utf-8"))
    assert written.keys() == {*settings, "transductive"}
    target = tmp_path / "nnUNetPlans_2d_unlabeled"
    target.mkdir()
    for suffix in FILES:
        (target / f"case{suffix}").touch()
    shutil.copy(WRITTEN / "nnUNetPlans_2d_unlabeled.json", tmp_path)
    check_settings(target, settings)
    with pytest.raises(ValueError, match="other plans: spacing changed"):
        check_settings(target, settings | {"spacing": [9.0, 9.0]})
