"""Two made-up datasets: small lesions, and unlabeled scans of other scanners than the labeled ones.

    export nnUNet_raw=MADE_UP/raw nnUNet_preprocessed=MADE_UP/preprocessed nnUNet_results=MADE_UP/results
    python benchmarks/made_up.py lesions -tr nnUNetTrainer nnUNetTrainerM3HL --seeds 0 1 2 [--bf16]
    python benchmarks/made_up.py scanners -tr nnUNetTrainerM3HL --set rampup=0.0 --on development
    python benchmarks/made_up.py lesions -tr nnUNetTrainerM3HL --alone --steps 8000

*lesions*: less than 0.2 % of a scan is lesion. *scanners*: the demo's organ; the labeled scans are of one good scanner,
the unlabeled ones and those to measure on of any: more noise, texture and shading.

Every row is two trainings of as many steps, as in methods.py: `nnUNetTrainer` on the labeled scans, the same for all
rows of a seed, and from its weights the row's trainer; with --alone one, from random weights. The final checkpoint is
used, nothing is selected. What is trained already is not trained again. One process and one thread per call. The scans
are made, planned and preprocessed by the first call; their difficulty was chosen with nnUNetTrainer alone (that of
`scanners`: for the demo).

A patch of *lesions* is a 16th of a scan: most have no lesion in them, but for those that nnU-Net puts on foreground,
the last third of every batch. nnU-Net's Dice has a smoothing of 1e-5, which rewards a network that finds nothing in
such a patch as soon as the probabilities of all voxels sum to less. In the large patches that nnU-Net plans they never
do. In these they do, and then the network finds nothing anywhere (two of five trainings of nnUNetTrainer). So the
smoothing is 0 there for all trainers, as in nnU-Net's nnUNetTrainerDiceCELoss_noSmooth.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("nnUNet_n_proc_DA", "0")
os.environ.setdefault("nnUNet_compile", "0")

import numpy as np
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.run.run_training import get_trainer_from_args
from phases import literal, seed_all, use_bf16, use_channels_last
from scipy import ndimage

from nnunet_ssl.commands import demo
from nnunet_ssl.commands.demo import direction, ellipsoid, grid, small_configuration, smooth_noise, write_image
from nnunet_ssl.system.files import replacing

RESULTS = Path(__file__).parent / "results"
CONFIGURATION = "small"
FOLDERS = {"unlabeled": "Un", "test": "Ts", "development": "Development"}  # endings; of the others Tr
SEED = 0  # of the scans
SHAPE = (60, 60, 60)  # voxels of a scan with lesions
LARGEST_FRACTION = 0.002  # of its voxels that are lesion
LESION = 80  # brightness above the background, whose mean is 100
TEXTURE, NOISE = 10, 10  # standard deviations of the background's smooth texture and of the noise
FEATURES, BATCH_SIZE = (8, 16, 32), 2
STEPS_PER_EPOCH = 250
FIRST = "nnUNetTrainer"  # whose weights every row starts from
RUN = ["on", "trainer", "steps", "seed"]  # what identifies a row of the table
METRICS = ["dice", "lesions", "found", "false_positives", "volume"]  # of a case; Dice in percent
ALL_NEIGHBOURS = np.ones((3, 3, 3))
HEAD = (
    f"Every trainer starts from the weights of an {FIRST} with as many steps. Dice in percent, mean over the scans; a "
    "lesion is found where a voxel of it is predicted; false: predicted components without a lesion, per scan; volume: "
    "predicted voxels per lesion voxel. Means over the seeds, in brackets of each seed. `benchmarks/made_up.py`."
)


def make_lesion_case(rng: np.random.Generator, _: str) -> tuple[np.ndarray, np.ndarray]:
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


def make_organ_case(rng: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A scan of the demo, as `make_lesion_case`: of one good scanner where it has a label for the training."""
    return demo.make_case(rng, **(demo.ONE_SCANNER if kind in ("labeled", "validation") else demo.ANY_SCANNER))


class Scans(NamedTuple):
    """A made-up dataset, and the network for it."""

    dataset: str
    table: str  # file in RESULTS, without its ending
    title: str
    cases: dict[str, int]
    make_case: Callable[[np.random.Generator, str], tuple[np.ndarray, np.ndarray]]
    patch: tuple[int, ...]
    steps: int
    smooth: float | None = None  # smoothing of the Dice loss; None: nnU-Net's


SCANS = {
    "lesions": Scans(
        "Dataset998_SmallStructures",
        "small_structures",
        f"Lesions of less than {100 * LARGEST_FRACTION:.1f} % of a scan",
        {"labeled": 6, "validation": 2, "unlabeled": 24, "test": 20, "development": 20},
        make_lesion_case,
        (24, 24, 24),
        4000,
        smooth=0.0,
    ),
    "scanners": Scans(
        "Dataset997_OtherScanners",
        "other_scanners",
        "An organ (one lesion in what follows), the labeled scans of one scanner, the others of any",
        {"labeled": 4, "validation": 2, "unlabeled": 16, "test": 40, "development": 40},
        make_organ_case,
        demo.PATCH,
        1000,
    ),
}


def make_dataset(scans: Scans) -> None:
    """Writes, plans and preprocesses the dataset with nnU-Net's commands, unless it is there."""
    raw, preprocessed = (Path(folder) / scans.dataset for folder in (nnUNet_raw, nnUNet_preprocessed))
    plans_file, split_file = preprocessed / "nnUNetPlans.json", preprocessed / "splits_final.json"
    if split_file.is_file():  # is written last
        return
    rng = np.random.default_rng(SEED)
    names = {kind: [f"{kind}_{index:03d}" for index in range(number)] for kind, number in scans.cases.items()}
    for kind, cases in names.items():
        ending = FOLDERS.get(kind, "Tr")
        for case in cases:
            image, label = scans.make_case(rng, kind)
            write_image(raw / f"images{ending}" / f"{case}_0000.nii.gz", image)
            if kind != "unlabeled":
                write_image(raw / f"labels{ending}" / f"{case}.nii.gz", label)
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "lesion": 1},
        "numTraining": scans.cases["labeled"] + scans.cases["validation"],
        "file_ending": ".nii.gz",
    }
    (raw / "dataset.json").write_text(json.dumps(description, indent=4))

    environment = {k: v for k, v in os.environ.items() if k != "nnUNet_n_proc_DA"}  # planning fails with 0
    number = scans.dataset[7:10]
    command = f"nnUNetv2_plan_and_preprocess -d {number} -c 3d_fullres -npfp 1 -np 1"
    subprocess.run(command.split(), check=True, env=environment)
    plans = json.loads(plans_file.read_text())
    plans["configurations"][CONFIGURATION] = small_configuration(plans, scans.patch, FEATURES, BATCH_SIZE)
    plans_file.write_text(json.dumps(plans, indent=4))
    command = f"nnunet-ssl preprocess -d {number} -c {CONFIGURATION} -np 1"
    subprocess.run(command.split(), check=True, env=environment)
    with replacing(split_file) as temporary:
        temporary.write_text(json.dumps([{"train": names["labeled"], "val": names["validation"]}]))


def row_of(args, trainer_name: str) -> str:
    return ", ".join([trainer_name, *args.settings, *["alone"] * args.alone])


def train(args, scans: Scans, trainer_name: str, seed: int, start: Path | None = None) -> Path:
    """Trains unless it is done already; returns the model's folder. `start`: the model whose weights are the first."""
    of_row = start or args.alone
    name = row_of(args, trainer_name).replace(", ", "_") if of_row else f"{trainer_name}_first"
    model = Path(nnUNet_results) / scans.dataset / f"{name}-{args.steps}-seed={seed}__nnUNetPlans__{CONFIGURATION}"
    if checkpoint(model).is_file():
        return model
    seed_all(seed, 0)
    trainer = get_trainer_from_args(scans.dataset, CONFIGURATION, 0, trainer_name, device=torch.device("cpu"))
    trainer.num_iterations_per_epoch = STEPS_PER_EPOCH
    trainer.num_epochs = args.steps // STEPS_PER_EPOCH
    trainer.num_val_iterations_per_epoch = 5  # monitoring only
    if start and hasattr(trainer, "supervised_part"):
        trainer.supervised_part = 0.0  # the first training was it
    for key, value in (setting.split("=", 1) for setting in args.settings if of_row):
        if not hasattr(trainer, key):
            raise SystemExit(f"{trainer_name} has no setting {key}.")
        setattr(trainer, key, literal(value))
    trainer.output_folder_base, trainer.output_folder = str(model), str(checkpoint(model).parent)
    checkpoint(model).parent.mkdir(parents=True, exist_ok=True)
    trainer.log_file = str(checkpoint(model).parent / Path(trainer.log_file).name)
    use_channels_last(trainer)
    if args.bf16:
        use_bf16(trainer)
    trainer.initialize()
    for part in trainer.loss.modules():
        if scans.smooth is not None and hasattr(part, "smooth"):
            part.smooth = scans.smooth
    if start:
        weights = torch.load(checkpoint(start), map_location="cpu", weights_only=False)["network_weights"]
        trainer.network.load_state_dict(weights)
        seed_all(seed, 1)  # other batches than those of the first phase
    trainer.run_training()
    return model


def checkpoint(model: Path) -> Path:
    return model / "fold_0" / "checkpoint_final.pth"


def predict(scans: Scans, model: Path, on: str) -> dict[str, list[float]]:
    """The METRICS of every scan, predicted without mirroring."""
    raw = Path(nnUNet_raw) / scans.dataset
    labels = sorted((raw / f"labels{FOLDERS[on]}").iterdir())
    images = [[str(raw / f"images{FOLDERS[on]}" / f.name.replace(".nii.gz", "_0000.nii.gz"))] for f in labels]
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
    """The METRICS of a case: lesions, how many have a predicted voxel, predicted components without a lesion voxel.

    Both masks have the same shape, and the reference is not empty. Volume: predicted voxels per voxel of a lesion.
    """
    lesions, number = ndimage.label(reference, ALL_NEIGHBOURS)
    components, predicted = ndimage.label(prediction, ALL_NEIGHBOURS)
    both = prediction & reference
    found, hits = (len(np.unique(parts[both])) for parts in (lesions, components))
    return [
        200 * both.sum() / (prediction.sum() + reference.sum()),
        number,
        found,
        predicted - hits,
        prediction.sum() / reference.sum(),
    ]


def record(scans: Scans, run: list[str], metrics: dict[str, list[float]]) -> None:
    """Replaces this run's rows of the per-case CSV and writes the tables anew; `run` holds the values of RUN."""
    rows, file = [], RESULTS / f"{scans.table}.csv"
    if file.is_file():
        with file.open(newline="") as f:
            rows = [row for row in list(csv.reader(f))[1:] if row[: len(RUN)] != run]
    for case, (dice, *counts, volume) in sorted(metrics.items()):
        rows.append([*run, case, f"{dice:.2f}", *map(str, counts), f"{volume:.2f}"])
    with replacing(file) as temporary, temporary.open("w", newline="") as f:
        csv.writer(f).writerows([[*RUN, "case", *METRICS], *rows])
    labeled, unlabeled, test = (scans.cases[kind] for kind in ("labeled", "unlabeled", "test"))
    title = f"{scans.title}; {labeled} labeled and {unlabeled} unlabeled scans, {test} to measure on. {HEAD}"
    with replacing(file.with_suffix(".md")) as temporary:
        temporary.write_text("\n\n".join([title, *tables(rows)]) + "\n")


def tables(rows: list[list[str]]) -> list[str]:
    """A table each for development and test scans, with a line per trainer."""
    runs: dict[tuple, list] = {}
    for row in rows:
        runs.setdefault(tuple(row[: len(RUN)]), []).append([float(figure) for figure in row[len(RUN) + 1 :]])
    lines: dict[str, dict] = {}
    for (on, *line, seed), cases in sorted(runs.items()):
        dice, lesions, found, false, volume = zip(*cases, strict=True)
        shown = statistics.mean(dice), 100 * sum(found) / sum(lesions), statistics.mean(false), statistics.mean(volume)
        lines.setdefault(on, {}).setdefault(tuple(line), {})[seed] = shown
    found = []
    for on, of_trainers in lines.items():
        table = [
            f"| {on} scans | steps | seeds | Dice | lesions found, % | false | volume |",
            "|---|---|---|---|---|---|---|",
        ]
        for line, seeds in of_trainers.items():
            columns = zip(*seeds.values(), strict=True)
            cells = [*line, ", ".join(seeds), *map(mean_and_each, columns, (1, 0, 1, 2))]
            table.append(f"| {' | '.join(cells)} |")
        found.append("\n".join(table))
    return found


def mean_and_each(values: tuple[float, ...], digits: int) -> str:
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{statistics.mean(values):.{digits}f} ({each})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", choices=SCANS)
    parser.add_argument("-tr", dest="trainers", nargs="+", default=["nnUNetTrainer", "nnUNetTrainerM3HL"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    steps = ", ".join(f"{name}: {scans.steps}" for name, scans in SCANS.items())
    parser.add_argument("--steps", type=int, help=f"of each of the two trainings (default: {steps})")
    parser.add_argument("--alone", action="store_true", help="one training of --steps, from random weights")
    parser.add_argument("--set", dest="settings", nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--on", choices=("development", "test"), default="test", help="the scans to measure on")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16; for CPUs with avx512_bf16 or AMX")
    args = parser.parse_args()
    scans = SCANS[args.scans]
    args.steps = args.steps or scans.steps
    if args.steps % STEPS_PER_EPOCH:
        parser.error(f"--steps must be a multiple of {STEPS_PER_EPOCH}.")
    torch.set_num_threads(1)
    make_dataset(scans)
    for seed in args.seeds:
        first = None if args.alone else train(args, scans, FIRST, seed)
        for trainer in args.trainers:
            metrics = predict(scans, train(args, scans, trainer, seed, first), args.on)
            row = row_of(args, trainer)
            record(scans, [args.on, row, str(args.steps), str(seed)], metrics)
            dice = statistics.mean(values[0] for values in metrics.values())
            print(f"{row}, seed {seed}, {args.on} scans: Dice {dice:.2f}", flush=True)


if __name__ == "__main__":
    main()
