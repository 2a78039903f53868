import numpy as np
import pytest
from scipy.spatial.distance import cdist

from nnunet_ssl.evaluation import surface_distances


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


def test_they_agree_with_medpy():
    medpy = pytest.importorskip("medpy.metric.binary", reason="medpy is not installed")
    rng = np.random.default_rng(1)
    a, b = rng.random((2, 10, 12, 14)) > 0.8
    spacing = (2.0, 1.0, 0.5)
    expected = [getattr(medpy, name)(a, b, spacing) for name in ("hd95", "asd", "assd")]
    assert surface_distances(a, b, spacing) == pytest.approx(expected)


@pytest.mark.parametrize(("a", "b"), [(0, 1), (1, 0), (0, 0)])
def test_an_empty_mask_has_no_distance(a, b):
    assert np.isnan(surface_distances(np.full((3, 3), a, bool), np.full((3, 3), b, bool), (1, 1))).all()


def test_different_shapes_are_refused():
    with pytest.raises(ValueError, match="shape"):
        surface_distances(np.ones((2, 3), bool), np.ones((3, 2), bool), (1, 1))
