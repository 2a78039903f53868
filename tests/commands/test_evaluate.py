import csv
import json

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from scipy.spatial.distance import cdist

from nnunet_ssl.cli import main
from nnunet_ssl.commands.evaluate import METRICS, case_metrics, evaluate, label_masks, label_values, surface_distances


def cube(shape, lower, upper):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))] = True
    return mask


def test_two_voxels_are_as_far_apart_as_the_spacing_says():
    a, b = cube((9, 9, 9), (1, 2, 3), (2, 3, 4)), cube((9, 9, 9), (1, 5, 7), (2, 6, 8))
    assert surface_distances(a, b, (1, 1, 1)) == (5, 5, 5)  # 3, 4
    assert surface_distances(a, b, (7, 4, 3)) == (pytest.approx(288**0.5),) * 3  # 12, 12


def test_of_equal_masks_they_are_zero_up_to_the_edge_of_the_image():
    mask = cube((6, 6, 6), (0, 0, 2), (6, 4, 6))
    assert surface_distances(mask, mask, (1, 2, 3)) == (0, 0, 0)


def test_the_average_surface_distance_is_directed_from_the_prediction():
    line, point = cube((1, 8), (0, 0), (1, 5)), cube((1, 8), (0, 0), (1, 1))
    # from the line's voxels to the point 0, 1, 2, 3, 4 voxels; back 0
    assert surface_distances(line, point, (1, 2)).asd == 4
    assert surface_distances(point, line, (1, 2)).asd == 0
    assert surface_distances(line, point, (1, 2)).assd == pytest.approx(20 / 6)
    # 0, 0, 2, 4, 6, 8 mm: the 95th percentile lies 3/4 of the way from the fifth to the sixth
    assert surface_distances(line, point, (1, 2)).hd95 == pytest.approx(7.5)


def surface_points(mask, spacing):
    """Voxels with a face neighbour outside of the mask, by looking at every neighbour."""
    padded = np.pad(mask, 1)
    inner = tuple(slice(1, -1) for _ in mask.shape)
    neighbours = [np.roll(padded, step, axis)[inner] for axis in range(mask.ndim) for step in (1, -1)]
    return np.argwhere(mask & ~np.all(neighbours, axis=0)) * spacing


@pytest.mark.parametrize("shape", [(12, 14), (9, 10, 11)])
def test_they_agree_with_all_pairs_of_surface_voxels(shape):
    rng = np.random.default_rng(0)
    spacing = np.array([3.0, 0.7, 1.3])[: len(shape)]
    for _ in range(5):
        a, b = rng.random((2, *shape)) > 0.7
        pairs = cdist(surface_points(a, spacing), surface_points(b, spacing))
        there, back = pairs.min(1), pairs.min(0)
        both = np.concatenate([there, back])
        expected = np.percentile(both, 95), there.mean(), both.mean()
        assert surface_distances(a, b, spacing) == pytest.approx(expected)


def random_pair(rng, dimensions):
    """Boxes and noise, often up to the edge of the image."""
    shape = rng.integers(4, 14, dimensions)
    mask = rng.random(shape) > 0.97
    for _ in range(rng.integers(1, 4)):
        lower = rng.integers(0, shape)
        mask[tuple(slice(a, b) for a, b in zip(lower, lower + rng.integers(1, shape), strict=True))] = True
    return mask, np.roll(mask, rng.integers(-2, 3), 0) | (rng.random(shape) > 0.95)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_they_agree_with_medpy(dimensions):
    medpy = pytest.importorskip("medpy.metric.binary", reason="medpy is not installed")
    rng = np.random.default_rng(1)
    for _ in range(100):
        a, b = random_pair(rng, dimensions)
        spacing = rng.uniform(0.3, 4, dimensions)
        expected = {"Dice": medpy.dc(a, b), "Jaccard": medpy.jc(a, b)}
        for name in ("HD95", "ASD", "ASSD"):
            expected[f"{name}_mm"] = getattr(medpy, name.lower())(a, b, spacing)
            expected[f"{name}_voxels"] = getattr(medpy, name.lower())(a, b)
        assert case_metrics(a, b, spacing) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("a", "b"), [(0, 1), (1, 0), (0, 0)])
def test_an_empty_mask_has_no_distance(a, b):
    assert np.isnan(surface_distances(np.full((3, 3), a, bool), np.full((3, 3), b, bool), (1, 1))).all()


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        surface_distances(np.ones((2, 3), bool), np.ones((3, 2), bool), (1, 1))


# ---- cases ----


def test_overlap_and_distances_of_a_case_by_hand():
    a, b = cube((4, 8), (1, 1), (3, 5)), cube((4, 8), (1, 2), (3, 7))
    metrics = case_metrics(a, b, (1, 2))
    # 8 and 10 voxels, 6 in both; the last column of b lies two columns from a
    assert metrics["Dice"] == 2 * 6 / 18
    assert metrics["Jaccard"] == 6 / 12
    # every voxel is on a surface; from a: two of 8 are one column away. From b: two are one, two are two columns away
    assert metrics["ASD_mm"] == pytest.approx(2 * 2 / 8)
    assert metrics["ASSD_mm"] == pytest.approx((2 * 2 + 2 * 2 + 2 * 4) / 18)
    assert metrics["ASSD_voxels"] == pytest.approx((2 + 2 + 4) / 18)
    assert list(metrics) == list(METRICS)


EMPTY, FULL = np.zeros((3, 4), bool), np.ones((3, 4), bool)


@pytest.mark.parametrize(
    ("prediction", "reference", "zero_where_empty", "overlap", "distance"),
    [
        (EMPTY, FULL, False, 0, np.nan),
        (FULL, EMPTY, False, 0, np.nan),
        (EMPTY, EMPTY, False, np.nan, np.nan),
        (EMPTY, FULL, True, 0, 0),
        (EMPTY, EMPTY, True, 0, 0),
        (FULL, EMPTY, True, 0, np.nan),
        (FULL, FULL, True, 1, 0),
    ],
)
def test_empty_masks(prediction, reference, zero_where_empty, overlap, distance):
    metrics = case_metrics(prediction, reference, (1, 1), zero_where_empty=zero_where_empty)
    for name, value in metrics.items():
        assert value == pytest.approx(overlap if name in ("Dice", "Jaccard") else distance, nan_ok=True)


def test_the_largest_component_of_the_prediction_alone_counts_on_demand():
    reference = cube((6, 12), (1, 1), (4, 4))
    prediction = reference | cube((6, 12), (1, 9), (3, 11))
    assert case_metrics(prediction, reference, (1, 1))["Dice"] == 18 / 22
    assert case_metrics(prediction, reference, (1, 1), largest_component=True)["Dice"] == 1
    corner = reference | cube((6, 12), (4, 4), (5, 5))  # touches by a corner: the same component
    assert case_metrics(corner, reference, (1, 1), largest_component=True)["Dice"] == 18 / 19


def test_an_empty_prediction_has_no_largest_component():
    assert case_metrics(EMPTY, FULL, (1, 1), largest_component=True)["Dice"] == 0
    assert np.isnan(case_metrics(EMPTY, FULL, (1, 1), largest_component=True)["HD95_voxels"])


def test_labels_and_regions_of_a_dataset_json():
    classes = {"labels": {"background": 0, "a": 1, "b": "2", "ignore": 3}}
    assert label_values(classes) == ({"a": (1,), "b": (2,)}, 3)
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": 2}}
    assert label_values(regions) == ({"whole": (1, 2), "core": (2,)}, None)


@pytest.mark.parametrize("shape", [(9, 11), (7, 9, 11)])
def test_masks_in_their_boxes_have_the_metrics_of_whole_masks(shape):
    rng = np.random.default_rng(0)
    labels = {"a": (1,), "b": (4,), "both": (1, 4), "nowhere": (3, 9), "background": (0,)}
    for ignore_label in (None, 5):
        maps = np.where(rng.random((2, *shape)) > 0.8, rng.choice([1, 4, 5], (2, *shape)), 0)
        maps[:, -2:] = 0  # the boxes are smaller than the images
        maps[0, -1], maps[1, -1] = 10**9, -7  # no labels
        found = dict(label_masks(*maps, labels, ignore_label))
        counts = maps[1] != ignore_label
        for name, values in labels.items():
            whole = [np.isin(image, values) & counts for image in maps]
            assert case_metrics(*found[name], (1, 2, 3)[: len(shape)]) == pytest.approx(
                case_metrics(*whole, (1, 2, 3)[: len(shape)]), nan_ok=True
            )
        assert found["a"][0].size < maps[0].size
        assert found["nowhere"][0].size == 0


# ---- folders ----

SHAPE, SPACING = (6, 10, 12), (1.5, 1.0, 3.0)  # slices, rows, columns; columns, rows, slices


@pytest.fixture
def folders(tmp_path):
    """Three cases of two nested regions: a prediction that is moved, one that is right, one that is empty.

    The last two columns are ignored; the predictions have anything there.
    """
    rng = np.random.default_rng(0)
    description = {"labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, "file_ending": ".nii.gz"}
    description |= {"channel_names": {"0": "MRI"}, "regions_class_order": [1, 2], "numTraining": 1}
    label = np.zeros(SHAPE)
    label[1:5, 2:8, 2:9] = 1
    label[2:4, 3:6, 4:7] = 2
    for name in ("reference", "prediction"):
        (tmp_path / name).mkdir()
    (tmp_path / "prediction" / "dataset.json").write_text(json.dumps(description))
    for index, prediction in enumerate((np.roll(label, 1, 1), label.copy(), np.zeros(SHAPE))):
        prediction[:, :, -2:] = rng.integers(0, 3, (*SHAPE[:2], 2))
        reference = label.copy()
        reference[:, :, -2:] = 3
        write(reference, tmp_path / "reference" / f"case_{index}.nii.gz")
        write(prediction, tmp_path / "prediction" / f"case_{index}.nii.gz")
    return tmp_path


def write(array, file, spacing=SPACING):
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(file))


def run(folders, options=""):
    return main(f"evaluate -r {folders}/reference -p {folders}/prediction -np 1 {options}".split())


def test_a_folder_is_evaluated_by_case_and_region(folders, capsys):
    assert run(folders) == 0
    with open(folders / "prediction" / "evaluation.csv", encoding="utf-8", newline="") as f:
        rows = {(row["case"], row["label"]): row for row in csv.DictReader(f)}
    assert len(rows) == 6
    predicted, reference = (
        sitk.GetArrayFromImage(sitk.ReadImage(str(folders / kind / "case_0.nii.gz")))
        for kind in ("prediction", "reference")
    )
    counts = reference != 3
    expected = case_metrics((predicted == 2) & counts, (reference == 2) & counts, SPACING[::-1])
    assert {name: float(rows["case_0", "core"][name]) for name in METRICS} == expected
    whole = case_metrics((predicted > 0) & counts, (reference > 0) & counts, SPACING[::-1])
    assert float(rows["case_0", "whole"]["ASD_mm"]) == whole["ASD_mm"]
    assert float(rows["case_1", "whole"]["Dice"]) == 1  # what lies in ignored voxels does not count
    assert float(rows["case_2", "core"]["Dice"]) == 0

    summary = json.loads((folders / "prediction" / "evaluation.json").read_text(encoding="utf-8"))
    core = summary["labels"]["core"]
    assert core["Dice"]["mean"] == pytest.approx((expected["Dice"] + 1 + 0) / 3)
    assert core["Dice"]["worst"] == 0
    assert core["HD95_mm"]["undefined"] == 1
    assert core["HD95_mm"]["mean"] == pytest.approx(expected["HD95_mm"] / 2)
    assert core["HD95_mm"]["worst"] == expected["HD95_mm"]
    shown = capsys.readouterr().out
    assert "| label | Dice (%) | Jaccard (%) | HD95 (mm) | ASD (mm) | ASSD (mm) | worst Dice (%) |" in shown
    assert "core: no distance in 1 case, where a mask is empty" in shown


@pytest.mark.parametrize(
    ("protocol", "kept", "empty", "unit"),
    [("strict", 2, None, "mm"), ("la-literature", 1, 0, "voxels"), ("acdc-literature", 2, 0, "voxels")],
)
def test_the_protocols_differ_in_components_empty_predictions_and_unit(folders, capsys, protocol, kept, empty, unit):
    reference = sitk.GetArrayFromImage(sitk.ReadImage(str(folders / "reference" / "case_1.nii.gz")))
    core = np.where(reference == 2, 2, 0)  # 2 x 3 x 3 voxels
    core[0, 0, :2] = 2
    for case, array in (("case_1", core), ("case_0", np.zeros(SHAPE)), ("case_2", np.zeros(SHAPE))):
        write(array, folders / "prediction" / f"{case}.nii.gz")
    assert run(folders, f"--protocol {protocol} -o {folders}/out") == 0
    summary = json.loads((folders / "out" / "evaluation.json").read_text(encoding="utf-8"))
    assert summary["protocol"] == protocol
    with open(folders / "out" / "evaluation.csv", encoding="utf-8", newline="") as f:
        rows = {(row["case"], row["label"]): row for row in csv.DictReader(f)}
    assert float(rows["case_1", "core"]["Dice"]) == {1: 1, 2: 2 * 18 / (18 + 20)}[kept]
    assert float(rows["case_0", "core"]["Dice"]) == 0
    assert float(rows["case_0", "core"]["HD95_voxels"]) == pytest.approx(np.nan if empty is None else 0, nan_ok=True)
    assert summary["labels"]["core"]["HD95_voxels"]["undefined"] == (2 if empty is None else 0)
    assert f"HD95 ({unit})" in capsys.readouterr().out
    assert not (folders / "prediction" / "evaluation.csv").exists()


def test_an_unknown_protocol_is_refused_with_the_names_of_all(folders, capsys):
    with pytest.raises(SystemExit):
        run(folders, "--protocol literature")
    shown = capsys.readouterr().err
    with pytest.raises(ValueError, match="strict, la-literature, acdc-literature") as error:
        evaluate(folders / "reference", folders / "prediction", protocol="literature")
    for message in (shown, str(error.value)):
        assert "'literature'" in message
        assert "la-literature" in message
        assert "acdc-literature" in message


def test_the_means_are_those_of_nnunets_own_evaluation(folders):
    assert run(folders) == 0
    ours = json.loads((folders / "prediction" / "evaluation.json").read_text(encoding="utf-8"))["labels"]
    for name, region in (("whole", (1, 2)), ("core", 2)):
        pairs = [[str(folders / k / f"case_{i}.nii.gz") for k in ("reference", "prediction")] for i in range(3)]
        theirs = [compute_metrics(*pair, SimpleITKIO(), [region], 3)["metrics"][region] for pair in pairs]
        assert ours[name]["Dice"]["mean"] == pytest.approx(np.nanmean([m["Dice"] for m in theirs]))
        assert ours[name]["Jaccard"]["mean"] == pytest.approx(np.nanmean([m["IoU"] for m in theirs]))


def test_missing_surplus_and_displaced_files_are_named_and_nothing_is_written(folders, capsys):
    prediction = folders / "prediction"
    (prediction / "case_1.nii.gz").rename(prediction / "other.nii.gz")
    assert run(folders) == 1
    shown = capsys.readouterr().err
    assert f"case_1.nii.gz: no prediction in {prediction}" in shown
    assert f"other.nii.gz: no reference in {folders / 'reference'}" in shown
    (prediction / "other.nii.gz").rename(prediction / "case_1.nii.gz")

    write(np.zeros(SHAPE), prediction / "case_1.nii.gz", spacing=(1.5, 1.0, 2.0))
    write(np.zeros((6, 10, 11)), prediction / "case_2.nii.gz")
    assert run(folders) == 1
    shown = capsys.readouterr().err
    assert "case_1.nii.gz: spacing [2.0, 1.0, 1.5], but the reference has [3.0, 1.0, 1.5]" in shown
    assert "case_2.nii.gz: shape [6.0, 10.0, 11.0], but the reference has [6.0, 10.0, 12.0]" in shown
    assert not (prediction / "evaluation.csv").exists()


@pytest.mark.parametrize("folder", ["prediction", "reference"])
def test_a_file_that_is_cut_off_has_no_dice(folder, folders, capsys):
    file = folders / folder / "case_1.nii.gz"
    file.write_bytes(file.read_bytes()[:-30])
    assert run(folders) == 1
    assert f"{file} is cut off or damaged" in capsys.readouterr().err
    assert not (folders / "prediction" / "evaluation.csv").exists()


def test_without_dataset_json_or_references_the_message_says_so(folders, capsys):
    (folders / "prediction" / "dataset.json").unlink()
    assert run(folders) == 1
    assert "Give one: -djfile FILE, or the values of the labels: -l 1 2" in capsys.readouterr().err
    assert run(folders, f"-djfile {folders}/none.json") == 1
    (folders / "dataset.json").write_text('{"labels": {"background": 0, "a": 1}, "file_ending": ".png"}')
    capsys.readouterr()
    assert run(folders) == 1
    assert "reference has no file *.png" in capsys.readouterr().err


def test_labels_take_the_place_of_a_dataset_json(folders, capsys):
    (folders / "prediction" / "dataset.json").unlink()
    assert run(folders, "-l 2 1") == 0
    summary = json.loads((folders / "prediction" / "evaluation.json").read_text(encoding="utf-8"))
    assert list(summary["labels"]) == ["2", "1"]
    two = case_metrics(*(
        sitk.GetArrayFromImage(sitk.ReadImage(str(folders / kind / "case_0.nii.gz"))) == 2
        for kind in ("prediction", "reference")
    ), SPACING[::-1])  # fmt: skip
    with open(folders / "prediction" / "evaluation.csv", encoding="utf-8", newline="") as f:
        assert float(next(csv.DictReader(f))["Dice"]) == two["Dice"]
    assert "reader" not in capsys.readouterr().out  # what nnU-Net says


@pytest.mark.parametrize(
    ("options", "harm", "message"),
    [
        ("-l 0 1", lambda f: None, "-l 0 is no label: 0 is the background"),
        ("-l 1", lambda f: (f / "reference" / "a.png").touch(), "files of several formats (.nii.gz, .png)"),
        ("-l 1", lambda f: [file.unlink() for file in (f / "reference").iterdir()], "has no file that nnU-Net reads"),
    ],
    ids=["background", "formats", "empty"],
)
def test_labels_that_fit_nothing_are_refused(options, harm, message, folders, capsys):
    harm(folders)
    assert run(folders, options) == 1
    assert message in capsys.readouterr().err
    assert not (folders / "prediction" / "evaluation.csv").exists()
