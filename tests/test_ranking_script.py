"""The figures of benchmarks/ranking.py: what counts as an error, and how many bad scans were found."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import annotating
import ranking


def test_the_error_is_one_minus_the_mean_dice_of_the_classes_that_are_there():
    classes = {"a": [1], "b": [2], "both": [1, 2], "rare": [3]}
    prediction, reference = np.array([1, 1, 2, 0, 1]), np.array([1, 2, 2, 0, 9])  # 9: ignored
    assert ranking.error(prediction, reference, classes) == pytest.approx(1 - (2 / 3 + 2 / 3 + 1) / 3)
    assert ranking.error(np.array([0, 3]), np.array([0, 0]), classes) == 1
    assert np.isnan(ranking.error(np.array([0, 0]), np.array([0, 0]), classes))


def test_correlation_and_what_is_found():
    errors = np.array([0.1, 0.5, 0.3, 0.9])
    assert ranking.correlation(np.array([1, 3, 2, 4.0]), errors)[0] == pytest.approx(1)
    assert ranking.correlation(-errors, errors)[0] == pytest.approx(-1)
    assert ranking.correlation(np.array([np.nan, 3, 2, 4.0]), errors)[0] == pytest.approx(1)
    assert np.isnan(ranking.correlation(np.ones(4), errors)).all()
    assert ranking.found_among_first(np.array([1, 2, 3, 4.0]), errors, 2) == 1
    assert ranking.found_among_first(np.array([np.nan, 3, 2, 4.0]), errors, 2) == 2


def test_the_script_reads_a_ranking_and_draws(tmp_path, monkeypatch, capsys):
    output, labels = tmp_path / "out", tmp_path / "labels"
    (output / "labels").mkdir(parents=True)
    labels.mkdir()
    settings = {"dataset": "D", "configuration": "c", "plans": "p", "folds": [0], "networks": {}, "classes": {"a": [1]}}
    (output / "settings.json").write_text(json.dumps({**settings, "file_ending": ".nii.gz"}))
    with (output / "rank.csv").open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["case", "score", "disagreement", "volume_ml_a", "missing"])
        for i in range(6):
            writer.writerow([f"scan_{i}", 1 - i / 10, "", 10 - i, ""])
            for folder, voxels in ((output / "labels", 8), (labels, 2 + i)):  # the first scan is the worst
                image = np.zeros((1, 1, 10), np.uint8)
                image[..., :voxels] = 1
                sitk.WriteImage(sitk.GetImageFromArray(image), str(folder / f"scan_{i}.nii.gz"))
    (labels / "scan_5.nii.gz").unlink()  # never labeled
    arguments = ["ranking.py", str(output), str(labels), "-o", str(tmp_path / "picture.png"), "--worst", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    ranking.main()
    printed = capsys.readouterr().out
    assert "| score | 1.00 (1.00 to 1.00) | 2 |" in printed
    assert "| small volume | -1.00 (-1.00 to -1.00) | 0 |" in printed
    assert "| chance | 0 | 0.8 |" in printed
    assert "5 scans, mean Dice 64.8 %, worst 40.0 %" in printed
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_annotating_takes_the_first_scans_and_three_draws_from_all(tmp_path):
    cases = [f"scan_{n:02d}" for n in range(20)][::-1]
    (tmp_path / "rank.csv").write_text("\n".join(["case,score", *(f"{case},0.5" for case in cases)]))
    ranked, *drawn = annotating.choices(tmp_path / "rank.csv").values()
    assert ranked == cases[:5]
    assert len(drawn) == 3
    assert all(len({*draw}) == 5 and {*draw} <= {*cases} for draw in drawn)
    assert len({*map(tuple, [ranked, *drawn])}) == 4
