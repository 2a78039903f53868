"""The unlabeled scans are the same ones in every command and in the training, whatever their files are called."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tiny
from nnunetv2 import paths
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny_trainers import make_trainer, seed

from nnunet_ssl.cli import main
from nnunet_ssl.data.scans import is_packed
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL

FILES = ["patient_A.nii.gz", "patient_B.nii.gz", "a.b_c.nii.gz", "numbered_0000.nii.gz"]
CASES = {"patient_A", "patient_B", "a.b_c", "numbered", "series"}
pytestmark = pytest.mark.slow  # begins early: its few tests take long


@pytest.fixture(scope="module")
def dataset():
    """Dataset961_Names with one channel: plain names, one with a channel number, and a DICOM series."""
    raw = tiny.make_raw_dataset(961, "Names", cases=3, unlabeled=len(FILES) + 1)
    scans = sorted((raw / "imagesUn").iterdir())
    for scan, name in zip(scans, FILES, strict=False):
        scan.rename(scan.with_name(name))
    tiny.write_dicom(sitk.ReadImage(str(scans[-1])), raw / "imagesUn" / "series")
    scans[-1].unlink()
    preprocessed = tiny.plan(961, ("3d_fullres",))
    fold = {"train": ["case_000", "case_001"], "val": ["case_002"]}
    (preprocessed / "splits_final.json").write_text(json.dumps([fold]))
    return preprocessed


def test_preprocess_doctor_and_training_find_the_same_scans(dataset, capsys):
    doctor = ["doctor", "-d", "961", "-c", "3d_fullres"]
    assert main(doctor) == 1
    assert "imagesUn: 5 cases, 0 finished" in capsys.readouterr().out
    assert main(["preprocess", "-d", "961", "-c", "3d_fullres", "-np", "1"]) == 0
    assert main(doctor) == 0, capsys.readouterr().out
    assert "imagesUn: 5 cases, 5 finished" in capsys.readouterr().out
    trainer = make_trainer(nnUNetTrainerM3HL, dataset)
    trainer.on_train_start()
    log = Path(trainer.log_file).read_text(encoding="utf-8")
    assert "5 unlabeled" in log
    assert "not preprocessed" not in log


def test_pseudo_label_takes_them_too_and_stock_nnunet_reads_the_result(dataset, capsys):
    seed()
    make_trainer(nnUNetTrainer, dataset).run_training()
    options = "-d 961 -c 3d_fullres -f 0 -o 962 -device cpu -np 1 --disable_tta"
    assert main(["pseudo-label", *options.split()]) == 0
    folder = Path(paths.nnUNet_raw) / "Dataset962_NamesPseudoLabels"
    written = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    assert set(written["pseudo_labels"]["cases"]) == CASES
    converted = folder / "imagesTr" / "series_0000.nii.gz"
    assert os.listdir(converted.parent) == [converted.name]  # the other scans stay where they are
    assert written["dataset"]["series"]["images"] == ["imagesTr/series_0000.nii.gz"]
    series = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(
        str(Path(paths.nnUNet_raw, "Dataset961_Names/imagesUn/series"))
    )
    read = [sitk.GetArrayFromImage(image) for image in (sitk.ReadImage(series), sitk.ReadImage(str(converted)))]
    assert np.array_equal(*read)
    assert is_packed(converted)  # as its name says
    (folder.parent / "Dataset961_Names/imagesUn/SCAN.NII.GZ").touch()
    assert main(["pseudo-label", *options.replace("962", "987").split()]) == 1
    assert "SCAN.NII.GZ: nnU-Net reads .nii.gz; rename it" in capsys.readouterr().err
    tiny.preprocess(962, ("3d_fullres",))
    data = Path(paths.nnUNet_preprocessed) / folder.name / "nnUNetPlans_3d_fullres"
    assert {file.stem for file in data.glob("*.pkl")} == {*CASES, "case_000", "case_001", "case_002"}
