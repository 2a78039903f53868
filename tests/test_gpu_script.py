"""benchmarks/gpu.py, which a GPU is needed for, on a CPU: it shall work on the day when there is one."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import gpu


@pytest.mark.slow
def test_it_measures_every_trainer_it_is_given(tiny_dataset, tmp_path, monkeypatch):
    in_own_process = gpu.in_own_process

    def measured(name, compiled, args):
        if name == "nnUNetTrainer":  # in this process: every other one takes seconds to import nnU-Net
            return gpu.measured(SimpleNamespace(**{**vars(args), "one": name}))
        return in_own_process(name, compiled, args)

    monkeypatch.setattr(gpu, "in_own_process", measured)
    monkeypatch.setenv("nnUNet_results", "")  # the script sets it
    command = ["gpu.py", "--device", "cpu", "--without-tests", "-d", "701", "-o", tmp_path, "-tr", "nnUNetTrainerM3HL"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    gpu.main()
    _, _, *rows = (tmp_path / "gpu_CPU.md").read_text().splitlines()[2:]
    cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    assert [row[1] for row in cells] == ["nnUNetTrainer", "nnUNetTrainerM3HL"]
    for row in cells:
        assert float(row[3]) > 0  # milliseconds of a step
        assert float(row[10]) > 0  # and of loading
    assert (cells[0][4], cells[1][5]) == ("1.00", "1.33")


def test_the_tests_that_need_a_gpu_are_those_of_its_file(monkeypatch):
    def run(command, **options):
        assert Path(command[-1]).is_file()
        assert options["env"]["CUDA_VISIBLE_DEVICES"] == ""
        return SimpleNamespace(stdout="...\n8 skipped in 3.2s\n", stderr="")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    assert gpu.tests("cpu") == "8 skipped in 3.2s"
