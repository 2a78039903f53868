"""Labels of scans by one trained model, or by several, whose disagreement is kept."""

import os
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.data_iterators import preprocessing_iterator_fromfiles
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from nnunet_ssl.data.nifti import require_complete
from nnunet_ssl.data.plausibility import expected_scans
from nnunet_ssl.data.scan_checks import check_accepted, check_scans, check_unlabeled
from nnunet_ssl.system.disk import say_full_disk
from nnunet_ssl.system.files import replacing
from nnunet_ssl.system.pool import worker_pool

SCRATCH, DISAGREEMENT = "predicting", "disagreement"  # folders of a run that is not finished


def predict(
    scans: dict[str, list[str]],
    predictors: Sequence[nnUNetPredictor],
    num_processes: int,
    finish: Callable,
    further: Callable[[], tuple],
) -> None:
    """Predicts scans with nnU-Net's own predictors, behind a progress bar; what becomes of a scan is done in workers.

    Args:
        scans: per case its image files.
        predictors: of networks with the same plans and configuration.
        num_processes: for preprocessing, and as many for `finish`; with 1 this process calls it.
        finish: a function of a module, called for every scan with its name, a list of logits (classes, *spatial), the
            properties of the preprocessed scan, nnU-Net's managers of configuration and plans, dataset.json, and what
            `further` gives.
        further: is called when a scan has been predicted.

    Raises:
        RuntimeError: a worker died.
    """
    first = predictors[0]
    how = (first.configuration_manager, first.plans_manager, first.dataset_json)
    prepared = preprocessing_iterator_fromfiles(
        list(scans.values()),
        None,
        list(scans),
        first.plans_manager,
        first.dataset_json,
        first.configuration_manager,
        num_processes,
        first.device.type == "cuda",
    )
    exports = deque()
    try:
        with worker_pool(num_processes) as pool:
            for item in tqdm(prepared, total=len(scans), desc="Labeling scans", unit="scan"):
                logits = [
                    predictor.predict_logits_from_preprocessed_data(item["data"]).cpu().detach().numpy()
                    for predictor in predictors
                ]
                job = (item["ofile"], logits, item["data_properties"], *how, *further())
                if pool is None:
                    finish(*job)
                    continue
                exports.append(pool.submit(finish, *job))
                while len(exports) > (num_processes + 2) // len(predictors):  # more would fill the memory
                    exports.popleft().result()
            while exports:
                exports.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "A worker process died without an error, most likely because memory ran out. Run the same command again "
            "with fewer processes (-np 1 needs the least): complete labels are kept."
        ) from error


def export(
    case: str,
    logits: list[np.ndarray],
    properties: dict,
    configuration,
    plans,
    dataset_json: dict,
    unfinished: Path,
    ignore_label: int | None,
) -> None:
    """Writes a label file in `labelsTr` of a folder, and how far the models disagree.

    Args:
        logits: of every model, (classes, *spatial) of the preprocessed scan; of several the mean of the probabilities
            counts.
        properties: of the preprocessed scan.
        configuration: nnU-Net's manager, as `plans`.
        dataset_json: of the model.
        unfinished: the folder.
        ignore_label: of voxels on which the models disagree; None: these have the label of the mean.
    """
    labels, each = label_maps(logits, properties, configuration, plans, dataset_json)
    if len(each) > 1:
        (unfinished / DISAGREEMENT).mkdir(exist_ok=True)
        with replacing(unfinished / DISAGREEMENT / f"{case}.txt") as temporary:
            temporary.write_text(repr(changed_part(each)))
        if ignore_label is not None:
            labels[disagreeing(each)] = ignore_label
    write_labels(case, labels, properties, plans, dataset_json, unfinished / "labelsTr", unfinished / SCRATCH / case)


def label_maps(
    logits: list[np.ndarray], properties: dict, configuration, plans, dataset_json: dict
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Label maps in the grid of the scan's files: of the networks' mean probability, and of every network."""
    manager = plans.get_label_manager(dataset_json)

    def segmentation(values):
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            values, plans, configuration, manager, properties
        )

    labels = segmentation(logits[0] if len(logits) == 1 else mean_logits(logits, manager))
    return labels, [segmentation(values) for values in logits] if len(logits) > 1 else [labels]


def write_labels(
    case: str, labels: np.ndarray, properties: dict, plans, dataset_json: dict, folder: Path, scratch: Path
) -> None:
    """Writes a label file into a folder of its own, and moves it to where it belongs in one step.

    Args:
        labels: in the grid of the scan's files.
        properties: of the scan, for the geometry.
        folder: where the file appears.
        scratch: where it is written; on the same disk.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    label = f"{case}{dataset_json['file_ending']}"
    with say_full_disk(scratch, lambda: labels.nbytes):
        plans.image_reader_writer_class().write_seg(labels, str(scratch / label), properties)
        require_complete(scratch / label)
    # the label goes last, it says that all is there: nnU-Net writes the spacing of a TIFF beside it
    for file in sorted(scratch.iterdir(), key=lambda file: file.name == label):
        os.replace(file, folder / file.name)


def mean_probabilities(logits: Sequence[np.ndarray], manager: LabelManager) -> torch.Tensor:
    """Mean of the networks' probabilities, of classes or regions: (classes, *spatial), float32."""
    # one after the other: the probabilities of all of them need not be in memory at once
    return sum(manager.apply_inference_nonlin(torch.from_numpy(values).float()) for values in logits) / len(logits)


def mean_logits(logits: Sequence[np.ndarray], manager: LabelManager) -> np.ndarray:
    """Logits whose probabilities are the mean of the models' probabilities: (classes, *spatial), float32."""
    mean = mean_probabilities(logits, manager)
    least = torch.finfo(mean.dtype).tiny
    return (torch.logit(mean, 1e-7) if manager.has_regions else mean.clamp_min(least).log()).numpy()


def disagreeing(labels: Sequence[np.ndarray]) -> np.ndarray:
    """The voxels that do not have one label in all of the label maps; bool, of their shape."""
    return np.any([other != labels[0] for other in labels[1:]], axis=0)


def changed_part(labels: Sequence[np.ndarray]) -> float:
    """How different label maps of a scan are: mean, over consecutive ones, of changed voxels over foreground voxels.

    The foreground is that of either of the two, so that the number lies in [0, 1]. Two empty maps agree. Source: the
    choice of pseudo labels in the winning solution of FLARE22 (Huang et al. 2022), which has the foreground of one.
    """
    parts = []
    for one, other in pairwise(labels):
        foreground = np.count_nonzero((one != 0) | (other != 0))
        parts.append(np.count_nonzero(one != other) / foreground if foreground else 0.0)
    return float(np.mean(parts))


def refuse_unsound(
    unlabeled: dict[str, list[Path]],
    left: Collection[str],
    raw: Path,
    plans: PlansManager,
    configuration: str,
    dataset_json: dict,
    num_processes: int,
    accept: Collection[str],
) -> None:
    """Reads the scans of imagesUn that are left to label, before a model spends hours on some.

    Raises: ValueError with a line per problem of scans that are not accepted as they are.
    """
    check_accepted(accept, unlabeled, raw / "imagesUn")
    new = {case: files for case, files in unlabeled.items() if case in left}
    with worker_pool(min(num_processes, len(new))) as pool:
        report = check_unlabeled(pool, raw, plans, [configuration], dataset_json, unlabeled, new, accept)
    report.require_sound("Nothing was labeled", raw / "imagesUn")


def refuse_unsound_folder(
    scans: dict[str, list[Path]],
    left: Collection[str],
    images: Path,
    plans: PlansManager,
    configuration: str,
    dataset_json: dict,
    num_processes: int,
    accept: Collection[str],
) -> None:
    """Reads the scans of a folder that are left, before a model spends hours on some; as `refuse_unsound`."""
    check_accepted(accept, scans, images)
    expected = expected_scans(plans, {configuration: plans.get_configuration(configuration)}, dataset_json)
    new = {case: files for case, files in scans.items() if case in left}
    with worker_pool(min(num_processes, len(new))) as pool:
        check_scans(pool, new, {}, expected, accept).require_sound("Nothing was predicted", images)
