"""Cost of a training step of our trainers against nnUNetTrainer's on the same plans: paired time ratio, peak memory.

    python benchmarks/step_time.py -d 501 -c 3d_fullres_quick [-tr nnUNetTrainerM3HL nnUNetTrainerM3] [--repeats 20]
    python benchmarks/step_time.py -d 501 -c 3d_fullres_quick -tr nnUNetTrainerM3HL --supervised

Time: both trainers live in one process and take turns, block by block, on batches that are in memory already; the
ratio of every pair of blocks is taken, so that a machine whose speed drifts does not disturb it. Memory: each trainer
in a process of its own, peak resident size on the CPU and peak allocated memory on a GPU, minus what the process had
with all libraries imported: weights, teacher, gradients, momentum, batches and graphs. Multiplications: of convolutions
and matrix products in one step; they have what a count of passes leaves out (further decoders, a discriminator).

With --supervised, the supervised phase of our trainers: it is stock nnU-Net's step, and loading counts as well.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path

os.environ.setdefault("nnUNet_n_proc_DA", "0")
os.environ.setdefault("nnUNet_compile", "0")

import torch
from nnunetv2.run.run_training import get_trainer_from_args
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nnunet_ssl.system.files import replacing

BLOCK = 4  # steps between two turns
# Forward and backward passes of a planned batch that a method's equations need; nnUNetTrainer's are 1 and 1. A backward
# pass costs about two forward passes.
PASSES = {
    "nnUNetTrainerM3HL": (2, 1),
    "nnUNetTrainerM3": (2, 1),
    "nnUNetTrainerBCP": (2, 1),
    "nnUNetTrainerMeanTeacher": (3, 2),
    "nnUNetTrainerUAMT": (11, 2),
    "nnUNetTrainerCPS": (4, 4),
    "nnUNetTrainerCoLearning": (4, 3),  # the teacher's of a whole batch, and 6 + 6 of half a batch
    "nnUNetTrainerCoM3HL": (3, 2),
    "nnUNetTrainerFixMatch": (3, 2),
    "nnUNetTrainerCutMixMT": (3, 2),
    "nnUNetTrainerMCNet": (2, 2),
    "nnUNetTrainerURPC": (2, 2),
    "nnUNetTrainerOMF": (2, 2),  # of its first phase; the second one has one backward pass less
    "nnUNetTrainerADMT": (5, 2),
    "nnUNetTrainerPSC": (4, 3),
    "nnUNetTrainerDTC": (2, 2),
    "nnUNetTrainerSASSNet": (2, 2),  # and those of its discriminator
    # a backward pass that finds a direction is half of one: it has no gradients of weights
    "nnUNetTrainerSSNet": (8, 5),
    "nnUNetTrainerPSMT": (10, 3),  # two decoders are one pass
    "nnUNetTrainerABD": (7, 6),  # after its first phase, which has one of each
}


class Multiplications(TorchDispatchMode):
    """Counts what torch's FlopCounterMode counts, which stops where a step calls autograd.grad itself."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def find_trainer(name: str, args):
    device = torch.device(args.device)
    trainer = get_trainer_from_args(args.dataset, args.configuration, args.fold, name, device=device)
    trainer.supervised_part = 0.5 if args.supervised else 0.0  # of ours; else every step is the method's
    if not args.supervised:
        trainer._streams_of = lambda epoch: (True, True)  # patches for the steps of any phase
    return trainer


def prepared(name: str, args) -> tuple:
    """A trainer in its training, and the batches for a block: in memory, or with --supervised its loader."""
    trainer = find_trainer(name, args)
    trainer.on_train_start()
    trainer.network.train()
    if args.supervised:
        return trainer, trainer.dataloader_train
    trainer.step = trainer.max_steps // 3 if hasattr(trainer, "max_steps") else 0  # all terms are there
    return trainer, [next(trainer.dataloader_train) for _ in range(BLOCK)]


def seconds(trainer, batches) -> float:
    begin = time.perf_counter()
    for batch in islice(batches, BLOCK):
        trainer.train_step(batch)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / BLOCK


def multiplications(trainer, batch) -> int:
    """Of all convolutions and matrix products in one training step."""
    with Multiplications() as counted:
        trainer.train_step(batch)
    return counted.total


def peak_memory(name: str, args, queue) -> None:
    """Puts the peak memory of a training, in MiB above the imported libraries, into the queue; in its own process."""
    torch.set_num_threads(args.threads)
    find_trainer(name, args)  # imports the modules of all trainers up to this one: about 40 MiB, no matter of training
    before = peak_mib(torch.device(args.device))
    trainer, batches = prepared(name, args)
    for _ in range(3):
        seconds(trainer, batches)
    queue.put(peak_mib(trainer.device) - before)


def peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    # not getrusage: on Linux a child starts with its parent's peak
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


def memory(name: str, args) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=peak_memory, args=(name, args, queue))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"The memory measurement of {name} failed.")
    return queue.get()


def record_ratios(configuration: str, ratios: dict[str, float]) -> None:
    """Puts ratios into results/ratios.json, which benchmarks/guard.py compares with benchmarks/baseline.json."""
    path = Path(__file__).parent / "results" / "ratios.json"
    path.parent.mkdir(exist_ok=True)
    known = json.loads(path.read_text()) if path.is_file() else {}
    known[configuration] = dict(sorted((known.get(configuration, {}) | ratios).items()))
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(known, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", dest="dataset", default="501")
    parser.add_argument("-c", dest="configuration", default="3d_fullres_quick")
    parser.add_argument("-f", dest="fold", type=int, default=0)
    parser.add_argument("-tr", dest="trainers", nargs="+", default=[*PASSES])
    parser.add_argument("-device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20, help=f"pairs of blocks of {BLOCK} steps")
    parser.add_argument("--supervised", action="store_true", help="measure the supervised phase, loading included")
    args = parser.parse_args()
    os.environ["nnUNet_results"] = tempfile.gettempdir()
    # for the processes whose memory is measured: the C library gives freed tensors back at once, so that the resident
    # size is that of the living ones
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = args.device == "cuda"  # as nnUNetv2_train

    stock, stock_batches = prepared("nnUNetTrainer", args)
    stock_memory = memory("nnUNetTrainer", args)
    lines = [
        "| trainer | forward + backward passes | by their count | multiplications / stock "
        "| step / stock: median (min to max) | above the count | stock step | peak memory / stock |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in args.trainers:
        trainer, batches = prepared(name, args)
        seconds(stock, stock_batches), seconds(trainer, batches)  # warm-up
        work = multiplications(trainer, next(iter(batches))) / multiplications(stock, next(iter(stock_batches)))
        pairs = [(seconds(trainer, batches), seconds(stock, stock_batches)) for _ in range(args.repeats)]
        ratios = sorted(ours / theirs for ours, theirs in pairs)
        stock_seconds = statistics.median(theirs for _, theirs in pairs)
        forward, backward = (1, 1) if args.supervised else PASSES[name]
        count, ratio = (forward + 2 * backward) / 3, statistics.median(ratios)
        peak = memory(name, args) / stock_memory
        kind = "supervised phase, " * args.supervised
        record_ratios(
            f"{args.configuration}, {args.device}", {f"{kind}step, {name}": ratio, f"{kind}memory, {name}": peak}
        )
        lines.append(
            f"| {name} | {forward} + {backward} | {count:.2f} | {work:.2f} "
            f"| {ratio:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {100 * (ratio / count - 1):+.0f} % "
            f"| {1000 * stock_seconds:.0f} ms "
            f"| {peak:.2f} ({stock_memory:.0f} MiB) |"
        )
        print(lines[-1], flush=True)
        del trainer, batches
    table = "\n".join(lines)
    print(table)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    where = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {args.threads} thread(s)"
    header = f"Configuration `{args.configuration}`, {where}, torch {torch.__version__}.\n\n"
    (results / f"step_time_{args.configuration}_{args.device}{'_supervised' * args.supervised}.md").write_text(
        header + table + "\n"
    )


if __name__ == "__main__":
    main()
