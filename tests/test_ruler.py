"""The figures of benchmarks/ruler.py, from which the README's table is made."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import methods
import pseudo_labels
import ruler
import tasks


def rows(name, dice):
    """A table's rows from Dice by seed and case."""
    values = ((s, case, f"{d}") for s, cases in dice.items() for case, d in cases.items())
    return [[name, str(s), "10", "20", "10", case, d, "1.0", "1.0", "90.0"] for s, case, d in values]


def write(file, means):
    """A task's table: five cases around the mean of each row, of seed 0."""
    cases = {name: {f"case{n}": mean + n - 2 for n in range(5)} for name, mean in means.items()}
    with file.open("w", newline="") as f:
        csv.writer(f).writerows([["header"], *(row for name in cases for row in rows(name, {0: cases[name]}))])


def test_the_part_of_the_gap_and_its_interval():
    generator = np.random.default_rng(0)
    supervised = generator.uniform(50, 70, (3, 12))
    reference = np.full((2, 12), 90.0)
    half = supervised + (90 - supervised) / 2
    assert ruler.gap_closed(half, supervised, reference) == pytest.approx((0.5, 0.5, 0.5))
    noisy = half + generator.normal(0, 5, half.shape)
    part, low, high = ruler.gap_closed(noisy, supervised, reference)
    assert part == pytest.approx((noisy.mean() - supervised.mean()) / (90 - supervised.mean()))
    assert low < part < high
    single = ruler.gap_closed(noisy[:1], supervised[:1], reference[:1])  # the patients alone are drawn
    assert single[1] < single[0] < single[2]


def test_methods_are_compared_on_the_seeds_that_both_have_and_by_patients():
    cases = [f"patient{n:03d}_frame0{f}" for n in range(6) for f in (1, 2)]
    ours = {seed: {c: 80 + i for i, c in enumerate(cases)} for seed in (0, 1, 3)}
    theirs = {seed: {c: 78 + i + 50 * (seed == 2) for i, c in enumerate(cases)} for seed in (1, 2, 3)}
    method, other = (ruler.Scores(rows("x", dice)) for dice in (ours, theirs))
    assert method.metrics.shape == (3, 6, 4)
    difference, better, p = ruler.against(method, other)
    assert (difference, better) == (pytest.approx(2), 6)
    assert p == pytest.approx(2 / 2**6)  # six patients, all of one sign
    single = ruler.Scores(rows("x", {1: theirs[1]}))
    assert np.isnan(ruler.against(method, single)[2])


def test_longer_trainings_are_compared_with_supervised_training_of_that_length(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.RESULTS", tmp_path)
    for task, dice in (("ACDC-3", (60, 80, 70, 81, 75)), ("ACDC-60", (90, None, 100, None, None))):
        names = ("supervised", "x", "supervised, num_epochs=40", "x, mask_cells=2, num_epochs=40", "y, num_epochs=70")
        write(tmp_path / f"{task}.csv", {n: mean for n, mean in zip(names, dice, strict=True) if mean})
    assert list(ruler.by_length("ACDC-3", "test")) == ["", "num_epochs=40"]
    short, long = (ruler.table("ACDC-3", "test", length) for length in ("", "num_epochs=40"))
    (row,) = (line for line in short.splitlines() if line.startswith("| x "))
    assert "67 %" in row
    (row,) = (line for line in long.splitlines() if line.startswith("| x, mask_cells=2 |"))
    assert "37 %" in row
    assert "num_epochs=40 |" not in short + long
    (row,) = (line for line in short.splitlines() if line.startswith("| y, num_epochs=70 "))
    assert "%" not in row  # no supervised training is as long


def test_one_training_is_compared_with_two_that_have_as_many_epochs(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.RESULTS", tmp_path)
    names = ("supervised", "x, num_epochs=20, alone", "x, alone", "x, num_epochs=20")
    longer = ("supervised, num_epochs=40", "x, num_epochs=50, alone", "x, num_epochs=50, alone, ensemble of seeds 0 1")
    means = dict(zip(names + longer, (60, 80, 70, 75, 65, 85, 85), strict=True))
    write(tmp_path / "ACDC-3.csv", means)
    write(tmp_path / "ACDC-60.csv", {"supervised": 90, "supervised, num_epochs=40": 95})
    lengths = ruler.by_length("ACDC-3", "test")  # a phase has 10 epochs, the longer second one 40
    assert [*lengths[""]] == ["supervised", "x, one training", "x, alone", "x, num_epochs=20"]
    assert [*lengths["num_epochs=40"]] == ["supervised", "x, one training", "x, one training, ensemble of seeds 0 1"]
    for length, part in (("", "67 %"), ("num_epochs=40", "67 %")):
        table = ruler.table("ACDC-3", "test", length).splitlines()
        (row,) = (line for line in table if line.startswith("| x, one training |"))
        assert part in row


def test_an_ensemble_is_compared_with_an_ensemble(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.RESULTS", tmp_path)
    ensemble = ", num_epochs=40, ensemble of seeds 0 1"
    dice = {"supervised, num_epochs=40": 60, "x, num_epochs=40": 80, f"supervised{ensemble}": 70, f"x{ensemble}": 80}
    dice["self-training, num_epochs=40"] = 65
    for task, means in (("ACDC-3", dice), ("ACDC-60", {"supervised, num_epochs=40": 100})):
        write(tmp_path / f"{task}.csv", means)
    lengths = ruler.by_length("ACDC-3", "test")
    assert list(lengths) == ["", "num_epochs=40"]
    table = ruler.table("ACDC-3", "test", "num_epochs=40").splitlines()
    single, joint = (next(line for line in table if line.startswith(f"| x{end}")) for end in (" |", ", ensemble"))
    assert "50 %" in single
    assert " %" not in joint  # all labels have no ensemble
    assert np.isnan(ruler.pooled({"ACDC-3": lengths["num_epochs=40"]}, "x, ensemble of seeds 0 1")[0])


def test_cost_is_in_first_phases_of_the_same_day():
    fast = ["x", "0", "10", "25", "10", "case", "80", "1", "1", "80"]
    slow = ["x", "1", "20", "50", "20", "case", "80", "1", "1", "80"]
    alone = ["x", "0", "0", "46", "20", "case", "80", "1", "1", "80"]
    assert ruler.Scores([fast, slow]).cost == pytest.approx(3.5)
    assert ruler.Scores([alone]).cost == pytest.approx(2.3)


def test_a_patient_of_several_tasks_counts_once():
    def scores(name, added):
        return ruler.Scores(rows(name, {0: {f"case{n}": 80 + n + added(n) for n in range(7)}}))

    tasks = {}
    for task, gain in (("LA-4", 4.0), ("LA-8", -1.0), ("ACDC-3", 2.0)):
        # one patient of the left atrium loses more in the second task than it wins in the first
        method = scores("x", lambda n, gain=gain: gain - 9 * (n == 6 and gain < 0))
        tasks[task] = {"x": method, "self-training": scores("self-training", lambda n: 0)}
    difference, patients, p = ruler.pooled(tasks, "x")
    assert difference == pytest.approx((6 * 1.5 - 3 + 7 * 2) / 14)
    assert patients == 14
    assert p == pytest.approx(ruler.stats.wilcoxon([1.5] * 6 + [-3.0] + [2.0] * 7).pvalue)
    assert ruler.pooled({"LA-4": {"x": method}}, "x")[1] == 0


def test_a_class_that_is_not_found_counts_as_zero(tmp_path):
    reference, prediction = np.zeros((2, 1, 4, 4), np.uint8)
    reference[0, 0], reference[0, 1] = 1, 2
    prediction[0, 0] = 1
    for name, mask in (("reference", reference), ("prediction", prediction)):
        sitk.WriteImage(sitk.GetImageFromArray(mask), str(tmp_path / f"{name}.nii.gz"))
    files = tmp_path / "prediction.nii.gz", tmp_path / "reference.nii.gz"
    assert methods.case_means(*files, [1, 2, 3], "voxels") == [50, 0, 0, 50]  # class 3 is in neither


def test_the_largest_component_is_that_of_all_classes_together(tmp_path):
    reference = np.zeros((2, 6, 8), np.uint8)
    reference[:, :2], reference[:, 2] = 1, 2
    prediction = reference.copy()
    prediction[:, 4:, :6] = 2  # by itself larger than each of the two classes, but not than both
    for name, mask in (("reference", reference), ("prediction", prediction)):
        sitk.WriteImage(sitk.GetImageFromArray(mask), str(tmp_path / f"{name}.nii.gz"))
    files = tmp_path / "prediction.nii.gz", tmp_path / "reference.nii.gz"
    dice, _, _, largest = methods.case_means(*files, [1, 2], "mm")
    assert largest == 100 > dice


def test_labels_of_other_models_are_not_taken_for_those_of_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "nnUNet_results", str(tmp_path))
    monkeypatch.setattr(methods, "nnUNet_raw", str(tmp_path / "raw"))
    first = methods.Run("LA-4", "self-training", 0, labelers=(0, 1, 2))
    folder = tmp_path / "LA-4/labels_523"
    folder.mkdir(parents=True)
    (folder / methods.LABELING_SECONDS).write_text('{"labeling": 3.0}')  # done
    assert methods.label_scans(first, "Dataset501_LA") == ("Dataset523_LAPseudoLabels", 3)
    other = methods.Run("LA-4", "self-training", 0, labelers=(0, 1))
    assert first.row != other.row
    with pytest.raises(RuntimeError, match=r"Dataset523_LAPseudoLabels has other labels"):
        methods.label_scans(other, "Dataset501_LA")


def test_which_scans_a_model_is_measured_on(tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "nnUNet_raw", str(tmp_path / "raw"))
    monkeypatch.setattr(methods, "nnUNet_preprocessed", str(tmp_path))
    hidden = methods.TASKS["LA-4"].hidden
    few = {"train": ["a"], "val": ["b"], "unlabeled": [f"u{number:02}" for number in range(hidden + 1)]}
    other = {"train": ["c"], "val": ["d"], "unlabeled": ["e"]}
    folds = [other, few, other, {"train": ["a", "b"], "val": ["b"]}]
    for folder in ("Dataset501_LA", "raw/Dataset501_LA/labelsTs"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "Dataset501_LA/splits_final.json").write_text(json.dumps(folds))
    (tmp_path / "raw/Dataset501_LA/labelsTs/t.nii.gz").touch()

    def measured(on, task="LA-4"):
        found = methods.scans(methods.Run(task, "supervised", 0), "Dataset501_LA", on)
        assert all(image.name == label.name.replace(".nii", "_0000.nii") for image, label in found.items())
        return [label.name.split(".")[0] for label in found.values()]

    assert measured("test") == ["t"]
    assert measured("development") == ["b", *few["unlabeled"][:-1]]
    assert measured("unlabeled") == few["unlabeled"]
    for on in ("unlabeled", "development"):
        with pytest.raises(SystemExit, match=f"LA-60 has no {on} scans"):
            measured(on, "LA-60")
    folds[3] = {"train": ["a"], "val": ["b"]}
    (tmp_path / "Dataset501_LA/splits_final.json").write_text(json.dumps(folds))
    assert measured("development", "LA-60") == ["b"]
    with pytest.raises(SystemExit, match="LA-60 has no unlabeled scans"):
        measured("unlabeled", "LA-60")


def test_labels_before_and_after_are_of_the_same_unlabeled_scans(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pseudo_labels, "PICTURE", tmp_path / "picture.png")
    monkeypatch.setattr(pseudo_labels, "HARD", 1)
    monkeypatch.setattr(tasks, "RESULTS", tmp_path)

    def measure(task, before, after):
        found = rows(pseudo_labels.BEFORE, {0: before, 1: {"a": 1}})  # another seed
        found += rows(pseudo_labels.AFTER[task], {0: after, 1: {"a": 1}})
        with (tmp_path / f"{task}_unlabeled.csv").open("w", newline="") as f:
            csv.writer(f).writerows([["header"], *found])

    measure("LA-4", {"a": 50, "b": 80, "c": 90}, {"a": 70, "b": 70, "c": 95})
    measure("ACDC-3", {"a": 50, "b": 80}, {"a": 70, "c": 70})
    with pytest.raises(SystemExit, match=r"ACDC-3: the unlabeled scans of .* are not measured"):
        pseudo_labels.main()
    assert not pseudo_labels.PICTURE.exists()
    measure("ACDC-3", {"a": 50, "b": 80}, {"b": 70, "a": 40})
    capsys.readouterr()
    pseudo_labels.main()
    first, second = capsys.readouterr().out.splitlines()
    assert first == "LA-4: 3 scans, Dice 73.3 before, 78.3 after, better on 2; the 1 worst before 50.0, after 70.0"
    assert second.startswith("ACDC-3: 2 scans, Dice 65.0 before, 55.0 after, better on 0")
    assert pseudo_labels.PICTURE.stat().st_size > 10_000
    points = pseudo_labels.plt.gcf().axes[0].collections[0].get_offsets()
    assert np.array_equal(points, [[50, 70], [80, 70], [90, 95]])
