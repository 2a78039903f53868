import numpy as np
import pytest
import SimpleITK as sitk
from matplotlib import colors, image, style

from nnunet_ssl.commands import demo, pictures
from nnunet_ssl.commands.pictures import PREDICTION, REFERENCE, compare_cases, compare_segmentations


@pytest.fixture(autouse=True)
def fonts():
    """Those of a new process: nnU-Net's progress.png, drawn by another test, leaves huge ones behind."""
    with style.context("default"):
        yield


def write(array, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(file))
    return file


def pixels(file, colour):
    """How many pixels of a picture have a colour."""
    difference = image.imread(file)[..., :3] - np.array(colors.to_rgb(colour))
    return int((np.abs(difference).max(-1) < 0.08).sum())


def organ(lower, upper):
    mask = np.zeros((6, 24, 24), np.uint8)
    mask[2:4, lower:upper, lower:upper] = 1
    return mask


def test_reference_and_prediction_are_outlined_where_they_are(tmp_path):
    scan = np.random.default_rng(0).normal(100, 10, (6, 24, 24)).astype(np.float32)
    scans = [write(scan, tmp_path / f"case_{i}_0000.nii.gz") for i in range(2)]
    references = [write(organ(8, 16), tmp_path / f"case_{i}.nii.gz") for i in range(2)]
    right = [write(organ(9, 15), tmp_path / "right" / f.name) for f in references]
    empty = [write(organ(0, 0), tmp_path / "empty" / f.name) for f in references]
    compare_segmentations(scans, references, {"one": right, "two": right}, tmp_path / "both.png")
    compare_segmentations(scans, references, {"one": right, "two": empty}, tmp_path / "one.png")
    compare_segmentations(scans, references, {"one": empty, "two": empty}, tmp_path / "none.png")
    blue = [pixels(tmp_path / f"{name}.png", PREDICTION) for name in ("both", "one", "none")]
    orange = [pixels(tmp_path / f"{name}.png", REFERENCE) for name in ("both", "one", "none")]
    legend = blue[2]  # the line in the legend is there in any case
    # the other column may be a little larger: it has no label below
    assert blue[0] - legend == pytest.approx(2 * (blue[1] - legend), rel=0.2)
    assert blue[1] - legend > 100
    assert min(orange) > 1000
    assert {p.name for p in tmp_path.iterdir() if p.suffix not in (".gz", "")} == {"both.png", "one.png", "none.png"}


def test_the_demo_shows_the_scans_that_gain_most_and_least(tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    for index in range(4):
        write(organ(8, 16), raw / "labelsTs" / f"test_{index}.nii.gz")
    shown = {}
    monkeypatch.setattr(
        "nnunet_ssl.commands.pictures.compare_segmentations",
        lambda images, references, predictions, output: shown.update(
            images=images, references=references, predictions=predictions, output=output
        ),
    )
    demo.picture(tmp_path, raw, {"A_8epochs": [50.0, 60, 70, 80], "B_8epochs": [55.0, 90, 60, 80]})
    assert shown["references"][0].name == "test_1.nii.gz"  # + 30
    assert shown["references"][-1].name == "test_2.nii.gz"  # - 10
    assert shown["images"][0].name == "test_1_0000.nii.gz"
    assert list(shown["predictions"]) == ["A", "B"]
    assert shown["predictions"]["B"][0] == tmp_path / "predictions" / "B_8epochs" / "test_1.nii.gz"
    assert shown["output"] == tmp_path / demo.PICTURE


def test_the_dice_is_said_to_be_that_of_the_whole_scan(tmp_path, monkeypatch):
    figures = figures_of(monkeypatch)
    scan = write(np.zeros((6, 24, 24), np.float32), tmp_path / "case_0000.nii.gz")
    reference = write(organ(8, 16), tmp_path / "case.nii.gz")
    compare_segmentations([scan], [reference], {"one": [reference]}, tmp_path / "p.png")
    assert [axis.get_xlabel() for axis in figures[0].axes] == ["", "Dice of the scan 100 %"]


def figures_of(monkeypatch):
    """The figures that are drawn from now on."""
    figures, original = [], pictures.Figure
    monkeypatch.setattr(pictures, "Figure", lambda **options: figures.append(original(**options)) or figures[-1])
    return figures


@pytest.mark.parametrize("number", [1, 2, 8])
def test_nothing_of_a_comparison_is_cut_off_or_wrong_of_one_trainer(number, tmp_path, monkeypatch):
    figures = figures_of(monkeypatch)
    dice = {f"nnUNetTrainerCoLearning{i}_300epochs": {"a": 0.5, "b": 0.6} for i in range(number)}
    compare_cases(dice, tmp_path / "p.png", models=15)
    (axis,) = figures[0].axes
    figures[0].draw_without_rendering()  # at the figure's own resolution
    for text in (axis.title, axis.yaxis.label, *axis.get_xticklabels()):
        box = text.get_window_extent()
        assert 0 <= box.x0 < box.x1 <= figures[0].bbox.x1
        assert 0 <= box.y0 < box.y1 <= figures[0].bbox.y1
    assert ("line" in axis.get_title()) == (number > 1)
    assert axis.get_title().startswith("2 test cases;")
    assert axis.get_ylabel() == "Dice of a test case, mean of 15 models (%)"


def test_a_single_case_is_not_plural(tmp_path, monkeypatch):
    figures = figures_of(monkeypatch)
    compare_cases({"a": {"x": 0.5}}, tmp_path / "p.png", models=1)
    assert figures[0].axes[0].get_title().startswith("1 test case;")
    assert figures[0].axes[0].get_ylabel() == "Dice of a test case (%)"
