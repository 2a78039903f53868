"""The numbers of a ranking: each against a closed form or a plain second implementation."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from nnunet_ssl.commands.ranking import (
    choose,
    disagreement,
    entropy,
    measure,
    ranks,
    robust_z,
    scores,
    standardized,
    volume_z,
)

TWO = {"a": (1,), "b": (2,)}
NESTED = {"whole": (1, 2), "core": (2,)}


def test_disagreement_is_one_minus_the_mean_dice_of_all_pairs():
    one, two, none = (np.array(row, dtype=bool) for row in ([1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]))
    assert disagreement([one, two]) == pytest.approx(1 / 3)
    assert disagreement([one, two, none]) == pytest.approx(1 - (2 / 3 + 0 + 0) / 3)  # not of consecutive ones only
    assert disagreement([one, one]) == disagreement([none, none]) == 0
    assert disagreement([one]) is None


def test_entropy_is_in_bits_over_the_voxels_that_may_be_of_the_class():
    quarter = -(0.25 * np.log2(0.25) + 0.75 * np.log2(0.75))
    assert entropy(torch.tensor([[0.5, 0.25], [0.01, 0.0499]])) == pytest.approx((1 + quarter) / 2)
    assert entropy(torch.tensor([1.0, 1.0, 0.0])) == 0
    assert entropy(torch.tensor([0.04, 0.0])) is None
    # a larger background changes nothing
    assert entropy(torch.tensor([0.5, *[0.001] * 1000])) == 1


def test_a_row_of_classes():
    first = np.zeros((2, 3, 4), dtype=np.uint8)
    first[0, 0, 0] = first[0, 1, 1] = 1  # touch by a corner: one piece
    first[1, 2, 3] = 2  # touches nothing
    second = first.copy()
    second[1, 2, 3] = 1
    probabilities = torch.zeros(2, 2, 3, 4)
    probabilities[0, 0, 0, 0] = 0.5
    row = measure(first, [first, second], probabilities, TWO, (2.0, 5.0, 10.0))
    assert row["volume_ml_a"] == pytest.approx(0.2)
    assert row["volume_ml_b"] == pytest.approx(0.1)
    assert row["components"] == 2
    assert row["missing"] == []
    assert row["disagreement"] == 0  # of the foreground as a whole
    assert row["disagreement_a"] == pytest.approx(1 - 4 / 5)
    assert row["disagreement_b"] == 1
    assert (row["entropy_a"], row["entropy_b"]) == (1, None)


def test_a_row_of_regions_of_a_flat_image_by_one_network():
    labels = np.array([[[0, 1, 1, 0]]], dtype=np.uint8)
    row = measure(labels, [labels], torch.full((2, 1, 1, 4), 0.5), NESTED, (999.0, 2.0, 5.0))
    assert row["volume_ml_whole"] == pytest.approx(0.02)  # 1 mm thick
    assert row["volume_ml_core"] == 0
    assert row["missing"] == ["core"]
    assert row["disagreement"] is row["disagreement_whole"] is None


def test_ranks_go_from_0_to_1_and_equal_ones_share_theirs():
    np.testing.assert_allclose(ranks([30, 10, 20, 10, np.nan]), [1, 1 / 6, 2 / 3, 1 / 6, 0.5])
    np.testing.assert_allclose(ranks([7]), [0.5])
    np.testing.assert_allclose(ranks([7, 7]), [0.5, 0.5])


def test_robust_z_is_not_moved_by_an_outlier_and_equal_values_are_not_unusual():
    z = robust_z([0, 1, 2, 3, 1000, np.nan])
    np.testing.assert_allclose(z[:5], (np.array([0, 1, 2, 3, 1000]) - 2) / 1.4826)
    assert np.isnan(z[5])
    np.testing.assert_allclose(robust_z([2, 2, 2, 2.01]), [0, 0, 0, 0.2])
    assert np.isnan(robust_z([np.nan])).all()


def test_volume_z_is_the_largest_of_the_classes_and_has_no_unit():
    volumes = {"a": [1, 2, 4, 8, 4], "b": [3, 3, 3, 3, 0]}
    logarithms = np.log([1, 2, 4, 8, 4])
    deviation = np.abs(logarithms - np.log(4))
    expected = deviation / (1.4826 * np.median(deviation))
    np.testing.assert_allclose(volume_z(volumes), expected)
    np.testing.assert_allclose(
        volume_z({name: [1000 * v for v in values] for name, values in volumes.items()}), expected
    )
    volumes["b"] = [3, 3, 300, 3, 0]
    assert volume_z(volumes)[2] == pytest.approx(np.log(100) / 0.05)
    np.testing.assert_allclose(volume_z({"a": [0, 0]}), [0, 0])


def plain_scores(disagreements, entropies, volumes, components):
    """The equation of the docstring, scan by scan."""

    def rank(values, i):
        known = [v for v in values if not np.isnan(v)]
        if np.isnan(values[i]) or len(known) == 1:
            return 0.5
        return (sum(v < values[i] for v in known) + (sum(v == values[i] for v in known) - 1) / 2) / (len(known) - 1)

    number = len(components)
    mean_entropy = [np.nanmean([e[i] for e in entropies.values()]) for i in range(number)]
    pieces = [abs(np.log(c) - np.median(np.log(components))) for c in components]
    z, result = volume_z(volumes), []
    for i in range(number):
        doubt = (rank(mean_entropy, i) + rank(disagreements, i)) / 2
        usual = [v for v in volumes.values() if np.mean(np.array(v) > 0) >= 0.5]
        absence = sum(v[i] == 0 for v in usual) / len(usual)
        result.append((2 * doubt + (rank(z, i) + rank(pieces, i)) / 2) / 3 + absence)
    return result


def random_columns(number=30, seed=0):
    rng = np.random.default_rng(seed)
    volumes = {name: rng.lognormal(size=number) for name in ("a", "b", "rare")}
    volumes["a"][3] = 0
    volumes["rare"][: number - 4] = 0
    entropies = {name: rng.uniform(size=number) for name in volumes}
    entropies["rare"][: number - 4] = np.nan
    return rng.uniform(size=number), entropies, volumes, rng.integers(1, 6, size=number)


def test_the_score_is_the_equation_of_its_docstring():
    columns = random_columns()
    np.testing.assert_allclose(scores(*columns), plain_scores(*columns))


def test_more_doubt_an_unusual_volume_and_a_missing_class_are_worse():
    disagreements, entropies, volumes, components = random_columns()
    before = scores(disagreements, entropies, volumes, components)

    def after(disagreements=disagreements, entropies=entropies, volumes=volumes):
        return scores(disagreements, entropies, volumes, components)[7]

    assert after(disagreements=np.where(np.arange(30) == 7, 2.0, disagreements)) > before[7]
    assert after(entropies={**entropies, "a": np.where(np.arange(30) == 7, 2.0, entropies["a"])}) > before[7]
    assert after(volumes={**volumes, "a": np.where(np.arange(30) == 7, 1e9, volumes["a"])}) > before[7]
    # one of the two classes that most scans have
    assert after(volumes={**volumes, "b": np.where(np.arange(30) == 7, 0, volumes["b"])}) - before[7] > 0.5 - 0.34


def test_networks_that_are_all_equally_wrong_do_not_hide_a_scan_without_any_foreground():
    disagreements, entropies, volumes, components = random_columns()
    for values in volumes.values():
        values[5] = 0
    for values in entropies.values():
        values[5] = np.nan
    disagreements[5] = components[5] = 0  # empty masks agree
    assert scores(disagreements, entropies, volumes, components).argmax() == 5


def test_with_one_network_the_entropy_counts_and_where_nothing_is_known_all_are_alike():
    _, entropies, volumes, components = random_columns()
    alone = scores([np.nan] * 30, entropies, volumes, components)
    assert spearmanr(alone, [np.nanmean([e[i] for e in entropies.values()]) for i in range(30)])[0] > 0.6
    np.testing.assert_allclose(scores([np.nan], {"a": [np.nan]}, {"a": [0.0]}, [0]), [0.5])


def test_distances_of_usual_scans_are_one():
    points = standardized(np.random.default_rng(0).normal(3, [1, 100, 0], size=(40, 3)))
    assert points.shape == (40, 2)  # one dimension is constant
    squares = [np.sum((a - b) ** 2) for i, a in enumerate(points) for b in points[:i]]
    assert np.mean(squares) == pytest.approx(40 / 39)


def test_near_duplicates_are_not_chosen_together():
    features = np.random.default_rng(0).normal(size=(10, 8))
    features[1] = features[0] + 1e-6
    score = np.linspace(1, 0.5, 10)
    chosen, distances = choose(score, features, 4)
    assert chosen[0] == 0
    assert 1 not in chosen
    assert len(set(chosen)) == 4
    points = standardized(features)
    assert distances[0] == np.inf
    for i in range(1, 4):
        nearest = min(np.linalg.norm(points[chosen[i]] - points[other]) for other in chosen[:i])
        assert distances[i] == pytest.approx(nearest)


def test_a_clearly_worse_scan_is_chosen_though_others_are_farther():
    features = np.array([[0.0], [10.0], [20.0], [21.0]])  # 0 and 20 are farther apart than usual scans, 0 and 10 nearer
    assert choose([1.0, 0.8, 0.6, 0.1], features, 3)[0] == [0, 1, 2]
    assert choose([1.0, 0.9, 0.8, 0.7], None, 3) == ([0, 1, 2], [np.inf] * 3)
    assert choose([1.0, 0.5], np.zeros((2, 4)), 2)[0] == [0, 1]  # where all are alike, the worst
