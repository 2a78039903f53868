"""The whole way on a small synthetic dataset: nnU-Net's own commands without and with unlabeled scans, and the Dice."""

import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk
from scipy import ndimage
from tqdm import tqdm

from nnunet_ssl.system.files import replacing
from nnunet_ssl.system.processes import execute

DATASET = "Dataset999_Demo"
CONFIGURATION = "demo"
TRAINERS = ("nnUNetTrainer_8epochs", "nnUNetTrainerM3HL_8epochs")  # an epoch of nnU-Net has 250 steps
CASES = {"labeled": 4, "unlabeled": 16, "test": 8}
# Ranges of the standard deviations of noise and background texture, and of the bias field's slope: the labeled scans
# are of one good scanner, the others of any scanner.
ONE_SCANNER = {"noise": (5, 10), "texture": (15, 15), "slope": (0, 0.4)}
ANY_SCANNER = {"noise": (5, 30), "texture": (15, 30), "slope": (0, 1.3)}
SEED = 0  # of the scans; the training is not seeded, nnU-Net does not seed it either
SHAPE = (24, 32, 32)  # voxels of a scan, slices first
SPACING = 3.0  # mm, along every axis
PATCH = (20, 24, 24)  # voxels
FEATURES = (8, 16, 32)  # of the network, per stage; every stage halves every axis
BATCH_SIZE = 2
PICTURE = "demo.png"
SHOWN = 3  # scans in the picture: those on which the two differ most and least, and one between
MARKER = "demo.json"  # in the output folder: says that the demo made it, and which commands have finished
TAIL = 15  # lines of a failed command's log that are shown


class Command(NamedTuple):
    """A console command: `program` in this Python's folder of scripts, `settings` for its environment alone."""

    name: str
    program: str
    arguments: tuple[str, ...]
    settings: dict[str, str] = {}

    def __str__(self):
        return shlex.join([*(f"{k}={v}" for k, v in self.settings.items()), self.program, *self.arguments])


def demo(output: Path) -> None:
    """Makes the dataset, trains with labeled scans only and with unlabeled ones too, and prints a table of the Dice.

    Everything lies in `output`. A demo that was interrupted goes on behind the last command that finished.

    Raises:
        FileExistsError: `output` holds something else, or the demo of another version.
        SystemExit: a command failed; the message has the end of its log.
    """
    sys.stdout.reconfigure(line_buffering=True)  # also into a file, where people look how far it is
    output = Path(output).absolute()
    finished = claim(output)
    raw, plans = (output / f"nnUNet_{kind}" / DATASET for kind in ("raw", "preprocessed"))
    print(f"{', '.join(f'{n} {kind}' for kind, n in CASES.items())} scans in {raw}")
    write_dataset(raw)

    folders = {f"nnUNet_{kind}": str(output / f"nnUNet_{kind}") for kind in ("raw", "preprocessed", "results")}
    # compiling takes longer than the trainings, and so do worker processes that each import torch first
    settings = {**folders, "nnUNet_compile": "0", "nnUNet_def_n_proc": "1"}
    print("\n".join(f"$ export {name}={shlex.quote(value)}" for name, value in settings.items()))
    environment = {k: v for k, v in os.environ.items() if k != "nnUNet_n_proc_DA"} | settings  # planning fails with 0

    todo = commands(output, device())
    with tqdm(todo, unit="command", disable=None) as bar:  # None: no bar in files and pipes
        for command in bar:
            bar.set_description(command.name)
            log = output / "logs" / f"{command.name}.log"
            tqdm.write(f"$ {command}")
            if str(command) in finished:
                tqdm.write("  finished before")
                continue
            tqdm.write(f"  log: {log}")
            seconds = run(command, log, environment, bar.refresh)
            tqdm.write(f"  {seconds:.0f} s")
            if command.name == "plan":
                add_configuration(plans / "nnUNetPlans.json")
                tqdm.write(f"Added the small configuration {CONFIGURATION} to {plans / 'nnUNetPlans.json'}")
            finished.append(str(command))
            write_marker(output, finished)

    scores = {trainer: dice(output / "predictions" / trainer / "summary.json") for trainer in TRAINERS}
    print(table(scores))
    picture(output, raw, scores)
    print(
        f"\nThe labeled scans are of one good scanner, the unlabeled ones and the test scans of any scanner. Both "
        f"trainings took the same number of steps. So short trainings differ by some points from run to run, and the "
        f"scans are made up: this shows the way, it is no benchmark.\n"
        f"picture:     {output / PICTURE}\n"
        f"predictions: {output / 'predictions'}\n"
        f"models:      {output / 'nnUNet_results' / DATASET}\n"
        f"logs:        {output / 'logs'}"
    )


def claim(output: Path) -> list[str]:
    """Makes the folder, or recognizes one that the demo made; returns the commands that have finished in it.

    Raises: FileExistsError for a folder with anything else in it.
    """
    version, marker = metadata.version("nnunet-ssl"), output / MARKER
    if marker.is_file():
        made = json.loads(marker.read_text())
        if made["version"] == version:
            return made["finished"]
        raise FileExistsError(
            f"{output} is the demo of nnunet-ssl {made['version']}, this is {version}. Remove it or choose another "
            f"folder: nnunet-ssl demo -o DIR"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"{output} was not made by the demo and is not empty. Choose another folder: nnunet-ssl demo -o DIR"
        )
    output.mkdir(parents=True, exist_ok=True)
    write_marker(output, [])
    return []


def write_marker(output: Path, finished: Sequence[str]) -> None:
    """Records in `output` which commands have finished, so that an interrupted demo goes on behind them."""
    content = {"version": metadata.version("nnunet-ssl"), "finished": list(finished)}
    with replacing(output / MARKER) as temporary:
        temporary.write_text(json.dumps(content, indent=1))


def device() -> str:
    """In the words of nnU-Net's -device; not Apple's mps, on which the demo was never tried."""
    import torch  # takes seconds: a folder is refused before

    return "cuda" if torch.cuda.is_available() else "cpu"


def commands(output: Path, device: str) -> list[Command]:
    """What a user types, in order: stock nnU-Net but for the preprocessing of the unlabeled scans."""
    number = DATASET[7:10]
    raw = output / "nnUNet_raw" / DATASET
    steps = [
        # the demo's configuration inherits the data of 3d_fullres, so this is all that has to be preprocessed
        Command("plan", "nnUNetv2_plan_and_preprocess", ("-d", number, "-c", "3d_fullres", "-npfp", "1", "-np", "1")),
        Command("unlabeled", "nnunet-ssl", ("preprocess", "-d", number, "-c", CONFIGURATION, "-np", "1")),
    ]
    for trainer in TRAINERS:
        # Fold "all" trains on every labeled case. nnU-Net then validates on the same cases, which is no measurement;
        # but nothing is chosen by it: the final checkpoint predicts, and the Dice comes from the test scans.
        model = ("-tr", trainer, "-device", device)
        prediction = str(output / "predictions" / trainer)
        no_workers = {"nnUNet_n_proc_DA": "0"} if device == "cpu" else {}  # they would compete with the training
        # one prediction per scan instead of eight mirrored ones, to save time
        data = ("-i", str(raw / "imagesTs"), "-o", prediction, "-npp", "0", "-nps", "0", "--disable_tta")
        steps += [
            Command(f"train_{trainer}", "nnUNetv2_train", (number, CONFIGURATION, "all", *model), no_workers),
            Command(
                f"predict_{trainer}",
                "nnUNetv2_predict",
                ("-d", number, "-c", CONFIGURATION, "-f", "all", *model, *data),
            ),
            Command(
                f"evaluate_{trainer}",
                "nnUNetv2_evaluate_simple",
                (str(raw / "labelsTs"), prediction, "-l", "1", "-np", "1"),
            ),
        ]
    return steps


def run(command: Command, log: Path, environment: dict[str, str], tick: Callable[[], object]) -> float:
    """Runs a command with its output in a log file, calls `tick` while it runs, returns its seconds.

    Raises: SystemExit with the end of the log where the command fails, or with advice where there is no such program.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    begin = time.monotonic()
    try:
        code = execute(command.program, command.arguments, log, environment | command.settings, tick)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    if code != 0:
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:])
        raise SystemExit(
            f"{command.program} failed with exit code {code}. The end of its log:\n\n{end}\n\n"
            f"The whole log: {log}\nWhen the cause is gone, the same demo command goes on from here."
        )
    return time.monotonic() - begin


def dice(summary: Path) -> list[float]:
    """Dice of every test scan in percent, from nnU-Net's summary.json."""
    return [
        100 * case["metrics"]["1"]["Dice"]
        for case in json.loads(summary.read_text(encoding="utf-8"))["metric_per_case"]
    ]


def table(scores: dict[str, list[float]]) -> str:
    """Markdown table of the Dice (percent) per trainer."""
    lines = [
        "",
        "| trainer | labeled scans | unlabeled scans | Dice mean | worst case |",
        "|---|---|---|---|---|",
    ]
    for trainer, values in scores.items():
        unlabeled = 0 if trainer == TRAINERS[0] else CASES["unlabeled"]
        figures = f"{statistics.mean(values):.1f} | {min(values):.1f}"
        lines.append(f"| {trainer} | {CASES['labeled']} | {unlabeled} | {figures} |")
    return "\n".join(lines)


def picture(output: Path, raw: Path, scores: dict[str, list[float]]) -> None:
    """Writes a picture of both trainers' predictions on some test scans."""
    from nnunet_ssl.commands.pictures import compare_segmentations  # imports matplotlib

    without, with_unlabeled = scores.values()
    order = np.argsort(np.subtract(with_unlabeled, without))
    chosen = [int(order[round(i)]) for i in np.linspace(len(order) - 1, 0, SHOWN)]
    references = [sorted((raw / "labelsTs").iterdir())[index] for index in chosen]
    compare_segmentations(
        [raw / "imagesTs" / f.name.replace(".nii.gz", "_0000.nii.gz") for f in references],
        references,
        {name.partition("_")[0]: [output / "predictions" / name / f.name for f in references] for name in scores},
        output / PICTURE,
    )


def write_dataset(folder: Path) -> None:
    """Writes a raw dataset: imagesTr and labelsTr, imagesUn, imagesTs, and labelsTs, which only the Dice uses."""
    rng = np.random.default_rng(SEED)
    for kind, ending in (("labeled", "Tr"), ("unlabeled", "Un"), ("test", "Ts")):
        for index in range(CASES[kind]):
            case = f"{kind}_{index:03d}"
            image, label = make_case(rng, **(ONE_SCANNER if kind == "labeled" else ANY_SCANNER))
            write_image(folder / f"images{ending}" / f"{case}_0000.nii.gz", image)
            if kind != "unlabeled":
                write_image(folder / f"labels{ending}" / f"{case}.nii.gz", label)
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "organ": 1},
        "numTraining": CASES["labeled"],
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=4))


def write_image(file: Path, array: np.ndarray) -> None:
    """Writes an array (slices, rows, columns) as an image with the demo's spacing; makes its folder."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing([SPACING] * 3)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(file))


def make_case(
    rng: np.random.Generator,
    noise: tuple[float, float],
    texture: tuple[float, float],
    slope: tuple[float, float],
    shape: Sequence[int] = SHAPE,
) -> tuple[np.ndarray, np.ndarray]:
    """One synthetic scan: a bright lobed organ among vessels and balls as bright, with a bias field and noise.

    Args:
        noise: range that the standard deviation of the noise is drawn from.
        texture: the same for the background's smooth texture.
        slope: range of the bias field's slope, in powers of e from one side of the image to the other.
        shape: voxels, slices first.

    Returns:
        Image (*shape) float32 and label (*shape) uint8: 1 in the organ, a connected part that does not touch the
        faces of the image, and 0 elsewhere.
    """
    organ = make_organ(rng, shape)
    vessels, balls = make_neighbours(rng, organ)
    image = 100 + rng.uniform(*texture) * smooth_noise(rng, shape, 4)
    image += rng.uniform(65, 85) * ndimage.gaussian_filter(organ + 1.7 * vessels + 0.4 * balls, 0.6)
    field = rng.uniform(*slope) / max(shape) * direction(rng)
    image *= np.exp(np.tensordot(field, grid(shape, np.divide(shape, 2)), 1))
    image += rng.uniform(*noise) * rng.standard_normal(shape)
    return image.astype(np.float32), organ.astype(np.uint8)


def make_organ(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Mask of two or three joined ellipsoids with an uneven surface."""
    center = shape * rng.uniform(0.4, 0.6, 3)
    radii = min(shape) * rng.uniform(0.22, 0.32, 3)
    axes = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    distance = ellipsoid(shape, center, radii, axes)
    for _ in range(rng.integers(1, 3)):
        other = center + 0.9 * radii.mean() * direction(rng)
        distance = np.minimum(distance, ellipsoid(shape, other, 0.7 * radii, axes))
    organ = distance + 0.12 * smooth_noise(rng, shape, 2.5) < 1
    inside = np.zeros(shape, bool)
    inside[1:-1, 1:-1, 1:-1] = True
    parts, _ = ndimage.label(organ & inside)
    return parts == np.bincount(parts[parts > 0]).argmax()


def make_neighbours(rng: np.random.Generator, organ: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mask of straight vessels, which may end at the organ, and of balls, which keep a distance from it."""
    shape = organ.shape
    vessels, balls = np.zeros(shape, bool), np.zeros(shape, bool)
    for _ in range(rng.integers(2, 4)):
        offset, along = grid(shape, shape * rng.uniform(0, 1, 3)), direction(rng)
        across = np.linalg.norm(offset - np.multiply.outer(along, np.tensordot(along, offset, 1)), axis=0)
        vessels |= across < min(shape) * rng.uniform(0.04, 0.08)
    for _ in range(rng.integers(3, 6)):
        center, radii = shape * rng.uniform(0, 1, 3), min(shape) * rng.uniform(0.07, 0.14, 3)
        balls |= ellipsoid(shape, center, radii, np.eye(3)) < 1
    return vessels & ~organ, balls & ~vessels & ~ndimage.binary_dilation(organ, iterations=2)


def ellipsoid(shape: Sequence[int], center: np.ndarray, radii: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Every voxel's distance from the center (voxels) in units of the radii along `axes`: below 1 inside."""
    return np.linalg.norm(np.tensordot(axes / radii[:, None], grid(shape, center), 1), axis=0)


def grid(shape: Sequence[int], origin: np.ndarray) -> np.ndarray:
    """Coordinates (3, *shape) of the voxels relative to `origin`."""
    return np.indices(shape) - np.reshape(origin, (3, 1, 1, 1))


def direction(rng: np.random.Generator) -> np.ndarray:
    """Random unit vector (3,)."""
    vector = rng.standard_normal(3)
    return vector / np.linalg.norm(vector)


def smooth_noise(rng: np.random.Generator, shape: Sequence[int], scale: float) -> np.ndarray:
    """Random field of mean 0 and standard deviation 1 with structures of about `scale` voxels."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape), scale, mode="wrap")
    return (field - field.mean()) / field.std()


def add_configuration(file: Path) -> None:
    """Adds a configuration to the plans that a CPU can train in minutes."""
    plans = json.loads(file.read_text(encoding="utf-8"))
    plans["configurations"][CONFIGURATION] = small_configuration(plans, PATCH, FEATURES, BATCH_SIZE)
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(plans, indent=4))


def small_configuration(
    plans: dict, patch: Sequence[int], features: Sequence[int], batch_size: int, base: str = "3d_fullres"
) -> dict:
    """A configuration for plans with a network of the planned kind but smaller.

    Args:
        plans: content of nnUNetPlans.json, left as it is.
        patch: voxels, of as many axes as the configuration's.
        features: of the network, per stage; every stage halves every axis and has two convolutions.
        batch_size: patches per step.
        base: the planned configuration whose data it takes.
    """
    architecture = deepcopy(plans["configurations"][base]["architecture"])
    stages, axes = len(features), len(patch)
    architecture["arch_kwargs"].update(
        n_stages=stages,
        features_per_stage=list(features),
        kernel_sizes=[[3] * axes] * stages,
        strides=[[1] * axes] + [[2] * axes] * (stages - 1),
        n_conv_per_stage=[2] * stages,
        n_conv_per_stage_decoder=[2] * (stages - 1),
    )
    return {
        "inherits_from": base,
        "patch_size": list(patch),
        "batch_size": batch_size,
        "architecture": architecture,
    }
