import os
import subprocess
import sys
from pathlib import Path

from nnunet_ssl import autoregister
from nnunet_ssl.autoregister import register, trainers_folder


def run_python(*arguments, **variables):
    """What a new Python prints, started with only `variables` of those that matter here; it must not complain."""
    env = {k: v for k, v in os.environ.items() if k not in ("nnUNet_extTrainer", "NNUNET_SSL_NO_AUTOREGISTER")}
    done = subprocess.run(
        [sys.executable, *arguments], env={**env, **variables}, capture_output=True, encoding="utf-8", check=True
    )
    assert done.stderr == ""
    return done.stdout.strip()


def ext_trainer_at_start(**variables):
    return run_python("-c", "import os; print(os.environ.get('nnUNet_extTrainer'))", **variables)


def test_python_starts_with_the_trainers_folder_set():
    assert ext_trainer_at_start() == trainers_folder()
    assert Path(trainers_folder(), "nnUNetTrainerM3HL.py").is_file()


def test_the_users_folders_stay_and_come_first():
    mine = os.pathsep.join(["/my/trainers", "/more/trainers"])
    assert ext_trainer_at_start(nnUNet_extTrainer=mine) == mine + os.pathsep + trainers_folder()


def test_opting_out_leaves_the_variable_alone():
    assert ext_trainer_at_start(NNUNET_SSL_NO_AUTOREGISTER="1") == "None"
    assert ext_trainer_at_start(NNUNET_SSL_NO_AUTOREGISTER="1", nnUNet_extTrainer="/mine") == "/mine"


def test_a_second_registration_changes_nothing(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", "/my/trainers")
    register()
    once = os.environ["nnUNet_extTrainer"]
    register()
    assert os.environ["nnUNet_extTrainer"] == once == "/my/trainers" + os.pathsep + trainers_folder()


def test_an_empty_variable_gets_no_empty_folder(monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", "")
    register()
    assert os.environ["nnUNet_extTrainer"] == trainers_folder()


def test_trainers_folder_is_inside_an_installed_package_and_beside_a_checkout(monkeypatch, tmp_path):
    (tmp_path / "nnunet_ssl").mkdir()
    monkeypatch.setattr(autoregister, "__file__", str(tmp_path / "nnunet_ssl" / "autoregister.py"))
    assert trainers_folder() == str(tmp_path / "trainers")
    (tmp_path / "nnunet_ssl" / "trainers").mkdir()
    assert trainers_folder() == str(tmp_path / "nnunet_ssl" / "trainers")


def test_registration_imports_nothing_beyond_os():
    root = str(Path(autoregister.__file__).parents[1])
    code = (
        f"import os, sys; sys.path.insert(0, {root!r}); before = set(sys.modules); import nnunet_ssl.autoregister;"
        "nnunet_ssl.autoregister.register(); print(*sorted(set(sys.modules) - before))"
    )
    assert run_python("-S", "-c", code) == "nnunet_ssl nnunet_ssl.autoregister"  # -S: without any start-up file
