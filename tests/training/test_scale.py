"""Thousands of unlabeled cases: a training starts as soon, and takes as little memory, as with ten."""

import json
import multiprocessing
import os
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from tiny_trainers import make_trainer, seed

from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL


def measure(dataset: Path, results: Path, connection) -> None:
    """Sends the cases, seconds from the start of a training to its first batch, and the process's peak memory in MB."""
    os.environ |= {"nnUNet_preprocessed": str(dataset.parent), "nnUNet_results": str(results)}
    torch.set_num_threads(1)
    seed()
    begin = time.perf_counter()
    trainer = make_trainer(nnUNetTrainerM3HL, dataset)
    trainer.on_train_start()
    next(trainer.dataloader_train)
    seconds = time.perf_counter() - begin
    cases = len(trainer.dataloader_train.data_loader.unlabeled._data)
    connection.send((cases, seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))


def start(dataset: Path, number: int, folder: Path) -> tuple[float, float]:
    """Seconds and MB of a start with so many unlabeled cases, which are links to one file."""
    copy = folder / str(number) / dataset.name
    shutil.copytree(dataset, copy)
    (copy / "splits_final.json").write_text(json.dumps([{"train": ["case_000", "case_001"], "val": ["case_002"]}]))
    unlabeled = copy / "nnUNetPlans_3d_fullres_unlabeled"
    for index in range(number - 2):
        for ending in (".b2nd", ".pkl", "_seg.b2nd"):
            os.link(unlabeled / f"unlabeled_000{ending}", unlabeled / f"more_{index:05d}{ending}")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(copy, folder / "results", sender))
    process.start()
    sender.close()
    cases, seconds, memory = receiver.recv()  # EOFError where the process has died
    process.join()
    assert cases == number
    return seconds, memory


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks the trainings")
@pytest.mark.slow
def test_a_start_with_ten_thousand_cases_is_as_quick_and_small_as_with_ten(tiny_dataset, tmp_path):
    few, many = (start(tiny_dataset, number, tmp_path) for number in (10, 10_000))
    print("10 cases: {:.2f} s, {:.0f} MB; 10,000: {:.2f} s, {:.0f} MB".format(*few, *many))
    assert many[0] - few[0] < 5
    assert many[1] - few[1] < 50
