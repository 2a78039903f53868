"""Cost of producing the unlabeled patches: labeled plus unlabeled ones against labeled ones alone, in one process.

    python benchmarks/loader.py -d 501 -c 3d_fullres_quick [-tr nnUNetTrainerM3HL nnUNetTrainerCPS]

A trainer with a weak view makes two views of every unlabeled patch. With --on-device the workers leave the intensity
transforms of unlabeled patches to the training device (`nnUNet_ssl_augment=device`). Batches are made in turns, without
worker processes; the ratio of every pair of turns is taken.
"""

import argparse
import os
import statistics
import tempfile
import time

os.environ["nnUNet_n_proc_DA"] = "0"
os.environ.setdefault("nnUNet_compile", "0")
os.environ["nnUNet_results"] = tempfile.gettempdir()

import torch
from nnunetv2.run.run_training import get_trainer_from_args
from step_time import record_ratios

TURN = 4  # batches


def seconds(loader) -> float:
    begin = time.perf_counter()
    for _ in range(TURN):
        loader.generate_train_batch()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", dest="dataset", default="501")
    parser.add_argument("-c", dest="configuration", default="3d_fullres_quick")
    parser.add_argument("-f", dest="fold", type=int, default=0)
    parser.add_argument("-tr", dest="trainers", nargs="+", default=["nnUNetTrainerM3HL", "nnUNetTrainerCPS"])
    parser.add_argument("--repeats", type=int, default=20, help=f"pairs of turns of {TURN} batches")
    parser.add_argument("--on-device", action="store_true", help="without the intensity transforms of unlabeled ones")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["nnUNet_ssl_augment"] = "device" if args.on_device else "workers"

    ratios = {}
    for name in args.trainers:
        trainer = get_trainer_from_args(args.dataset, args.configuration, args.fold, name, device=torch.device("cpu"))
        trainer.supervised_part = 0.0  # whose batches have no unlabeled patches
        trainer.initialize()
        loaders = trainer.get_dataloaders()[0].data_loader  # inside of the single-threaded augmenter: our pair
        pairs = []
        for _ in range(args.repeats):
            labeled, unlabeled = seconds(loaders.labeled), seconds(loaders.unlabeled)
            pairs.append((labeled + unlabeled) / labeled)
        ratios[f"loader, {name}" + ", on device" * args.on_device] = statistics.median(pairs)
        print(f"{name}: {statistics.median(pairs):.2f} ({min(pairs):.2f} to {max(pairs):.2f})", flush=True)
    record_ratios(f"{args.configuration}, cpu", ratios)


if __name__ == "__main__":
    main()
