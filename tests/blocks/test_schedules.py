import math
from itertools import groupby, pairwise

import pytest

from nnunet_ssl.blocks.schedules import sigmoid_rampup, turn, warmup_decay


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, math.exp(-5)), (25, math.exp(-5 * 9 / 16)), (50, math.exp(-5 / 4)), (75, math.exp(-5 / 16)), (100, 1)],
)
def test_the_rampup_follows_its_formula(step, expected):
    assert sigmoid_rampup(step, 100) == pytest.approx(expected, rel=1e-12)


def test_the_rampup_stays_at_its_ends_outside_of_its_length():
    assert sigmoid_rampup(-7, 10) == sigmoid_rampup(0, 10) == math.exp(-5)
    assert sigmoid_rampup(11, 10) == sigmoid_rampup(1e9, 10) == 1


def test_the_rampup_rises_all_the_way():
    values = [sigmoid_rampup(step, 40) for step in range(41)]
    assert all(a < b for a, b in pairwise(values))


@pytest.mark.parametrize("length", [0, -1])
@pytest.mark.parametrize("step", [0, 5])
def test_a_rampup_without_length_is_always_one(step, length):
    assert sigmoid_rampup(step, length) == 1


@pytest.mark.parametrize(("step", "expected"), [(0, 0), (1, 1 / 2), (2, 2 / 3), (3, 3 / 4), (99, 0.99), (10000, 0.99)])
def test_the_decay_warms_up_to_its_limit(step, expected):
    assert warmup_decay(step, 0.99) == pytest.approx(expected, abs=1e-15)


def test_the_decay_makes_a_plain_average_of_all_students_until_its_limit():
    teacher = 123.0
    for step in range(50):
        decay = warmup_decay(step, 0.999)
        teacher = decay * teacher + (1 - decay) * step
        assert teacher == pytest.approx(step / 2)  # the mean of 0..step; the start is forgotten


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_the_decay_never_exceeds_its_limit_nor_falls(decay):
    values = [warmup_decay(step, decay) for step in range(100)]
    assert values == sorted(values)
    assert max(values) <= decay


def test_turns_have_every_length_up_to_the_longest_and_depend_on_the_step_alone():
    turns = [turn(step, 5) for step in range(3000)]
    lengths = [len([*steps]) for _, steps in groupby(turns)][:-1]
    assert turns[0] == 0
    assert {*turns} == {0, 1}
    assert {*lengths} == {1, 2, 3, 4, 5}
    assert min(lengths.count(n) for n in range(1, 6)) > 150  # of 1,000
    assert [turn(step, 5) for step in (2999, 0, 1234)] == [turns[2999], turns[0], turns[1234]]
    assert [turn(step, 1) for step in range(4)] == [0, 1, 0, 1]
