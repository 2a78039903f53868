"""How wrong the predictions of scans are likely to be, from the predictions alone. Pure functions of numbers.

The score has no weight that was fitted: it is the mean of how doubtful and how unusual a scan is among all scans.
Networks that disagree on a scan are wrong there more often (deep ensembles, Lakshminarayanan et al. 2017); that the
pairwise Dice of samples predicts the Dice of their mean was seen before (Roy et al. 2019, Bayesian QuickNAT).
"""

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations

import numpy as np
import torch
from scipy import ndimage
from scipy.stats import rankdata
from torch import Tensor

POSSIBLE = 0.05  # least probability of a class in voxels that count for its entropy
LEAST_SPREAD = 0.05  # of log volumes: scans whose volumes differ by less than 5 % are not unusual
EXPECTED = 0.5  # part of the scans that must have a class for its absence to count


# ---- one scan ----


def disagreement(masks: Sequence[np.ndarray]) -> float | None:
    """1 - mean pairwise Dice of masks, in [0, 1]: two empty ones agree; None for one mask.

    Args:
        masks: of every network, bool, of one shape.
    """
    if len(masks) < 2:
        return None
    pairs = [(np.count_nonzero(a & b), np.count_nonzero(a) + np.count_nonzero(b)) for a, b in combinations(masks, 2)]
    return 1 - float(np.mean([2 * both / total if total else 1.0 for both, total in pairs]))


def entropy(probability: Tensor) -> float | None:
    """Mean binary entropy in bits, in [0, 1], of a class's probability over the voxels where it is at least POSSIBLE.

    None where no voxel is. So the size of the background does not count, and a structure that was suspected and not
    predicted does.

    Args:
        probability: of one class or region, any shape.
    """
    p = probability[probability >= POSSIBLE].double()
    if p.numel() == 0:
        return None
    return float(-(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean() / np.log(2))


def measure(
    labels: np.ndarray,
    each: Sequence[np.ndarray],
    probabilities: Tensor,
    classes: Mapping[str, tuple[int, ...]],
    spacing: Sequence[float],
) -> dict:
    """A row of rank.csv but for what needs all scans.

    Args:
        labels: label map of the mean prediction, (*spatial).
        each: the label map of every network.
        probabilities: mean of the networks', (classes, *spatial), in the order of `classes`, in any grid.
        classes: foreground classes or regions, name to label values.
        spacing: of the label maps, mm along every axis; that of a 2D image's single slice counts as 1 mm.
    """
    thickness = 1.0 if labels.shape[0] == 1 else spacing[0]
    millilitres = thickness * float(np.prod(spacing[1:])) / 1000
    foreground = sorted({value for values in classes.values() for value in values})
    volumes = {name: float(np.isin(labels, values).sum()) * millilitres for name, values in classes.items()}
    pieces = ndimage.label(np.isin(labels, foreground), np.ones([3] * labels.ndim))[1]

    def differ(values: Collection[int]) -> float | None:
        return disagreement([np.isin(own, values) for own in each])

    return {
        "disagreement": differ(foreground),
        **{f"disagreement_{name}": differ(values) for name, values in classes.items()},
        **{f"entropy_{name}": entropy(p) for name, p in zip(classes, probabilities, strict=True)},
        **{f"volume_ml_{name}": volume for name, volume in volumes.items()},
        "components": pieces,
        "missing": [name for name, volume in volumes.items() if volume == 0],
    }


# ---- all scans ----


def ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks in [0, 1] of numbers, 1 for the largest; equal ones share theirs, NaN and a single one have 0.5."""
    values = np.asarray(values, dtype=float)
    known, result = ~np.isnan(values), np.full(len(values), 0.5)
    if known.sum() > 1:
        result[known] = (rankdata(values[known]) - 1) / (known.sum() - 1)
    return result


def robust_z(values: Sequence[float]) -> np.ndarray:
    """(value - median) / (1.4826 * median absolute deviation), which is normal's z; NaN stays NaN.

    The deviation counts as LEAST_SPREAD at least, so that scans that are all alike are not unusual.
    """
    values = np.asarray(values, dtype=float)
    known = values[~np.isnan(values)]
    if len(known) == 0:
        return values
    center = np.median(known)
    return (values - center) / max(1.4826 * float(np.median(np.abs(known - center))), LEAST_SPREAD)


def volume_z(volumes: Mapping[str, Sequence[float]]) -> np.ndarray:
    """Per scan the largest absolute robust z over the classes of the logarithm of the volume; 0 without any class.

    Args:
        volumes: class to the volumes of all scans; those that are 0 have no z.
    """
    logarithms = [np.log(np.where(np.asarray(v) > 0, v, np.nan)) for v in volumes.values()]
    return np.max([np.nan_to_num(np.abs(robust_z(values))) for values in logarithms], axis=0)


def scores(
    disagreements: Sequence[float],
    entropies: Mapping[str, Sequence[float]],
    volumes: Mapping[str, Sequence[float]],
    components: Sequence[float],
) -> np.ndarray:
    """Expected error of every scan's prediction among all scans, in [0, 2]: higher is worse.

    score = (2 * doubt + strangeness) / 3 + absence, where doubt is the mean rank of disagreement and entropy (entropy
    alone for one network), strangeness the mean rank of `volume_z` and of the number of components, compared with the
    median as a ratio, and absence the part of the classes that most scans have and this one has not. Ranks are in
    [0, 1] over the scans. Doubt counts twice because a rare anatomy is unusual too; that was not fitted.

    Args:
        disagreements: of the foreground; NaN where there is one network.
        entropies: per class that of every scan; NaN where none is defined. A scan's is the mean over its classes.
        volumes: per class, ml.
        components: number of connected pieces of the foreground.
    """
    by_class = np.array([*entropies.values()], dtype=float)
    known = ~np.isnan(by_class)
    mean_entropy = np.where(known.any(0), np.where(known, by_class, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)
    evidence = [ranks(mean_entropy)]
    if not np.isnan(np.asarray(disagreements, dtype=float)).all():
        evidence.append(ranks(disagreements))
    pieces = np.log(np.maximum(np.asarray(components, dtype=float), 0.5))  # none is as far from 1 as 2 are
    strangeness = np.mean([ranks(volume_z(volumes)), ranks(np.abs(pieces - np.median(pieces)))], axis=0)
    present = np.array([*volumes.values()], dtype=float) > 0
    expected = present.mean(1) >= EXPECTED
    absence = (~present[expected]).mean(0) if expected.any() else np.zeros(present.shape[1])
    return (2 * np.mean(evidence, axis=0) + strangeness) / 3 + absence


def standardized(features: np.ndarray) -> np.ndarray:
    """Features (scans, dimensions) with mean 0 and standard deviation 1 in every dimension; constant ones are left out.

    They are divided by sqrt(2 * dimensions), so that the root mean square distance of two different scans is
    sqrt(n / (n - 1)), about 1.
    """
    features = np.asarray(features, dtype=np.float64)
    deviation = features.std(0)
    varying = deviation > 1e-6 * np.maximum(np.abs(features).max(0, initial=0), 1e-12)
    scaled = (features[:, varying] - features[:, varying].mean(0)) / deviation[varying]
    return scaled / np.sqrt(2 * max(1, scaled.shape[1]))


def choose(score: Sequence[float], features: np.ndarray | None, number: int) -> tuple[list[int], list[float]]:
    """Scans to annotate next: the worst one, then always that with the largest score * min(1, distance).

    The distance is that of the `standardized` features to the nearest scan that was chosen before: scans as far apart
    as two usual ones count in full, a near duplicate not at all. Of equal ones the first counts.

    Args:
        score: of every scan, not negative.
        features: (scans, dimensions); None: by score alone.
        number: of scans to choose, at most as many as there are.

    Returns:
        Their indices, and the distance of each to the nearest one before it; infinite for the first.
    """
    score = np.asarray(score, dtype=float)
    points = None if features is None else standardized(features)
    distance, chosen, distances = np.full(len(score), np.inf), [], []
    for _ in range(number):
        value = score * np.minimum(1, distance)
        value[chosen] = -1
        best = int(value.argmax())
        chosen.append(best)
        distances.append(float(distance[best]))
        if points is not None:
            distance = np.minimum(distance, np.linalg.norm(points - points[best], axis=1))
    return chosen, distances
