"""benchmarks/gpu.py, which a GPU is needed for, on a CPU: it shall work on the day when there is one."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_it_measures_every_trainer_it_is_given(tiny_dataset, tmp_path):
    command = [sys.executable, SCRIPT, "--device", "cpu", "-d", "701", "-o", tmp_path, "-tr", "nnUNetTrainerM3HL"]
    subprocess.run([str(word) for word in command], check=True, cwd=tmp_path)
    tests, _, _, _, *rows = (tmp_path / "gpu_CPU.md").read_text().splitlines()[2:]
    assert "skipped" in tests  # there is no GPU, or it is not used
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    assert [row[1] for row in cells] == ["nnUNetTrainer", "nnUNetTrainerM3HL"]
    for row in cells:
        assert float(row[3]) > 0  # milliseconds of a step
        assert float(row[10]) > 0  # and of loading
    assert (cells[0][4], cells[1][5]) == ("1.00", "1.33")
