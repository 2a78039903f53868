"""Realistic mistakes end in one sentence before any epoch, and nothing on disk changes: see docs/bad_input.md."""

import json
import os
import shutil
from importlib import metadata
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint

from nnunet_ssl.cli import main
from nnunet_ssl.commands.evaluate import label_values
from nnunet_ssl.data.dataset_json import channel_names, read_dataset_json
from nnunet_ssl.data.preprocessed import read_settings
from nnunet_ssl.data.splits import read_fold, read_splits
from nnunet_ssl.dataset_conversion.acdc import read_info
from nnunet_ssl.dataset_conversion.la import _read_list
from nnunet_ssl.trainer import SemiSupervisedTrainer
from nnunet_ssl.training.health import NOT_FINITE_STEPS

TRAINED, OWN = "nnUNetPlans_3d_fullres", "nnUNetPlans_3d_fullres_unlabeled"
CASES = [f"case_{i:03d}" for i in range(7)]


@pytest.fixture
def folder(tiny_dataset, tmp_path, monkeypatch) -> Path:
    """A copy of the preprocessed tiny dataset, beside a copy of the raw one; results go to a folder of their own."""
    raw = Path(os.environ["nnUNet_raw"], tiny_dataset.name)
    for kind, source in (("raw", raw), ("preprocessed", tiny_dataset)):
        shutil.copytree(source, tmp_path / kind / source.name)
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    for name in ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "save_every"):
        monkeypatch.setattr(SemiSupervisedTrainer, name, 1, raising=False)
    return tmp_path / "preprocessed" / tiny_dataset.name


def train(dataset="701", configuration="3d_fullres", fold=0, trainer="nnUNetTrainerM3", plans="nnUNetPlans", c=False):
    """What nnUNetv2_train does, without the validation of whole scans."""
    device = torch.device("cpu")
    made = get_trainer_from_args(dataset, configuration, fold, trainer, plans, continue_training=c, device=device)
    maybe_load_checkpoint(made, c, False)
    made.run_training()
    return made


def content(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refused(root: Path, words: str, **arguments) -> None:
    """Training raises a sentence with the words, before any epoch, and changes no file."""
    before = content(root)
    with pytest.raises((ValueError, OSError, RuntimeError, ImportError), match=words) as error:
        train(**arguments)
    assert len(str(error.value)) > 30
    after = content(root)
    assert {path: after.get(path) for path in before} == before
    new = [path for path in after.keys() - before.keys() if "results" not in path.relative_to(root).parts[0]]
    assert new == []
    assert not [path for path in after.keys() - before.keys() if path.name == "losses.csv" or path.suffix == ".pth"]


def folds(folder: Path, text) -> None:
    (folder / "splits_final.json").write_text(text if isinstance(text, str) else json.dumps([text]))


def change(file: Path, edit) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    edit(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def no_foreground(folder: Path) -> None:
    for case in CASES[:2]:
        file = str(folder / TRAINED / f"{case}.pkl")
        properties = load_pickle(file)
        properties["class_locations"] = {label: [] for label in properties["class_locations"]}
        write_pickle(properties, file)


FOLD = {"train": CASES[:2], "val": CASES[2:3]}
# harm to the preprocessed folder, words of the sentence
BAD_DATA = {
    "not_preprocessed": (
        lambda f: shutil.rmtree(f / TRAINED),
        "has no preprocessed case. Run: nnUNetv2_preprocess -d 701",
    ),
    "plans_changed": (
        lambda f: change(f / "nnUNetPlans.json", lambda p: p["configurations"]["3d_fullres"].update(spacing=[2, 1, 1])),
        "were preprocessed with other plans: spacing changed. Remove",
    ),
    "channels_changed": (
        lambda f: change(f / "dataset.json", lambda d: d.update(channel_names={"0": "T1", "1": "T2"})),
        "cases have 1 channel, but dataset.json has 2",
    ),
    "settings_damaged": (lambda f: (f / f"{OWN}.json").write_text('{"spacing'), f"{OWN}.json is cut off or not JSON"),
    "unknown_unlabeled": (lambda f: folds(f, {**FOLD, "unlabeled": ["nobody"]}), "fold is not in .*: nobody"),
    "unlabeled_twice": (
        lambda f: folds(f, {**FOLD, "unlabeled": CASES[3:5] + CASES[3:4]}),
        '"unlabeled" of fold 0 names cases more than once: case_003',
    ),
    "unlabeled_no_list": (lambda f: folds(f, {**FOLD, "unlabeled": "case_003"}), "must be a list of case names"),
    "unknown_train": (
        lambda f: folds(f, {"train": ["nobody"], "val": CASES[2:3]}),
        "1 case of fold 0 is not in .*: nobody",
    ),
    "no_train": (lambda f: folds(f, {"val": CASES[2:3]}), 'splits_final.json: fold 0 has no cases in "train"'),
    "no_val": (lambda f: folds(f, {"train": CASES[:2]}), 'splits_final.json: fold 0 has no cases in "val"'),
    "empty_val": (
        lambda f: folds(f, {"train": CASES[:2], "val": []}),
        'splits_final.json: fold 0 has no cases in "val"',
    ),
    "empty_splits": (lambda f: folds(f, ""), "splits_final.json is cut off or not JSON"),
    "cut_splits": (lambda f: folds(f, json.dumps([FOLD])[:40]), "splits_final.json is cut off or not JSON"),
    "no_folds": (lambda f: folds(f, "[]"), "Fold 0 does not exist: .*splits_final.json has no fold"),
    "too_few_cases": (
        lambda f: (
            [(f / "splits_final.json").unlink()] + [p.unlink() for c in CASES[4:] for p in (f / TRAINED).glob(f"{c}*")]
        ),
        "has 4 cases, too few for the 5 folds that nnU-Net draws. Write a fold",
    ),
    "no_segmentation_file": (
        lambda f: (f / TRAINED / "case_001_seg.b2nd").unlink(),
        "not with all three files: case_001. Run nnUNetv2_preprocess",
    ),
    "no_foreground": (no_foreground, "None of the 2 labeled cases of fold 0 has a voxel of a foreground label"),
}


@pytest.mark.parametrize("mistake", BAD_DATA)
def test_data(mistake, folder, tmp_path):
    harm, words = BAD_DATA[mistake]
    harm(folder)
    refused(tmp_path, words)


BAD_ARGUMENTS = {
    "wrong_dataset": ({"dataset": "799"}, "Could not find a dataset with the ID 799"),
    "not_planned": ({"configuration": "3d_lowres"}, "3d_lowres"),
    "negative_fold": ({"fold": -1}, "Fold -1 does not exist: .*has the folds 0 to 0"),
}


@pytest.mark.parametrize("mistake", BAD_ARGUMENTS)
def test_arguments(mistake, folder, tmp_path):
    arguments, words = BAD_ARGUMENTS[mistake]
    refused(tmp_path, words, **arguments)


def test_without_splits_there_are_five_folds(folder, tmp_path):
    (folder / "splits_final.json").unlink()
    refused(tmp_path, "Fold 5 does not exist: without .* there are the folds 0 to 4", fold=5)


BAD_ENVIRONMENT = {
    "no_results": ({"nnUNet_results": None}, "nnUNet_results is not defined"),
    "unwritable_results": (
        {"nnUNet_results": "{file}/results"},
        "cannot be written to .*Set nnUNet_results to a folder",
    ),
    "bad_seed": ({"nnUNet_ssl_seed": "abc"}, "nnUNet_ssl_seed=abc is not a seed: set it to an integer from 0 to"),
    "large_seed": ({"nnUNet_ssl_seed": "4294967296"}, "nnUNet_ssl_seed=4294967296 is not a seed"),
    "augment": ({"nnUNet_ssl_augment": "gpu"}, "nnUNet_ssl_augment=gpu is not known. Set it to device or workers"),
}


@pytest.mark.parametrize("mistake", BAD_ENVIRONMENT)
def test_environment(mistake, folder, tmp_path, monkeypatch):
    variables, words = BAD_ENVIRONMENT[mistake]
    (tmp_path / "file").touch()
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value.format(file=tmp_path / "file"))
    refused(tmp_path, words)


@pytest.mark.parametrize("version", ["2.7.1", "2.5", "1.7.0"])
def test_an_old_nnunet_is_refused_by_trainers_and_commands(version, folder, tmp_path, monkeypatch, capsys):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "nnunetv2" else real(name))
    refused(tmp_path, f"nnunetv2 {version} is installed, but nnunet-ssl needs 2.8")
    assert main(["split", "-d", "701", "--labeled", "2"]) == 1
    assert 'pip install "nnunetv2>=2.8,<2.9"' in capsys.readouterr().err


# ---- checkpoints given to --c ----


@pytest.fixture
def trained(folder) -> Path:
    """The fold folder of a training that has ended."""
    trained = Path(train().output_folder)
    for log in trained.glob("training_log_*"):
        log.rename(trained / "earlier_log.txt")  # nnU-Net names a log by the second: the next one may be in the same
    return trained


def test_checkpoint_of_another_trainer(trained, tmp_path):
    other = trained.parents[1] / "nnUNetTrainerCPS__nnUNetPlans__3d_fullres" / "fold_0"
    shutil.copytree(trained, other)
    refused(
        tmp_path,
        r"is of nnUNetTrainerM3, .*do not fit nnUNetTrainerCPS.*\(student_2, teacher\)",
        trainer="nnUNetTrainerCPS",
        c=True,
    )


def test_checkpoint_of_other_plans(folder, trained, tmp_path):
    def widen(plans):
        plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 8, 20]

    change(folder / "nnUNetPlans.json", widen)
    refused(tmp_path, r"nnUNetPlans, 3d_fullres; its networks do not fit .*\(student, teacher\)", c=True)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    """Some bytes in the middle, as a bad disk does; more than the padding between two tensors."""
    data = bytearray(file.read_bytes())
    middle = slice(len(data) // 2, len(data) // 2 + 200)
    data[middle] = bytes(byte ^ 0xFF for byte in data[middle])
    file.write_bytes(data)


def replace_by_text(file: Path) -> None:
    file.write_text("404: not found", encoding="utf-8")


DAMAGES = [cut, flip, replace_by_text, lambda file: file.write_bytes(b"")]
damages = pytest.mark.parametrize("damage", DAMAGES, ids=["cut", "flipped", "text", "empty"])


@damages
def test_a_damaged_checkpoint_is_replaced_by_the_next_one(damage, trained, capsys):
    for name in ("final", "latest"):
        shutil.copy2(trained / "checkpoint_best.pth", trained / f"checkpoint_{name}.pth")
    damage(trained / "checkpoint_final.pth")
    made = train(c=True)
    assert made.current_epoch == 1
    assert (
        f"WARNING: cut off or damaged: {trained / 'checkpoint_final.pth'}. Training continues from "
        f"{trained / 'checkpoint_latest.pth'} instead, with epoch 1." in capsys.readouterr().out
    )
    assert torch.load(trained / "checkpoint_final.pth", weights_only=False)["current_epoch"] == 1


@damages
def test_no_checkpoint_that_can_be_read(damage, trained, tmp_path):
    for file in trained.glob("*.pth"):
        damage(file)
    refused(tmp_path, r"Cut off or damaged: .*checkpoint_final.pth, .*checkpoint_best.pth. Restore a backup", c=True)


def test_validation_alone_never_takes_another_checkpoint(trained):
    cut(trained / "checkpoint_final.pth")
    made = get_trainer_from_args("701", "3d_fullres", 0, "nnUNetTrainerM3", device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"Cut off or damaged: \S+checkpoint_final.pth. Restore a backup"):
        maybe_load_checkpoint(made, False, True)


def test_a_checkpoint_that_must_not_be_opened_is_no_damage(trained, monkeypatch):
    """Training on from an older state would write over the better one."""
    original = torch.load

    def load(file, **kwargs):
        if Path(file).name == "checkpoint_final.pth":
            raise PermissionError(13, "Permission denied", str(file))
        return original(file, **kwargs)

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(PermissionError, match=r"checkpoint_final\.pth"):
        train(c=True)


# ---- what must work, as in nnU-Net ----


def test_one_labeled_case_trains(folder):
    folds(folder, {"train": CASES[:1], "val": CASES[2:3]})
    assert train().step == 1


def test_a_patch_larger_than_the_images_trains(folder):
    change(folder / "nnUNetPlans.json", lambda p: p["configurations"]["3d_fullres"].update(patch_size=[32, 32, 32]))
    assert train().step == 1


# ---- images with NaN: nnU-Net does not look ----


@pytest.mark.parametrize(
    ("place", "words"), [(TRAINED, r"labeled images \(case_00"), (OWN, "unlabeled images have voxels")]
)
def test_images_that_are_not_finite(place, words, folder, monkeypatch):
    if place == OWN:
        folds(folder, FOLD)  # no others
    for file in (folder / place).glob("*.b2nd"):
        if not file.name.endswith("_seg.b2nd"):
            image = blosc2.open(str(file), mode="r")[:]
            file.unlink()
            blosc2.asarray(np.full_like(image, np.nan), urlpath=str(file), mode="w")
    monkeypatch.setattr(SemiSupervisedTrainer, "num_iterations_per_epoch", 100)
    with pytest.raises(RuntimeError, match=f"NaN or infinite for {NOT_FINITE_STEPS} steps in a row.*{words}"):
        train()


# ---- commands ----

BAD_COMMANDS = {
    "preprocess_wrong_dataset": ("preprocess -d 799 -c 2d", None, "Could not find a dataset with the ID 799"),
    "preprocess_cut_plans": (
        "preprocess -d 701 -c 2d",
        lambda f: (f / "nnUNetPlans.json").write_text('{"conf'),
        "nnUNetPlans.json is cut off or not JSON",
    ),
    "preprocess_cut_dataset_json": (
        "preprocess -d 701 -c 2d",
        lambda f: (f / "dataset.json").write_text("{"),
        "dataset.json is cut off or not JSON",
    ),
    "preprocess_no_channels": (
        "preprocess -d 701 -c 2d",
        lambda f: change(f / "dataset.json", lambda d: d.pop("channel_names")),
        'dataset.json: "channel_names" must be a name for every channel',
    ),
    "preprocess_cut_splits": ("preprocess -d 701 -c 2d", lambda f: folds(f, "[{"), "splits_final.json is cut off"),
    "preprocess_unwritable": (
        "preprocess -d 701 -c 2d",
        lambda f: (shutil.rmtree(f / "nnUNetPlans_2d_unlabeled"), (f / "nnUNetPlans_2d_unlabeled").touch()),
        "nnUNetPlans_2d_unlabeled",
    ),
    "split_cut_dataset_json": (
        "split -d 701 --labeled 2 --overwrite",
        lambda f: (Path(os.environ["nnUNet_raw"]) / f.name / "dataset.json").write_text(""),
        "dataset.json is cut off or not JSON",
    ),
    "split_no_ending": (
        "split -d 701 --labeled 2 --overwrite",
        lambda f: change(Path(os.environ["nnUNet_raw"]) / f.name / "dataset.json", lambda d: d.pop("file_ending")),
        '"file_ending" must be that of the images',
    ),
    "doctor_cut_splits": ("doctor -d 701 -c 3d_fullres", lambda f: folds(f, "[{"), "splits_final.json is cut off"),
    "convert_binary_list": (
        "convert la -i . -d 790 --train-list {raw}/Dataset701_Tiny/imagesTr/case_000_0000.nii.gz",
        None,
        "case_000_0000.nii.gz is not a text file",
    ),
    "evaluate_bad_labels": (
        "evaluate -r {raw}/Dataset701_Tiny/labelsTr -p {raw}/Dataset701_Tiny/labelsTr -np 1",
        lambda f: change(Path(os.environ["nnUNet_raw"]) / f.name / "dataset.json", lambda d: d.update(labels=["blob"])),
        'dataset.json: "labels" must be numbers',
    ),
    "preprocess_no_folders": ("preprocess -d 701 -c 2d", None, "Could not find a dataset"),
}


@pytest.mark.parametrize("mistake", BAD_COMMANDS)
def test_commands(mistake, folder, tmp_path, monkeypatch, capsys):
    line, harm, words = BAD_COMMANDS[mistake]
    if mistake == "preprocess_no_folders":
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            monkeypatch.delenv(name)
    if harm is not None:
        harm(folder)
    before = content(tmp_path)
    assert main(line.format(raw=tmp_path / "raw").split()) == 1
    output = capsys.readouterr()
    assert words in output.out + output.err
    assert "Traceback" not in output.err
    assert content(tmp_path) == before


@pytest.mark.parametrize("command", ["export", "pseudo-label"])
def test_a_damaged_model(command, trained, tmp_path, capsys):
    cut(trained / "checkpoint_final.pth")
    arguments = ["-d", "701", "-c", "3d_fullres", "-f", "0", "-tr", "nnUNetTrainerM3"]
    arguments += ["-o", str(tmp_path / "out")] if command == "export" else ["-o", "799", "-device", "cpu", "-np", "1"]
    before = content(tmp_path)
    assert main([command, *arguments]) == 1
    assert "checkpoint_final.pth is cut off or damaged" in capsys.readouterr().err
    assert content(tmp_path) == before


# ---- parsers: arbitrary content ----

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(["train", "val", "unlabeled", "test"])
CASE_LISTS = st.lists(st.sampled_from(CASES) | JSON, max_size=4)
SPLITS = JSON | st.lists(st.dictionaries(NAMES | st.text(max_size=3), CASE_LISTS | JSON, max_size=5) | JSON, max_size=3)
ENTRIES = st.sampled_from(
    ["channel_names", "modality", "labels", "file_ending", "dataset", "overwrite_image_reader_writer"]
)
LABELS = st.dictionaries(
    st.sampled_from(["background", "heart", "ignore"]),
    st.integers(-1, 5) | st.lists(st.integers(0, 5) | st.none(), min_size=1, max_size=3),
)
SOUND = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "heart": 1}, "file_ending": ".nii.gz"}
CHANGES = st.dictionaries(ENTRIES, LABELS | JSON, max_size=2)
DATASETS = JSON | CHANGES | CHANGES.map(lambda changes: SOUND | changes)
DATASETS |= LABELS.map(lambda labels: SOUND | {"labels": labels})
fuzzed = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def sound_or_named(file: Path, read) -> None:
    """Reading gives a result, or one of two errors that name the file."""
    try:
        read(file)
    except (ValueError, FileNotFoundError) as error:
        assert str(file) in str(error)  # noqa: PT017, most contents are refused and some are not


@fuzzed
@given(content=SPLITS, fold=st.integers(-2, 3))
def test_any_json_as_splits(content, fold, tmp_path):
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps(content))

    def read(file):
        for entry in read_splits(file):
            assert all(isinstance(case, str) for name in ("train", "val", "unlabeled") for case in entry.get(name, []))
        entry = read_fold(file, fold)
        assert entry["train"]
        assert entry["val"]
        assert len(set(entry["unlabeled"])) == len(entry["unlabeled"])

    sound_or_named(file, read)


@fuzzed
@given(content=DATASETS)
def test_any_json_as_dataset_json(content, tmp_path):
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps(content))

    def read(file):
        description = read_dataset_json(file, "channel_names", "labels", "file_ending")
        assert all(isinstance(name, str) for name in channel_names(description))
        labels, ignore = label_values(description)
        assert all(isinstance(v, int) for values in labels.values() for v in values)
        assert ignore is None or isinstance(ignore, int)
        for entry in description.get("dataset", {}).values():
            assert os.path.join(entry["label"], *entry["images"])

    sound_or_named(file, read)


@fuzzed
@given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_in_every_file_that_is_read(content, tmp_path):
    file = tmp_path / "file.json"
    file.write_bytes(content)
    for read in (read_splits, read_dataset_json, read_settings, _read_list, read_info):
        sound_or_named(file, read)


def test_deep_json_is_refused(tmp_path):
    file = tmp_path / "splits_final.json"
    file.write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"splits_final\.json is cut off or not JSON"):
        read_splits(file)
