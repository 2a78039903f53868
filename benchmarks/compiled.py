"""What torch.compile makes of every trainer, on a CPU: graphs, breaks, waits, and the step's time against uncompiled.

    python benchmarks/compiled.py -d 501 -c 3d_fullres_quick [-tr nnUNetTrainerM3HL] [--repeats 10]

nnU-Net compiles on CUDA only; here it is told to on a CPU. The times say that compiled steps run and are not slower
for a silly reason; they say nothing about a GPU. A trainer and its uncompiled twin take turns, block by block, on
batches that are in memory; the ratio of every pair of blocks is taken.

- *graphs*: of encoder, decoder and Dice, for training, teaching, halves of a batch; the fewer, the shorter the start.
- *breaks*: places where compiled code falls back to Python.
- *eager*: convolutions in a step that are not compiled.
- *waits*: how often the host would wait for a GPU in a step, seen on tensors without values (tests/fake_cuda.py).
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ["nnUNet_n_proc_DA"] = "0"
os.environ["nnUNet_results"] = tempfile.gettempdir()
sys.path.append(str(Path(__file__).parents[1] / "tests"))

import torch
from fake_cuda import fake_step
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from step_time import BLOCK, find_trainer, seconds
from tiny_trainers import every_trainer
from torch import nn
from torch._dynamo.utils import counters

from nnunet_ssl.system.files import replacing

CONVOLUTIONS = {module.forward.__code__ for module in (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)}


def prepared(name: str, args, compiled: bool) -> tuple:
    """A trainer in the middle of its training, with batches, after a step of every phase."""
    nnUNetTrainer._do_i_compile = lambda self: compiled
    trainer = find_trainer(name, args)
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    batches = [next(trainer.dataloader_train) for _ in range(BLOCK)]
    for part in (0.0, 0.9, 0.3):  # of the training that are done
        if hasattr(trainer, "companions"):
            trainer.step = int(part * trainer.max_steps) + 1  # not the last step of an epoch, which is observed
        seconds(trainer, batches[:1])
    return trainer, batches


def eager_convolutions(trainer, batches) -> int:
    found = 0

    def count(frame, event, _):
        nonlocal found
        found += event == "call" and frame.f_code in CONVOLUTIONS

    sys.setprofile(count)
    try:
        trainer.train_step(batches[0])
    finally:
        sys.setprofile(None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", dest="dataset", default="501")
    parser.add_argument("-c", dest="configuration", default="3d_fullres_quick")
    parser.add_argument("-f", dest="fold", type=int, default=0)
    parser.add_argument("-tr", dest="trainers", nargs="+", default=[trainer.__name__ for trainer in every_trainer()])
    parser.add_argument("--repeats", type=int, default=10, help=f"pairs of blocks of {BLOCK} steps")
    args = parser.parse_args()
    args.device, args.supervised = "cpu", False
    torch.set_num_threads(1)
    folder = Path(nnUNet_preprocessed) / str(maybe_convert_to_dataset_name(int(args.dataset)))
    lines = [
        f"Configuration `{args.configuration}`, CPU, 1 thread, torch {torch.__version__}. No claim about GPUs.",
        "",
        "| trainer | graphs | breaks | eager | waits | first steps (s) | compiled / not: median (min to max) |",
        "|---|---|---|---|---|---|---|",
    ]
    classes = {trainer.__name__: trainer for trainer in (nnUNetTrainer, *every_trainer())}
    for name in ("nnUNetTrainer", *args.trainers):
        nnUNetTrainer._do_i_compile = lambda self: False
        waits = fake_step(classes[name], folder, args.configuration, part=0.3).waits.total()
        eager = prepared(name, args, False)
        torch._dynamo.reset()
        counters.clear()
        begin = time.perf_counter()
        compiled = prepared(name, args, True)
        start = time.perf_counter() - begin
        pairs = [seconds(*compiled) / seconds(*eager) for _ in range(args.repeats)]
        graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
        left = eager_convolutions(*compiled)
        lines.append(
            f"| {name} | {graphs} | {breaks} | {left} | {waits} | {start:.0f} "
            f"| {statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f}) |"
        )
        print(lines[-1], flush=True)
        with replacing(Path(__file__).parent / "results" / "compiled.md") as temporary:
            temporary.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
