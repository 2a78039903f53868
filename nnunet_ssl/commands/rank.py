"""Which unlabeled scans a model is worst on: predicts them with several networks and sorts them by expected error.

A folder that `nnunet-ssl rank` has written holds:

- `rank.csv`, a row per scan, worst first (an empty cell: not defined for this scan):
    case
    score                   expected error, higher is worse, see `ranking.scores`
    disagreement            1 - mean pairwise Dice of the networks' foreground, in [0, 1]; empty for one network
    disagreement_<class>    the same for every foreground class or region
    entropy_<class>         mean binary entropy in bits of the networks' mean probability, over the voxels that may be
                            of the class (probability of 5 % or more); empty where no voxel may be
    volume_ml_<class>       of the mean prediction; 0 where the class is not predicted. 2D images count as 1 mm thick
    volume_z                largest absolute robust z over the classes of the logarithm of the volume, over all scans
    components              connected pieces of the foreground of the mean prediction
    missing                 names of the classes that are not predicted, joined by spaces
- `labels/CASE<ending>`: the mean prediction, with the geometry of the image and the file ending of the dataset.
- `networks/NETWORK/CASE<ending>`: the label map of each network.
- `settings.json`: what all that was made from: dataset, configuration, plans, folds, trainers, also, checkpoint,
  mirroring, scans (their source), classes (name to label values), file_ending, and networks (name to file, network,
  size and time of the file, the deployed one of the first model first). A run with other settings is refused.
- `measured/CASE.json`: the row of a scan without what needs all scans, and its features; written last, it says that the
  scan is done. So an interrupted run goes on, several parts share a folder, and no row is ever lost.
- `images/CASE_0000<ending>`: where a scan is a DICOM series, that series as one file.
- `next.csv`, with --next: order, case, score, distance (to the nearest one before it), random_case.
"""

import json
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from nnunetv2 import paths
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from torch import Tensor

from nnunet_ssl.commands.evaluate import label_values
from nnunet_ssl.commands.interrupted_labels import convert_all
from nnunet_ssl.commands.labeling import (
    SCRATCH,
    changed_part,
    label_maps,
    mean_probabilities,
    predict,
    refuse_unsound,
    refuse_unsound_folder,
    write_labels,
)
from nnunet_ssl.commands.predictors import load_predictors, pooled_bottleneck
from nnunet_ssl.commands.preprocess import existing_folder
from nnunet_ssl.commands.ranking import measure
from nnunet_ssl.commands.ranking_files import (
    IMAGES,
    LABELS,
    MEASURED,
    NETWORKS,
    TABLE,
    choose_next,
    finished,
    require_same_settings,
    start_or_continue,
    table,
    write_table,
)
from nnunet_ssl.commands.trained_models import Network, all_networks, plans_without_cascade, trained_models
from nnunet_ssl.data.dataset_json import read_dataset_json
from nnunet_ssl.data.fold_scans import sort_folds
from nnunet_ssl.data.scans import no_scan, unlabeled_scans
from nnunet_ssl.system.device import require_device
from nnunet_ssl.system.files import replacing
from nnunet_ssl.system.lock import check_part, locked_part
from nnunet_ssl.system.wording import counted

Files = dict[str, list[Path]]


def rank(
    dataset: str,
    configuration: str,
    folds: Sequence[int | str],
    output: Path,
    trainers: Sequence[str] = ("nnUNetTrainer",),
    plans_identifier: str = "nnUNetPlans",
    checkpoint: str = "checkpoint_final.pth",
    images: Path | None = None,
    also: Sequence[Path] = (),
    networks: Sequence[str] = (),
    device: str = "cuda",
    num_processes: int = 3,
    mirroring: bool = True,
    accept: Collection[str] = (),
    num_parts: int = 1,
    part_id: int = 0,
    number: int = 0,
    seed: int = 12345,
) -> list[str]:
    """Predicts scans with every network of trained models, and sorts them by how wrong the predictions may be.

    What it writes is said above. Memory is that of one scan per process: every scan is written when it is done.

    Args:
        dataset: id or name.
        configuration: of the trained models.
        folds: of the models, numbers or "all".
        output: folder for everything; one of the same settings is continued.
        trainers: of the models, any of nnU-Net's or ours; all of the folds of each are used.
        plans_identifier: of the models, as `checkpoint`, a file name in the folders of the folds.
        images: folder of scans; None: the unlabeled scans of the folds, from imagesUn and the "unlabeled" list.
        also: further model folders with the same plans and folds, as of other seeds.
        networks: names of those of every checkpoint; none: all that segment.
        device: "cuda", "cpu" or "mps".
        num_processes: for preprocessing, and as many for what is done with predictions.
        mirroring: average predictions over mirrored images, nnU-Net's default.
        accept: scans whose voxels and size are right, whatever they look like.
        num_parts: the scans are shared by so many runs with the same disk; the last one writes the table.
        part_id: which of them this run is, from 0.
        number: of scans to choose for annotation.
        seed: of the random choice that is shown beside them.

    Returns:
        Lines that say what was written.

    Raises:
        FileNotFoundError: no dataset, model or scans; FileExistsError: the folder has other content.
        ValueError: no such fold, part or network, folds that hide different labels, models with other plans, unsound
            scans, a folder that was made with other settings.
        RuntimeError: another run is at the same scans, or a worker died.
        NotImplementedError: a cascade, or a network of an architecture of its own.
    """
    check_part(part_id, num_parts)
    require_device(device)
    name, output = str(maybe_convert_to_dataset_name(dataset)), Path(output)
    raw = Path(paths.nnUNet_raw) / name
    plans = plans_without_cascade(Path(paths.nnUNet_preprocessed) / name, plans_identifier, configuration)
    models = trained_models(name, configuration, folds, trainers, plans_identifier, checkpoint, also)
    if (around := Path(images or raw / "imagesUn")).resolve() in output.resolve().parents:
        raise ValueError(f"-o {output} is in the folder of the scans. Choose one outside of {around}.")
    dataset_json = read_dataset_json(models[0].folder / "dataset.json", "channel_names", "labels", "file_ending")
    scans, to_check = scans_of_folder(images, dataset_json) if images else scans_of_folds(name, folds, raw)
    if not 0 <= number <= len(scans):
        raise ValueError(f"--next {number}: there are {counted(len(scans), 'scan')} to choose from.")
    found = all_networks(models, configuration, networks)
    origin = {"dataset": name, "configuration": configuration, "plans": plans_identifier, "folds": list(folds)}
    origin |= {"trainers": list(trainers), "also": list(map(str, also)), "checkpoint": checkpoint}
    origin |= {"mirroring": mirroring, "scans": str(images.absolute()) if images else "unlabeled"}
    origin |= {"classes": label_values(dataset_json)[0], "file_ending": dataset_json["file_ending"]}
    origin["networks"] = {n: described(*network) for n, network in found.items()}
    require_same_settings(output, origin)
    share = dict(list(scans.items())[part_id::num_parts])
    left = share.keys() - finished(output, origin, share)
    refuse = refuse_unsound_folder if images else refuse_unsound
    refuse(to_check, left, images or raw, plans, configuration, dataset_json, num_processes, accept)
    output.mkdir(parents=True, exist_ok=True)
    with locked_part(output / "rank", part_id, num_parts, f"ranking scans in {output}"):
        start_or_continue(output, origin)
        left = share.keys() - finished(output, origin, share)  # perhaps fewer meanwhile
        if len(left) < len(share):
            print(f"Kept: {len(share) - len(left)} of {counted(len(share), 'scan')}.")
        if left:
            remaining = {case: files for case, files in share.items() if case in left}
            predict_and_measure(remaining, output, found, dataset_json["file_ending"], device, num_processes, mirroring)
    missing = scans.keys() - finished(output, origin, scans)
    if missing:
        others = counted(len(missing), "scan is", "scans are")
        return [f"{others} left for other parts. The run that finds all of them done writes {output / TABLE}."]
    shutil.rmtree(output / SCRATCH, ignore_errors=True)
    rows = table(output, scans)
    write_table(output / TABLE, rows, list(origin["classes"]))
    lines = [f"Wrote {output / TABLE}. The worst of {len(rows)}: {' '.join(row['case'] for row in rows[:5])}"]
    return lines + (choose_next(output, rows, number, seed) if number else [])


def described(network: Network, size: int, changed_ns: int) -> dict[str, object]:
    """What settings.json says of a network."""
    return {"file": str(network.model.file), "network": network.name, "size": size, "changed_ns": changed_ns}


def predict_and_measure(
    scans: dict[str, list[str]],
    output: Path,
    found: dict[str, tuple[Network, int, int]],
    ending: str,
    device: str,
    num_processes: int,
    mirroring: bool,
) -> None:
    """Predicts scans with all networks, behind a progress bar; each is written when it is done."""
    scans = convert_all(scans, output / IMAGES, ending, num_processes)
    predictors, names = load_predictors([network for network, _, _ in found.values()], device, mirroring), list(found)
    with pooled_bottleneck(predictors[0]) as features:
        predict(scans, predictors, max(1, num_processes), measure_scan, lambda: (output, names, features()))


def scans_of_folds(name: str, folds: Sequence[int | str], raw: Path) -> tuple[dict[str, list[str]], Files]:
    """The unlabeled scans of folds with their files, and those of imagesUn, which no nnU-Net has checked."""
    dataset_json = read_dataset_json(raw / "dataset.json", "channel_names", "file_ending")
    cases = get_filenames_of_train_images_and_targets(str(raw))
    scans = sort_folds(name, folds, cases, dataset_json)[0][2]
    return scans, {case: list(map(Path, files)) for case, files in scans.items() if case not in cases}


def scans_of_folder(images: Path, dataset_json: dict) -> tuple[dict[str, list[str]], Files]:
    """The scans of any folder with their files, twice.

    Raises: FileNotFoundError without any; ValueError where it has other files.
    """
    scans, others = unlabeled_scans(existing_folder(images), dataset_json)
    ending = dataset_json["file_ending"]
    if others:
        raise ValueError(f"Problems in {images}:\n  " + "\n  ".join(no_scan(file, ending) for file in others))
    if not scans:
        raise FileNotFoundError(f"{images} has no scans, as CASE_0000{ending}.")
    return {case: list(map(str, files)) for case, files in scans.items()}, scans


def measure_scan(
    case: str,
    logits: list[np.ndarray],
    properties: dict,
    configuration,
    plans,
    dataset_json: dict,
    output: Path,
    names: list[str],
    features: list[float] | None,
) -> None:
    """Writes the label maps of a scan and its row; arguments as `labeling.predict` gives them.

    Args:
        output: of the command.
        names: of the networks.
        features: of the scan; None where the network has none.
    """
    scratch = output / SCRATCH / case
    shutil.rmtree(scratch, ignore_errors=True)  # what an interrupted run has left
    labels, each = label_maps(logits, properties, configuration, plans, dataset_json)
    manager, (classes, _) = plans.get_label_manager(dataset_json), label_values(dataset_json)
    probabilities = of_classes(mean_probabilities(logits, manager), manager, classes)
    row = measure(labels, each, probabilities, classes, properties["spacing"])
    for folder, own in [*zip((f"{NETWORKS}/{name}" for name in names), each, strict=True), (LABELS, labels)]:
        write_labels(case, own, properties, plans, dataset_json, output / folder, scratch)
    scratch.rmdir()
    measured = {"row": row, "features": features, "changed": changed_part(each) if len(each) > 1 else None}
    with replacing(output / MEASURED / f"{case}.json") as temporary:
        temporary.write_text(json.dumps(measured))


def of_classes(probabilities: Tensor, manager: LabelManager, classes: dict[str, tuple[int, ...]]) -> Tensor:
    """The channels of a network's probabilities (channels, *spatial) that are foreground, in the order of `classes`."""
    # of regions dataset.json has the channels in this order, of labels their values are the channels
    return probabilities if manager.has_regions else probabilities[[value for (value,) in classes.values()]]
