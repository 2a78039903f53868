"""`nnunet-ssl compare`: jobs, what an interruption leaves, the table, the figure, and jobs on a cluster."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from matplotlib import colors, image
from nnunetv2 import paths
from pages import Page, alone
from scipy import stats
from tiny import make_raw_dataset, nnunet_command, plan, write_image

from nnunet_ssl.cli import main
from nnunet_ssl.commands.compare import job as job_module
from nnunet_ssl.commands.compare import page as page_module
from nnunet_ssl.commands.compare import run as run_module
from nnunet_ssl.commands.compare.table import case_values, comma_separated, latex, make_rows, markdown
from nnunet_ssl.commands.evaluate import METRICS
from nnunet_ssl.commands.pictures import compare_cases
from nnunet_ssl.data.splits import save_splits
from nnunet_ssl.system import cluster
from nnunet_ssl.system.colours import COLOURS
from nnunet_ssl.system.lock import locked
from nnunet_ssl.system.processes import execute

CASES = ("a", "b", "c")
THREE = ("nnUNetTrainer", "nnUNetTrainerM3", "nnUNetTrainerM3HL")
# in place of nnU-Net's commands: what a trainer predicts is the reference, moved by so many voxels
SHIFT = {"nnUNetTrainer": 2, "nnUNetTrainerM3": 1, "nnUNetTrainerM3HL": 0}


@pytest.fixture(autouse=True)
def no_figure_in_pages(request, monkeypatch):
    if request.node.get_closest_marker("pictures") is None:  # drawn twice, for bright and for dark screens
        monkeypatch.setattr(page_module, "draw_cases", lambda dice, models: None)


@pytest.fixture
def dataset(tmp_path, monkeypatch):
    """Dataset801_Compare with three test scans, plans as far as they are read, two folds; returns the folder of all."""
    for kind in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    raw, preprocessed = (tmp_path / kind / "Dataset801_Compare" for kind in ("raw", "preprocessed"))
    for index, case in enumerate(CASES):
        label = np.zeros((6, 12, 12), np.uint8)
        label[2:4, 3:8, 3 : 6 + index] = 1
        write_image(raw / "imagesTs" / f"{case}_0000.nii.gz", label.astype(np.float32))
        write_image(raw / "labelsTs" / f"{case}.nii.gz", label)
    description = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    (raw / "dataset.json").write_text(json.dumps(description))
    preprocessed.mkdir(parents=True)
    small = {"architecture": {}}
    configurations = {"3d_fullres": small, "cascade": small | {"previous_stage": "3d_lowres"}, "3d_lowres": small}
    (preprocessed / "nnUNetPlans.json").write_text(json.dumps({"configurations": configurations}))
    (preprocessed / "splits_final.json").write_text(json.dumps([{"train": ["x"], "val": ["y"]}] * 2))
    return tmp_path


def checkpoint(root, trainer, fold=0, name="checkpoint_final.pth"):
    """A complete one of any content."""
    folder = root / "results" / "Dataset801_Compare" / f"{trainer}__nnUNetPlans__3d_fullres" / f"fold_{fold}"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as file:
        file.writestr("weights", "0")
    return folder / name


@pytest.fixture
def trained(dataset):
    for trainer in THREE:
        checkpoint(dataset, trainer)
    return dataset


def option(arguments, name):
    return arguments[arguments.index(name) + 1]


def fake_execute(program, arguments, log, environment=None, tick=lambda: None):
    """Does what nnU-Net's command leaves on disk, and notes that it was called in $CALLS."""
    tick()
    tick()  # as time goes by
    trainer = option(arguments, "-tr")
    with open(os.environ["CALLS"], "a", encoding="utf-8") as file:
        file.write(" ".join([program, trainer, *[a for a in arguments if a in ("--c", "--disable_tta")]]) + "\n")
    if os.environ.get("KILL_AT") == trainer:
        os.kill(os.getpid(), signal.SIGKILL)
    if program == "nnUNetv2_train":
        checkpoint(Path((environment or os.environ)["nnUNet_results"]).parent, trainer, arguments[2])
        return 0
    output, raw = Path(option(arguments, "-o")), Path(os.environ["nnUNet_raw"], "Dataset801_Compare")
    output.mkdir(exist_ok=True)
    shutil.copy(raw / "dataset.json", output)
    for file in (raw / "labelsTs").iterdir():
        label = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
        write_image(output / file.name, np.roll(label, SHIFT.get(trainer, 0), 2))
    return 0


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """nnU-Net's commands are only noted; returns a function that gives the calls since it was called last."""
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(job_module, "execute", fake_execute)

    def calls():
        file = tmp_path / "calls"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        file.unlink(missing_ok=True)
        return lines

    return calls


def compare(*more, trainers=THREE, folds=("0",), device="cpu"):
    """The command; its exit code."""
    line = ["compare", "-d", "801", "-c", "3d_fullres", "-f", *folds, "-tr", *trainers, "-device", device, "-np", "1"]
    return main([*line, *more])


def out(root):
    return root / "results" / "Dataset801_Compare" / "comparison_nnUNetPlans_3d_fullres"


def table(root):
    """Rows of the CSV by trainer."""
    with (out(root) / "comparison.csv").open(newline="") as f:
        return {row["trainer"]: row for row in csv.DictReader(f)}


# ---- a sweep ----


def test_every_trainer_is_predicted_evaluated_and_listed(trained, fake, capsys):
    assert compare() == 0
    assert fake() == [f"nnUNetv2_predict {trainer}" for trainer in THREE]
    rows = table(trained)
    assert list(rows) == list(THREE)
    assert float(rows["nnUNetTrainerM3HL"]["Dice_percent_mean"]) == 100
    # moved by one voxel of three, four and five
    expected = 100 * np.array([2 / 3, 3 / 4, 4 / 5])
    assert float(rows["nnUNetTrainerM3"]["Dice_percent_mean"]) == pytest.approx(expected.mean())
    assert float(rows["nnUNetTrainerM3"]["Dice_percent_sd"]) == pytest.approx(expected.std(ddof=1))
    assert {row["cases"] for row in rows.values()} == {"3"}
    shown = capsys.readouterr().out
    assert (out(trained) / "comparison.md").read_text(encoding="utf-8") in shown
    assert "73.89 ± 6.74" in shown
    for said in ("strict", "in mm", "Wilcoxon", "against nnUNetTrainer", "with mirroring", "fold 0"):
        assert said in shown
    assert "booktabs" in (out(trained) / "comparison.tex").read_text(encoding="utf-8")
    assert (out(trained) / "comparison.png").stat().st_size > 10_000
    assert "nnUNetTrainerM3 73.89 ± 6.74" in Page(out(trained) / "comparison.html").texts["table"]
    assert "nnUNetv2_predict" in (out(trained) / "logs" / "nnUNetTrainer_fold_0.log").read_text(encoding="utf-8")


@pytest.mark.pictures
def test_the_page_of_a_comparison_stands_alone_and_escapes_what_it_quotes(tmp_path):
    cases = {name: {f"{name}<i>": dict.fromkeys(METRICS, 0.5) | {"Dice": d}} for name, d in (("a", 0.25), ("b", 0.75))}
    cases["0"] = {"0<i>": dict.fromkeys(METRICS, np.nan)}  # neither in the reference nor in the prediction
    values = {"One": cases["0"] | cases["a"] | cases["b"], "Two": {}, "Three": cases["b"]}
    rows = make_rows(values, {"Two": "RuntimeError: <b>no memory</b>"})
    dice = {name: {case: m["Dice"] for case, m in own.items()} for name, own in values.items() if own}
    page_module.write_comparison(tmp_path / "p.html", "Dataset801_Compare", rows, "two-sided <u>test</u>", dice, 6)
    page = Page(tmp_path / "p.html")
    assert alone(page)
    assert not [tag for tag, _ in page.elements if tag in ("b", "i", "u")]
    table, every = page.texts["table"], page.texts["cases"]
    for text in ("One 50.00 ± 35.36", "Two failed: RuntimeError: <b>no memory</b>", "two-sided <u>test</u>"):
        assert text in table
    assert every.endswith("a<i> 25.0 b<i> 75.0 75.0 0<i>")  # worst first, empty where a trainer has none
    assert "Medians: One 50.0 %, Three 75.0 %." in page.images()[0]["alt"]
    page_module.write_comparison(tmp_path / "p.html", "Dataset801_Compare", rows[1:2], "", {}, 6)
    assert "every trainer has failed" in Page(tmp_path / "p.html").texts["cases"]


def test_a_second_comparison_into_the_same_folder_is_refused(trained, fake, capsys):
    out(trained).mkdir(parents=True)
    with locked(out(trained) / ".compare.lock", f"comparing into {out(trained)}"):
        assert compare() == 1
    assert f"Process {os.getpid()} on " in (error := capsys.readouterr().err)
    assert f"has been comparing into {out(trained)} since" in error
    assert fake() == []
    assert compare() == 0
    assert not list(out(trained).glob(".*"))


def test_the_folder_cannot_be_taken_for_a_model(trained, fake):
    compare(trainers=["nnUNetTrainer"])
    models = {f"{trainer}__nnUNetPlans__3d_fullres" for trainer in THREE}
    made = {folder.name for folder in out(trained).parent.iterdir()} - models
    assert len(made) == 1
    assert "__" not in made.pop()


def test_what_is_finished_is_not_repeated(trained, fake):
    compare()
    files = {f: f.stat().st_mtime_ns for f in (out(trained) / "predictions").rglob("*.*")}
    assert len(files) > 15
    fake()
    assert compare() == 0
    assert fake() == []
    assert {f: f.stat().st_mtime_ns for f in files} == files
    checkpoint(trained, "nnUNetTrainerBCP")
    assert compare(trainers=[*THREE, "nnUNetTrainerBCP"]) == 0
    assert fake() == ["nnUNetv2_predict nnUNetTrainerBCP"]


def test_predictions_of_another_checkpoint_other_settings_or_other_labels_are_made_anew(trained, fake):
    compare()
    fake()
    final = checkpoint(trained, "nnUNetTrainerM3")
    later = time.time() + 100
    os.utime(final, (later, later))
    compare()
    assert fake() == ["nnUNetv2_predict nnUNetTrainerM3"]
    compare("--disable_tta")
    assert fake() == [f"nnUNetv2_predict {trainer} --disable_tta" for trainer in THREE]
    os.utime(trained / "raw" / "Dataset801_Compare" / "labelsTs" / "b.nii.gz", (later, later))
    compare("--disable_tta")
    assert len(fake()) == 3
    folder = out(trained) / "predictions" / "nnUNetTrainerM3HL_fold_0"
    described = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    (folder / "settings.json").write_text(json.dumps(described | {"protocol": "la-literature"}))
    compare("--disable_tta")
    assert fake() == ["nnUNetv2_predict nnUNetTrainerM3HL --disable_tta"]


def test_a_sweep_that_is_killed_goes_on_with_the_job_it_was_at(trained, fake):
    code = "import test_compare as t; t.job_module.execute = t.fake_execute; "
    code += "t.run_module.check_trainers = print; t.compare()"  # to find them takes seconds
    tests = Path(__file__).parents[1]
    environment = os.environ | {"KILL_AT": "nnUNetTrainerM3", "PYTHONPATH": str(tests)}
    process = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, env=environment, timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert fake() == ["nnUNetv2_predict nnUNetTrainer", "nnUNetv2_predict nnUNetTrainerM3"]
    first = out(trained) / "predictions" / "nnUNetTrainer_fold_0"
    assert [f.name for f in first.parent.iterdir() if not f.name.startswith(".")] == [first.name]
    before = {f: f.stat().st_mtime_ns for f in first.iterdir()}
    assert compare() == 0
    assert fake() == ["nnUNetv2_predict nnUNetTrainerM3", "nnUNetv2_predict nnUNetTrainerM3HL"]
    assert {f: f.stat().st_mtime_ns for f in first.iterdir()} == before


def test_ctrl_c_ends_the_sweep_and_loses_nothing(trained, fake, monkeypatch):
    def interrupt(program, arguments, *others, **more):
        if option(arguments, "-tr") == "nnUNetTrainerM3":
            raise KeyboardInterrupt
        return fake_execute(program, arguments, *others, **more)

    with monkeypatch.context() as patch:
        patch.setattr(job_module, "execute", interrupt)
        with pytest.raises(KeyboardInterrupt):
            compare()
    fake()
    assert compare() == 0
    assert fake() == ["nnUNetv2_predict nnUNetTrainerM3", "nnUNetv2_predict nnUNetTrainerM3HL"]


def test_a_job_that_was_ended_just_before_its_last_step_is_not_predicted_again(trained, fake, monkeypatch):
    replace = os.replace

    def interrupt(source, target):
        if target == job(trained).predictions:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            job_module.run_job(job(trained), lambda step: None)
    assert not job(trained).predictions.exists()
    fake()
    job_module.run_job(job(trained), lambda step: None)
    assert fake() == []
    assert (job(trained).predictions / "evaluation.json").is_file()


def job(root, trainer="nnUNetTrainer", **settings):
    shared = {"train": False, "device": "cpu", "num_processes": 1, "mirroring": True, "fold": 0, **settings}
    (out(root) / "logs").mkdir(parents=True, exist_ok=True)
    return job_module.Job("Dataset801_Compare", "3d_fullres", "nnUNetPlans", trainer, output=out(root), **shared)


# ---- training ----


def test_only_what_is_not_trained_is_trained(dataset, fake, monkeypatch):
    drawn = []
    monkeypatch.setattr(page_module, "draw_cases", lambda dice, models: drawn.append(models))
    checkpoint(dataset, "nnUNetTrainer", 1)
    assert compare("--train", trainers=["nnUNetTrainer"], folds=["0", "1"]) == 0
    assert drawn == [2]  # the figure is of the means over both folds
    assert fake() == ["nnUNetv2_train nnUNetTrainer", *["nnUNetv2_predict nnUNetTrainer"] * 2]


def test_a_training_that_was_begun_is_continued(dataset, fake):
    checkpoint(dataset, "nnUNetTrainer", name="checkpoint_latest.pth")
    compare("--train", trainers=["nnUNetTrainer"])
    assert fake()[0] == "nnUNetv2_train nnUNetTrainer --c"


def test_a_half_written_checkpoint_is_neither_used_nor_lost(dataset, fake):
    final = checkpoint(dataset, "nnUNetTrainer")
    whole = final.read_bytes()
    final.write_bytes(whole[:-10])
    checkpoint(dataset, "nnUNetTrainer", name="checkpoint_best.pth")
    assert compare(trainers=["nnUNetTrainer"]) == 1
    assert fake() == []
    compare("--train", trainers=["nnUNetTrainer"])
    assert fake()[0] == "nnUNetv2_train nnUNetTrainer --c"
    assert final.with_suffix(".incomplete").read_bytes() == whole[:-10]


# ---- trainers that break ----


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (3, "nnUNetv2_predict ended with exit code 3: CUDA out of memory"),
        (-9, "nnUNetv2_predict was ended by SIGKILL"),
        ("surplus", "x.nii.gz: no reference"),
        ("shape", "predictions and references are not of the same scans"),
        ("raise", "FileNotFoundError: nnUNetv2_predict is neither in"),
    ],
)
def test_a_trainer_that_breaks_fails_its_row_not_the_sweep(trained, fake, monkeypatch, capsys, fault, reason):
    def broken(program, arguments, log, **more):
        if option(arguments, "-tr") != "nnUNetTrainerM3":
            return fake_execute(program, arguments, log, **more)
        if fault == "raise":
            raise FileNotFoundError("nnUNetv2_predict is neither in BIN nor on PATH.")
        with log.open("a") as f:
            f.write("some | text\nCUDA out of memory\n")
        fake_execute(program, arguments, log, **more)
        folder = Path(option(arguments, "-o"))
        if fault in ("surplus", "shape"):
            name = "x" if fault == "surplus" else "a"
            write_image(folder / f"{name}.nii.gz", np.zeros((6, 12, 11), np.uint8))
        return fault if isinstance(fault, int) else 0

    monkeypatch.setattr(job_module, "execute", broken)
    assert compare() == 1
    rows = table(trained)
    assert reason.lower() in rows["nnUNetTrainerM3"]["failure"].lower()
    log = out(trained) / "logs" / "nnUNetTrainerM3_fold_0.log"
    assert str(log) in rows["nnUNetTrainerM3"]["failure"]
    assert "Traceback" in log.read_text(encoding="utf-8")
    assert rows["nnUNetTrainerM3"]["Dice_percent_mean"] == ""
    assert float(rows["nnUNetTrainerM3HL"]["Dice_percent_mean"]) == 100
    assert float(rows["nnUNetTrainerM3HL"]["wilcoxon_p"]) == pytest.approx(0.25)
    assert str(log) in capsys.readouterr().out

    monkeypatch.setattr(job_module, "execute", fake_execute)
    fake()
    assert compare() == 0  # the cause is gone
    assert fake() == ["nnUNetv2_predict nnUNetTrainerM3"]
    assert table(trained)["nnUNetTrainerM3"]["failure"] == ""


def test_a_trainer_with_one_failed_fold_has_no_numbers(dataset, fake, monkeypatch):
    for fold in (0, 1):
        checkpoint(dataset, "nnUNetTrainer", fold)
    assert compare(trainers=["nnUNetTrainer"], folds=["0"]) == 0
    monkeypatch.setattr(
        job_module,
        "execute",
        lambda program, arguments, log, **more: option(arguments, "-f") == "1" or fake_execute(program, arguments, log),
    )
    assert compare(trainers=["nnUNetTrainer"], folds=["0", "1"]) == 1
    row = table(dataset)["nnUNetTrainer"]
    assert row["failure"].startswith("fold 1: ")
    assert row["Dice_percent_mean"] == ""
    assert not (out(dataset) / "comparison.png").exists()


def test_a_first_trainer_that_broke_leaves_the_others_without_a_test(trained, fake, monkeypatch):
    monkeypatch.setattr(
        job_module,
        "execute",
        lambda program, arguments, log, **more: (
            option(arguments, "-tr") == "nnUNetTrainer" or fake_execute(program, arguments, log)
        ),
    )
    assert compare() == 1
    rows = table(trained)
    assert rows["nnUNetTrainerM3"]["wilcoxon_p"] == ""
    assert float(rows["nnUNetTrainerM3HL"]["Dice_percent_mean"]) == 100


# ---- input ----


def refused(root, capsys, said, *more, **arguments):
    assert compare(*more, **arguments) == 1
    error = capsys.readouterr().err
    for text in said if isinstance(said, tuple) else (said,):
        assert text in error
    assert not out(root).exists()


def test_models_that_are_not_trained_are_all_named_with_their_command(dataset, fake, capsys):
    checkpoint(dataset, "nnUNetTrainerM3")
    said = ("--train", *(f"nnUNetv2_train 801 3d_fullres 0 -tr {t} -p nnUNetPlans -device cpu" for t in THREE[::2]))
    refused(dataset, capsys, said)
    assert fake() == []


def test_trainers_that_are_not_found_are_all_named(trained, fake, capsys):
    refused(trained, capsys, ("nnUNetTrainerX:", "nnUNetTrainerY:"), trainers=["nnUNetTrainerX", "nnUNetTrainerY"])


def test_a_configuration_a_fold_and_plans_that_are_missing_are_refused(trained, fake, capsys):
    refused(trained, capsys, "no configuration 2d", "-c", "2d")
    refused(trained, capsys, "cascade is a cascade", "-c", "cascade")
    refused(trained, capsys, ("Fold 2 does not exist", "has the folds 0 to 1"), folds=["0", "2"])
    refused(trained, capsys, "Other.json is missing", "-p", "Other")


def test_a_dataset_that_is_missing_is_refused(trained, fake, capsys):
    refused(trained, capsys, "802", "-d", "802")
    refused(trained, capsys, "dataset.json is missing", "-d", "Dataset802_Other")


def test_test_scans_and_labels_that_do_not_fit_are_refused(trained, fake, capsys):
    raw = trained / "raw" / "Dataset801_Compare"
    shutil.copy(raw / "imagesTs" / "a_0000.nii.gz", raw / "imagesTs" / "a_0001.nii.gz")
    (raw / "imagesTs" / "b_0000.nii.gz").unlink()
    (raw / "labelsTs" / "c.nii.gz").unlink()
    refused(trained, capsys, ("a: 2 files, not 1", "b: no scan in", "c: no label in"))
    shutil.rmtree(raw / "labelsTs")
    refused(trained, capsys, "labelsTs has no file")
    shutil.rmtree(raw / "imagesTs")
    refused(trained, capsys, "imagesTs has no file")


def test_folds_of_different_numbers_of_labels_are_warned_of(tmp_path, capsys):
    splits = tmp_path / "splits_final.json"
    save_splits(splits, [{"train": [*cases], "val": ["y"]} for cases in ("abcd", "abcde", "abcdef")], overwrite=True)
    run_module.say_unequal(splits, [0, 1, "all"])
    assert "WARNING" not in capsys.readouterr().out
    run_module.say_unequal(splits, [0, 1, 2])
    assert "WARNING: the folds have 4 to 6 labeled cases, and the table has the mean" in capsys.readouterr().out


def test_colors_are_channels_in_one_file(dataset):
    raw = dataset / "raw" / "Dataset801_Compare"
    description = json.loads((raw / "dataset.json").read_text())
    colors = {"channel_names": {str(index): color for index, color in enumerate("RGB")}}
    (raw / "dataset.json").write_text(json.dumps(description | colors))
    with pytest.raises(ValueError, match="a: 1 file, not 3"):  # no labeled scan shows another number
        run_module.check_dataset(raw.name, "3d_fullres", "nnUNetPlans", [0])
    shutil.copytree(raw / "imagesTs", raw / "imagesTr")
    run_module.check_dataset(raw.name, "3d_fullres", "nnUNetPlans", [0])


def test_a_device_that_is_not_there_is_refused(trained, fake, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(trained, capsys, "-device cpu", device="cuda")
    refused(trained, capsys, "-device cpu", device="cuda", trainers=["nnUNetTrainerBCP"])  # before training is advised


def test_settings_for_slurm_are_checked(trained, fake, capsys, slurm):
    for words, said in (
        (["partition=gpu"], "--slurm is for --launcher slurm"),
        (["--launcher", "slurm", "partition"], "'partition' is not of the form NAME=VALUE"),
    ):
        with pytest.raises(SystemExit):
            compare(*words[:2], "--slurm", words[-1]) if len(words) > 1 else compare("--slurm", *words)
        assert said in capsys.readouterr().err
    for setting, said in (("partitoin=gpu", "partitoin"), ("timeout_min=long", "timeout_min"), ("nodes=2", "one node")):
        refused(trained, capsys, ("--slurm", said), "--launcher", "slurm", "--slurm", setting)


def test_submitit_is_asked_for_only_where_it_is_needed(trained, fake, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    refused(trained, capsys, "pip install submitit", "--launcher", "slurm")
    assert compare() == 0


def test_a_job_shows_how_far_it_is(trained, fake, capsys):
    assert compare(trainers=THREE[:2]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if ", fold 0: " in line]
    assert shown == [
        text
        for trainer in THREE[:2]
        for text in (
            f"{trainer}, fold 0: prediction",
            f"{trainer}, fold 0: evaluation",
        )
    ]


def test_a_job_tells_the_epoch_and_the_number_of_scans(trained, fake, monkeypatch, capsys):
    def train(program, arguments, log, environment=None, tick=lambda: None):
        if program == "nnUNetv2_train":
            tick()
            log.write_text(
                "2026-01-01 10:00:00.1: \n2026-01-01 10:00:00.2: Epoch 7 \n2026-01-01 10:00:00.3: Epoch time: 3 s\n"
            )
            tick()
            checkpoint(trained, THREE[1])
        else:
            fake_execute(program, arguments, log)
            tick()
        return 0

    (out(trained).parent / f"{THREE[1]}__nnUNetPlans__3d_fullres" / "fold_0" / "checkpoint_final.pth").unlink()
    monkeypatch.setattr(job_module, "execute", train)
    told = []
    monkeypatch.setattr(run_module, "show", lambda bar, job, step, shown: told.append(step))
    assert compare("--train", trainers=THREE[1:2]) == 0
    assert told == ["training", "training (epoch 7)", "prediction (3 of 3)", "evaluation"]


# ---- several trainings ----


@pytest.fixture
def seeds(dataset, fake, monkeypatch):
    """Two folders of results with two trainers; what M3HL predicts is moved in the second one only, by one voxel."""
    folders = [dataset / name / "results" for name in ("one", "two")]
    for folder in folders:
        for trainer in THREE[::2]:
            checkpoint(folder.parent, trainer)

    def execute(program, arguments, log, environment=None, tick=lambda: None):
        monkeypatch.setitem(SHIFT, "nnUNetTrainerM3HL", int(environment["nnUNet_results"] == str(folders[1])))
        return fake_execute(program, arguments, log, environment, tick)

    monkeypatch.setattr(job_module, "execute", execute)
    return folders


def of_results(folder):
    return folder / "Dataset801_Compare" / "comparison_nnUNetPlans_3d_fullres"


def test_the_mean_over_several_trainings_is_compared_and_each_is_shown(seeds, fake, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(page_module, "draw_cases", lambda dice, models: drawn.append(models))
    twice = seeds[0].parent / ".." / "one" / "results"  # counts once
    assert compare("--results", *map(str, (*seeds, twice)), trainers=THREE[::2]) == 0
    assert fake() == [f"nnUNetv2_predict {trainer}" for trainer in THREE[::2] for _ in seeds]
    with (of_results(seeds[0]) / "comparison.csv").open(newline="") as f:
        first, second = csv.DictReader(f)
    # as it is in one training, moved by one voxel of three, four and five in the other
    moved = 100 * np.array([2 / 3, 3 / 4, 4 / 5])
    values = (100 + moved) / 2
    assert float(second["Dice_percent_mean"]) == pytest.approx(values.mean())
    assert float(second["Dice_percent_sd"]) == pytest.approx(values.std(ddof=1))
    assert float(second["wilcoxon_p"]) == pytest.approx(0.25)
    assert [float(second[f"Dice_percent_training_{i}"]) for i in (1, 2)] == pytest.approx([100, moved.mean()])
    assert first["Dice_percent_training_1"] == first["Dice_percent_training_2"] == first["Dice_percent_mean"]
    assert second["cases"] == "3"
    shown = capsys.readouterr().out
    assert "| p | Dice of each training (%) |" in shown
    assert "| 100.00, 73.89 |" in shown
    assert "then over the folds and 2 trainings." in shown
    assert "does not tell how much two trainings" not in shown
    assert "Dice of each training" in (of_results(seeds[0]) / "comparison.tex").read_text(encoding="utf-8")
    assert "100.00, 73.89" in Page(of_results(seeds[0]) / "comparison.html").texts["table"]
    assert not (of_results(seeds[1]) / "comparison.csv").exists()
    assert drawn == [2]


def test_what_was_compared_for_one_training_is_not_predicted_again_for_several(seeds, fake, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_results", str(seeds[1]))
    monkeypatch.setattr(paths, "nnUNet_results", str(seeds[1]))
    assert compare(trainers=THREE[::2]) == 0
    assert "Dice of each training" not in capsys.readouterr().out
    fake()
    output = seeds[0].parents[1] / "both"
    assert compare("--results", *map(str, seeds), "-o", str(output), trainers=THREE[::2]) == 0
    assert fake() == [f"nnUNetv2_predict {trainer}" for trainer in THREE[::2]]
    assert {file.name for file in output.iterdir()} == {f"comparison.{e}" for e in ("csv", "html", "md", "png", "tex")}
    folders = {file.name for file in of_results(seeds[0]).iterdir()}
    assert folders == {"logs", "predictions"}
    assert compare("--results", str(seeds[0]), "-o", str(output), trainers=THREE[::2]) == 0
    assert fake() == []


def test_a_training_that_is_missing_is_named_with_its_folder_or_trained_there(seeds, fake, monkeypatch, capsys):
    third = seeds[0].parents[1] / "three" / "results"
    words = ("--results", *map(str, seeds), str(third))
    assert compare(*words, trainers=THREE[:1]) == 1
    assert f"nnUNet_results={third} nnUNetv2_train 801 3d_fullres 0 -tr nnUNetTrainer " in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setenv("nnUNet_ssl_seed", "0")
        assert compare("--train", *words, trainers=THREE[:1]) == 1
    assert "nnUNet_ssl_seed is set" in capsys.readouterr().err
    of_results(seeds[1]).mkdir()
    with locked(of_results(seeds[1]) / ".compare.lock", "comparing"):
        assert compare("--train", *words, trainers=THREE[:1]) == 1
    assert "has been comparing since" in capsys.readouterr().err
    assert fake() == []
    assert compare("--train", *words, trainers=THREE[:1]) == 0
    assert fake().count("nnUNetv2_train nnUNetTrainer") == 1
    assert (third / "Dataset801_Compare/nnUNetTrainer__nnUNetPlans__3d_fullres/fold_0/checkpoint_final.pth").is_file()
    assert of_results(third).is_dir()


def test_a_failure_says_of_which_training_it_is(seeds, fake, monkeypatch, capsys):
    monkeypatch.setattr(
        job_module,
        "execute",
        lambda program, arguments, log, environment, tick: (
            3
            if environment["nnUNet_results"] == str(seeds[1])
            else fake_execute(program, arguments, log, environment, tick)
        ),
    )
    assert compare("--results", *map(str, seeds), trainers=THREE[:1]) == 1
    assert f"| failed: fold 0 in {seeds[1]}: RuntimeError" in capsys.readouterr().out


# ---- numbers ----


def write_evaluation(file, values):
    """An evaluation.csv: per case and label Dice and HD95 (mm); all other metrics follow from them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["case", "label", *METRICS])
        for case, labels in values.items():
            for label, (dice, hd95) in labels.items():
                writer.writerow([case, label, dice, dice / 2, hd95, hd95 / 4, hd95 / 3, *[10 * hd95] * 3])
    return file


NAN = float("nan")


def test_a_case_is_the_mean_over_labels_then_over_folds(tmp_path):
    first = {"a": {"x": (0.8, 2), "y": (0.6, 4)}, "b": {"x": (0.9, 1), "y": (0.7, 3)}}
    second = {"a": {"x": (0.4, 6), "y": (0.2, 8)}, "b": {"x": (0.5, 5), "y": (0.5, 5)}}
    files = [write_evaluation(tmp_path / f"{i}.csv", values) for i, values in enumerate((first, second))]
    found = case_values(files)
    assert {case: values["Dice"] for case, values in found.items()} == pytest.approx({"a": 0.5, "b": 0.65})
    assert {case: values["HD95_mm"] for case, values in found.items()} == pytest.approx({"a": 5, "b": 3.5})

    three = write_evaluation(tmp_path / "three.csv", {"a": {"x": (0.1, 1), "y": (0.2, 1), "z": (0.9, 1)}})
    assert case_values([three])["a"]["Dice"] == pytest.approx(0.4)

    row = make_rows({"T": found}, {})[0]
    assert row.statistics["Dice"]["mean"] == pytest.approx(0.575)
    assert row.statistics["Dice"]["sd"] == pytest.approx(0.15 / 2**0.5)
    text = markdown([row], "Caption.")
    assert "| T | 57.50 ± 10.61 | 28.75 ± 5.30 | 4.25 ± 1.06 | 1.06 ± 0.27 | 2 | 0 |  |" in text
    numbers = next(csv.DictReader(comma_separated([row]).splitlines()))
    assert float(numbers["ASD_mm_mean"]) == pytest.approx(4.25 / 4)


def test_a_case_without_distance_is_counted_and_one_without_the_label_is_not(tmp_path):
    missed = {
        "a": {"x": (0.8, 2), "y": (0.0, NAN)},  # y is in one of the two
        "b": {"x": (0.8, 2), "y": (NAN, NAN)},  # y is in neither
        "c": {"x": (0.6, 4), "y": (0.6, 4)},
        "d": {"x": (NAN, NAN), "y": (NAN, NAN)},  # nothing to find, nothing found
    }
    found = case_values([write_evaluation(tmp_path / "e.csv", missed)])
    row = make_rows({"T": found}, {})[0]
    assert found["a"]["Dice"] == pytest.approx(0.4)
    assert found["b"]["Dice"] == pytest.approx(0.8)
    assert row.statistics["Dice"]["mean"] == pytest.approx(0.6)  # of three cases
    assert row.statistics["HD95_mm"]["mean"] == pytest.approx(3)  # of b and c
    assert "| 4 | 2 |" in markdown([row], "")


def dice_of(values):
    return {f"case_{i}": dict.fromkeys(METRICS, float(v)) for i, v in enumerate(values)}


def test_the_p_value_is_scipys(tmp_path):
    rng = np.random.default_rng(0)
    first, second = rng.uniform(0.5, 0.9, 12), rng.uniform(0.6, 0.9, 12)
    second[3] = first[3]
    first_row, second_row = make_rows({"A": dice_of(first), "B": dice_of(second)}, {})
    assert first_row.p is None
    assert second_row.p == stats.wilcoxon(second, first).pvalue
    assert f"| {second_row.p:.4f} |" in markdown([second_row], "")
    numbers = next(csv.DictReader(comma_separated([second_row]).splitlines()))
    assert float(numbers["wilcoxon_p"]) == second_row.p


@pytest.mark.parametrize("second", [[0.5, 0.6, 0.7], [0.5, 0.6, 0.8]])
def test_fewer_than_two_cases_that_differ_give_no_p_value(second):
    rows = make_rows({"A": dice_of([0.5, 0.6, 0.7]), "B": dice_of(second)}, {})
    assert rows[1].p is None
    assert markdown(rows, "").count("|  |") == 2


def test_a_single_case_and_cases_without_any_distance_are_shown():
    cases = {"a": dict.fromkeys(METRICS, NAN) | {"Dice": 0.0, "Jaccard": 0.0}}
    rows = make_rows({"A": cases, "B": cases}, {})
    assert "| A | 0.00 ± 0.00 | 0.00 ± 0.00 |  |  | 1 | 1 |  |" in markdown(rows, "")
    assert "nan" not in markdown(rows, "") + comma_separated(rows) + latex(rows, "")


def test_latex_is_escaped():
    rows = make_rows({"T_8epochs": dice_of([0.5, 0.6]), "U": {}}, {"U": r"50 % of {a_b} & c:\d ~ ^ # $"})
    text = latex(rows, "la_quick, 95 %")
    assert r"T\_8epochs & 55.00 $\pm$ 7.07" in text
    assert r"\caption{la\_quick, 95 \%}" in text
    assert r"failed: 50 \% of \{a\_b\} \& c:\textbackslash{}d \textasciitilde{} \textasciicircum{} \# \$}" in text
    assert r"\toprule" in text
    lines = [line for line in text.splitlines() if line.endswith(r"\\")]
    columns = 1 + text.partition(r"\begin{tabular}{l")[2].partition("}")[0].count("r")
    assert [line.replace(r"\&", "").count("&") + 1 for line in lines] == [columns, columns, 2]


def test_a_bar_in_a_reason_does_not_end_the_cell():
    text = markdown(make_rows({"U": {}}, {"U": "a | b"}), "")
    head, _, row = text.splitlines()[:3]
    assert row.replace("\\|", "").count("|") == head.count("|")


# ---- figure ----


def test_the_figure_shows_every_trainer_at_a_readable_size(tmp_path):
    rng = np.random.default_rng(0)
    for number in (1, 3, 8):
        names = [f"nnUNetTrainerCoLearning{i}" for i in range(number)]
        dice = {name: {f"case_{i}": rng.uniform(0.6, 0.95) for i in range(20)} for name in names}
        dice[names[0]]["case_3"] = NAN
        compare_cases(dice, tmp_path / "figure.png", models=1)
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
        pixels = image.imread(tmp_path / "figure.png")
        assert 700 <= pixels.shape[1] <= 1300
        assert 500 <= pixels.shape[0] <= 1000
        for colour in COLOURS[:number]:
            near = np.abs(pixels[..., :3] - np.array(colors.to_rgb(colour))).max(-1) < 0.03
            assert near.sum() > 500
    assert [f.name for f in tmp_path.iterdir()] == ["figure.png"]


# ---- child processes ----


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks at processes in /proc")
def test_a_command_ends_with_the_process_that_started_it_even_if_that_is_killed(tmp_path):
    program = "import os, subprocess, sys, time; open('pid', 'w').write(str(os.getpid())); "
    program += "subprocess.Popen([sys.executable, '-c', 'import os, time; "
    program += 'open(\\"child\\", \\"w\\").write(str(os.getpid())); time.sleep(300)\']); time.sleep(300)'
    code = "from pathlib import Path; from nnunet_ssl.system.processes import execute; import sys; "
    code += f"execute(Path(sys.executable).name, ['-c', {program!r}], Path('log'))"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    wait_until(
        lambda: all((tmp_path / n).is_file() and (tmp_path / n).read_text(encoding="utf-8") for n in ("pid", "child"))
    )
    started = [int((tmp_path / name).read_text(encoding="utf-8")) for name in ("pid", "child")]
    assert all(map(alive, started))
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(map(alive, started)))


def wait_until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid):
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_end_of_a_command_is_told(tmp_path):
    python = Path(sys.executable).name
    for code, expected in (("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9), ("print(7)", 0)):
        assert execute(python, ["-c", code], tmp_path / "log") == expected
    assert (tmp_path / "log").read_text(encoding="utf-8") == "7\n"


def test_nothing_that_a_user_writes_reaches_a_shell(tmp_path):
    words = ["-c", "import sys; print(sys.argv[1:])", "$(touch here)", "; touch here", "a b"]
    execute(Path(sys.executable).name, words, tmp_path / "log")
    assert (tmp_path / "log").read_text(encoding="utf-8").strip() == repr(words[2:])


# ---- cluster ----


def test_jobs_run_through_submitits_local_executor(tmp_path, monkeypatch):
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 0)
    executor = cluster.make_executor(tmp_path / "jobs", {"timeout_min": 5, "partition": "gpu"}, "local")
    assert cluster.run_jobs(executor, print, {"fine": "hello"}) == {}
    assert cluster.run_jobs(executor, str, {"returns": "a reason"}) == {"returns": "a reason"}
    raises = cluster.run_jobs(executor, int, {"raises": "x"})["raises"]
    assert "ValueError: invalid literal for int() with base 10: 'x'" in raises
    killed = cluster.run_jobs(executor, signal.raise_signal, {"killed": int(signal.SIGKILL)})["killed"]
    assert "ended without a result" in killed
    assert Path(killed.rpartition("log: ")[2]).parent == tmp_path / "jobs"
    (tmp_path / "logs").mkdir()
    shared = {"train": False, "device": "cpu", "num_processes": 1, "mirroring": False}
    job = job_module.Job("Dataset801_None", "3d_fullres", "nnUNetPlans", "T", 0, tmp_path, **shared)
    failed = cluster.run_jobs(executor, job_module.run_safely, {job.name: job})[job.name]
    assert failed.startswith("FileNotFoundError")
    assert "Traceback" in job.log.read_text(encoding="utf-8")
    assert "hello" in "".join(file.read_text(encoding="utf-8") for file in (tmp_path / "jobs").glob("*.out"))


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Slurm's commands: every job is in the state that the file `state` holds; sbatch keeps what it is given."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    scripts = {
        "srun": "",
        "sbatch": f"cat $1 >> {folder}/submitted; n=$(grep -c partition {folder}/submitted); "
        "echo Submitted batch job $((1000 + n))",
        "sacct": "echo 'JobID|State|NodeList'; "
        f'for i in 1001 1002 1003 1004; do echo "$i|$(cat {folder}/state)|"; done',
    }
    for name, script in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr("submitit.core.core.Job._results_timeout_s", 0)
    return folder


def test_what_is_queued_is_not_submitted_again(trained, fake, slurm, monkeypatch, capsys):
    class Interrupted(Exception):
        pass

    def interrupt(seconds):
        raise Interrupted

    monkeypatch.setattr(cluster, "time", SimpleNamespace(sleep=interrupt))
    words = ("--launcher", "slurm", "--slurm", "partition=gpu", "timeout_min=60", "mem_gb=8")
    (slurm / "state").write_text("PENDING")
    with pytest.raises(Interrupted):
        compare(*words, trainers=THREE[:2])
    script = (slurm / "submitted").read_text(encoding="utf-8")
    assert script.count("--partition=gpu") == 2
    assert script.count("--time=60") == 2
    assert "--mem=8GB" in script
    assert "--gpus-per-node" not in script  # -device cpu
    (slurm / "state").write_text("RUNNING")
    with pytest.raises(Interrupted):
        compare(*words, trainers=THREE)
    assert (slurm / "submitted").read_text(encoding="utf-8").count(
        "--partition=gpu"
    ) == 3  # only the third trainer's is new
    assert "nnUNetTrainer_fold_0 is job 1001 already, running" in capsys.readouterr().out

    assert compare(*words, "--disable_tta", trainers=THREE[:1]) == 1
    assert (
        "Job 1001 for nnUNetTrainer_fold_0 is still queued or running, with other settings" in capsys.readouterr().err
    )

    (slurm / "state").write_text("FAILED")
    assert compare(*words, trainers=THREE[:1]) == 1
    assert (slurm / "submitted").read_text(encoding="utf-8").count("--partition=gpu") == 4
    assert "job 1004 (failed): ended without a result" in table(trained)["nnUNetTrainer"]["failure"]
    assert fake() == []  # nothing ran here


# ---- real ----

OWN_TRAINER = """
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainerOwn(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 1
        self.num_iterations_per_epoch = 2
        self.num_val_iterations_per_epoch = 1
"""


def in_this_process(program, arguments, log, environment=None, tick=lambda: None):
    log.write_text(log.read_text(encoding="utf-8") + nnunet_command(program, *arguments))
    return 0


@pytest.mark.slow
def test_nnunet_trains_and_predicts_in_a_job_and_nothing_is_left_to_do_then(tmp_path, monkeypatch, capsys):
    make_raw_dataset(803, "CompareReal", cases=3, unlabeled=0, test=3)
    folder = plan(803, ["3d_fullres"])
    raw = Path(paths.nnUNet_raw) / folder.name
    (folder / "splits_final.json").write_text(json.dumps([{"train": ["case_000", "case_001"], "val": ["case_002"]}]))
    for scan in (raw / "imagesTs").iterdir():  # the blob is brighter than what is around it
        bright = sitk.GetArrayFromImage(sitk.ReadImage(str(scan))) > 130
        write_image(raw / "labelsTs" / scan.name.replace("_0000", ""), bright.astype(np.uint8))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "nnUNetTrainerOwn.py").write_text(OWN_TRAINER)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "own"))
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    line = ["compare", "-d", "803", "-c", "3d_fullres", "-f", "0", "-device", "cpu", "-np", "1", "--disable_tta"]
    line += ["-o", str(tmp_path / "out"), "--train", "-tr", "nnUNetTrainerOwn"]
    with monkeypatch.context() as patch:
        patch.setattr(job_module, "execute", in_this_process)
        assert main(line) == 0
    shown = capsys.readouterr().out
    evaluated = tmp_path / "out" / "predictions" / "nnUNetTrainerOwn_fold_0" / "evaluation.csv"
    with evaluated.open(newline="") as f:
        rows = list(csv.DictReader(f))
    dice = [100 * float(row["Dice"]) for row in rows]
    assert [row["case"] for row in rows] == ["test_000", "test_001", "test_002"]
    assert f"| nnUNetTrainerOwn | {np.mean(dice):.2f} ± {np.std(dice, ddof=1):.2f} |" in shown
    log = (tmp_path / "out" / "logs" / "nnUNetTrainerOwn_fold_0.log").read_text(encoding="utf-8")
    assert "$ nnUNetv2_train 803 3d_fullres 0 -tr nnUNetTrainerOwn" in log
    assert "Training done." in log

    monkeypatch.setattr(job_module, "execute", None)  # would raise
    before = evaluated.stat().st_mtime_ns
    assert main(line) == 0
    assert evaluated.stat().st_mtime_ns == before
    assert "Finished before: 1 of 1 job" in capsys.readouterr().out


def test_models_of_an_earlier_split_are_not_compared(trained, fake, capsys):
    def learnt(number, *trainers):
        for trainer in trainers:
            sentence = f"2026: This split has {number} training and 1 validation cases.\n"
            (checkpoint(trained, trainer).parent / "training_log_2026_1_1_1_1_1.txt").write_text(sentence)

    learnt(2, *THREE)
    refused(trained, capsys, "fold_0/checkpoint_final.pth has learnt labels that fold 0 of")
    splits = trained / "preprocessed/Dataset801_Compare/splits_final.json"
    save_splits(splits, [{"train": ["x", "w"], "val": ["y"]}] * 2, overwrite=True)
    learnt(1, THREE[1])
    refused(
        trained, capsys, (f"{THREE[1]}__", "with 1 labeled case,", f"{THREE[0]}__", "with 2: the split has changed")
    )
    learnt(1, *THREE)  # all before `split --add`
    assert compare() == 0
