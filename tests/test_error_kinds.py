"""benchmarks/error_kinds.py: every wrong voxel is of one kind."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import error_kinds as benchmark
from error_kinds import KINDS, error_kinds

REFERENCE = np.zeros((4, 16, 16), int)
REFERENCE[1:3, 2:10, 2:10] = 1  # 128 voxels


@pytest.mark.parametrize(
    ("kind", "place", "to"),
    [
        ("edge", (1, 2, 5), 0),
        ("edge", (2, 10, 10), 1),
        ("missing", (1, 5, 5), 0),
        ("too much", (1, slice(2, 10), slice(10, 12)), 1),
        ("elsewhere", (1, 14, 14), 1),
        ("class", (1, 5, 5), 2),
    ],
)
def test_a_wrong_voxel_is_of_one_kind(kind, place, to):
    prediction = REFERENCE.copy()
    prediction[place] = to
    found = error_kinds(prediction, REFERENCE, flat=True)
    of_kind, at_edge = (8, 8) if kind == "too much" else (1, 0)  # the first column beside the heart is its edge
    assert found.pop(kind) == pytest.approx(100 * of_kind / 128)
    assert sum(found.values()) == pytest.approx(100 * at_edge / 128)


def test_all_kinds_together_are_all_wrong_voxels():
    anything, beside = np.random.default_rng(0).integers(0, 3, REFERENCE.shape), np.zeros_like(REFERENCE)
    beside[1, 10, 5] = 1  # at the edge, and a piece of its own
    for prediction, flat in ((anything, True), (anything, False), (beside, True)):
        found = error_kinds(prediction, REFERENCE, flat)
        assert list(found) == list(KINDS)
        assert sum(found.values()) == pytest.approx(100 * (prediction != REFERENCE).sum() / 128)


def test_where_the_image_ends_there_is_no_edge():
    reference = np.ones((2, 4, 4), int)
    prediction = reference.copy()
    prediction[0, 0, 0] = 0
    assert error_kinds(prediction, reference, flat=False)["missing"] == pytest.approx(100 / 32)


def test_an_edge_in_3d_is_at_the_neighbouring_slice_too():
    prediction = REFERENCE.copy()
    prediction[1, 5, 5], prediction[3, 5, 5] = 0, 1  # the lowest slice, and above the highest
    assert error_kinds(prediction, REFERENCE, flat=False)["edge"] == pytest.approx(200 / 128)
    assert error_kinds(prediction, REFERENCE, flat=True)["edge"] == 0


def test_a_row_without_predictions_is_taken_from_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "nnUNet_results", str(tmp_path))
    monkeypatch.setattr(benchmark, "TABLE", tmp_path / "error_kinds.md")
    assert benchmark.read_table() == {}
    row = "| LA-4, supervised | 2 | 1.0 | 2.0 | 3.0 | 4.0 | 5.0 | 15.1 |"
    benchmark.TABLE.write_text(f"| task, row | seeds | {' | '.join(KINDS)} | all |\n|---|\n{row}\n")
    before = benchmark.read_table()
    assert benchmark.of_row("LA-4, supervised", before) == [2, 1, 2, 3, 4, 5, 15.1]
    with pytest.raises(SystemExit, match="'LA-8, supervised'"):
        benchmark.of_row("LA-8, supervised", before)
