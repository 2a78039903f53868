"""A training that is killed, interrupted or robbed of its files continues; benchmarks/faults.py has the long form."""

from pathlib import Path

import pytest
from faults import kills, other_faults, run

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads the process table from /proc")

# those that no other test has; all of them are in the benchmark
AIMED = [fault for fault in kills(8, seconds=1) if "plotted" in fault.name or "workers start" in fault.name]
CHOSEN = ("SIGTERM, 2", "disk full (RLIMIT", "a data worker", "a labeled case", "an unlabeled case")
OTHERS = [fault for fault in other_faults() if fault.name.startswith(CHOSEN)]
FAULTS = [
    pytest.param(fault, id=fault.name, marks=[pytest.mark.pictures] * ("plotted" in fault.name))
    for fault in (*AIMED, *OTHERS)
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost(fault, tiny_dataset, tmp_path):
    _, problems = run(fault, tiny_dataset, tmp_path)
    assert problems == []
