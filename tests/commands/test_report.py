"""`nnunet-ssl report`: a page that stands alone, says what is missing, and escapes what it quotes."""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from jinja2 import UndefinedError
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from pages import Page, alone
from tiny import write_image
from tiny_trainers import make_trainer, seed

from nnunet_ssl.cli import main
from nnunet_ssl.commands import preview
from nnunet_ssl.commands.report import page as page_module
from nnunet_ssl.commands.report import run as run_module
from nnunet_ssl.commands.report import scans as scans_module
from nnunet_ssl.commands.report.pictures import read_volume, surroundings, views_of, window_of
from nnunet_ssl.commands.report.training import trainer_files
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL

NAME, TRAINER = "Dataset803_Report", "nnUNetTrainerM3HL"
STRANGE = 'a<b>&"c'  # a name that HTML would take for a tag
LABELS = {"background": 0, "organ": 1, "lesion": 2}
SHAPE = (6, 14, 12)
CONFIGURATION = {
    "data_identifier": "nnUNetPlans_3d_fullres",
    "patch_size": [8, 8, 8],
    "batch_size": 2,
    "spacing": [3.0, 1.0, 1.0],
    "median_image_size_in_voxels": [6.0, 14.0, 12.0],
    "normalization_schemes": ["ZScoreNormalization"],
    "architecture": {
        "network_class_name": "unet.PlainConvUNet",
        "arch_kwargs": {"n_stages": 2, "features_per_stage": [4, 8]},
    },
}


def organ(lesion=True, shift=0):
    """A label map of an organ, with a lesion in it if wanted."""
    label = np.zeros(SHAPE, np.uint8)
    label[2:5, 3 + shift : 9 + shift, 3:9] = 1
    if lesion:
        label[3, 5 + shift : 7 + shift, 5:7] = 2
    return label


def write_scan(folder, case):
    image = np.random.default_rng(0).normal(100, 10, SHAPE).astype(np.float32) + 60 * organ()
    write_image(folder / f"{case}_0000.nii.gz", image, (3, 1, 1))


def write_label(folder, case, label):
    write_image(folder / f"{case}.nii.gz", label, (3, 1, 1))


def write_ranking(root, cases, networks=("student", "teacher"), maps=None, **rows):
    """A folder as `nnunet-ssl rank` writes it; worst first. Returns it."""
    folder, raw = root / "ranked", root / "raw" / NAME / "imagesUn"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "labels").mkdir(parents=True)
    columns = ["case", "score", "disagreement", "volume_ml_organ", "volume_ml_lesion", "volume_z", "components"]
    with (folder / "rank.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, [*columns, "missing"], restval="")
        writer.writeheader()
        for index, case in enumerate(cases):
            row = {
                "case": case,
                "score": f"{1 - index / 1000:.4f}",
                "disagreement": "0.25" if len(networks) > 1 else "",
            }
            row |= {"volume_ml_organ": "0.312", "volume_ml_lesion": "0.012", "volume_z": "0.5", "components": "1"}
            writer.writerow(row | rows)
            if not (raw / f"{case}_0000.nii.gz").exists():
                write_scan(raw, case)
            for shift, network in enumerate(networks):
                write_label(folder / "networks" / network, case, organ(shift=shift) if maps is None else maps)
    settings = {"dataset": NAME, "configuration": "3d_fullres", "trainers": [TRAINER], "scans": "unlabeled"}
    (folder / "settings.json").write_text(json.dumps(settings | {"networks": {name: {} for name in networks}}))
    return folder


def add_settings(folder, **more):
    file = folder / "settings.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def no_batch(*_):
    raise FileNotFoundError("nobody has preprocessed <this>")  # nnU-Net would look for the trainer before


@pytest.fixture
def root(tmp_path, monkeypatch, request):
    """Folders of nnU-Net with a finished training of 4 epochs, as far as the command reads it."""
    if request.node.get_closest_marker("pictures") is None:  # fourteen drawings take longer than the rest
        monkeypatch.setattr(run_module, "curves", lambda training: [])
    monkeypatch.setattr(preview, "rows_of_batch", no_batch)
    for kind in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{kind}", str(tmp_path / kind))
    monkeypatch.chdir(tmp_path)
    raw, preprocessed = tmp_path / "raw" / NAME, tmp_path / "preprocessed" / NAME
    model = tmp_path / "results" / NAME / f"{TRAINER}__nnUNetPlans__3d_fullres"
    for folder in (raw, preprocessed, model / "fold_0"):
        folder.mkdir(parents=True)
    description = {"channel_names": {"0": "MR"}, "labels": LABELS, "file_ending": ".nii.gz", "numTraining": 3}
    plans = {"dataset_name": NAME, "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO"}
    plans |= {"configurations": {"3d_fullres": CONFIGURATION}, "foreground_intensity_properties_per_channel": {}}
    for folder in (raw, model):
        (folder / "dataset.json").write_text(json.dumps(description))
    (model / "plans.json").write_text(json.dumps(plans))
    splits = [{"train": ["x", "y"], "val": ["v0", "v1"], "unlabeled": []}]
    (preprocessed / "splits_final.json").write_text(json.dumps(splits))
    fold = model / "fold_0"
    debug = {"num_epochs": "4", "supervised_epochs": "2", "pseudo_weight": "0.5", "torch_version": "2.9"}
    (fold / "debug.json").write_text(json.dumps(debug | {"initial_lr": "0.01"}))
    (fold / "losses.csv").write_text(
        "epoch,loss,pseudo,dice_student,dice_teacher\n0,1,,,\n1,1,,,\n2,1,2,.5,.6\n3,1,1,.7,.8\n"
    )
    warning = "2026-03-01 10:00:00.1: WARNING: all pseudo labels of this epoch are background, 0.3 <b>.\n"
    log = "".join(
        f"2026-03-01 10:00:00.1: Epoch {epoch}\n" + warning.replace("0.3", f"0.{epoch}") for epoch in range(3)
    )
    (fold / "training_log_2026_3_1.txt").write_text(log)
    logging = {"train_losses": [1, 0.5, 0, 0], "val_losses": [1, 1, 1, 0], "mean_fg_dice": [0, 0.2, 0.4, 0.5]}
    ours = {"inference_network": "teacher", "companions": {"teacher": {}}, "supervised_epochs": 2}
    checkpoint = {"network_weights": {}, "current_epoch": 4, "logging": logging, "nnunet_ssl": ours}
    torch.save(checkpoint, fold / "checkpoint_final.pth")
    for index, case in enumerate(("v0", "v1")):
        write_label(fold / "validation", case, organ(shift=2 * index))
        write_label(preprocessed / "gt_segmentations", case, organ())
        write_scan(raw / "imagesTr", case)
    return tmp_path


def fold_of(root):
    return root / "results" / NAME / f"{TRAINER}__nnUNetPlans__3d_fullres" / "fold_0"


def run(*more, trainer=TRAINER):
    line = ["report", "-d", "803", "-c", "3d_fullres", "-f", "0", "-tr", trainer, "-np", "1", "-o", "page.html"]
    return main([*line, *map(str, more)])


def page_of(*more, **settings):
    assert run(*more, **settings) == 0
    return Page("page.html")


@pytest.mark.pictures
def test_a_page_stands_alone_and_has_everything(root):
    page = page_of("--rank", write_ranking(root, ["u0", "u1"]))
    assert alone(page)
    for text in (NAME, TRAINER, "finished, 4 of 4 epochs", "teacher (of student, teacher)", "torch 2.9"):
        assert text in page.texts[""]
    training, settings = page.texts["training"], page.texts["settings"]
    assert "all pseudo labels of this epoch are background, 0.0 <b>. 0 to 2 3" in training  # one row of three warnings
    assert "Dice on validation patches" in training
    assert "A dotted line is where the semi-supervised phase begins" in training
    assert "pseudo_weight 0.5 alpha: weight of pseudo-labeled voxels; labeled voxels have 1" in settings
    for text in (
        "labeled cases 2",
        "validation cases 2",
        "unlabeled cases 0",
        "patch 8 x 8 x 8 voxels",
        "4, 8 features",
    ):
        assert text in settings
    unlabeled = page.texts["unlabeled"]
    assert unlabeled.index("u0") < unlabeled.index("u1")
    for text in ("score 1.00", "disagreement 0.25", "volume of organ 0.312 ml", "student teacher"):
        assert text in unlabeled
    alts = [attributes["alt"] for attributes in page.images()]
    assert any("Scan u0" in alt and "three planes" in alt and "student solid, teacher dashed" in alt for alt in alts)


def test_cases_with_labels_come_worst_first_with_their_numbers(root):
    page = page_of()
    text = page.texts["labeled"]
    assert text.index("1 v1") < text.index("2 v0")
    assert "v0 100.0 100.0 100.0 0.0 0.0" in text
    # the organ is 104 voxels, 72 are in both boxes, and 4 of these in each of the two lesions: 2 * 64 / 208
    assert "v1 30.8 61.5 0.0" in text
    assert "Dice of lesion 0.0 %" in text
    assert "Mean Dice of scans with labels" in page.texts[""]
    assert "worst: v1" in page.texts[""]


def test_what_files_and_names_say_is_never_taken_for_html(root):
    folder = write_ranking(root, [STRANGE], missing="<i>lesion</i>")
    page = page_of("--rank", folder)
    assert alone(page)
    assert STRANGE in page.texts["unlabeled"]
    assert "<i>lesion</i>" in page.texts["unlabeled"]
    assert f"Scan {STRANGE}," in "".join(attributes["alt"] for attributes in page.images())
    assert not [tag for tag, _ in page.elements if tag in ("b", "i")]


def test_two_hundred_scans_are_small_enough_to_send(root, monkeypatch):
    drawn = []
    noise = np.random.default_rng(0).normal(size=(320, 320)).astype(np.float32)

    def draw(image, maps, keys, window):  # the largest picture that a scan can have
        drawn.append(len(maps))
        return original(
            image._replace(voxels=noise[None], spacing=(1, 1, 1)), [np.zeros((1, 320, 320))], keys[:1], (-3, 3)
        )

    original = scans_module.draw_scan
    monkeypatch.setattr(scans_module, "draw_scan", draw)
    page = page_of("--rank", write_ranking(root, [f"u{index:03d}" for index in range(200)]))
    assert len([attributes for attributes in page.images() if "Scan u" in attributes["alt"]]) == 40
    assert "The other scans (160)" in page.texts["unlabeled"]
    assert "u199 0.80 0.25 0.312 0.012 1" in page.texts["unlabeled"]
    assert Path("page.html").stat().st_size < 8e6


# ---- what is missing is said ----


def test_without_a_ranking_and_without_labels_the_page_says_how_to_get_them(root):
    shutil.rmtree(fold_of(root) / "validation")
    page = page_of()
    assert "no ranking was given. Make one with nnunet-ssl rank" in page.texts["unlabeled"]
    assert "Left out: there are none." in page.texts["labeled"]
    assert page.texts["batch"].endswith("Left out: nobody has preprocessed <this>.")


@pytest.mark.pictures
def test_an_unfinished_training_has_a_page(root):
    (fold_of(root) / "checkpoint_final.pth").rename(fold_of(root) / "checkpoint_latest.pth")
    (fold_of(root) / "losses.csv").unlink()
    shutil.rmtree(fold_of(root) / "validation")
    page = page_of()
    assert "not finished: epoch 4 of 4, last checkpoint checkpoint_latest.pth" in page.texts[""]
    assert len(page.images()) == 2  # of nnU-Net's log
    (fold_of(root) / "checkpoint_latest.pth").unlink()
    for file in ("debug.json", "training_log_2026_3_1.txt"):
        (fold_of(root) / file).unlink()
    page = page_of()
    assert "not finished: epoch 0, no checkpoint yet" in page.texts[""]
    assert "There are no curves" in page.texts["training"]
    assert page.texts["training"].endswith("Warnings in the log None.")
    assert "debug.json is not in the folder" in page.texts["settings"]
    assert "there is no checkpoint yet" in page.texts["batch"]


def test_a_training_that_began_a_moment_ago_knows_its_epoch_from_the_table(root):
    (fold_of(root) / "checkpoint_final.pth").unlink()
    assert "not finished: epoch 4 of 4, no checkpoint yet" in page_of().texts[""]


def test_a_damaged_checkpoint_is_said_and_the_next_one_taken(root):
    fold = fold_of(root)
    shutil.copy(fold / "checkpoint_final.pth", fold / "checkpoint_best.pth")
    (fold / "checkpoint_final.pth").write_bytes(b"PK")
    page = page_of()
    assert "cut off or damaged" in page.texts["training"]
    assert "checkpoint_best.pth" in page.texts[""]


@pytest.mark.pictures
def test_a_stock_training_has_a_page(root):
    stock = "nnUNetTrainer"
    model = fold_of(root).parent
    shutil.copytree(model, model.with_name(model.name.replace(TRAINER, stock)))
    file = model.with_name(model.name.replace(TRAINER, stock)) / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=False)
    del checkpoint["nnunet_ssl"]
    torch.save(checkpoint, file)
    (file.parent / "debug.json").unlink()
    page = page_of(trainer=stock)
    assert "Dice on validation patches" in page.texts["training"]
    assert "dotted line" not in page.texts["training"]  # there is one phase
    assert "Deployed network" not in page.texts[""]
    assert "nnUNetTrainer learns from labeled scans alone" in page.texts["batch"]


def test_scans_without_any_foreground_and_a_class_that_is_never_predicted(root):
    empty = {"volume_ml_organ": "0", "volume_ml_lesion": "0", "components": "0", "missing": "organ lesion"}
    page = page_of("--rank", write_ranking(root, ["u0"], maps=organ() * 0, **empty))
    text = page.texts["unlabeled"]
    assert "No foreground at all: the picture shows the middle slices." in text
    assert "Not predicted: organ, lesion. No foreground" in text
    assert "Is there really nothing in this scan?" in text
    assert "lesion is not predicted in any of these scans." in text
    assert len(page.images()) == 3


@pytest.mark.parametrize("source", ["imagesUn", "imagesTr", "dataset.json", "DICOM", "a folder"])
def test_images_are_found_wherever_the_ranked_scans_are(source, root, monkeypatch):
    folder, raw = write_ranking(root, ["u0"]), root / "raw" / NAME
    file = raw / "imagesUn" / "u0_0000.nii.gz"
    settings = json.loads((folder / "settings.json").read_text())
    places = {"imagesTr": raw / "imagesTr", "dataset.json": root, "DICOM": folder / "images", "a folder": root / "else"}
    if source in places:
        places[source].mkdir(exist_ok=True)
        file.rename(places[source] / file.name)
    if source == "a folder":
        (folder / "settings.json").write_text(json.dumps(settings | {"scans": str(places[source])}))
    if source == "dataset.json":
        described = fold_of(root).parent / "dataset.json"
        monkeypatch.setenv("ELSEWHERE", "../..")
        entry = {"u0": {"images": [f"$ELSEWHERE/{file.name}"], "label": "none"}}
        described.write_text(json.dumps(json.loads(described.read_text()) | {"dataset": entry}))
    assert "Scan u0" in page_of("--rank", folder).images()[0]["alt"]


def test_one_network_cannot_disagree(root):
    text = page_of("--rank", write_ranking(root, ["u0"], networks=["student"])).texts["unlabeled"]
    assert "One network only: nothing can disagree." in text
    assert "disagreement 0" not in text
    assert "lines part" not in text


def test_what_to_look_for_is_said_of_the_scan(root):
    text = page_of("--rank", write_ranking(root, ["u0"], components="3", volume_z="4.2")).texts["unlabeled"]
    for question in ("Are all 3 pieces real?", "which network is right?", "The volume is unusual"):
        assert question in text


def test_a_table_without_scans_is_said(root):
    folder = write_ranking(root, [])
    assert "The table of the ranking has no scan." in page_of("--rank", folder).texts["unlabeled"]


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda root, folder: (root / "raw" / NAME / "imagesUn" / "u0_0000.nii.gz").unlink(), "scan was not found"),
        (lambda root, folder: (folder / "networks" / "teacher" / "u0.nii.gz").unlink(), "u0.nii.gz is missing"),
        (lambda root, folder: (folder / "networks" / "teacher" / "u0.nii.gz").write_bytes(b"x"), "cannot be read ("),
        (
            lambda root, folder: write_label(folder / "networks" / "teacher", "u0", organ()[1:]),
            "has [5, 14, 12] voxels, the scan [6, 14, 12]",
        ),
    ],
    ids=["no image", "no labels", "damaged", "other shape"],
)
def test_a_scan_that_cannot_be_shown_says_why_and_keeps_its_numbers(spoil, text, root):
    folder = write_ranking(root, ["u0"])
    spoil(root, folder)
    page = page_of("--rank", folder)
    assert text in page.texts["unlabeled"]
    assert "volume of organ 0.312 ml" in page.texts["unlabeled"]
    assert not [attributes for attributes in page.images() if "Scan u0" in attributes["alt"]]


def test_classes_that_are_missing_in_scans_with_labels_are_said(root):
    for kind, lesions in (("predictions", (False, False)), ("labelsTs", (True, True))):
        for case, lesion in zip(("t0", "t1"), lesions, strict=True):
            write_label(root / kind, case, organ(lesion))
    folders = ["--predictions", root / "predictions", "--labels", root / "labelsTs"]
    page = page_of(*folders)
    text = page.texts["labeled"]
    assert "lesion is never predicted." in text
    assert "Missed: lesion." in text
    assert "No picture: the file of the scan was not found." in text
    write_scan(root / "imagesTs", "t0")  # beside labelsTs
    assert len(page_of(*folders).images()) == 1
    for case in ("t0", "t1"):
        write_label(root / "labelsTs", case, organ() * 0)
        write_label(root / "predictions", case, organ() * 0)
    text = page_of(*folders).texts["labeled"]
    assert "No reference has organ: nothing can be said about it." in text
    assert "so without Dice: t0, t1." in text


def test_the_spacing_of_tiff_labels_is_where_nnunet_finds_it(root):
    raw, fold, copies = root / "raw" / NAME, fold_of(root), root / "preprocessed" / NAME / "gt_segmentations"
    for folder in (raw, fold.parent):
        file = folder / "dataset.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"file_ending": ".tif"}))
    plans = fold.parent / "plans.json"
    plans.write_text(plans.read_text().replace("SimpleITKIO", "Tiff3DIO"))
    (raw / "labelsTr").mkdir()
    for case in ("v0", "v1"):
        for folder in (raw / "labelsTr", fold / "validation"):
            Tiff3DIO().write_seg(organ(), str(folder / f"{case}.tif"), {"spacing": [3.0, 1.0, 1.0]})
        shutil.copy(raw / "labelsTr" / f"{case}.tif", copies)  # as nnU-Net copies it: without v0.json
    assert "100.0" in page_of().texts["labeled"]


def test_regions_are_measured_as_such(root):
    for file in (root / "raw" / NAME / "dataset.json", fold_of(root).parent / "dataset.json"):
        content = json.loads(file.read_text()) | {"labels": {"background": 0, "whole": [1, 2], "core": 2}}
        file.write_text(json.dumps(content | {"regions_class_order": [1, 2]}))
    # the whole organ has 108 voxels, 72 of them in both
    assert "v1 33.3 66.7 0.0" in page_of().texts["labeled"]


def test_a_method_and_a_real_training_have_their_batch(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_module, "curves", lambda training: [])
    seed()
    trainer = make_trainer(nnUNetTrainerM3HL, tiny_dataset)
    trainer.initialize()
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_best.pth")
    for name in ("plans", "dataset"):
        source = tiny_dataset / ("nnUNetPlans.json" if name == "plans" else "dataset.json")
        shutil.copy(source, Path(trainer.output_folder).parent / f"{name}.json")
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", "-d", "701", "-c", "3d_fullres", "-f", "0", "-tr", TRAINER]) == 0
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "report.html"])
    page = Page("report.html")
    assert alone(page)
    assert "mixed target" in page.images()[0]["alt"]
    assert "unlabeled cases 6" in page.texts["settings"]


# ---- pictures ----


def test_the_slices_are_those_with_the_largest_area_and_the_largest_difference():
    first, second = np.zeros((2, 8, 9, 10), int)
    first[2:5, 2:5, 2:5], first[3, 2:8, 2:9] = 1, 1
    second[:] = first
    second[4, 2:4, 2:4] = 2  # another class is a difference as well
    views = views_of([first, second], True)
    assert [(view.name, view.index) for view in views] == [
        ("axial", 3),
        ("most different", 4),
        ("coronal", 5),
        ("sagittal", 5),
    ]
    elsewhere = first.copy()
    elsewhere[:, 8, 9] = 1  # the planes stay with what the widest slice shows
    assert [view.index for view in views_of([elsewhere], True)] == [3, 3, 5, 5]
    assert [view.outlines for view in views_of([first, first], False)] == [True, False, True, True]
    assert [view.index for view in views_of([first * 0], False)] == [4, 4, 4, 5]
    assert [view.name for view in views_of([first[:1]], False)] == ["image", "outlines"]


def test_a_picture_is_cut_to_all_outlines_with_a_margin_in_millimetres():
    first, second = np.zeros((2, 20, 100, 100), int)
    first[8:12, 40:60, 40:60] = 1
    second[8, 40:80, 40] = 1  # a piece that only one network has
    # 40 mm are the longest side, so the margin is 10 mm
    assert surroundings([first, second], (5, 1, 1)) == (slice(6, 14), slice(30, 90), slice(30, 70))
    assert surroundings([first * 0], (5, 1, 1)) == (slice(0, 20), slice(0, 100), slice(0, 100))


def test_gray_values_with_a_meaning_have_the_window_of_the_foreground():
    assert window_of(np.zeros((1, 2, 2)), {"percentile_00_5": -20, "percentile_99_5": 80}) == (-70, 130)
    low, high = window_of(np.zeros((3, 2, 2)))
    assert low < high
    values = np.arange(1000.0).reshape(10, 10, 10)
    assert window_of(values) == pytest.approx((4.995, 994.005))


def test_a_radiologist_sees_scans_in_the_usual_directions(tmp_path):
    image = sitk.GetImageFromArray(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))  # stored from left to right and from the back
    image.SetSpacing((1, 2, 3))
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    volume = read_volume(tmp_path / "a.nii.gz", SimpleITKIO, ".nii.gz")
    assert volume.oriented
    assert volume.spacing == (3, 2, 1)
    assert np.array_equal(volume.voxels, np.arange(24).reshape(2, 3, 4)[:, ::-1, ::-1])


# ---- settings, atomic writing, mistakes ----


def test_the_file_of_a_trainer_is_found_with_any_number_of_epochs(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text("class nnUNetTrainerMine(nnUNetTrainerM3HL):\n    strength = 0.5  # of it\n")
    monkeypatch.setenv("nnUNet_extTrainer", f"{os.environ['nnUNet_extTrainer']}{os.pathsep}{tmp_path}")
    assert [file.name for file in trainer_files("nnUNetTrainerM3HL_100epochs")] == ["nnUNetTrainerM3HL.py"]
    assert [file.name for file in trainer_files("nnUNetTrainerMine")] == ["mine.py", "nnUNetTrainerM3HL.py"]
    assert trainer_files("nnUNetTrainerNobody") == []


def test_a_page_is_replaced_as_a_whole_or_not_at_all(root, monkeypatch, capsys):
    def on_a_full_disk(file, text, **_):
        file.write_bytes(text[:1000].encode())
        raise OSError("No space left on device")

    Path("page.html").write_text("the page of before", encoding="utf-8")
    files = sorted(root.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", on_a_full_disk)
        assert run() == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(page_module, "PAPER", {})
    with pytest.raises(UndefinedError, match="light"):  # the template lacks a colour
        run()
    assert Path("page.html").read_text(encoding="utf-8") == "the page of before"
    assert sorted(root.rglob("*")) == files


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (lambda root: None, ["-tr", "nnUNetTrainerM4"], "there is no such training. Train first: nnUNetv2_train 803"),
        (lambda root: None, ["-o", "nowhere/report.html"], "nowhere does not exist. Make it"),
        (lambda root: None, ["-o", "raw"], "-o raw is a folder"),
        (lambda root: None, ["--rank", "raw"], "rank.csv is missing. Give the folder that nnunet-ssl rank has written"),
        (
            lambda root: (write_ranking(root, ["u0"]) / "rank.csv").write_text("case,score\nu0,1\n"),
            ["--rank", "ranked"],
            "rank.csv is damaged (it has no column missing)",
        ),
        (
            lambda root: (write_ranking(root, ["u0"]) / "rank.csv").write_text("case,score,missing\nu0,1\n"),
            ["--rank", "ranked"],
            "rank.csv is damaged (a row is cut off",
        ),
        (
            lambda root: (write_ranking(root, ["u0"]) / "rank.csv").write_text("case,score,missing\nu0,x,\n"),
            ["--rank", "ranked"],
            "rank.csv is damaged (a number is none)",
        ),
        (
            lambda root: (write_ranking(root, ["u0"]) / "rank.csv").write_text("case,score,missing\n../u0,1,\n"),
            ["--rank", "ranked"],
            "rank.csv is damaged (a case is no name of a file)",
        ),
        (
            lambda root: (write_ranking(root, ["u0"]) / "settings.json").write_text('{"trainers": ["nnUNetTrainer"]}'),
            ["--rank", "ranked"],
            "ranks the predictions of trainer nnUNetTrainer, this page is of nnUNetTrainerM3HL",
        ),
        (
            lambda root: add_settings(write_ranking(root, ["u0"]), plans="ResEnc", folds=[3]),
            ["--rank", "ranked"],
            "of plans ResEnc, fold 3, this page is of nnUNetTrainerM3HL, Dataset803_Report, 3d_fullres, nnUNetPlans, "
            "fold 0",
        ),
        (
            lambda root: (fold_of(root) / "losses.csv").write_text("epoch,loss\n0,x\n"),
            [],
            "losses.csv is damaged (could not convert",
        ),
        (lambda root: (fold_of(root) / "debug.json").write_text("[]"), [], "debug.json is damaged"),
        (lambda root: None, ["--predictions", "nowhere", "--labels", "raw"], "--predictions nowhere is no folder"),
        (
            lambda root: write_label(root / "one", "a", organ()) or write_label(root / "two", "b", organ()),
            ["--predictions", "one", "--labels", "two"],
            "b.nii.gz: no prediction in one",
        ),
        (
            lambda root: write_label(root / "one", "a", organ()) or write_label(root / "two", "a", organ()[1:]),
            ["--predictions", "one", "--labels", "two"],
            "not of the same scans",
        ),
    ],
    ids=[
        "no training",
        "no folder",
        "a folder",
        "no ranking",
        "no column",
        "cut ranking",
        "no number",
        "other folder",
        "other training",
        "other plans and fold",
        "damaged table",
        "damaged debug.json",
        "no predictions",
        "other cases",
        "other geometry",
    ],
)
def test_bad_input_is_a_sentence(spoil, arguments, message, root, capsys):
    spoil(root)
    files = sorted(root.rglob("*"))
    assert run(*arguments) == 1
    assert message in capsys.readouterr().err
    assert sorted(root.rglob("*")) == files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--predictions", "a"], "--predictions and --labels belong together"),
        (["--labels", "a"], "--predictions and --labels belong together"),
        (["--images", "a"], "--images is for --predictions and --labels"),
        (["--pictures", "-1"], "--pictures -1 is no number of pictures"),
    ],
)
def test_options_that_do_not_fit_end_with_the_usage(arguments, message, capsys):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err


def test_a_page_is_made_where_the_unlabeled_cases_are_gone(root):
    splits = root / "preprocessed" / NAME / "splits_final.json"
    splits.write_text(json.dumps([{"train": ["x", "y"], "val": ["v0", "v1"], "unlabeled": ["u"]}]))
    assert "not known here: " in page_of().source
    splits.write_text("[]")
    assert "not known here: Fold 0 does not exist" in page_of().source
