"""Numbers that change over the training, as functions of the step."""

import math
from bisect import bisect
from functools import cache
from random import Random


def sigmoid_rampup(step: float, length: float) -> float:
    """exp(-5 (1 - step / length)^2), clipped to [e^-5, 1]; 1 for length 0 (Laine & Aila 2017, arXiv:1610.02242)."""
    if length <= 0:
        return 1.0
    progress = min(max(step / length, 0.0), 1.0)
    return math.exp(-5.0 * (1.0 - progress) ** 2)


def warmup_decay(step: int, decay: float) -> float:
    """EMA decay min(1 - 1 / (step + 1), decay): at step 0 the teacher becomes a copy of the student.

    Source: Tarvainen & Valpola 2017 (arXiv:1703.01780), released code. `step` counts optimizer steps before this one.
    """
    return min(1.0 - 1.0 / (step + 1.0), decay)


def turn(step: int, longest: int) -> int:
    """Which of two, 0 or 1, has its turn at a step: turns of random length from 1 to `longest` steps (AD-MT).

    The lengths are drawn by the step alone: a training that is continued, and every rank, draws the same.
    """
    return bisect(_ends(longest, 1 << step.bit_length()), step) % 2


@cache
def _ends(longest: int, steps: int) -> list[int]:
    """The first steps after each turn, the last one beyond `steps`."""
    random, ends = Random(0), [0]
    while ends[-1] <= steps:
        ends.append(ends[-1] + random.randint(1, longest))
    return ends[1:]


def whole_epochs(part: float, epochs: int) -> int:
    """How many whole epochs a part of the training has, rounded down.

    Raises:
        ValueError: the part is not at least 0 and below 1.
    """
    if not 0 <= part < 1:
        raise ValueError(f"supervised_part is at least 0 and below 1, not {part}.")
    return int(part * epochs + 1e-9)  # 0.29 * 100 is 28.999...
