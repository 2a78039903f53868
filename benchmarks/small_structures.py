"""Small structures: trains on made-up scans with lesions of less than 0.2 % of the volume, and measures on 20 others.

    export nnUNet_raw=LESIONS/raw nnUNet_preprocessed=LESIONS/preprocessed nnUNet_results=LESIONS/results
    python benchmarks/small_structures.py -tr nnUNetTrainer nnUNetTrainerM3HL --seeds 0 1 2 --label before
    python benchmarks/small_structures.py -tr nnUNetTrainerM3HL --seeds 0 1 2 --label after    # with other code

A patch is a 16th of a scan, so a random one seldom has a lesion in it: what a method learns from depends on the
patches that nnU-Net puts on foreground, the last third of every batch. How many of those it uses is counted: a labeled
patch is used where the loss has a gradient with respect to it.

The scans are made, planned and preprocessed by the first call; the difficulty was chosen with nnUNetTrainer alone.
Every trainer takes the same number of steps. The final checkpoint is used, nothing is selected. What is trained already
is not trained again; `--label` says which code it was. One process and one thread per call.
"""

import argparse
import csv
import json
import os
import random
import statistics
import subprocess
from pathlib import Path

os.environ.setdefault("nnUNet_n_proc_DA", "0")
os.environ.setdefault("nnUNet_compile", "0")

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.run.run_training import get_trainer_from_args
from phases import literal, use_channels_last
from scipy import ndimage

import nnunet_ssl
from nnunet_ssl.commands.demo import direction, ellipsoid, grid, small_configuration, smooth_noise, write_image
from nnunet_ssl.system.files import replacing

RESULTS = Path(__file__).parent / "results" / "small_structures.csv"
DATASET = "Dataset998_SmallStructures"
CONFIGURATION = "small"
CASES = {"labeled": 6, "validation": 2, "unlabeled": 24, "test": 20}
SEED = 0  # of the scans
SHAPE = (60, 60, 60)  # voxels
LARGEST_FRACTION = 0.002  # of a scan's voxels that are lesion
LESION = 80  # brightness above the background, whose mean is 100
TEXTURE, NOISE = 10, 10  # standard deviations of the background's smooth texture and of the noise
PATCH, FEATURES, BATCH_SIZE = (24, 24, 24), (8, 16, 32), 2
STEPS_PER_EPOCH = 250
RUN = ["trainer", "label", "steps", "seed"]  # what identifies a row of the table
COUNTS = ["used", "used_with_foreground"]  # labeled patches of the training
METRICS = ["dice", "lesions", "found", "false_positives"]  # of a case; Dice in percent
ALL_NEIGHBOURS = np.ones((3, 3, 3))


def make_case(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A scan with one to three round lesions, among vessels and large balls half as bright; float32 and uint8."""
    lesions, others = np.zeros(SHAPE, bool), np.zeros(SHAPE)
    number = rng.integers(1, 4)
    while ndimage.label(lesions)[1] < number:
        ball = ellipsoid(SHAPE, rng.uniform(6, np.subtract(SHAPE, 6)), rng.uniform(2, 3.1, 3), np.eye(3)) < 1
        if not (ball & ndimage.binary_dilation(lesions, iterations=4)).any():
            lesions |= ball
    for _ in range(rng.integers(2, 4)):
        offset, along = grid(SHAPE, rng.uniform(0, SHAPE)), direction(rng)
        across = np.linalg.norm(offset - np.multiply.outer(along, np.tensordot(along, offset, 1)), axis=0)
        others[across < rng.uniform(1.5, 3)] = rng.uniform(0.3, 0.6)
    for _ in range(rng.integers(1, 3)):
        ball = ellipsoid(SHAPE, rng.uniform(0, SHAPE), rng.uniform(5, 9, 3), np.eye(3)) < 1
        others[ball] = rng.uniform(0.3, 0.6)
    bright = np.where(lesions, rng.uniform(0.8, 1.2), others)
    image = 100 + LESION * ndimage.gaussian_filter(bright, 0.6)
    image += TEXTURE * smooth_noise(rng, SHAPE, 4) + NOISE * rng.standard_normal(SHAPE)
    assert 0 < lesions.mean() < LARGEST_FRACTION
    return image.astype(np.float32), lesions.astype(np.uint8)


def make_dataset() -> None:
    """Writes, plans and preprocesses the dataset with nnU-Net's commands, unless it is there."""
    raw, preprocessed = (Path(folder) / DATASET for folder in (nnUNet_raw, nnUNet_preprocessed))
    plans_file, split_file = preprocessed / "nnUNetPlans.json", preprocessed / "splits_final.json"
    if split_file.is_file():  # is written last
        return
    rng = np.random.default_rng(SEED)
    names = {kind: [f"{kind}_{index:03d}" for index in range(number)] for kind, number in CASES.items()}
    for kind, cases in names.items():
        ending = {"unlabeled": "Un", "test": "Ts"}.get(kind, "Tr")
        for case in cases:
            image, label = make_case(rng)
            write_image(raw / f"images{ending}" / f"{case}_0000.nii.gz", image)
            if kind != "unlabeled":
                write_image(raw / f"labels{ending}" / f"{case}.nii.gz", label)
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": CASES["labeled"] + CASES["validation"],
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description, indent=4))

    environment = {k: v for k, v in os.environ.items() if k != "nnUNet_n_proc_DA"}  # planning fails with 0
    number = DATASET[7:10]
    command = f"nnUNetv2_plan_and_preprocess -d {number} -c 3d_fullres -npfp 1 -np 1"
    subprocess.run(command.split(), check=True, env=environment)
    plans = json.loads(plans_file.read_text())
    plans["configurations"][CONFIGURATION] = small_configuration(plans, PATCH, FEATURES, BATCH_SIZE)
    plans_file.write_text(json.dumps(plans, indent=4))
    command = f"nnunet-ssl preprocess -d {number} -c {CONFIGURATION} -np 1"
    subprocess.run(command.split(), check=True, env=environment)
    with replacing(split_file) as temporary:
        temporary.write_text(json.dumps([{"train": names["labeled"], "val": names["validation"]}]))


def train(args, trainer_name: str, seed: int) -> Path:
    """Trains unless it is done already; returns the model's folder."""
    name = f"{trainer_name}-{args.label}-{args.steps}-seed={seed}"
    model = Path(nnUNet_results) / DATASET / f"{name}__nnUNetPlans__{CONFIGURATION}"
    folder = model / "fold_0"
    if (folder / "patches.json").is_file():
        return model
    for set_seed in (random.seed, np.random.seed, torch.manual_seed):
        set_seed(seed)
    trainer = get_trainer_from_args(DATASET, CONFIGURATION, 0, trainer_name, device=torch.device("cpu"))
    trainer.num_iterations_per_epoch = STEPS_PER_EPOCH
    trainer.num_epochs = args.steps // STEPS_PER_EPOCH
    trainer.num_val_iterations_per_epoch = 5  # monitoring only
    for key, value in args.settings.items():
        if not hasattr(trainer, key):
            raise SystemExit(f"{trainer_name} has no setting {key}.")
        setattr(trainer, key, value)
    trainer.output_folder_base, trainer.output_folder = str(model), str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    trainer.log_file = str(folder / Path(trainer.log_file).name)
    use_channels_last(trainer)
    counts = count_patches(trainer)
    trainer.run_training()
    (folder / "patches.json").write_text(json.dumps(counts))
    return model


def count_patches(trainer) -> dict[str, int]:
    """Lets the trainer count the labeled patches that its loss depends on, and how many of them show foreground there.

    A patch of which only a part is used, in a mix, counts by its foreground in this part.
    """
    counts, step = dict.fromkeys(COUNTS, 0), trainer.train_step

    def counting_step(batch: dict) -> dict:
        image, target = batch["data"].requires_grad_(), batch["target"]
        foreground = (target[0] if isinstance(target, list) else target) > 0
        result = step(batch)
        if image.grad is not None:
            used = image.grad != 0
            counts["used"] += int(used.flatten(1).any(1).sum())
            counts["used_with_foreground"] += int((used & foreground).flatten(1).any(1).sum())
        return result

    trainer.train_step = counting_step
    return counts


def predict(model: Path) -> dict[str, list[float]]:
    """The METRICS of every test scan, predicted without mirroring."""
    raw = Path(nnUNet_raw) / DATASET
    labels = sorted((raw / "labelsTs").iterdir())
    images = [[str(raw / "imagesTs" / file.name.replace(".nii.gz", "_0000.nii.gz"))] for file in labels]
    predictor = nnUNetPredictor(
        use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"), allow_tqdm=False
    )
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    predictor.network.to(memory_format=torch.channels_last_3d)
    predictions = predictor.predict_from_files_sequential(images, None)
    references = [sitk.GetArrayFromImage(sitk.ReadImage(str(file))) for file in labels]
    pairs = zip(labels, predictions, references, strict=True)
    return {file.name.split(".")[0]: measure(ours == 1, reference == 1) for file, ours, reference in pairs}


def measure(prediction: np.ndarray, reference: np.ndarray) -> list[float]:
    """Dice in percent, lesions, how many of them have a predicted voxel, predicted components without a lesion voxel.

    Both masks have the same shape, and the reference is not empty.
    """
    lesions, number = ndimage.label(reference, ALL_NEIGHBOURS)
    components, predicted = ndimage.label(prediction, ALL_NEIGHBOURS)
    both = prediction & reference
    found, hits = (len(np.unique(parts[both])) for parts in (lesions, components))
    return [200 * both.sum() / (prediction.sum() + reference.sum()), number, found, predicted - hits]


def record(run: list[str], counts: dict[str, int], metrics: dict[str, list[float]]) -> None:
    """Replaces this run's rows of the per-case CSV and writes the table anew; `run` holds the values of RUN."""
    RESULTS.parent.mkdir(exist_ok=True)
    rows = []
    if RESULTS.is_file():
        with RESULTS.open(newline="") as f:
            rows = [row for row in list(csv.reader(f))[1:] if row[: len(RUN)] != run]
    patches = [str(counts[name]) for name in COUNTS]
    rows += [[*run, *patches, case, f"{v[0]:.2f}", *(str(n) for n in v[1:])] for case, v in sorted(metrics.items())]
    with replacing(RESULTS) as temporary, temporary.open("w", newline="") as f:
        csv.writer(f).writerows([[*RUN, *COUNTS, "case", *METRICS], *rows])
    with replacing(RESULTS.with_suffix(".md")) as temporary:
        temporary.write_text(table(rows))


def table(rows: list[list[str]]) -> str:
    """One line per trainer and code: means over its seeds, and the Dice of every seed."""
    runs: dict[tuple, list] = {}
    for row in rows:
        figures = [*row[len(RUN) : -len(METRICS) - 1], *row[-len(METRICS) :]]  # without the case's name
        runs.setdefault(tuple(row[: len(RUN)]), []).append([float(figure) for figure in figures])
    groups: dict[tuple, dict] = {}
    for (*group, seed), cases in sorted(runs.items()):
        used, with_foreground, dice, lesions, found, false = zip(*cases, strict=True)
        dice, false = statistics.mean(dice), sum(false) / len(false)
        share = 100 * with_foreground[0] / used[0]
        groups.setdefault(tuple(group), {})[seed] = (dice, 100 * sum(found) / sum(lesions), false, share)
    lines = [
        f"Lesions of less than {100 * LARGEST_FRACTION:.1f} % of a scan; {CASES['labeled']} labeled and "
        f"{CASES['unlabeled']} unlabeled scans, {CASES['test']} test scans, final checkpoint, no mirroring at "
        "prediction. Dice in percent, mean over test scans; a lesion is found where a voxel of it is predicted; false: "
        "predicted components without a lesion, per scan; foreground: part of the used labeled patches that show a "
        "lesion. Means over the seeds.",
        "",
        "| trainer | code | steps | seeds | Dice mean | Dice of each | lesions found | found of each | false | "
        "false of each | foreground |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for group, seeds in groups.items():
        dice, found, false, share = zip(*seeds.values(), strict=True)
        cells = [*group, ", ".join(seeds), f"{statistics.mean(dice):.1f}", ", ".join(f"{x:.1f}" for x in dice)]
        cells += [f"{statistics.mean(found):.0f} %", ", ".join(f"{x:.0f}" for x in found)]
        cells += [f"{statistics.mean(false):.2f}", ", ".join(f"{x:.2f}" for x in false)]
        lines.append(f"| {' | '.join(cells)} | {statistics.mean(share):.0f} % |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-tr", dest="trainers", nargs="+", default=["nnUNetTrainer", "nnUNetTrainerM3HL"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--label", required=True, help="which code or settings these are, for the table")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], metavar="NAME=VALUE")
    args = parser.parse_args()
    args.settings = {key: literal(value) for key, value in (setting.split("=", 1) for setting in args.settings)}
    if args.steps % STEPS_PER_EPOCH:
        parser.error(f"--steps must be a multiple of {STEPS_PER_EPOCH}.")
    torch.set_num_threads(1)
    print(f"{args.label}: {Path(nnunet_ssl.__file__).parent}", flush=True)
    make_dataset()
    for trainer in args.trainers:
        for seed in args.seeds:
            model = train(args, trainer, seed)
            counts = json.loads((model / "fold_0" / "patches.json").read_text())
            metrics = predict(model)
            record([trainer, args.label, str(args.steps), str(seed)], counts, metrics)
            dice = statistics.mean(values[0] for values in metrics.values())
            print(f"{trainer}, {args.label}, seed {seed}: Dice {dice:.2f}", flush=True)


if __name__ == "__main__":
    main()
