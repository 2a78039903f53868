import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.autoregister import trainers_folder
from nnunet_ssl.cli import main
from nnunet_ssl.commands import doctor as doctor_module
from nnunet_ssl.commands.doctor import doctor, list_trainers
from nnunet_ssl.data.preprocessed import preprocessing_settings, write_settings

TRAINER = """from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
class {name}(nnUNetTrainer):
    '''One line.

    Not this one.'''
"""


@pytest.fixture
def trainers(monkeypatch, tmp_path):
    """An empty trainers folder that takes the place of ours and is registered with nnU-Net."""
    folder = tmp_path / "trainers"
    folder.mkdir()
    monkeypatch.setattr(doctor_module, "trainers_folder", lambda: str(folder))
    monkeypatch.setenv("nnUNet_extTrainer", str(folder))
    return folder


@pytest.fixture
def dataset(monkeypatch, tmp_path):
    """Dataset 901, planned and preprocessed for 3d_fullres as far as the doctor looks, without unlabeled cases."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name / "Dataset901_Doctor").mkdir(parents=True)
    folder = tmp_path / "nnUNet_preprocessed" / "Dataset901_Doctor"
    configurations = {
        name: {"data_identifier": identifier, "architecture": {}, "normalization_schemes": ["ZScoreNormalization"] * 2}
        for name, identifier in (("3d_fullres", "plans_3d"), ("2d", "plans_2d"))
    }
    plans = {
        "configurations": configurations,
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "foreground_intensity_properties_per_channel": {},
    }
    (folder / "nnUNetPlans.json").write_text(json.dumps(plans))
    manager = PlansManager(plans)
    settings = preprocessing_settings(manager, manager.get_configuration("3d_fullres"))
    write_settings(folder / "plans_3d_unlabeled", settings)
    (folder / "dataset.json").write_text(
        json.dumps({"file_ending": ".nii.gz", "channel_names": {"0": "T1", "1": "T2"}})
    )
    touch(folder / "plans_3d", *case_files("case_0"), *case_files("case_1"), *case_files("case_2"))
    monkeypatch.setattr(doctor_module, "_check_trainers", lambda: [])  # slow, and tested by itself
    monkeypatch.setattr(doctor_module, "SHARED_MEMORY", tmp_path / "nowhere")  # a container has little
    return folder


def touch(folder, *names):
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()


def case_files(case):
    return [case + ending for ending in ("_seg.b2nd", ".b2nd", ".pkl")]


def raw(dataset):
    return Path(os.environ["nnUNet_raw"], dataset.name)


def test_a_working_installation_passes_and_every_trainer_is_found(capsys):
    assert doctor() == 0
    out = capsys.readouterr().out
    assert "FAIL" not in out
    for name, _ in list_trainers():
        assert [line.split() for line in out.splitlines() if f" {name} " in line] == [["ok", name, "found"]]


def test_trainers_are_listed_without_being_imported(trainers):
    (trainers / "nnUNetTrainerB.py").write_text(TRAINER.format(name="nnUNetTrainerB") + "class Helper: pass\n")
    (trainers / "nnUNetTrainerA.py").write_text("'''The file.'''\nimport not_there\nclass nnUNetTrainerA: pass\n")
    (trainers / "other.py").write_text("class nnUNetTrainerC: pass\n")
    assert list_trainers() == [("nnUNetTrainerA", "The file."), ("nnUNetTrainerB", "One line.")]


def test_every_trainer_file_has_a_class_of_its_name_with_a_description():
    listed = dict(list_trainers())
    assert {file.stem for file in Path(trainers_folder()).glob("nnUNetTrainer*.py")} <= set(listed)
    assert all(listed.values())


def test_a_torchvision_that_does_not_fit_torch_is_named_as_the_cause(monkeypatch, capsys):
    def import_module(name):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor_module, "import_module", import_module)
    assert doctor() == 1
    out = capsys.readouterr().out
    assert "RuntimeError: operator torchvision::nms does not exist" in out
    assert "pip install --upgrade --force-reinstall torch torchvision" in out
    assert "not looked for" in out


def test_another_nnunet_version_fails(monkeypatch, capsys):
    monkeypatch.setattr(doctor_module.metadata, "version", lambda name: "2.7.0")
    monkeypatch.setattr(doctor_module, "import_module", lambda name: None)
    assert doctor() == 1
    out = capsys.readouterr().out
    assert "2.7.0, but 2.8 is needed" in out
    assert 'pip install "nnunetv2>=2.8,<2.9"' in out


def test_each_folder_that_is_not_there_gets_its_fix(monkeypatch, capsys, dataset, tmp_path):
    monkeypatch.delenv("nnUNet_raw")
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path / "missing"))
    monkeypatch.setattr(doctor_module.os, "access", lambda folder, mode: False)
    assert doctor("901") == 1
    out = capsys.readouterr().out
    assert "export nnUNet_raw=" in out
    assert f"mkdir -p {tmp_path / 'missing'}," in out
    assert f"chmod u+w {os.environ['nnUNet_results']}," in out
    assert "set the three folders first" in out


def test_a_trainer_outside_of_the_search_path_fails(monkeypatch, capsys, trainers):
    (trainers / "nnUNetTrainerLost.py").write_text(TRAINER.format(name="nnUNetTrainerLost"))
    monkeypatch.setenv("nnUNet_extTrainer", "/nowhere")
    assert doctor() == 1
    out = capsys.readouterr().out
    assert "Could not find requested nnunet trainer nnUNetTrainerLost" in out
    assert 'export nnUNet_extTrainer="$(nnunet-ssl trainers --path)"' in out


def test_a_trainer_that_cannot_be_imported_fails_with_its_error(capsys, trainers):
    (trainers / "nnUNetTrainerBroken.py").write_text("import not_there\nclass nnUNetTrainerBroken: pass\n")
    assert doctor() == 1
    out = capsys.readouterr().out
    assert "No module named 'not_there'" in out
    assert "Inspecting module: nnUNetTrainerBroken" in out


def test_a_users_file_that_imports_our_trainer_hides_nothing(monkeypatch, capsys, trainers, tmp_path):
    touch(tmp_path / "mine")
    name = "nnUNetTrainerMeanTeacher"
    (trainers / f"{name}.py").write_text(TRAINER.format(name=name))
    own = f"from nnunet_ssl.trainers.{name} import {name}\n\n\nclass nnUNetTrainerMine({name}):\n    num_epochs = 3\n"
    (tmp_path / "mine" / "nnUNetTrainerMine.py").write_text(own)
    monkeypatch.setenv("nnUNet_extTrainer", f"{tmp_path / 'mine'}{os.pathsep}{trainers}")
    assert doctor() == 0, capsys.readouterr().out


def test_a_trainer_hidden_by_another_folder_fails(monkeypatch, capsys, trainers, tmp_path):
    touch(tmp_path / "mine")
    for folder in (trainers, tmp_path / "mine"):
        (folder / "nnUNetTrainerTwice.py").write_text(TRAINER.format(name="nnUNetTrainerTwice"))
    assert doctor() == 0
    monkeypatch.setenv("nnUNet_extTrainer", f"{tmp_path / 'mine'}{os.pathsep}{trainers}")
    assert doctor() == 1
    assert f"hidden by a class of the same name in {tmp_path / 'mine'}" in capsys.readouterr().out


def test_no_unlabeled_cases_at_all_fails(capsys, dataset):
    assert doctor("901", ["3d_fullres"]) == 1
    out = capsys.readouterr().out
    assert "no unlabeled cases" in out
    assert "nnunet-ssl preprocess -d 901 -c 3d_fullres" in out


def test_files_of_images_un_that_are_no_scans_are_named(capsys, dataset):
    touch(raw(dataset) / "imagesUn", "plain.nii.gz")
    assert doctor("901", ["3d_fullres"]) == 1
    assert "1 file is no scan, as plain.nii.gz: not a scan; expected CASE_0000.nii.gz" in capsys.readouterr().out


def test_images_un_must_all_be_preprocessed(capsys, dataset):
    touch(raw(dataset) / "imagesUn", "u_0_0000.nii.gz", "u_0_0001.nii.gz", "u_1_0000.nii.gz", "u_2_0000.nii.gz")
    touch(dataset / "plans_3d_unlabeled", *case_files("u_0"), *case_files("u_1")[:2])  # u_1 was interrupted
    assert doctor("901", ["3d_fullres"]) == 1
    out = capsys.readouterr().out
    assert "3 cases, 1 finished in plans_3d_unlabeled, 2 missing" in out
    assert "-> nnunet-ssl preprocess -d 901 -c 3d_fullres" in out

    touch(dataset / "plans_3d_unlabeled", *case_files("u_1"), *case_files("u_2"))
    assert doctor("901", ["3d_fullres"]) == 0
    assert "3 cases, 3 finished in plans_3d_unlabeled\n" in capsys.readouterr().out


def test_unlabeled_cases_of_a_fold_must_be_preprocessed(capsys, dataset):
    folds = [{"train": ["case_0"], "val": ["case_1"], "unlabeled": unlabeled} for unlabeled in (["case_2"], ["x"], [])]
    (dataset / "splits_final.json").write_text(json.dumps([*folds, {"train": ["case_0"], "val": ["case_1"]}]))
    assert doctor("901", ["3d_fullres"], fold=0) == 0
    assert "fold 0: 1 unlabeled case in splits_final.json\n" in capsys.readouterr().out
    assert doctor("901", ["3d_fullres"], fold=1) == 1
    out = capsys.readouterr().out
    assert "1 of them missing in plans_3d" in out
    assert "-> nnUNetv2_preprocess -d 901 -c 3d_fullres" in out
    for fold_without in (2, 3):
        assert doctor("901", ["3d_fullres"], fold=fold_without) == 1
        assert "no unlabeled cases" in capsys.readouterr().out
    assert doctor("901", ["3d_fullres"], fold=4) == 1
    assert "choose a fold from 0 to 3" in capsys.readouterr().out
    assert doctor("901", ["3d_fullres"]) == 1  # every fold: fold 1 is not ready


def test_cases_that_other_plans_have_preprocessed_fail(capsys, dataset):
    touch(dataset / "plans_3d_unlabeled", *case_files("u_0"))
    plans = json.loads((dataset / "nnUNetPlans.json").read_text(encoding="utf-8"))
    plans["configurations"]["3d_fullres"]["spacing"] = [2, 1, 1]
    (dataset / "nnUNetPlans.json").write_text(json.dumps(plans))
    assert doctor("901", ["3d_fullres"]) == 1
    out = capsys.readouterr().out
    assert "spacing changed" in out
    assert f"-> rm -r {dataset / 'plans_3d_unlabeled'}, then run: nnunet-ssl preprocess -d 901" in out


def test_without_a_configuration_the_preprocessed_ones_are_checked(capsys, dataset):
    touch(dataset / "plans_3d_unlabeled", *case_files("u_0"))
    assert doctor("901") == 0
    out = capsys.readouterr().out
    assert "Dataset901_Doctor 3d_fullres" in out
    assert "Dataset901_Doctor 2d" not in out


def test_a_damaged_file_is_reported(capsys, dataset):
    (dataset / "splits_final.json").write_text("[")
    assert doctor("901", ["3d_fullres"]) == 1
    assert "splits_final.json is cut off or not JSON" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"dataset": "902"}, "Could not find a dataset with the ID 902"),
        ({"dataset": "Doctor"}, "did not start with 'Dataset'"),
        ({"dataset": "901", "configurations": ["3d_lowres"]}, "choose one of 3d_fullres, 2d"),
        ({"dataset": "901", "plans_identifier": "otherPlans"}, "nnUNetv2_plan_and_preprocess -d 901"),
    ],
)
def test_what_cannot_be_found_is_reported(capsys, dataset, arguments, text):
    assert doctor(**arguments) == 1
    assert text in capsys.readouterr().out


def test_fold_all_needs_scans_in_images_un_and_no_list(capsys, dataset):
    fold = {"train": ["case_0"], "val": ["case_1"], "unlabeled": ["case_2"]}
    (dataset / "splits_final.json").write_text(json.dumps([fold]))
    assert doctor("901", ["3d_fullres"], fold="all") == 1  # its labels are used
    out = capsys.readouterr().out
    assert f"no unlabeled cases for fold all: none in {raw(dataset) / 'imagesUn'}" in out
    assert "split" not in out
    touch(dataset / "plans_3d_unlabeled", *case_files("u_0"))
    assert main(["doctor", "-d", "901", "-c", "3d_fullres", "-f", "all"]) == 0


def test_a_configuration_without_unlabeled_cases_is_not_meant_where_another_one_has_some(capsys, dataset):
    """nnU-Net preprocesses 2d as well; who trains 3d_fullres alone has a sound set-up."""
    touch(raw(dataset) / "imagesUn", "u_0_0000.nii.gz", "u_0_0001.nii.gz")
    touch(dataset / "plans_3d_unlabeled", *case_files("u_0"))
    touch(dataset / "plans_2d", *case_files("case_0"))
    assert doctor("901") == 0, capsys.readouterr().out
    assert doctor("901", ["2d"]) == 1


def test_json_is_all_that_is_printed(capsys, dataset):
    touch(dataset / "plans_3d_unlabeled", *case_files("u_0"))
    assert main(["doctor", "--json", "-d", "901"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    names = [check["name"] for check in found["checks"]]
    assert {"python", "torch", "nnUNet_raw", "device", "Dataset901_Doctor 3d_fullres"} <= set(names)
    assert all(check["ok"] and check["text"] for check in found["checks"])
    assert main(["doctor", "--json", "-d", "902"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False
    assert [bool(check["fix"]) for check in found["checks"] if not check["ok"]] == [True]


@pytest.mark.parametrize(
    ("value", "code", "text"), [("0", 0, "env -u nnUNet_n_proc_DA"), ("x", 1, "export"), ("3", 0, "3")]
)
def test_a_number_of_workers_that_planning_does_not_take_is_said(value, code, text, capsys, dataset, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", value)
    assert doctor() == code
    line, *_ = [line for line in capsys.readouterr().out.partition("nnUNet_n_proc_DA")[2].split("\n\n") if line]
    assert text in line
    monkeypatch.delenv("nnUNet_n_proc_DA")
    assert doctor() == 0
    assert "nnUNet_n_proc_DA" not in capsys.readouterr().out


@pytest.mark.parametrize(("mebibytes", "code"), [(64, 1), (2048, 0)])
def test_shared_memory_that_is_too_small_for_workers_is_said(mebibytes, code, capsys, dataset, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=mebibytes * 2**20))
    monkeypatch.setattr(doctor_module, "SHARED_MEMORY", Path("/"))
    assert doctor() == 0  # without workers
    assert "MiB" not in capsys.readouterr().out
    monkeypatch.delenv("nnUNet_n_proc_DA")
    assert doctor() == code
    out = capsys.readouterr().out
    assert f"{mebibytes} MiB" in out
    assert ("--shm-size=2g" in out) == bool(code)


def test_folders_with_spaces_are_quoted_in_commands(capsys, dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "my results"))
    assert doctor() == 1
    assert f"mkdir -p '{tmp_path / 'my results'}'" in capsys.readouterr().out


def test_our_own_folder_written_in_another_way_hides_nothing(monkeypatch, capsys, trainers, tmp_path):
    (trainers / "nnUNetTrainerOne.py").write_text(TRAINER.format(name="nnUNetTrainerOne"))
    (tmp_path / "link").symlink_to(trainers)
    for folder in (f"{trainers}{os.sep}", str(tmp_path / "link")):
        monkeypatch.setenv("nnUNet_extTrainer", folder)
        assert doctor() == 0, capsys.readouterr().out
