"""Values and sizes that no scan of a dataset has are doubted, those of unusual scans are not."""

import re

import numpy as np
import pytest
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_ssl.data.plausibility import Expected, Grid, resampled_size, size_doubt, smaller_than_patch, value_doubt

GRID = Grid("3d_fullres", (2.0, 1.0, 1.0), (50, 100, 80), (32, 64, 64))
EXPECTED = Expected(
    ("CT",), ".nii.gz", SimpleITKIO, ("ZScoreNormalization",), (900.0,), frozenset({0, 1, 2, 4}), (0, 1, 2), (GRID,)
)


def voxels(*values):
    return np.array(values, np.float32).reshape(1, 1, -1)


def expected(**changes):
    return Expected(**(vars(EXPECTED) | changes))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((7, 7, 7), "constant, every voxel is 7"),
        ((0, 1, 0, 1), r"looks like a label map, .* \(0, 1\)"),
        ((0, 4, 2, 0), r"looks like a label map, .* \(0, 2, 4\)"),
        ((0, 1, 1e30), r"values up to 1e\+30 are too large to be normalized"),
        ((0, 1, -1e30), r"values up to 1e\+30 are too large to be normalized"),
        ((0, 1e-9, 3e-9), "voxels differ by 3e-09 at most"),
    ],
)
def test_values_that_no_scan_has_are_doubted(values, words):
    assert re.match(words, value_doubt(voxels(*values), 0, EXPECTED))


@pytest.mark.parametrize(
    "values",
    [
        (0, 1, 2, 4, 5),  # a value that is no label
        (0, 1, 3),  # between two labels
        (0, 1, 0.5),
        (-1024, 0, 1, 2),
        (0, 65535),
        (0, 1e6, 3e7),  # activity of a tracer
        (-2147483648, 0, 800),  # outside of the field of view
        (0, 0.001, 0.003),
    ],
)
def test_values_of_unusual_scans_are_not_doubted(values):
    assert value_doubt(voxels(*values), 0, EXPECTED) is None


def test_the_limit_is_where_nnunets_normalization_ends():
    """The sum of the squares of n voxels of size v is n v^2; beyond float32 the standard deviation is infinite."""
    for factor, doubted in ((1.01, True), (0.99, False)):
        image = voxels(0, *[factor * np.sqrt(np.finfo(np.float32).max / 5)] * 4)
        assert (value_doubt(image, 0, EXPECTED) is not None) == doubted
    with np.errstate(over="ignore"):
        assert np.isinf(voxels(0, 1, 1e30).std())


def test_channels_that_are_not_normalized_end_with_half_precision():
    plain = expected(normalization=("ZScoreNormalization", "NoNormalization"))
    image = voxels(0, 7e4)
    assert value_doubt(image, 0, plain) is None
    assert "float16" in value_doubt(image, 1, plain)
    assert value_doubt(voxels(0, 6e4), 1, plain) is None


def test_a_channel_that_is_a_mask_in_the_labeled_scans_too_is_none_by_mistake():
    assert value_doubt(voxels(0, 1), 0, expected(maxima=(1.0,))) is None
    assert value_doubt(voxels(0, 1), 0, expected(labels=frozenset())) is None


def test_sizes_are_those_of_nnunets_resampling():
    assert resampled_size((10, 20, 30), (4.0, 2.0, 1.0), (0, 1, 2), GRID).tolist() == [20, 40, 30]
    assert resampled_size((10, 20, 30), (4.0, 2.0, 1.0), (2, 0, 1), GRID).tolist() == [15, 40, 40]
    plane = Grid("2d", (1.0, 0.5), (100, 80), (64, 64))
    assert resampled_size((10, 20, 30), (4.0, 2.0, 1.0), (0, 1, 2), plane).tolist() == [40, 60]


@pytest.mark.parametrize(
    ("spacing", "words"),
    [
        ((20.0, 1.0, 1.0), r"\[500, 100, 80\] voxels .* is \[50, 100, 80\]: 10 times as many along an axis"),
        ((0.2, 0.1, 0.1), r"\[5, 10, 8\] voxels .*: 10 times fewer along an axis"),
        ((2.0, 1.0, 0.001), "times fewer"),  # no voxel is left
        ((2.0, 10.0, 10.0), r"correct its spacing, now \[2.0, 10.0, 10.0\] mm"),
    ],
)
def test_a_spacing_that_is_ten_times_wrong_is_doubted_with_the_factor(spacing, words):
    assert re.search(words, size_doubt((50, 100, 80), spacing, EXPECTED))


@pytest.mark.parametrize("shape", [(50, 100, 80), (250, 100, 80), (12, 60, 60), (50, 300, 240)])
def test_the_size_of_a_longer_or_shorter_scan_is_not_doubted(shape):
    assert size_doubt(shape, (2.0, 1.0, 1.0), EXPECTED) is None


def test_plans_without_a_median_size_doubt_none():
    assert size_doubt((50, 100, 80), (200.0, 1.0, 1.0), expected(grids=(Grid("x", (2, 1, 1), (), (8, 8, 8)),))) is None


def test_only_a_scan_that_is_smaller_along_every_axis_is_smaller_than_the_patch():
    assert smaller_than_patch((31, 63, 63), (2.0, 1.0, 1.0), EXPECTED) == ["3d_fullres"]
    assert smaller_than_patch((31, 63, 64), (2.0, 1.0, 1.0), EXPECTED) == []
