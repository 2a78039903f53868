"""Thousands of unlabeled cases: a training starts as soon, and takes as little memory, as with ten."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# prints seconds from the start of the training to the first batch, and the peak memory of the process in MB
SCRIPT = """
import resource, sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
from tiny_trainers import make_trainer, seed
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL
torch.set_num_threads(1)
seed()
begin = time.perf_counter()
trainer = make_trainer(nnUNetTrainerM3HL, Path({dataset!r}))
trainer.on_train_start()
next(trainer.dataloader_train)
seconds = time.perf_counter() - begin
cases = len(trainer.dataloader_train.data_loader.unlabeled._data)
print("measured", cases, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def start(dataset: Path, number: int, folder: Path) -> tuple[float, float]:
    """Seconds and MB of a start with so many unlabeled cases, which are links to one file."""
    copy = folder / str(number) / dataset.name
    shutil.copytree(dataset, copy)
    (copy / "splits_final.json").write_text(json.dumps([{"train": ["case_000", "case_001"], "val": ["case_002"]}]))
    unlabeled = copy / "nnUNetPlans_3d_fullres_unlabeled"
    for index in range(number - 2):
        for ending in (".b2nd", ".pkl", "_seg.b2nd"):
            os.link(unlabeled / f"unlabeled_000{ending}", unlabeled / f"more_{index:05d}{ending}")
    environment = {
        **os.environ,
        "nnUNet_preprocessed": str(copy.parent),
        "nnUNet_results": str(folder / "results"),
        "OMP_NUM_THREADS": "1",
    }
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]), dataset=str(copy))
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, encoding="utf-8", timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    _, cases, seconds, memory = result.stdout.splitlines()[-1].split()
    assert int(cases) == number
    return float(seconds), float(memory)


@pytest.mark.slow
def test_a_start_with_ten_thousand_cases_is_as_quick_and_small_as_with_ten(tiny_dataset, tmp_path):
    few, many = (start(tiny_dataset, number, tmp_path) for number in (10, 10_000))
    print("10 cases: {:.2f} s, {:.0f} MB; 10,000: {:.2f} s, {:.0f} MB".format(*few, *many))
    assert many[0] - few[0] < 5
    assert many[1] - few[1] < 50
