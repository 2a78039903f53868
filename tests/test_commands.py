"""The stock commands and our own, as a user types them."""

import importlib
import os
import signal
import subprocess
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch
from nnunetv2.paths import nnUNet_raw, nnUNet_results
from tiny import nnunet_command
from tiny_trainers import every_trainer

from nnunet_ssl.cli import main
from nnunet_ssl.commands import split
from nnunet_ssl.training.checkpoints import CHECKPOINT_KEY

# what a user would put into a folder of their own on nnUNet_extTrainer
USERS_TRAINER = """
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL


class nnUNetTrainerMine(nnUNetTrainerM3HL):
    feature_weight = 0.1
    num_epochs = 3
    num_iterations_per_epoch = 2
    num_val_iterations_per_epoch = 1
    save_every = 1
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "nnUNetTrainerMine.py").write_text(USERS_TRAINER)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "mine"))  # ours is appended when Python starts
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # nnU-Net takes all cores on a CPU; others may need them

    def start(line):
        name, *arguments = line.split()
        program = [str(Path(sys.executable).with_name(name)), *arguments]
        return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8")

    return start


@pytest.mark.slow
def test_stock_commands_train_continue_and_predict(tiny_dataset, command, tmp_path):
    train = "nnUNetv2_train 701 3d_fullres 0 -tr nnUNetTrainerMine -device cpu"
    model = Path(nnUNet_results) / "Dataset701_Tiny" / "nnUNetTrainerMine__nnUNetPlans__3d_fullres"
    latest, final = (model / "fold_0" / f"checkpoint_{name}.pth" for name in ("latest", "final"))
    process = command(train)
    deadline = time.time() + 200
    while not latest.is_file() and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    output, _ = process.communicate()
    assert latest.is_file(), output
    assert not final.exists()
    done = torch.load(latest, weights_only=False)["current_epoch"]

    output = nnunet_command(*train.split(), "--c")
    assert "Mean Validation Dice" in output
    assert f"Epoch {done}" in output
    assert f"Epoch {done - 1} " not in output
    assert "feature_weight = 0.1" in output
    state = torch.load(final, weights_only=False)
    assert state[CHECKPOINT_KEY]["step"] == 6  # of all epochs
    assert (model / "fold_0" / "validation" / "case_002.nii.gz").is_file()

    images = Path(nnUNet_raw) / "Dataset701_Tiny" / "imagesTs"
    predict = f"nnUNetv2_predict -d 701 -c 3d_fullres -f 0 -tr nnUNetTrainerMine -i {images} -o {tmp_path / 'out'}"
    nnunet_command(*predict.split(), "-device", "cpu", "-npp", "0", "-nps", "0", "--disable_tta")
    assert (tmp_path / "out" / "test_000.nii.gz").is_file()


def test_an_epoch_variant_is_found_by_nnunets_own_finder():
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    for name, epochs in (("nnUNetTrainerM3HL_7epochs", 7), ("nnUNetTrainerM3_123epochs", 123)):
        trainer = recursive_find_trainer_class_by_name(name)
        assert (trainer.__name__, trainer.num_epochs) == (name, epochs)


def test_trainers_lists_every_trainer_with_a_line(capsys):
    assert main(["trainers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {trainer.__name__ for trainer in every_trainer(variants=True)}
    assert all(len(line.split()) > 3 for line in lines)
    assert main(["trainers", "--path"]) == 0
    assert capsys.readouterr().out.strip() in os.environ["nnUNet_extTrainer"].split(os.pathsep)


def test_the_version_is_that_of_the_installed_package(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"nnunet-ssl {metadata.version('nnunet-ssl')}\n"


def test_every_command_has_help(capsys):
    for name in ("trainers", "convert", "split", "preprocess", "pseudo-label", "doctor", "demo"):
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert "usage: nnunet-ssl" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["convert", "--help"])
    assert "uses the label of EVERY case" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("preprocess -d 701 -c 3d_lowres", "3d_lowres"),
        ("split -d 701 --labeled 100", "--labeled"),
        ("convert la -i /nowhere -d 790", "/nowhere"),
        ("split -d 701 --labeled 2", "--overwrite"),
    ],
)
def test_bad_input_ends_in_one_sentence_and_exit_code_1(line, words, tiny_dataset, capsys):
    before = (tiny_dataset / "splits_final.json").read_text(encoding="utf-8")
    assert main(line.split()) == 1
    output = capsys.readouterr()
    assert words in output.err
    assert "Traceback" not in output.err
    assert output.err.startswith(f"nnunet-ssl {line.split()[0]}: ")
    assert (tiny_dataset / "splits_final.json").read_text(encoding="utf-8") == before


@pytest.mark.parametrize("command", ["doctor -f x", "compare -d 1 -c 2d -tr T -f 0 x", "export -d 1 -c 2d -tr T -f x"])
def test_a_fold_that_is_none_is_said_in_the_users_words(command, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(command.split())
    error = capsys.readouterr().err
    assert 'argument -f: Fold "x" does not exist: give a number, or all' in error
    assert "_number_or_all" not in error


def test_warnings_of_other_packages_are_shown_with_traceback_only(capsys, monkeypatch):
    monkeypatch.setattr(split, "split_dataset", lambda *_: warnings.warn("of others", FutureWarning, stacklevel=1))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        main("split -d 1 --labeled 1".split())  # noqa: SIM905
        assert [str(warning.message) for warning in seen] == []
        main("--traceback split -d 1 --labeled 1".split())  # noqa: SIM905
    assert [str(warning.message) for warning in seen] == ["of others"]
    assert "Wrote 1 fold to" in capsys.readouterr().out


@pytest.mark.parametrize("trainer", every_trainer(variants=True))
def test_every_trainer_is_imported_from_a_module_of_its_name(trainer):
    module = importlib.import_module(f"nnunet_ssl.trainers.{trainer.__name__}")
    assert getattr(module, trainer.__name__) is trainer


def test_doctor_finds_the_tiny_dataset_ready(tiny_dataset, capsys):
    assert main(["doctor", "-d", "701", "-c", "3d_fullres", "2d", "-f", "0"]) == 0, capsys.readouterr().out
    assert main(["doctor", "-d", "701", "-c", "3d_lowres"]) == 1
    assert "3d_lowres" in capsys.readouterr().out
