"""One command for a day with a GPU: the tests that need one, then time, memory, waits and loading of every trainer.

    python benchmarks/gpu.py                                  # on made-up scans of 160 x 160 x 160 voxels
    python benchmarks/gpu.py -d 501 -c 3d_fullres -f 0        # on a preprocessed dataset, as the left atrium
    python benchmarks/gpu.py --device cpu -tr nnUNetTrainerM3HL    # the same on a CPU, tiny: shows that it works

Writes benchmarks/results/gpu_CARD.md, a row as soon as it is measured. Every row is a process of its own:

- *step*: median over blocks of steps on batches that are in memory already, after as many to warm up.
- *first*: seconds of the first step, in which everything is compiled.
- *memory*: peak of what torch has allocated on the GPU, weights, momentum, teachers and graphs included.
- *waits*: how often the host waits for the GPU in a step, as torch's sync debug mode counts.
- *loading*: milliseconds of one core for the patches of a step, from disk to the augmented batch; nnU-Net's workers
  share them. A step that takes longer than this divided by the number of workers does not wait for them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from importlib import metadata
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
DATASET, CONFIGURATION = "Dataset997_GPU", "gpu"
BLOCK = 5  # steps
# side of scans and patches in voxels, features per stage, batch, blocks
SIZES = {"cuda": (160, 128, (32, 64, 128, 256, 320, 320), 2, 10), "cpu": (24, 16, (4, 8, 16), 2, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", dest="dataset", help="a preprocessed dataset; left out: made-up scans")
    parser.add_argument("-c", dest="configuration", default="3d_fullres")
    parser.add_argument("-f", dest="fold", default="0")
    parser.add_argument("-tr", dest="trainers", nargs="+", help="left out: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--without-tests", action="store_true")
    parser.add_argument("-o", dest="output", type=Path, default=HERE / "results", help="folder of the table")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a trainer to measure in this process
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args)))
        return
    with tempfile.TemporaryDirectory(prefix="nnunet_ssl_gpu_") as folder:
        os.environ["nnUNet_results"] = f"{folder}/results"
        if args.dataset is None:
            os.environ["nnUNet_raw"], os.environ["nnUNet_preprocessed"] = f"{folder}/raw", f"{folder}/preprocessed"
            make_dataset(*SIZES[args.device])
            args.dataset, args.configuration = DATASET, CONFIGURATION
        report(args)


def report(args) -> None:
    import torch  # not before the folders are set: nnU-Net reads them when it is imported
    from step_time import PASSES

    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU. --device cpu shows that this script works.")
    card = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU ({platform.machine()})"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "nnunetv2", "nnunet-ssl"))
    lines = [f"{card}, {versions}, Python {platform.python_version()}; {args.dataset}, {args.configuration}.", ""]
    if not args.without_tests:
        lines += [f"Tests on the GPU: {tests(args.device)}", ""]
    lines += [
        "| trainer | compiled | step (ms) | / stock | by passes | first (s) | memory (GiB) | / stock | waits "
        "| loading (ms) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    file = args.output / f"gpu_{card.split(' (')[0].replace(' ', '_')}.md"
    args.output.mkdir(parents=True, exist_ok=True)
    trainers = ["nnUNetTrainer", *(args.trainers or PASSES)]
    for compiled in (False, True) if args.device == "cuda" else (False,):
        stock = None
        for name in trainers:
            try:
                row = in_own_process(name, compiled, args)
            except subprocess.CalledProcessError as error:  # the others shall have their turn
                reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
                lines.append(f"| {name} | {'yes' if compiled else 'no'} | failed: {reason[:200]} | | | | | | | |")
            else:
                stock = row if name == "nnUNetTrainer" else stock
                lines.append(line(name, compiled, row, stock, PASSES.get(name, (1, 1))))
            print(lines[-1], flush=True)
            file.write_text("\n".join(lines) + "\n")
    print(f"Written: {file}")


def line(name: str, compiled: bool, row: dict, stock: dict | None, passes: tuple[int, int]) -> str:
    """A row of the table; without ratios where stock nnU-Net could not be measured."""
    on_gpu = row["memory"] > 0
    cells = [
        name,
        "yes" if compiled else "no",
        f"{row['step']:.1f}",
        f"{row['step'] / stock['step']:.2f}" if stock else "",
        f"{(passes[0] + 2 * passes[1]) / 3:.2f}",
        f"{row['first']:.1f}",
        f"{row['memory']:.2f}" if on_gpu else "",
        f"{row['memory'] / stock['memory']:.2f}" if stock and on_gpu else "",
        str(row["waits"]) if on_gpu else "",
        f"{row['loading']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def tests(device: str) -> str:
    """The last line of pytest on the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", HERE.parent / "tests/contract/test_cuda.py"]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
    found = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=HERE.parent, env=environment
    )
    return (found.stdout.strip().splitlines() or [found.stderr])[-1]


def in_own_process(name: str, compiled: bool, args) -> dict:
    environment = os.environ | {"nnUNet_compile": str(int(compiled)), "nnUNet_n_proc_DA": "0"}
    command = [sys.executable, __file__, "--one", name, "-d", args.dataset, "-c", args.configuration, "-f", args.fold]
    command += ["--device", args.device]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(found.stdout.strip().splitlines()[-1])


def measured(args) -> dict:
    """What is in a row of the table; memory and waits are 0 on a CPU."""
    import torch
    from nnunetv2.run.run_training import get_trainer_from_args

    device, cuda = torch.device(args.device), args.device == "cuda"
    torch.backends.cudnn.benchmark = cuda  # as nnUNetv2_train
    fold = int(args.fold) if args.fold.isdecimal() else args.fold
    trainer = get_trainer_from_args(args.dataset, args.configuration, fold, args.one, device=device)
    trainer.supervised_part = 0.0  # every step is the method's
    trainer._streams_of = lambda epoch: (True, True)  # patches for the steps of any phase
    trainer.on_train_start()
    trainer.on_train_epoch_start()

    def seconds(batches):
        begin = time.perf_counter()
        for batch in batches:
            trainer.train_step(batch)
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / len(batches)

    begin = time.perf_counter()
    batches = [next(trainer.dataloader_train) for _ in range(BLOCK)]
    loading = (time.perf_counter() - begin) / BLOCK
    if cuda:  # as nnU-Net's workers
        batches = [{name: pinned(value) for name, value in batch.items()} for batch in batches]
    if hasattr(trainer, "companions"):
        trainer.step = trainer.max_steps // 3  # all terms are there
    first = seconds(batches[:1])
    blocks = SIZES[args.device][-1]
    for _ in range(2):
        seconds(batches)
    if cuda:
        torch.cuda.reset_peak_memory_stats()  # of what cuDNN has tried and does not use
    steps = statistics.median(seconds(batches) for _ in range(blocks))
    memory, waits = 0, 0
    if cuda:
        memory = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.train_step(batches[0])
        torch.cuda.set_sync_debug_mode("default")
        waits = sum("synchroniz" in str(warning.message) for warning in said)
    return {"step": 1000 * steps, "first": first, "memory": memory, "waits": waits, "loading": 1000 * loading}


def pinned(value):
    """A tensor, or those of a list, in memory from which a GPU copies by itself; anything else as it is."""
    if isinstance(value, list):
        return [pinned(each) for each in value]
    return value.pin_memory() if hasattr(value, "pin_memory") else value


def make_dataset(side: int, patch: int, features: tuple[int, ...], batch_size: int, _) -> None:
    """Made-up scans, a noisy ball in each, planned and preprocessed with nnU-Net's commands."""
    from nnunet_ssl.commands.demo import small_configuration, write_image

    raw, preprocessed = (Path(os.environ[name]) / DATASET for name in ("nnUNet_raw", "nnUNet_preprocessed"))
    rng = np.random.default_rng(0)
    axes = np.indices((side,) * 3) - side / 2
    for number in range(8):
        ball = (axes**2).sum(0) < (side * rng.uniform(0.2, 0.4)) ** 2
        image = (100 * ball + 30 * rng.standard_normal(ball.shape)).astype(np.float32)
        labeled = number < 4
        write_image(raw / f"images{'Tr' if labeled else 'Un'}" / f"case_{number}_0000.nii.gz", image)
        if labeled:
            write_image(raw / "labelsTr" / f"case_{number}.nii.gz", ball.astype(np.uint8))
    description = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "ball": 1}, "numTraining": 4}
    (raw / "dataset.json").write_text(json.dumps(description | {"file_ending": ".nii.gz"}))
    environment = {name: value for name, value in os.environ.items() if name != "nnUNet_n_proc_DA"}
    number = DATASET[7:10]
    for command in (
        f"nnUNetv2_plan_and_preprocess -d {number} -c 3d_fullres -npfp 2 -np 2",
        f"nnunet-ssl preprocess -d {number} -c 3d_fullres -np 2",
    ):
        subprocess.run(command.split(), check=True, env=environment, stdout=subprocess.DEVNULL)
    file = preprocessed / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"][CONFIGURATION] = small_configuration(plans, (patch,) * 3, features, batch_size)
    file.write_text(json.dumps(plans))
    splits = [{"train": [f"case_{number}" for number in range(3)], "val": ["case_3"]}]
    (preprocessed / "splits_final.json").write_text(json.dumps(splits))


if __name__ == "__main__":
    main()
