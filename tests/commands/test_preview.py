"""The picture of a training batch shows what the trainer's own code mixes."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from equations import EVERY_KIND
from PIL import Image
from tiny_trainers import every_trainer, make_trainer, seed

from nnunet_ssl.blocks.mixing import box_mask, mix, mix_halves, recorded
from nnunet_ssl.cli import main
from nnunet_ssl.commands import preview as module
from nnunet_ssl.commands.pictures import PREDICTION, REFERENCE
from nnunet_ssl.commands.preview import Column, Names, class_map, colours, mixed_row, preview
from nnunet_ssl.data.loading import Batch
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL

NAMES = Names(["a", "b"], ["c", "d"])
MIXED = {"nnUNetTrainerM3HL": 2, "nnUNetTrainerM3": 2, "nnUNetTrainerBCP": 2, "nnUNetTrainerCoLearning": 2}
MIXED |= {"nnUNetTrainerCoM3HL": 2, "nnUNetTrainerFixMatch": 2, "nnUNetTrainerCutMixMT": 2, "nnUNetTrainerADMT": 2}
MIXED |= {"nnUNetTrainerPSMT": 2, "nnUNetTrainerABD": 2}


@pytest.fixture
def rows(monkeypatch):
    """The rows of the last picture."""
    drawn = []
    original = module.draw

    def draw(rows, *more, **settings):
        drawn[:] = rows
        original(rows, *more, **settings)

    monkeypatch.setattr(module, "draw", draw)
    return drawn


def files(folder):
    return sorted(Path(folder).rglob("*"))


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
@pytest.mark.parametrize("trainer_class", every_trainer())
def test_every_trainer_has_a_picture(trainer_class, configuration, tiny_dataset, tmp_path, rows, capsys):
    name, file = trainer_class.__name__, tmp_path / "preview.png"
    results, variables = files(os.environ["nnUNet_results"]), dict(os.environ)
    assert preview("701", configuration, 0, name, file) == MIXED.get(name, 0)
    assert capsys.readouterr().out == ""  # nothing of nnU-Net's
    assert files(os.environ["nnUNet_results"]) == results
    assert dict(os.environ) == variables
    assert files(tmp_path) == [file]
    with Image.open(file) as picture:
        assert picture.width > 500
    assert rows
    for row in rows:
        titles = [column.title for column in row]
        among_unlabeled = ("FixMatch", "CutMixMT", "ADMT", "PSMT")
        first = "unlabeled" if name.removeprefix("nnUNetTrainer") in among_unlabeled else "labeled"
        assert titles[:2] == [f"{first} patch", "unlabeled patch"]
        assert titles[2:] == (["mask", "mixed patch", "mixed target"] if name in MIXED else titles[2:])
        assert all(column.values.shape[:2] == (16, 16) for column in row)
        assert (row[0].case in ("case_000", "case_001")) == (first == "labeled")
        assert row[0].case
        assert row[1].case
        assert row[1].case not in ("case_000", "case_001", "case_002")
        for column in row[:2]:
            assert (column.slice is None) == (configuration == "2d")


@pytest.mark.parametrize("labels", EVERY_KIND, ids=lambda kind: kind.fixture, indirect=True)
def test_every_kind_of_labels_has_a_picture(labels, labels_dataset, tmp_path):
    for name in ("nnUNetTrainerM3HL", "nnUNetTrainerCoLearning"):
        assert preview(labels_dataset.name, "3d_fullres", 0, name, tmp_path / "preview.png")


def test_pseudo_labels_are_those_of_the_checkpoint(tiny_dataset, tmp_path, monkeypatch, rows):
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    seed()
    trainer = make_trainer(nnUNetTrainerM3HL, tiny_dataset)
    trainer.initialize()
    bias = trainer.companions.teacher.decoder.seg_layers[-1].bias.data
    bias.copy_(torch.linspace(-1e4, 1e4, len(bias)))  # the last class everywhere
    trainer.save_checkpoint(f"{trainer.output_folder}/checkpoint_best.pth")
    before = files(tmp_path)
    command = "preview -d 701 -c 3d_fullres -f 0 -tr nnUNetTrainerM3HL -chk checkpoint_best.pth -o"
    assert main([*command.split(), str(tmp_path / "preview.png")]) == 0
    assert files(tmp_path) == sorted([*before, tmp_path / "preview.png"])
    for row in rows:
        ((unlabeled, _, _),) = row[1].outlines
        assert (unlabeled == len(bias) - 1).all()


def test_a_row_tells_both_sources_apart():
    labeled, unlabeled = torch.rand(2, 1, 8, 6, 6), torch.rand(2, 1, 8, 6, 6)
    batch = Batch(image=labeled, target=torch.ones_like(labeled).short(), unlabeled=unlabeled, unlabeled_weak=None)
    with recorded() as calls:
        mask = torch.zeros(1, 1, 8, 6, 6, dtype=torch.bool)
        mask[:, :, 3, :, :2] = True  # slice 3 alone is mixed
        mix_halves(labeled, batch.target, unlabeled, torch.zeros_like(batch.target), torch.cat([mask, ~mask]))
    assert len(calls) == 2
    for sample, keeps in ((0, mask[0, 0, 3].numpy()), (1, ~mask[0, 0, 3].numpy())):
        by_title = {column.title: column for column in mixed_row(*calls, sample, batch, NAMES, 0)}
        (known, _, _), (pseudo, _, _) = by_title["mixed patch"].outlines
        assert np.array_equal(known, keeps)
        assert not pseudo.any()
        assert by_title["labeled patch"].case == NAMES.labeled[sample]
        assert by_title["unlabeled patch"].case == NAMES.unlabeled[sample]
        assert by_title["unlabeled patch"].slice == (3, 8)
        target, shown = by_title["mixed target"].values, by_title["mask"].values
        for voxels, label in ((keeps, 1), (~keeps, 0)):
            assert np.allclose(target[voxels], colours(np.array([label]), np.array([label == 1])))
            assert np.allclose(shown[voxels], colours(np.array([0]), np.array([label == 1])))


def test_the_second_source_may_be_the_labeled_one():
    labeled, unlabeled = torch.rand(1, 1, 6, 6), torch.rand(1, 1, 6, 6)
    batch = Batch(image=labeled, target=torch.ones(1, 1, 6, 6), unlabeled=unlabeled, unlabeled_weak=None)
    with recorded() as calls:
        mask = box_mask(1, (6, 6))
        mix(unlabeled, labeled, mask)
        mix(torch.zeros(1, 1, 6, 6), batch.target, mask)
    row = mixed_row(*calls, 0, batch, Names(["a"], ["b"]), 0)
    assert [(column.title, column.case) for column in row[:2]] == [("labeled patch", "a"), ("unlabeled patch", "b")]
    (known, _, _), _ = row[3].outlines
    assert np.array_equal(known, ~mask[0, 0].numpy())


def shown(row, monkeypatch, file, **settings):
    """The figure of some rows."""
    figures = []
    original = module.Figure
    monkeypatch.setattr(module, "Figure", lambda **options: figures.append(original(**options)) or figures[0])
    module.draw([row] * 2, "zyx", file, **settings)
    return figures[0]


@pytest.mark.parametrize("shape", [(16, 96), (40, 40), (96, 16)], ids=["flat", "square", "high"])
def test_the_picture_is_filled_by_patches_of_any_shape(shape, tmp_path, monkeypatch):
    values = np.zeros(shape)  # black
    figure = shown([Column("labeled patch", values, [], "case", (4, 9)) for _ in range(5)], monkeypatch, tmp_path / "p")
    with Image.open(tmp_path / "p") as picture:
        assert (np.asarray(picture.convert("L")) < 50).mean() > 0.3
    for axis in figure.axes:
        assert axis.get_xlabel().split() == ["case", "slice", "5", "of", "9", "along", "z"]
    assert figure.legends[0].get_title().get_text() == "plane y-x of the preprocessed scans"


@pytest.mark.parametrize("random", [False, True])
def test_what_an_untrained_network_predicts_does_not_cover_the_images(random, tmp_path, monkeypatch):
    classes = np.eye(20, dtype=int)
    row = [Column("a", np.zeros((20, 20)), [(classes, REFERENCE, "solid"), (classes, PREDICTION, "dashed")])]
    figure = shown(row, monkeypatch, tmp_path / "p", random=random)
    lines = figure.axes[0].collections
    assert len(lines) == (1 if random else 2)
    assert all(line.get_linewidths() < 1 for line in lines)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(texts) == 2
    assert ("untrained" in texts[1]) == random


def test_colours_that_are_not_used_are_not_explained(tmp_path, monkeypatch):
    figure = shown([Column("a", np.zeros((9, 9)), [])], monkeypatch, tmp_path / "p")
    assert len(figure.legends[0].get_texts()) == 1


def test_nested_regions_are_told_apart_and_the_ignore_channel_is_none():
    target = torch.zeros(3, 4)
    target[0, :3], target[1, :1], target[2, 3] = 1, 1, 1  # whole, core, ignored
    assert class_map(target, 2).tolist() == [2, 1, 1, 0]
    assert class_map(torch.tensor([[0.0, 3.0]]), 0).tolist() == [0, 3]
    assert class_map(torch.tensor([[0.9, 0.2], [0.1, 0.8]]), 0).tolist() == [0, 1]


def test_a_patch_of_unknown_origin_is_an_error():
    image, mask = torch.rand(1, 1, 6, 6), box_mask(1, (6, 6))
    batch = Batch(image=image, target=image, unlabeled=torch.rand(1, 1, 6, 6), unlabeled_weak=None)
    with recorded() as calls:
        mix(image, batch.unlabeled + 0.1, mask)
        mix(image, image, mask)
    with pytest.raises(RuntimeError, match="before it mixes"):
        mixed_row(*calls, 0, batch, Names(["a"], ["b"]), 0)


def test_nothing_is_recorded_outside_of_the_block():
    image, mask = torch.rand(1, 1, 6, 6), box_mask(1, (6, 6))
    with recorded() as calls:
        pass
    mix(image, image, mask)
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-tr", "nnUNetTrainerM3", "-chk", "checkpoint_none.pth"], "checkpoint_none.pth is missing"),
        (["-tr", "nnUNetTrainer"], "nnUNetTrainer is not a semi-supervised trainer"),
        (["-tr", "nnUNetTrainerM4"], "nnUNetTrainerM4"),
        (["-tr", "nnUNetTrainerM3", "-device", "mps"], "There is no MPS device here"),
        (["-tr", "nnUNetTrainerM3", "-o", "/nowhere/preview.png"], "/nowhere does not exist"),
    ],
)
def test_bad_input_is_a_sentence(arguments, message, tiny_dataset, tmp_path, capsys):
    file = tmp_path / "preview.png"
    assert main(["preview", "-d", "701", "-c", "3d_fullres", "-f", "0", "-o", str(file), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not file.exists()
