"""The guard against slower or larger trainings."""

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from guard import worse  # noqa: E402
from step_time import PASSES  # noqa: E402

BEFORE = {"quick, cpu": {"step, A": 2.0, "memory, A": 1.0}}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({"step, A": 2.2, "memory, A": 1.1}, []),
        ({"step, A": 1.0, "memory, A": 0.5, "step, B": 9.0}, []),
        ({"step, A": 2.21, "memory, A": 1.0}, ["quick, cpu, step, A: 2.21, was 2.00"]),
        ({"step, A": 2.0}, ["quick, cpu, memory, A: missing, was 1.00"]),
    ],
)
def test_what_is_ten_percent_worse_or_missing_is_named(now, said):
    assert worse(BEFORE, {"quick, cpu": now}) == said


def test_the_committed_baseline_is_not_worse_than_the_committed_results(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["guard.py"])
    runpy.run_path(str(BENCHMARKS / "guard.py"), run_name="__main__")
    assert "No ratio" in capsys.readouterr().out
    baseline = json.loads((BENCHMARKS / "baseline.json").read_text(encoding="utf-8"))
    measured = baseline["3d_fullres_quick, cpu"].keys()
    assert measured >= {f"{what}, {trainer}" for what in ("step", "memory") for trainer in PASSES}
