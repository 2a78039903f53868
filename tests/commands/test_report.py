"""`nnunet-ssl report`: a page that stands alone, says what is missing, and escapes what it quotes."""

import csv
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_image
from tiny_trainers import make_trainer, seed

from nnunet_ssl.cli import main
from nnunet_ssl.commands.report import page as page_module
from nnunet_ssl.commands.report import run as run_module
from nnunet_ssl.commands.report import scans as scans_module
from nnunet_ssl.commands.report.pictures import surroundings, views_of, window_of
from nnunet_ssl.commands.report.training import trainer_file
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


class Page(HTMLParser):
    """What the tests ask of a page: its elements with their attributes, and the text of every section."""

    def __init__(self, file):
        super().__init__()
        self.elements, self.texts, self.section, self.hidden = [], {}, "", False
        self.source = Path(file).read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.hidden = tag == "style"
        if tag == "section":
            self.section = dict(attrs)["id"]

    def handle_endtag(self, tag):
        self.hidden = False
        if tag == "section":
            self.section = ""

    def handle_data(self, data):
        if not self.hidden:
            self.texts[self.section] = " ".join(f"{self.texts.get(self.section, '')} {data}".split())

    def images(self):
        return [attributes for tag, attributes in self.elements if tag == "img"]


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
            row = {"case": case, "score": f"{1 - index / 1000:.4f}", "disagreement": "0.25" if len(networks) > 1 else ""}
            row |= {"volume_ml_organ": "0.312", "volume_ml_lesion": "0.012", "volume_z": "0.5", "components": "1"}
            writer.writerow(row | rows)
            if not (raw / f"{case}_0000.nii.gz").exists():
                write_scan(raw, case)
            for shift, network in enumerate(networks):
                write_label(folder / "networks" / network, case, organ(shift=shift) if maps is None else maps)
    settings = {"dataset": NAME, "configuration": "3d_fullres", "trainers": [TRAINER], "scans": "unlabeled"}
    (folder / "settings.json").write_text(json.dumps(settings | {"networks": dict.fromkeys(networks, {})}))
    return folder


@pytest.fixture
def root(tmp_path, monkeypatch, request):
    """Folders of nnU-Net with a finished training of 4 epochs, as far as the command reads it."""
    if request.node.get_closest_marker("pictures") is None:  # fourteen drawings take longer than the rest
        monkeypatch.setattr(run_module, "curves", lambda training: [])
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
    (fold / "losses.csv").write_text("epoch,loss,pseudo,dice_student,dice_teacher\n0,1,,,\n1,1,,,\n2,1,2,.5,.6\n3,1,1,.7,.8\n")
    warning = "2026-03-01 10:00:00.1: WARNING: all pseudo labels of this epoch are background, 0.3 <b>.\n"
    log = "".join(f"2026-03-01 10:00:00.1: Epoch {epoch}\n" + warning.replace("0.3", f"0.{epoch}") for epoch in range(3))
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


def alone(page):
    """Whether a page needs no other file, and every picture has a text."""
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert not [tag for tag, _ in page.elements if tag in ("script", "link", "iframe", "object", "embed")]
    assert "url(" not in page.source
    assert "@import" not in page.source
    for tag, attributes in page.elements:
        for name in ("src", "srcset"):
            assert attributes.get(name, "data:image/").startswith("data:image/"), tag
        assert attributes.get("href", "#").startswith("#")
        assert not [name for name in attributes if name.startswith("on")]
    assert page.images()
    assert all(len(attributes["alt"]) > 40 for attributes in page.images())
    anchors = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {attributes["href"][1:] for tag, attributes in page.elements if tag == "a"} <= anchors
    return True


@pytest.mark.pictures
def test_a_page_stands_alone_and_has_everything(root):
    page = page_of("--rank", write_ranking(root, ["u0", "u1"]))
    assert alone(page)
    for text in (NAME, TRAINER, "finished, 4 of 4 epochs", "teacher (of student, teacher)", "torch 2.9"):
        assert text in page.texts[""]
    training, settings = page.texts["training"], page.texts["settings"]
    assert "all pseudo labels of this epoch are background, 0.0 <b>. 0 to 2 3" in training  # one row of three warnings
    assert "Dice of nnU-Net's log" in training
    assert "pseudo_weight 0.5 alpha: weight of pseudo-labeled voxels; labeled voxels have 1" in settings
    for text in ("labeled cases 2", "validation cases 2", "unlabeled cases 0", "patch 8 x 8 x 8 voxels", "4, 8 features"):
        assert text in settings
    unlabeled = page.texts["unlabeled"]
    assert unlabeled.index("u0") < unlabeled.index("u1")
    for text in ("score 1.00", "disagreement 0.25", "volume of organ 0.312 ml", "student teacher"):
        assert text in unlabeled
    alts = [attributes["alt"] for attributes in page.images()]
    assert any("Scan u0" in alt and "axial" not in alt and "student solid, teacher dashed" in alt for alt in alts)


def test_cases_with_labels_come_worst_first_with_their_numbers(root):
    page = page_of()
    text = page.texts["labeled"]
    assert text.index("1 v1") < text.index("2 v0")
    assert "v0 100.0 100.0 100.0 0.0 0.0" in text
    # 6 rows, moved by 2 of them, in three slices: the organ without the lesion, which is missed by its 2 rows
    whole, part = 3 * 36 - 4, 3 * 24 - 8
    assert f"v1 {50 * part / whole * 1:.1f}" in text or f"{100 * 2 * part / (2 * whole):.1f} 0.0" in text
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
        return original(image._replace(voxels=noise[None], spacing=(1, 1, 1)), [np.zeros((1, 320, 320))], keys[:1], (-3, 3))

    original = scans_module.draw_scan
    monkeypatch.setattr(scans_module, "draw_scan", draw)
    page = page_of("--rank", write_ranking(root, [f"u{index:03d}" for index in range(200)]))
    assert len([attributes for attributes in page.images() if "Scan u" in attributes["alt"]]) == 40
    assert "The other scans (160)" in page.texts["unlabeled"]
    assert "u199 0.80 0.25 0.312 0.012 1" in page.texts["unlabeled"]
    assert Path("page.html").stat().st_size < 8e6
