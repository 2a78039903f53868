"""Time and memory of writing a checkpoint of a network with 31 million parameters, against nnUNetTrainer, on a CPU.

    python benchmarks/checkpoint.py [--repeats 7]

Time: all trainers live in one process and take turns; the ratio to nnUNetTrainer is taken in every turn. What the
companions' bytes cost is the time in which torch.save alone writes all networks and the optimizer state. Memory: a new
process for every row, the most that is resident while the second checkpoint is written minus what is resident before;
files cached by the system do not count. The row "read back" is what nnunet-ssl did at first: nnU-Net writes its
checkpoint into memory, it is read, and written again with ours. TMPDIR chooses the disk.
"""

import argparse
import io
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

os.environ["nnUNet_compile"] = "0"
# the C library gives freed tensors back at once, so that the resident size is that of the living ones
os.environ |= {"MALLOC_MMAP_THRESHOLD_": "262144", "MALLOC_TRIM_THRESHOLD_": "262144"}

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ssl.blocks.networks import unwrap
from nnunet_ssl.trainer import SemiSupervisedTrainer
from nnunet_ssl.trainers.nnUNetTrainerCoLearning import nnUNetTrainerCoLearning
from nnunet_ssl.trainers.nnUNetTrainerM3HL import nnUNetTrainerM3HL
from nnunet_ssl.training.checkpoints import CHECKPOINT_KEY

ADDED = 0.3  # bar: at most this part of nnUNetTrainer's time on top of what the bytes cost
STAGES, FEATURES = 6, [32, 64, 128, 256, 320, 320]
ARCHITECTURE = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": STAGES,
        "features_per_stage": FEATURES,
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * STAGES,
        "strides": [[1, 1, 1], *[[2, 2, 2]] * (STAGES - 1)],
        "n_conv_per_stage": [2] * STAGES,
        "n_conv_per_stage_decoder": [2] * (STAGES - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}
CONFIGURATION = {
    "data_identifier": "cases",
    "batch_size": 2,
    "patch_size": [128, 128, 128],
    "spacing": [1.0, 1.0, 1.0],
    "normalization_schemes": ["ZScoreNormalization"],
    "use_mask_for_norm": [False],
    "architecture": ARCHITECTURE,
    "batch_dice": False,
}
DATASET_JSON = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "atrium": 1}, "file_ending": ".nii.gz"}


class nnUNetTrainerAlone(SemiSupervisedTrainer):
    """No companion."""


def read_back(trainer: SemiSupervisedTrainer, file: str) -> None:
    stock = io.BytesIO()
    nnUNetTrainer.save_checkpoint(trainer, stock)
    stock.seek(0)
    checkpoint = torch.load(stock, map_location="cpu", weights_only=False)
    checkpoint["network_weights"] = unwrap(trainer.network).state_dict()
    checkpoint[CHECKPOINT_KEY] = {name: unwrap(c).state_dict() for name, c in vars(trainer.companions).items()}
    torch.save(checkpoint, file)


def save_alone(trainer: nnUNetTrainer, file: str) -> None:
    networks = [trainer.network, *vars(getattr(trainer, "companions", SimpleNamespace())).values()]
    torch.save([trainer.optimizer.state_dict(), *(network.state_dict() for network in networks)], file)


ROWS = {
    "nnUNetTrainer": (nnUNetTrainer, nnUNetTrainer.save_checkpoint),
    "no companion": (nnUNetTrainerAlone, nnUNetTrainerAlone.save_checkpoint),
    "M3HL: teacher": (nnUNetTrainerM3HL, nnUNetTrainerM3HL.save_checkpoint),
    "co-learning: student, teacher": (nnUNetTrainerCoLearning, nnUNetTrainerCoLearning.save_checkpoint),
    "no companion, read back": (nnUNetTrainerAlone, read_back),
}


def prepared(trainer_class: type) -> nnUNetTrainer:
    """A trainer after its first optimizer step, so that there is momentum; of a dataset without images."""
    cases = Path(os.environ["nnUNet_preprocessed"], "Dataset001_None", CONFIGURATION["data_identifier"])
    cases.mkdir(parents=True, exist_ok=True)
    for ending in (".pkl", ".b2nd", "_seg.b2nd"):
        (cases / f"case{ending}").touch()
    plans = {
        "dataset_name": "Dataset001_None",
        "plans_name": "nnUNetPlans",
        "label_manager": "LabelManager",
        "configurations": {"3d_fullres": CONFIGURATION},
        "continue_training": False,
    }
    trainer = trainer_class(plans, "3d_fullres", 0, DATASET_JSON, torch.device("cpu"))
    trainer.initialize()
    trainer.logger.local_logger.my_fantastic_logging["mean_fg_dice"].append(0.0)
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.full_like(parameter, 1e-3)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return trainer


def resident_mib(which: str) -> float:
    """VmRSS: memory of this process now; VmHWM: the most since the last reset."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status[which].split()[0]) / 1024


def peak_memory(row: str, queue) -> None:
    """Puts the peak memory of writing, in MiB above what is resident before, into the queue; in its own process."""
    torch.set_num_threads(1)
    trainer_class, save = ROWS[row]
    trainer = prepared(trainer_class)
    file = str(Path(trainer.output_folder, "checkpoint.pth"))
    save(trainer, file)  # imports
    before = resident_mib("VmRSS")
    # Linux; getrusage would have the peak of all that was before
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    save(trainer, file)
    queue.put(resident_mib("VmHWM") - before)


def memory(row: str) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=peak_memory, args=(row, queue))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise SystemExit(f"The memory measurement of {row} failed.")
    return queue.get()


def times(repeats: int) -> tuple[dict[str, list[tuple[float, float]]], dict[str, int]]:
    """Seconds of every turn for the checkpoint and for its bytes alone, and bytes of the file, by row."""
    trainers = {trainer_class: prepared(trainer_class) for trainer_class, _ in ROWS.values()}
    seconds, size = {row: [] for row in ROWS}, {}
    for _ in range(repeats):
        for row, (trainer_class, save) in ROWS.items():
            trainer = trainers[trainer_class]
            file = Path(trainer.output_folder, "checkpoint.pth")
            turn = []
            for way in (save_alone, save):
                begin = time.perf_counter()
                way(trainer, str(file))
                turn.append(time.perf_counter() - begin)
                size[row] = file.stat().st_size
                file.unlink()
            seconds[row].append((turn[1], turn[0]))
    return seconds, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="turns")
    args = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        os.environ["nnUNet_preprocessed"] = os.environ["nnUNet_results"] = folder
        peaks = {row: memory(row) for row in ROWS}
        seconds, size = times(args.repeats)
    stock = [own for own, _ in seconds["nnUNetTrainer"]]
    lines = [
        "| checkpoint | file | time: median | / nnUNetTrainer: median (min to max) | bar | memory |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        ratios = sorted(own / other for (own, _), other in zip(seconds[row], stock, strict=True))
        bar = ADDED + statistics.median(alone / other for (_, alone), other in zip(seconds[row], stock, strict=True))
        lines.append(
            f"| {row} | {size[row] / 2**20:.0f} MiB | {statistics.median(own for own, _ in seconds[row]):.2f} s "
            f"| {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) | {bar:.2f} "
            f"| {peaks[row]:.1f} MiB |"
        )
    table = "\n".join(lines)
    print(table)
    header = (
        f"A network of 31 million parameters, CPU, 1 thread, torch {torch.__version__}. Bar: the time in which "
        f"torch.save alone writes these bytes, plus {ADDED} times that of nnUNetTrainer's checkpoint.\n\n"
    )
    (Path(__file__).parent / "results" / "checkpoint.md").write_text(header + table + "\n")


if __name__ == "__main__":
    main()
