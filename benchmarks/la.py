"""Left atrium benchmark: trains, predicts the 20 test scans, and adds Dice and surface distances to a table.

    nnunet-ssl convert la -i LA -d 501 --train-list la_dev_train.list --test-list la_dev_test.list
    nnUNetv2_plan_and_preprocess -d 501 -c 3d_fullres -overwrite_target_spacing 2.5 2.5 2.5
    python benchmarks/la.py -d 501 -f 0 -tr nnUNetTrainer nnUNetTrainerM3 nnUNetTrainerM3HL
    python benchmarks/la.py -d 501 -f 3 -tr nnUNetTrainer                               # upper bound: all labels
    python benchmarks/la.py -d 501 -f 0 -tr nnUNetTrainerM3HL --set feature_pairs=all --on development
    python benchmarks/la.py -d 501 -f 0 -tr nnUNetTrainerM3HL --after nnUNetTrainer     # as with -pretrained_weights
    nnunet-ssl pseudo-label -d 501 -c la_quick -f 0 -o 511 -device cpu                  # self-training
    nnUNetv2_extract_fingerprint -d 511 && nnUNetv2_preprocess -d 511 -c 3d_fullres
    python benchmarks/la.py -d 511 -f 0 -tr nnUNetTrainer

Settings are chosen on the development scans of a fold, which no model of it saw the labels of (the validation cases and
the first 22 unlabeled ones); figures are reported on the test scans.

Every trainer takes the same number of steps of the same size on the same plans. The final checkpoint is used, nothing
is selected. What is trained already is not trained again. One process and one thread per call: start as many
calls as there are cores, or give --threads.
"""

import argparse
import csv
import json
import math
import os
import shutil
import statistics
import subprocess
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("nnUNet_n_proc_DA", "0")
os.environ.setdefault("nnUNet_compile", "0")

import numpy as np
import SimpleITK as sitk
import torch
from methods import literal, use_bf16, use_channels_last
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw, nnUNet_results
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_ssl.commands.demo import small_configuration
from nnunet_ssl.commands.evaluate import case_metrics
from nnunet_ssl.system.files import replacing

RESULTS = Path(__file__).parent / "results"
UNLABELED_DEVELOPMENT_SCANS = 22  # of a fold; with its 8 validation cases 30
METRICS = ["dice", "hd95", "asd"]  # per case: percent, mm, mm
RUN = ["trainer", "fold", "labeled", "network", "steps", "seed"]  # what identifies a row of the table
# patch in voxels, features per stage, batch size; every stage halves every axis
PROTOCOLS = {"quick": ([20, 28, 28], [16, 32, 64], 4), "long": ([56, 80, 80], [32, 64, 128, 256], 2)}


def add_configuration(dataset: str, protocol: str) -> str:
    """Adds the protocol's small configuration to the dataset's plans, on the data of 3d_fullres; returns its name."""
    path = Path(nnUNet_preprocessed) / dataset / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    name, configuration = f"la_{protocol}", small_configuration(plans, *PROTOCOLS[protocol])
    if plans["configurations"].get(name) != configuration:
        plans["configurations"][name] = configuration
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(plans, indent=4))
    return name


def variant(args, trainer: str) -> str:
    """The trainer with its settings and what it starts from."""
    suffix = "".join(f"-{key}={value}" for key, value in args.settings.items())
    return trainer + suffix + (f"-after={args.after}" if args.after else "")


def model_name(args, trainer: str) -> str:
    """What the model's folder is called instead of the trainer."""
    run = f"-{args.steps}-seed={args.seed}" if args.steps != 4000 or args.seed else ""
    return variant(args, trainer) + run + "-bf16" * args.bf16


def train(args, dataset: str, configuration: str, trainer_name: str, fold: int) -> Path:
    """Trains unless it is done already; returns the fold's folder."""
    torch.manual_seed(args.seed)
    np.random.seed(args.seed)
    folder = model_folder(args, dataset, configuration, trainer_name)
    trainer = get_trainer_from_args(dataset, configuration, fold, trainer_name, device=torch.device(args.device))
    trainer.num_iterations_per_epoch = 250
    trainer.num_epochs = args.steps // 250
    trainer.num_val_iterations_per_epoch = 5  # monitoring only
    for key, value in args.settings.items():
        if not hasattr(trainer, key):
            raise SystemExit(f"{trainer_name} has no setting {key}.")
        setattr(trainer, key, value)
    trainer.output_folder_base = str(folder)
    trainer.output_folder = str(folder / f"fold_{fold}")
    os.makedirs(trainer.output_folder, exist_ok=True)
    trainer.log_file = os.path.join(trainer.output_folder, os.path.basename(trainer.log_file))
    if args.device == "cpu":
        use_channels_last(trainer)
    if args.bf16:
        use_bf16(trainer)
    if not (folder / f"fold_{fold}" / "checkpoint_final.pth").is_file():
        if args.after:  # as with nnUNetv2_train -pretrained_weights
            earlier = SimpleNamespace(**{**vars(args), "settings": {}, "after": None})
            weights = model_folder(earlier, dataset, configuration, args.after) / f"fold_{fold}"
            trainer.initialize()
            load_pretrained_weights(trainer.network, str(weights / "checkpoint_final.pth"))
        trainer.run_training()
    return folder / f"fold_{fold}"


def model_folder(args, dataset: str, configuration: str, trainer: str) -> Path:
    return Path(nnUNet_results) / dataset / f"{model_name(args, trainer)}__nnUNetPlans__{configuration}"


def checkpoints(folder: Path) -> dict[str, str]:
    """Network name to checkpoint file name: the deployed network, and the others that the stock network can load."""
    state = torch.load(folder / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    ours = state.get("nnunet_ssl")
    if not ours:
        return {"student": "checkpoint_final.pth"}
    files = {ours["inference_network"]: "checkpoint_final.pth"}
    keys = state["network_weights"].keys()
    for name, weights in {"student": ours["student"], **ours["companions"]}.items():
        if name not in files and weights.keys() == keys:
            files[name] = f"checkpoint_{name}.pth"
            torch.save({**state, "network_weights": weights}, folder / files[name])
    return files


def scans(args, dataset: str, fold: int) -> dict[Path, Path]:
    """Image to reference label of the scans on which a model is measured."""
    raw = Path(nnUNet_raw) / provenance(dataset).get("dataset", dataset)
    if args.on == "test":
        labels = sorted((raw / "labelsTs").iterdir())
        return {raw / "imagesTs" / file.name.replace(".nii.gz", "_0000.nii.gz"): file for file in labels}
    split = json.loads((Path(nnUNet_preprocessed) / dataset / "splits_final.json").read_text())[fold]
    cases = split["val"] + split["unlabeled"][:UNLABELED_DEVELOPMENT_SCANS]
    return {raw / "imagesTr" / f"{case}_0000.nii.gz": raw / "labelsTr" / f"{case}.nii.gz" for case in cases}


def predict(args, dataset: str, configuration: str, name: str, fold: int, checkpoint: str) -> dict[str, list[float]]:
    """Predicts the scans with nnUNetv2_predict (no mirroring, to save time); the METRICS of every case."""
    model = Path(nnUNet_results) / dataset / f"{name}__nnUNetPlans__{configuration}"
    output, source = (model / f"{folder}_{args.on}_{fold}_{checkpoint}" for folder in ("predicted", "images"))
    for folder in (output, source):
        shutil.rmtree(folder, ignore_errors=True)
    source.mkdir()
    references = scans(args, dataset, fold)
    for image in references:
        (source / image.name).symlink_to(image)
    # nnUNetv2_predict takes as many threads as there are cores: let them sleep, not spin, while they wait
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    command = f"nnUNetv2_predict -d {dataset} -c {configuration} -f {fold} -tr {name} -chk {checkpoint} -npp 1 -nps 1"
    command += f" -device {args.device} --disable_tta --disable_progress_bar"
    command = [*command.split(), "-i", str(source), "-o", str(output)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return {file.name.split(".")[0]: measure(output / file.name, file) for file in references.values()}


def provenance(dataset: str) -> dict:
    """Where the labels of a dataset that `nnunet-ssl pseudo-label` wrote come from; empty for any other."""
    return json.loads((Path(nnUNet_raw) / dataset / "dataset.json").read_text()).get("pseudo_labels", {})


def measure(prediction: Path, reference: Path) -> list[float]:
    """Dice in percent, 95 % Hausdorff distance and average surface distance in mm of two label files."""
    images = [sitk.ReadImage(str(file)) for file in (prediction, reference)]
    ours, theirs = (sitk.GetArrayFromImage(image) == 1 for image in images)
    metrics = case_metrics(ours, theirs, images[1].GetSpacing()[::-1])
    return [100 * metrics["Dice"], metrics["HD95_mm"], metrics["ASD_mm"]]


def record(args, run: list[str], metrics: dict[str, list[float]]) -> None:
    """Replaces this run's rows of the per-case CSV and writes the table anew; `run` holds the values of RUN."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"la_{args.protocol}{'_bf16' * args.bf16}{'_development' * (args.on == 'development')}.csv"
    rows = []
    if path.is_file():
        with path.open(newline="") as f:
            rows = [row for row in list(csv.reader(f))[1:] if row[: len(RUN)] != run]
    rows += [[*run, case, *(f"{value:.2f}" for value in values)] for case, values in sorted(metrics.items())]
    with replacing(path) as temporary, temporary.open("w", newline="") as f:
        csv.writer(f).writerows([[*RUN, "case", *METRICS], *rows])
    with replacing(path.with_suffix(".md")) as temporary:
        trained = f"`{args.protocol}`{', trained in bfloat16' * args.bf16}"
        temporary.write_text(table(f"{trained}, {len(metrics)} {args.on} scans", rows))


def table(title: str, rows: list[list[str]]) -> str:
    """One line per run, few labels first; then one line per trainer that was trained with several seeds."""
    groups: dict[tuple, list] = {}
    for row in rows:
        # runs of before the distances were measured have the Dice only
        metrics = [float(value or "nan") for value in row[len(RUN) + 1 :]]
        groups.setdefault(tuple(row[: len(RUN)]), []).append(metrics + [math.nan] * (len(METRICS) - len(metrics)))
    lines = [
        f"Protocol {title}, final checkpoint, no mirroring at prediction. Dice in percent; HD95 is the "
        f"95 % Hausdorff distance, ASD the average surface distance from prediction to reference, means in mm.",
        "",
        "| trainer | labeled | network | steps | seed | Dice mean | sd over cases | worst case | HD95 | ASD |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    seeds: dict[tuple, list] = {}
    for run, cases in sorted(groups.items(), key=lambda group: (int(group[0][2]), group[0][0], group[0][3:])):
        trainer, _, labeled, network, steps, seed = run
        dice, hd95, asd = zip(*cases, strict=True)
        figures = f"{statistics.mean(dice):.2f} | {statistics.stdev(dice):.2f} | {min(dice):.2f}"
        lines.append(f"| {trainer} | {labeled} | {network} | {steps} | {seed} | {figures} | {_distances(hd95, asd)} |")
        means = [statistics.mean(metric) for metric in (dice, hd95, asd)]
        seeds.setdefault((trainer, labeled, network, steps), []).append((seed, *means))
    lines += [
        "",
        "Where there are several seeds: mean over them, and the Dice of every one.",
        "",
        "| trainer | labeled | network | steps | seeds | Dice mean | sd over seeds | Dice of each | HD95 | ASD |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run, runs in seeds.items():
        if len(runs) > 1:
            number, dice, hd95, asd = zip(*runs, strict=True)
            figures = (
                f"{statistics.mean(dice):.2f} | {statistics.stdev(dice):.2f} | {', '.join(f'{d:.2f}' for d in dice)}"
            )
            lines.append(f"| {' | '.join(run)} | {', '.join(number)} | {figures} | {_distances(hd95, asd)} |")
    return "\n".join(lines) + "\n"


def _distances(*metrics: tuple[float, ...]) -> str:
    return " | ".join("" if math.isnan(m) else f"{m:.2f}" for m in map(statistics.mean, metrics))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-d", dest="dataset", default="501")
    parser.add_argument("-tr", dest="trainers", nargs="+", required=True)
    parser.add_argument("-f", dest="folds", nargs="+", type=int, default=[0])
    parser.add_argument("--protocol", choices=PROTOCOLS, default="quick")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--set", dest="settings", nargs="*", default=[], metavar="NAME=VALUE", help="trainer attributes"
    )
    parser.add_argument("--after", metavar="TRAINER", help="start from the weights of this trainer's model of the fold")
    parser.add_argument("--on", choices=("development", "test"), default="test", help="the scans to measure on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast; for CPUs that have it")
    args = parser.parse_args()
    pairs = [setting.split("=", 1) for setting in args.settings]
    args.settings = {key: literal(value) for key, value in pairs}
    torch.set_num_threads(args.threads)

    dataset = maybe_convert_to_dataset_name(int(args.dataset))
    configuration = add_configuration(dataset, args.protocol)
    splits = json.loads((Path(nnUNet_preprocessed) / dataset / "splits_final.json").read_text())
    for fold in args.folds:
        for trainer in args.trainers:
            name = model_name(args, trainer)
            folder = train(args, dataset, configuration, trainer, fold)
            for network, checkpoint in checkpoints(folder).items():
                metrics = predict(args, dataset, configuration, name, fold, checkpoint)
                labeled = set(splits[fold]["train"]) - set(provenance(dataset).get("cases", []))
                shown = "self-training, " * bool(provenance(dataset)) + variant(args, trainer)
                run = [shown, fold, len(labeled), network, args.steps, args.seed]
                record(args, [str(value) for value in run], metrics)
                dice = statistics.mean(values[0] for values in metrics.values())
                print(f"{name}, fold {fold}, {network}: Dice {dice:.2f}", flush=True)


if __name__ == "__main__":
    main()
