"""Labels of scans by one trained model, or by several, whose disagreement is kept."""

import os
from collections import deque
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from nnunetv2.inference.data_iterators import preprocessing_iterator_fromfiles
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from tqdm import tqdm

from nnunet_ssl.commands.trained_models import Model
from nnunet_ssl.system.files import replacing
from nnunet_ssl.system.pool import worker_pool
from nnunet_ssl.system.quiet import quiet

SCRATCH, DISAGREEMENT = "predicting", "disagreement"  # folders of a run that is not finished


def predict(
    scans: dict[str, list[str]],
    unfinished: Path,
    models: Sequence[Model],
    device: str,
    num_processes: int,
    mirroring: bool,
    ignore_label: int | None,
) -> None:
    """Predicts the scans with nnU-Net's own predictor, behind a progress bar.

    A label file appears in `labelsTr` of the folder `unfinished` when it is complete, as soon as its scan is predicted.

    Args:
        models: with the same plans and configuration; of several the mean of the probabilities counts.
        ignore_label: of voxels on which they disagree; None: these have the label of the mean.

    Raises:
        RuntimeError: a worker died.
    """
    predictors = []
    for model in models:
        predictors.append(nnUNetPredictor(use_mirroring=mirroring, device=torch.device(device), allow_tqdm=False))
        with quiet():  # nnU-Net says every file in which it looks for the trainer, and cites itself
            predictors[-1].initialize_from_trained_model_folder(str(model.folder), (model.fold,), model.checkpoint)
    first = predictors[0]
    how = (first.configuration_manager, first.plans_manager, first.dataset_json, ignore_label)
    prepared = preprocessing_iterator_fromfiles(
        list(scans.values()),
        None,
        list(scans),
        first.plans_manager,
        first.dataset_json,
        first.configuration_manager,
        num_processes,
        device == "cuda",
    )
    exports = deque()
    try:
        with worker_pool(num_processes) as pool:
            for item in tqdm(prepared, total=len(scans), desc="Labeling scans", unit="scan"):
                logits = [
                    predictor.predict_logits_from_preprocessed_data(item["data"]).cpu().detach().numpy()
                    for predictor in predictors
                ]
                job = (item["ofile"], unfinished, logits, item["data_properties"], *how)
                if pool is None:
                    export(*job)
                    continue
                exports.append(pool.submit(export, *job))
                while len(exports) > (num_processes + 2) // len(models):  # more would fill the memory
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
    unfinished: Path,
    logits: list[np.ndarray],
    properties: dict,
    configuration,
    plans,
    dataset_json: dict,
    ignore_label: int | None,
) -> None:
    """Writes a label file in a folder of its own, and moves it to `labelsTr` in one step.

    Args:
        logits: of every model, (classes, *spatial) of the preprocessed scan.
        properties: of the preprocessed scan.
        configuration: nnU-Net's manager, as `plans`.
        dataset_json: of the model.
        ignore_label: see `predict`.
    """
    scratch = unfinished / SCRATCH / case
    scratch.mkdir(parents=True, exist_ok=True)
    manager = plans.get_label_manager(dataset_json)

    def segmentation(values):
        return convert_predicted_logits_to_segmentation_with_correct_shape(
            values, plans, configuration, manager, properties
        )

    labels = segmentation(logits[0] if len(logits) == 1 else mean_logits(logits, manager))
    if len(logits) > 1:
        each = [segmentation(values) for values in logits]
        (unfinished / DISAGREEMENT).mkdir(exist_ok=True)
        with replacing(unfinished / DISAGREEMENT / f"{case}.txt") as temporary:
            temporary.write_text(repr(disagreement(each)))
        if ignore_label is not None:
            labels[disagreeing(each)] = ignore_label
    label = f"{case}{dataset_json['file_ending']}"
    plans.image_reader_writer_class().write_seg(labels, str(scratch / label), properties)
    # the label goes last, it says that all is there: nnU-Net writes the spacing of a TIFF beside it
    for file in sorted(scratch.iterdir(), key=lambda file: file.name == label):
        os.replace(file, unfinished / "labelsTr" / file.name)


def mean_logits(logits: Sequence[np.ndarray], manager: LabelManager) -> np.ndarray:
    """Logits whose probabilities are the mean of the models' probabilities: (classes, *spatial), float32."""
    # one after the other: the probabilities of all of them need not be in memory at once
    mean = sum(manager.apply_inference_nonlin(torch.from_numpy(values).float()) for values in logits) / len(logits)
    least = torch.finfo(mean.dtype).tiny
    return (torch.logit(mean, 1e-7) if manager.has_regions else mean.clamp_min(least).log()).numpy()


def disagreeing(labels: Sequence[np.ndarray]) -> np.ndarray:
    """The voxels that do not have one label in all of the label maps; bool, of their shape."""
    return np.any([other != labels[0] for other in labels[1:]], axis=0)


def disagreement(labels: Sequence[np.ndarray]) -> float:
    """How different label maps of a scan are: mean, over consecutive ones, of changed voxels over foreground voxels.

    The foreground is that of either of the two, so that the number lies in [0, 1]. Two empty maps agree. Source: the
    choice of pseudo labels in the winning solution of FLARE22 (Huang et al. 2022), which has the foreground of one.
    """
    parts = []
    for one, other in pairwise(labels):
        foreground = np.count_nonzero((one != 0) | (other != 0))
        parts.append(np.count_nonzero(one != other) / foreground if foreground else 0.0)
    return float(np.mean(parts))
