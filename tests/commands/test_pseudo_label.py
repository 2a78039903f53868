"""`nnunet-ssl pseudo-label` and what stock nnU-Net makes of the dataset that it writes."""

import json
import os
import queue
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2 import paths
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference import data_iterators
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tiny import preprocess, write_image
from tiny_trainers import make_trainer, seed

from nnunet_ssl.cli import main
from nnunet_ssl.commands.pseudo_label import pseudo_label
from nnunet_ssl.data.splits import save_splits
from nnunet_ssl.system.lock import locked
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL

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
    description = json.loads((written / "dataset.json").read_text(encoding="utf-8"))
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
    splits = json.loads(
        (Path(paths.nnUNet_preprocessed) / written.name / "splits_final.json").read_text(encoding="utf-8")
    )
    assert splits == [{"train": LABELED + UNLABELED, "val": VALIDATION}]


def test_stock_nnunet_preprocesses_with_the_same_plans_and_trains_on_it(written, tiny_dataset):
    folder = Path(paths.nnUNet_preprocessed) / written.name
    plans = json.loads((folder / "nnUNetPlans.json").read_text(encoding="utf-8"))
    original = json.loads((tiny_dataset / "nnUNetPlans.json").read_text(encoding="utf-8"))
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
        pseudo_label("701", "3d_fullres", [0], 981, device="cpu")
    assert sorted(written.rglob("*")) == before


def refused(error, match, **arguments):
    arguments = {"folds": [0], "output_id": 982, "device": "cpu", "num_processes": 1, **arguments}
    with pytest.raises(error, match=match):
        pseudo_label("701", "3d_fullres", arguments.pop("folds"), arguments.pop("output_id"), **arguments)
    assert not list(Path(paths.nnUNet_raw).glob("*982*"))
    assert not list(Path(paths.nnUNet_preprocessed).glob("*982*"))


def test_a_model_that_is_missing_is_named_with_the_command_that_trains_it(tiny_dataset):
    refused(FileNotFoundError, "nnUNetv2_train 701 3d_fullres 0 -tr nnUNetTrainerX", trainers=["nnUNetTrainerX"])


def test_a_fold_that_is_missing_is_refused(model):
    (model / "fold_4").mkdir()
    (model / "fold_4" / "checkpoint_final.pth").touch()
    refused(ValueError, "Fold 4 does not exist: .*splits_final.json has the folds 0 to 0", folds=[4])
    shutil.rmtree(model / "fold_4")


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(ValueError, "There is no CUDA device here", device="cuda", trainers=["nnUNetTrainerThatIsMissing"])


def test_a_second_run_for_the_same_dataset_is_refused(model):
    folder = Path(paths.nnUNet_raw) / "Dataset984_TinyPseudoLabels"
    lock = folder.with_name(f".{folder.name}.lock")
    with locked(lock, f"labeling scans for {folder}"):
        refused(RuntimeError, f"Process .* has been labeling scans for {folder} since", output_id=984)


def test_scans_are_compared_and_let_through_by_name(model, network):
    images = Path(paths.nnUNet_raw) / "Dataset701_Tiny" / "imagesUn"
    shutil.copy(images.with_name("imagesTr") / "case_002_0000.nii.gz", images / "copied_0000.nii.gz")
    try:
        words = (
            r"Nothing was labeled(.|\n)*copied_0000.nii.gz: .* case_002_0000.nii.gz in imagesTr(.|\n)*--accept copied"
        )
        refused(ValueError, words, output_id=984)
        refused(ValueError, "--accept nobody: no such case in", output_id=984, accept=["nobody"])
        network.allowed = 0
        with pytest.raises(KeyboardInterrupt):  # the network is asked for labels
            pseudo_label("701", "3d_fullres", [0], 984, device="cpu", num_processes=1, accept=["copied"])
    finally:
        (images / "copied_0000.nii.gz").unlink()
        shutil.rmtree(images.parents[1] / ".Dataset984_TinyPseudoLabels.tmp", ignore_errors=True)


def test_a_model_that_has_seen_hidden_labels_is_refused(model, tiny_dataset):
    splits = tiny_dataset / "splits_final.json"
    text = splits.read_text(encoding="utf-8")
    [fold] = json.loads(text)
    try:
        save_splits(splits, [fold | {"train": LABELED[1:], "unlabeled": [*fold["unlabeled"], LABELED[0]]}], True)
        refused(
            ValueError,
            r"has learnt labels that fold 0 of .* hides or validates on now: 2 labels, and that fold has 1 now",
        )
    finally:
        for backup in splits.parent.glob("splits_final.json.bak*"):
            backup.unlink()
        splits.write_text(text)


@pytest.mark.parametrize("number", [0, 1000, -5])
def test_an_id_that_nnunet_cannot_read_is_refused(tiny_dataset, number):
    refused(ValueError, "three digits", output_id=number)


def test_a_case_that_is_labeled_and_unlabeled_is_refused(model, tiny_dataset):
    file = tiny_dataset / "splits_final.json"
    before = file.read_text(encoding="utf-8")
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


# ---- interrupted runs ----


@pytest.fixture
def network(model, monkeypatch):
    """How many scans the network has labeled; it raises KeyboardInterrupt when it has labeled `allowed`."""
    calls = SimpleNamespace(count=0, allowed=1000)
    original = nnUNetPredictor.predict_logits_from_preprocessed_data

    def counted(predictor, data):
        if calls.count == calls.allowed:
            raise KeyboardInterrupt
        calls.count += 1
        return original(predictor, data)

    monkeypatch.setattr(nnUNetPredictor, "predict_logits_from_preprocessed_data", counted)
    # preprocessing in threads: processes take seconds to start
    context, manager = (
        SimpleNamespace(Process=threading.Thread),
        SimpleNamespace(Event=threading.Event, Queue=queue.Queue),
    )
    monkeypatch.setattr(data_iterators, "multiprocessing", SimpleNamespace(get_context=lambda method: context))
    monkeypatch.setattr(data_iterators, "Manager", lambda: manager)
    return calls


def label(**arguments):
    """Writes Dataset983_TinyPseudoLabels."""
    arguments = {"device": "cpu", "num_processes": 1, "mirroring": False, **arguments}
    return pseudo_label("701", "3d_fullres", [0], 983, **arguments)


@pytest.fixture
def labels(network):
    """The label folder of a run that was interrupted after two of six scans."""
    network.allowed = 2
    with pytest.raises(KeyboardInterrupt):
        label()
    network.count, network.allowed = 0, 1000
    yield Path(paths.nnUNet_raw) / ".Dataset983_TinyPseudoLabels.tmp" / "labelsTr"
    for root in (paths.nnUNet_raw, paths.nnUNet_preprocessed):
        for folder in Path(root).glob("*Dataset983*"):
            shutil.rmtree(folder)


def same_dataset(folder, written):
    """Whether a dataset has the files and labels of the one that was written in one go."""
    files = sorted(file.relative_to(folder) for file in folder.rglob("*"))
    assert files == sorted(file.relative_to(written) for file in written.rglob("*"))
    for case in UNLABELED:
        np.testing.assert_array_equal(*(read(root / "labelsTr" / f"{case}.nii.gz") for root in (folder, written)))
    own, expected = (json.loads((root / "dataset.json").read_text(encoding="utf-8")) for root in (folder, written))
    return own == expected | {"name": folder.name}


def test_an_interrupted_run_leaves_no_dataset(labels):
    assert not list(Path(paths.nnUNet_raw).glob("Dataset983*"))
    assert not list(Path(paths.nnUNet_preprocessed).glob("Dataset983*"))


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_restart_labels_only_the_scans_that_are_left(labels, network, written, capsys, num_processes):
    before = {file.name: file.stat().st_mtime_ns for file in labels.iterdir()}
    assert len(before) == 2
    shutil.copy(labels / min(before), labels / "gone.nii.gz")  # of a scan that is not there any more
    folder = label(num_processes=num_processes)
    assert network.count == 4
    assert {name: (folder / "labelsTr" / name).stat().st_mtime_ns for name in before} == before
    assert same_dataset(folder, written)
    assert not list(Path(paths.nnUNet_raw).glob(".Dataset983*"))
    output = capsys.readouterr()
    assert "Labeled by an interrupted run of the same model, and kept: 2 of 6 scans" in output.out
    assert "4/4" in output.err


def test_a_restart_after_the_last_scan_needs_no_network(labels, network, written, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nnunet_ssl.commands.pseudo_label.dataset_entries", interrupted)
        with pytest.raises(KeyboardInterrupt):
            label()
        network.count = 0
        patch.undo()
        # and in the very last step, when all that belongs to the dataset is there
        replace = os.replace
        patch.setattr(os, "replace", lambda *to: interrupted() if to[0] == labels.parent else replace(*to))
        with pytest.raises(KeyboardInterrupt):
            label()
    preprocessed = Path(paths.nnUNet_preprocessed) / "Dataset983_TinyPseudoLabels"
    assert {"nnUNetPlans.json", "dataset.json"} <= {file.name for file in preprocessed.iterdir()}
    assert same_dataset(label(), written)
    assert network.count == 0


@pytest.mark.parametrize("change", ["retrained", "other checkpoint", "mirroring", "no record"])
def test_labels_of_another_model_are_dropped(labels, network, model, capsys, change):
    file = model / "fold_0" / "checkpoint_final.pth"
    before = file.stat()
    if change == "retrained":
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    elif change == "other checkpoint":
        shutil.copy2(file, file.with_name("checkpoint_copy.pth"))
    elif change == "no record":
        [record] = labels.parent.glob("*.json")
        record.unlink()
    other = {"mirroring": {"mirroring": True}, "other checkpoint": {"checkpoint": "checkpoint_copy.pth"}}
    try:
        label(**other.get(change, {}))
    finally:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        file.with_name("checkpoint_copy.pth").unlink(missing_ok=True)
    assert network.count == 6
    assert "Dropped labels of an interrupted run: 2." in capsys.readouterr().out


def test_a_scan_that_is_newer_than_its_label_is_labeled_again(labels, network, written):
    os.utime(min(labels.iterdir()), (1, 1))
    assert same_dataset(label(), written)
    assert network.count == 5


def test_a_label_that_was_half_written_is_written_again(labels, network, written, monkeypatch):
    write_seg = SimpleITKIO.write_seg

    def interrupted(reader, array, file, properties):
        write_seg(reader, array, file, properties)
        os.truncate(file, Path(file).stat().st_size // 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SimpleITKIO, "write_seg", interrupted)
        with pytest.raises(KeyboardInterrupt):
            label()
    assert len(list(labels.parent.rglob("*.nii.gz"))) == 3
    assert network.count == 1
    network.count = 0
    assert same_dataset(label(), written)
    assert network.count == 4


# ---- unlabeled patches of predicted foreground ----


def predicted(monkeypatch, number="981"):
    monkeypatch.setenv("nnUNet_ssl_predicted_foreground", number)


def test_a_training_oversamples_what_the_model_found(written, tiny_dataset, monkeypatch):
    preprocess(981, ["3d_fullres"])
    predicted(monkeypatch)
    trainer = make_trainer(nnUNetTrainerM3HL, tiny_dataset)
    trainer.on_train_start()
    loader = trainer.dataloader_train.data_loader.unlabeled
    assert sorted(loader._data.predicted) == UNLABELED  # no case whose labels are true
    folder = tiny_dataset.with_name(written.name) / "nnUNetPlans_3d_fullres"
    assert {file.parent for file in loader._data.predicted.values()} == {folder}
    assert loader.oversample_foreground_percent == trainer.oversample_foreground_percent > 0
    assert "in 6 of 6 unlabeled cases" in Path(trainer.log_file).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("number", "change", "words"),
    [
        ("998", None, "nnUNet_ssl_predicted_foreground=998 is no dataset"),
        ("abc", None, "nnUNet_ssl_predicted_foreground=abc is no dataset"),
        ("701", None, "the labels of Dataset701_Tiny are not predicted ones"),
        ("981", {"dataset": "Dataset703_Other"}, "was labeled by a model of Dataset703_Other"),
        ("981", {"cases": UNLABELED[1:]}, "has seen labels which this fold must not know, of case_003"),
        ("981", {"plans": "other"}, "was preprocessed with other plans"),
        ("981", {"cases": [*UNLABELED, "lost"]}, "1 case of Dataset981_TinyPseudoLabels is not in .*: lost. Run: "),
    ],
    ids=["no dataset", "no number", "true labels", "other dataset", "other labels", "other plans", "not preprocessed"],
)
def test_predictions_that_do_not_fit_are_refused(number, change, words, written, tiny_dataset, monkeypatch):
    folder = tiny_dataset.with_name(written.name)
    if not (folder / "nnUNetPlans_3d_fullres").is_dir():
        preprocess(981, ["3d_fullres"])
    predicted(monkeypatch, number)
    file, plans = folder / "dataset.json", folder / "other.json"
    original = file.read_text(encoding="utf-8")
    try:
        if change:
            content = json.loads(original)
            content["pseudo_labels"] |= change
            file.write_text(json.dumps(content))
        if change and "plans" in change:
            content = json.loads((folder / "nnUNetPlans.json").read_text(encoding="utf-8"))
            content["configurations"]["3d_fullres"]["spacing"] = [9, 9, 9]
            plans.write_text(json.dumps(content))
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            make_trainer(nnUNetTrainerM3HL, tiny_dataset).on_train_start()
    finally:
        file.write_text(original)
        plans.unlink(missing_ok=True)
