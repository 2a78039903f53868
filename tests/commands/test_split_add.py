"""`nnunet-ssl split --add`: a corrected label makes an unlabeled scan a labeled one, and nothing is ever half done."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from tiny import preprocess, write_dicom, write_image
from tiny_trainers import make_trainer, seed

from nnunet_ssl.cli import main
from nnunet_ssl.commands import add_labels as module
from nnunet_ssl.commands.add_labels import add_labels
from nnunet_ssl.data.splits import move_to_train
from nnunet_ssl.system.lock import locked
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL

TRAIN, VAL, LISTED = ["case_000", "case_001"], ["case_002"], [f"case_{i:03d}" for i in range(3, 7)]
IDENTIFIERS = ("nnUNetPlans_2d", "nnUNetPlans_3d_fullres")
COMMAND = ["split", "-d", "701", "-f", "0", "-np", "1", "--add"]


@pytest.fixture
def folder(tiny_dataset, tmp_path, monkeypatch):
    """A copy of the preprocessed tiny dataset beside one of the raw dataset; unlabeled_000 has a label in labelsTr."""
    raw = Path(os.environ["nnUNet_raw"], tiny_dataset.name)
    for kind, source in (("raw", raw), ("preprocessed", tiny_dataset)):
        shutil.copytree(source, tmp_path / kind / source.name)
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    save_label(tmp_path / "raw" / raw.name)
    return tmp_path / "preprocessed" / tiny_dataset.name


def save_label(raw, case="unlabeled_000"):
    """What a radiologist saves: the bright voxels."""
    image = sitk.ReadImage(str(raw / "imagesUn" / f"{case}_0000.nii.gz"))
    label = sitk.GetImageFromArray((sitk.GetArrayFromImage(image) > 130).astype(np.uint8))
    label.CopyInformation(image)
    sitk.WriteImage(label, str(raw / "labelsTr" / f"{case}.nii.gz"))


def raw_of(folder):
    return folder.parents[1] / "raw" / folder.name


def splits(folder):
    return json.loads((folder / "splits_final.json").read_text())


def content(root):
    """Bytes of all files but backups, and but the pickles and packed arrays, of which nnU-Net writes other bytes."""
    left_out = (".bak", ".pkl", ".b2nd")
    names = {str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file() and ".bak" not in p.name}
    return {name: b"" if p.suffix in left_out else p.read_bytes() for name, p in names.items()}


def test_a_scan_of_imagesun_becomes_a_labeled_case_as_nnunet_makes_it(folder, capsys):
    raw, image = raw_of(folder), (raw_of(folder) / "imagesUn/unlabeled_000_0000.nii.gz").read_bytes()
    assert main([*COMMAND, "unlabeled_000"]) == 0
    assert splits(folder) == [{"train": [*TRAIN, "unlabeled_000"], "val": VAL, "unlabeled": LISTED}]
    assert "Fold 0 has 3 train, 1 val, 4 unlabeled now." in capsys.readouterr().out
    assert (raw / "imagesTr/unlabeled_000_0000.nii.gz").read_bytes() == image
    assert [file.name for file in (raw / "imagesUn").iterdir()] == ["unlabeled_001_0000.nii.gz"]
    for file in (raw / "dataset.json", folder / "dataset.json"):
        assert json.loads(file.read_text())["numTraining"] == 8
    label = (raw / "labelsTr/unlabeled_000.nii.gz").read_bytes()
    assert (folder / "gt_segmentations/unlabeled_000.nii.gz").read_bytes() == label
    assert json.loads((folder / "splits_final.json.bak").read_text())[0]["train"] == TRAIN
    found = {}
    for identifier in IDENTIFIERS:
        assert not list((folder / f"{identifier}_unlabeled").glob("unlabeled_000*"))
        assert list((folder / f"{identifier}_unlabeled").glob("unlabeled_001*"))
        found[identifier] = nnUNetDatasetBlosc2(str(folder / identifier)).load_case("unlabeled_000")
        found[identifier] = [np.asarray(part) for part in found[identifier][:2]] + [found[identifier][3]]
    assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".lock"))]
    preprocess(701, ["2d", "3d_fullres"])  # all of it again, by nnU-Net
    for identifier, (image, label, properties) in found.items():
        data, seg, _, expected = nnUNetDatasetBlosc2(str(folder / identifier)).load_case("unlabeled_000")
        np.testing.assert_array_equal(image, np.asarray(data))
        np.testing.assert_array_equal(label, np.asarray(seg))
        assert properties["class_locations"].keys() == expected["class_locations"].keys()
        np.testing.assert_array_equal(properties["class_locations"][1], expected["class_locations"][1])
        assert len(expected["class_locations"][1]) > 0


def test_trainings_take_the_new_label_and_go_on_from_the_present_model(folder, capsys):
    seed()
    make_trainer(nnUNetTrainer, folder, num_epochs=1, num_iterations_per_epoch=1).run_training()
    assert main([*COMMAND, "unlabeled_000", "case_003", "--new-fold"]) == 0
    assert "Fold 1 has 4 train, 1 val, 3 unlabeled now." in capsys.readouterr().out
    old, new = splits(folder)
    assert old == {"train": TRAIN, "val": VAL, "unlabeled": [*LISTED, "unlabeled_000"]}
    assert new == {"train": [*TRAIN, "case_003", "unlabeled_000"], "val": VAL, "unlabeled": LISTED[1:]}
    for fold, (labeled, unlabeled) in enumerate(((2, 6), (4, 4))):
        trainer = make_trainer(nnUNetTrainerM3HL, folder, fold=fold)
        trainer.on_train_start()
        loader = trainer.dataloader_train.data_loader
        assert (len(loader.labeled._data.identifiers), len(loader.unlabeled._data)) == (labeled, unlabeled)
    start = ["start-from", "-d", "701", "-c", "3d_fullres", "-tr", "nnUNetTrainerM3HL_4epochs", "--model"]
    assert main([*start, "nnUNetTrainer", "-f", "1", "--model-fold", "0"]) == 0
    written = folder.parents[1] / f"results/{folder.name}/nnUNetTrainerM3HL_4epochs__nnUNetPlans__3d_fullres/fold_1"
    assert (written / "checkpoint_latest.pth").is_file()
    # not the other way round: fold 0 hides what fold 1 knows
    written.parent.joinpath("fold_1").rename(written.parent / "fold_0")
    capsys.readouterr()
    (folder / "splits_final.json").write_text(json.dumps([new, old]))
    assert main([*start, "nnUNetTrainer", "-f", "1", "--model-fold", "0", "--overwrite"]) == 1
    assert "may have seen labels that this fold must not know: case_003, unlabeled_000." in capsys.readouterr().err


def test_a_hidden_label_needs_no_preprocessing_unless_it_was_corrected(folder, monkeypatch):
    for target in IDENTIFIERS:
        for file in (folder / target).glob("*.pkl"):
            os.utime(file)  # the copy of the raw dataset is newer
    done = []
    monkeypatch.setattr(module, "preprocess_case", lambda case, *_: done.append(case))
    assert main([*COMMAND, "case_004"]) == 0
    assert done == []
    assert splits(folder)[0]["unlabeled"] == ["case_003", "case_005", "case_006"]
    label = raw_of(folder) / "labelsTr/case_005.nii.gz"
    shutil.copy2(label, label.with_name("case_005_copy.nii.gz"))  # an older time of change, put in place now
    os.replace(label.with_name("case_005_copy.nii.gz"), label)
    assert main([*COMMAND, "case_005"]) == 0
    assert done == ["case_005"] * 2


STEPS = ["preprocess_labeled", "publish_labels", "copy", "note_cases", "save_splits", "take_away"]


@pytest.mark.parametrize(
    ("new_fold", "steps"), [(False, STEPS), (True, ["save_splits", "take_away"])], ids=["fold", "new fold"]
)
def test_a_run_that_was_killed_anywhere_is_repeated(new_fold, steps, folder, tmp_path, monkeypatch):
    arguments = ("701", ["unlabeled_000", "case_003"], 0, new_fold, 1)
    for name in ("nnUNetPlans_2d", "nnUNetPlans_2d_unlabeled"):
        shutil.rmtree(folder / name)
    before = tmp_path / "before"
    shutil.copytree(tmp_path / "raw", before / "raw")
    shutil.copytree(tmp_path / "preprocessed", before / "preprocessed")
    expected_number, expected_fold = add_labels(*arguments)
    expected = {kind: content(tmp_path / kind) for kind in ("raw", "preprocessed")}
    for step in steps:
        for kind in expected:
            shutil.rmtree(tmp_path / kind)
            shutil.copytree(before / kind, tmp_path / kind)
        original = getattr(module, step)

        def interrupted(*args, original=original, **kwargs):
            if original.__name__ in ("save_splits", "preprocess_labeled", "copy"):  # killed after it
                original(*args, **kwargs)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(module, step, interrupted)
            with pytest.raises(KeyboardInterrupt):
                add_labels(*arguments)
        assert splits(folder)[0]["val"] == VAL
        assert add_labels(*arguments) == (expected_number, expected_fold), step
        assert {kind: content(tmp_path / kind) for kind in expected} == expected, step


def test_a_series_and_a_plain_name_get_the_name_of_a_channel(folder):
    raw = raw_of(folder)
    plain = raw / "imagesUn/unlabeled_000_0000.nii.gz"
    array = sitk.GetArrayFromImage(sitk.ReadImage(str(plain)))
    series = sitk.GetImageFromArray(array.astype(np.int16))
    write_dicom(series, raw / "imagesUn/series")
    write_image(raw / "labelsTr/series.nii.gz", (array > 130).astype(np.uint8))
    os.replace(plain, raw / "imagesUn/unlabeled_000.nii.gz")
    add_labels("701", ["series", "unlabeled_000"], 0, num_processes=1)
    for case in ("series", "unlabeled_000"):
        found = sitk.GetArrayFromImage(sitk.ReadImage(str(raw / f"imagesTr/{case}_0000.nii.gz")))
        np.testing.assert_allclose(found, array, atol=1)
    assert [file.name for file in (raw / "imagesUn").iterdir()] == ["unlabeled_001_0000.nii.gz"]
    assert len(list((raw / "dicom_labeled/series").iterdir())) == len(array)  # nothing is thrown away


def test_a_table_of_files_gets_an_entry(folder):
    raw = raw_of(folder)
    for file in (raw / "dataset.json", folder / "dataset.json"):
        description = json.loads(file.read_text())
        cases = [*TRAIN, *VAL, *LISTED]
        description["dataset"] = {
            case: {"images": [f"imagesTr/{case}_0000.nii.gz"], "label": f"labelsTr/{case}.nii.gz"} for case in cases
        }
        file.write_text(json.dumps(description))
    add_labels("701", ["unlabeled_000"], 0, num_processes=1)
    for file in (raw / "dataset.json", folder / "dataset.json"):
        description = json.loads(file.read_text())
        assert description["dataset"]["unlabeled_000"] == {
            "images": ["imagesTr/unlabeled_000_0000.nii.gz"],
            "label": "labelsTr/unlabeled_000.nii.gz",
        }
        assert description["numTraining"] == len(description["dataset"]) == 8


def test_lists_of_other_folds():
    folds = [
        {"train": ["a"], "val": ["v"], "unlabeled": ["x"]},
        {"train": ["a"], "val": ["v"]},
        {"train": ["a", "x"], "val": ["v"], "test": ["u"]},
    ]
    assert move_to_train(folds, 1, ["u", "w"], ["u"], False) == 1
    assert folds == [
        {"train": ["a"], "val": ["v"], "unlabeled": ["x", "u"]},
        {"train": ["a", "u", "w"], "val": ["v"]},
        {"train": ["a", "x"], "val": ["v"], "test": ["u"]},  # a test case stays one
    ]


def relabel(folder, change):
    file = raw_of(folder) / "labelsTr/unlabeled_000.nii.gz"
    image = change(sitk.ReadImage(str(file)))
    sitk.WriteImage(image, str(file))


def shifted(image):
    image.SetOrigin((5, 0, 0))
    return image


def other_image(folder):
    shutil.copy(raw_of(folder) / "imagesTr/case_000_0000.nii.gz", raw_of(folder) / "imagesTr/unlabeled_000_0000.nii.gz")


NEW = "unlabeled_000"
# harm to the dataset, cases, fold, words of the sentence
REFUSED = {
    "no label": (None, ["unlabeled_001"], "0", "labelsTr/unlabeled_001.nii.gz is missing. Save the label there"),
    "geometry": (lambda f: relabel(f, shifted), [NEW], "0", "origin [5.0, 0.0, 0.0] differs from [0.0, 0.0, 0.0] of"),
    "shape": (lambda f: relabel(f, lambda image: image[1:]), [NEW], "0", "shape [24.0, 20.0, 21.0] differs from"),
    "values": (lambda f: relabel(f, lambda image: image * 7), [NEW], "0", "has the values 7, which are no labels of"),
    "unreadable": (
        lambda f: (raw_of(f) / "labelsTr/unlabeled_000.nii.gz").write_bytes(b"no"),
        *([NEW], "0", "unlabeled_000.nii.gz cannot be read"),
    ),
    "labeled": (None, [NEW, "case_000"], "0", "case_000: labeled already in fold 0"),
    "validation": (None, ["case_002"], "0", "case_002: for validation in fold 0"),
    "unknown": (None, ["nobody"], "0", "nobody: no scan of"),
    "all": (None, [NEW], "all", "Fold all has every case of imagesTr, and no list to add to."),
    "no fold": (None, [NEW], "3", "Fold 3 does not exist"),
    "no splits": (
        lambda f: (f / "splits_final.json").unlink(),
        [NEW],
        "0",
        "there is no fold yet. A training, or nnunet-ssl split, makes it.",
    ),
    "not preprocessed": (
        lambda f: [shutil.rmtree(f / target) for target in IDENTIFIERS],
        *([NEW], "0", "has no preprocessed cases. Plan and preprocess the labeled scans first"),
    ),
    "same name": (other_image, [NEW], "0", "another scan of this name is in imagesTr; rename the one in imagesUn"),
    "image": (
        lambda f: (raw_of(f) / "imagesUn/unlabeled_000_0000.nii.gz").write_bytes(b"no"),
        *([NEW], "0", "unlabeled_000_0000.nii.gz: cannot be read"),
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_added_is_refused_and_nothing_changes(mistake, folder, capsys):
    harm, cases, fold, words = REFUSED[mistake]
    if harm is not None:
        harm(folder)
    before = content(folder.parents[1])
    assert main(["split", "-d", "701", "-f", fold, "-np", "1", "--add", *cases]) == 1
    assert words in capsys.readouterr().err
    assert content(folder.parents[1]) == before


def test_a_running_training_is_left_its_scans(folder, capsys):
    fold = folder.parents[1] / "results" / folder.name / "nnUNetTrainerM3HL__nnUNetPlans__3d_fullres/fold_0"
    fold.mkdir(parents=True)
    before = content(folder.parents[1])
    with locked(fold / ".training.lock", f"training in {fold}"):
        assert main([*COMMAND, "unlabeled_000"]) == 1
    assert f"has been training in {fold}" in capsys.readouterr().err
    assert content(folder.parents[1]) == before


def test_a_label_may_have_the_ignore_label_and_parts_of_regions(folder):
    from nnunet_ssl.data.label_checks import label_problems
    from nnunet_ssl.data.plausibility import expected_scans
    from nnunet_ssl.data.preprocessed import load_plans

    raw = raw_of(folder)
    description = json.loads((raw / "dataset.json").read_text())
    description |= {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "regions_class_order": [1, 2]}
    plans = load_plans(folder, "nnUNetPlans", ["2d"])
    expected = expected_scans(plans, {"2d": plans.get_configuration("2d")}, description)
    label, image = raw / "labelsTr/unlabeled_000.nii.gz", raw / "imagesUn/unlabeled_000_0000.nii.gz"
    for factor, problems in ((1, 0), (2, 0), (3, 0), (4, 1)):
        save_label(raw)
        relabel(folder, lambda image, factor=factor: image * factor)
        assert len(label_problems("unlabeled_000", label, [image], expected)) == problems


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--add a", "--add needs -f, and neither --val nor --overwrite"),
        ("--add a -f 0 --val 3", "--add needs -f, and neither --val nor --overwrite"),
        ("--labeled 2 --new-fold", "-f and --new-fold are for --add"),
        ("--labeled 2 --add a", "not allowed with argument"),
        ("", "one of the arguments --labeled --add is required"),
    ],
)
def test_options_of_the_other_kind_end_with_the_usage(line, words, capsys):
    with pytest.raises(SystemExit):
        main(["split", "-d", "701", *line.split()])
    assert words in capsys.readouterr().err
