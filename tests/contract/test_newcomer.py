"""The first commands of the README, copied from it, on a made-up folder whose unlabeled scans have plain names."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from tiny import make_raw_dataset

ROOT = Path(__file__).parents[2]
SHORT = """
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL


class nnUNetTrainerShort(nnUNetTrainerM3HL):
    num_epochs = 2
    num_iterations_per_epoch = 1
    num_val_iterations_per_epoch = 1
"""


@pytest.fixture
def environment(tmp_path):
    (tmp_path / "nnUNetTrainerShort.py").write_text(SHORT)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = {"nnUNet_extTrainer": str(tmp_path), "nnUNet_def_n_proc": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    given = {key: value for key, value in os.environ.items() if key != "nnUNet_n_proc_DA"}  # planning crashes with 0
    yield given | settings | {"PATH": path}
    for root in (nnUNet_raw, nnUNet_preprocessed, nnUNet_results):
        shutil.rmtree(Path(root) / "Dataset796_Newcomer", ignore_errors=True)


@pytest.mark.slow
def test_the_first_commands_of_the_readme_train_and_predict(environment, tmp_path):
    raw = make_raw_dataset(796, "Newcomer", cases=5, unlabeled=2, test=1, shape=(20, 22, 24))
    for scan in (raw / "imagesUn").iterdir():
        scan.rename(scan.with_name(scan.name.replace("_0000", "").replace("unlabeled_", "Müller A.")))
    assert sorted(scan.name for scan in (raw / "imagesUn").iterdir()) == ["Müller A.000.nii.gz", "Müller A.001.nii.gz"]

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    install, *lines = readme.split("```\n")[1].splitlines()
    assert install == "pip install nnunet-ssl"
    assert [line.split()[0] for line in lines] == ["nnUNetv2_plan_and_preprocess", "nnUNetv2_train", "nnUNetv2_predict"]
    for line in lines:
        # the dataset, a training of two short epochs, and the folders are the reader's own
        line = re.sub(r"\b501\b", "796", line).replace("nnUNetTrainerM3HL", "nnUNetTrainerShort")
        line = line.replace("-i IN -o OUT", f"-i '{raw / 'imagesTs'}' -o '{tmp_path / 'predicted'}'")
        # one process each: those that nnU-Net starts by default take minutes on a small computer
        line = line.replace(" && ", " -npfp 1 -np 1 && ") + (" -np 1" if "preprocess" in line else "")
        cpu = {"nnUNetv2_train": " -device cpu", "nnUNetv2_predict": " -device cpu -npp 0 -nps 0 --disable_tta"}
        line += cpu.get(line.split()[0], "")
        workers = {"nnUNet_n_proc_DA": "0"} if "nnUNetv2_train" in line else {}  # a dozen of them take minutes to start
        given = environment | workers
        done = subprocess.run(line, shell=True, env=given, capture_output=True, encoding="utf-8", timeout=400)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    model = Path(nnUNet_results) / "Dataset796_Newcomer/nnUNetTrainerShort__nnUNetPlans__3d_fullres/fold_0"
    assert (model / "checkpoint_final.pth").is_file()
    assert "2 unlabeled" in next(model.glob("training_log*")).read_text(encoding="utf-8")
    assert (tmp_path / "predicted/test_000.nii.gz").is_file()
