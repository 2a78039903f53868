"""A picture of one training batch as the method sees it."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from nnunetv2.run.run_training import get_trainer_from_args
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.file_path_utilities import get_output_folder
from torch import Tensor

from nnunet_ssl.blocks.mixing import Mix, recorded
from nnunet_ssl.commands.pictures import PREDICTION, REFERENCE, outline
from nnunet_ssl.data.loading import Batch
from nnunet_ssl.system.attributes import replaced
from nnunet_ssl.system.device import require_device
from nnunet_ssl.system.files import replacing
from nnunet_ssl.system.quiet import quiet
from nnunet_ssl.trainer import SemiSupervisedTrainer

LABELED, UNLABELED = REFERENCE, PREDICTION  # colours of what is known and of what is predicted
WIDTH, HEIGHT = 2.6, 3.6  # inches of a patch at most; one of them is less, as the patch is wider or higher
OUTLINE = 0.8  # points; the image has to be seen


class Names(NamedTuple):
    """The cases that the patches of a batch are of, in its order."""

    labeled: list[str]
    unlabeled: list[str]


class Column(NamedTuple):
    """One picture of a row.

    Attributes:
        title: above it, in the first row.
        values: gray values in [0, 1] (rows, columns), or colours (rows, columns, 3).
        outlines: classes (rows, columns) with the colour and the style of the lines around them.
        case: that it is of, where there is one.
        slice: index and number of the patch's slices, where it has some.
    """

    title: str
    values: np.ndarray
    outlines: list[tuple[np.ndarray, str, str]]
    case: str = ""
    slice: tuple[int, int] | None = None


Row = list[Column]


def preview(
    dataset: str,
    configuration: str,
    fold: int | str,
    trainer_name: str,
    output: Path,
    plans_identifier: str = "nnUNetPlans",
    checkpoint: str | None = None,
    device: str = "cpu",
) -> int:
    """Draws the patches of one training batch, and what the trainer's own code mixes of them.

    The batch is that of a step after a third of the training, when pretraining is over and patches are still mixed.

    Args:
        dataset: id or name, preprocessed.
        configuration: as 3d_fullres.
        fold: number or "all".
        trainer_name: one of ours.
        output: PNG file; replaced in one step. Nothing else is written, but for the splits_final.json that nnU-Net
            draws where there is none.
        plans_identifier: of the plans.
        checkpoint: file name of a checkpoint of this trainer, whose networks make the pseudo labels; None: networks
            with random weights.
        device: "cpu", "cuda" or "mps".

    Returns:
        How many mixed patches the picture has; 0 for a method that does not mix, which has the plain patches only.

    Raises:
        FileNotFoundError: the checkpoint or the unlabeled scans are missing.
        ValueError: the trainer is not one of ours, or there is no such device.
    """
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"{output.absolute().parent} does not exist. Make it, or choose another -o.")
    rows, axes = rows_of_batch(dataset, configuration, fold, trainer_name, plans_identifier, checkpoint, device)
    draw(rows, axes, output, random=checkpoint is None)
    return len(rows) if is_mixed(rows) else 0


def rows_of_batch(
    dataset: str,
    configuration: str,
    fold: int | str,
    trainer_name: str,
    plans_identifier: str,
    checkpoint: str | None,
    device: str,
) -> tuple[list[Row], list[str]]:
    """The rows of the picture and the names of the axes of the preprocessed scans; see `preview`."""
    dataset = str(maybe_convert_to_dataset_name(dataset))
    file = None
    if checkpoint is not None:
        file = Path(get_output_folder(dataset, trainer_name, plans_identifier, configuration, fold)) / checkpoint
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing. Leave -chk out to look at an untrained {trainer_name}.")
    require_device(device)
    with _nothing_written(), quiet():
        trainer = get_trainer_from_args(
            dataset, configuration, fold, trainer_name, plans_identifier, device=torch.device(device)
        )
        if not isinstance(trainer, SemiSupervisedTrainer):
            raise ValueError(f"{trainer_name} is not a semi-supervised trainer. See: nnunet-ssl trainers")
        if file is None:
            trainer.initialize()
        else:
            trainer.load_checkpoint(str(file))
        trainer.current_epoch, trainer.step = trainer.supervised_epochs, trainer.max_steps // 3
        while trainer.step < trainer.max_steps and not trainer.streams()[1]:
            trainer.step += 1
        with replaced(trainer, "streams", lambda: (True, True)):  # what the method does not learn from is shown too
            loader = trainer.get_dataloaders()[0]
        item = next(loader)
        batch, names = trainer._to_device(item), Names(list(item["keys"]), list(loader.data_loader.unlabeled.drawn))
        with torch.no_grad(), recorded() as calls:
            for _ in trainer.losses(batch):
                pass
    # every method mixes the images first, then their targets by the same masks; further tensors are not shown, nor is
    # an image whose target is not mixed
    by_mask: dict[int, list[Mix]] = {}
    for call in calls:
        by_mask.setdefault(id(call.mask), []).append(call)
    pairs = [(mixes[0], mixes[1]) for mixes in by_mask.values() if len(mixes) > 1]
    labels = trainer.label_manager
    regions = len(labels.foreground_regions) if labels.has_regions else 0
    rows = [
        mixed_row(image, target, sample, batch, names, regions)
        for image, target in pairs
        for sample in sorted({0, len(image.mask) // 2})
    ]
    plain = [plain_row(batch, sample, names, regions) for sample in range(min(2, len(batch.image)))]
    axes = ["zyx"[axis] for axis in trainer.plans_manager.transpose_forward]
    return rows or plain, axes


def is_mixed(rows: Sequence[Row]) -> bool:
    """Whether rows show what a method mixes, not plain patches."""
    return any(column.title == "mixed patch" for column in rows[0])


@contextmanager
def _nothing_written() -> Iterator[None]:
    """A results folder that vanishes, no worker processes, no run of Weights & Biases, nothing compiled."""
    with tempfile.TemporaryDirectory(prefix="nnunet_ssl_preview_") as folder:
        settings = {"nnUNet_results": folder, "nnUNet_n_proc_DA": "0", "nnUNet_wandb_enabled": "0"}
        settings["nnUNet_compile"] = "0"  # it takes longer than the one batch
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                os.environ.update({name: value} if value is not None else {})


def mixed_row(image: Mix, target: Mix, sample: int, batch: Batch, names: Names, regions: int) -> Row:
    """Columns of one mixed patch: its two sources, mask, mix and target."""
    mask = np.broadcast_to(image.mask[sample, 0].cpu().numpy(), image.first.shape[2:])
    sources = [(image.first[sample], target.first[sample]), (image.second[sample], target.second[sample])]
    origins = [origin(source, batch, names) for source, _ in sources]
    labeled = [is_labeled for is_labeled, _ in origins]
    maps = [class_map(labels, regions) for _, labels in sources]
    mixed = class_map(target.result[sample], regions)
    # the colour of every voxel's source
    known = np.where(mask, labeled[0], labeled[1])
    place = show_where(mixed, known)

    columns: Row = []
    for number in sorted((0, 1), key=lambda i: not labeled[i]):
        name, colour, style = ("labeled", LABELED, "solid") if labeled[number] else ("unlabeled", UNLABELED, "dashed")
        shown, outlines = gray(sources[number][0], place), [(maps[number][place], colour, style)]
        columns.append(Column(f"{name} patch", shown, outlines, origins[number][1], number_of_slice(place, mask)))
    outlines = [(mixed * known, LABELED, "solid"), (mixed * ~known, UNLABELED, "dashed")]
    return [
        *columns,
        Column("mask", colours(np.zeros_like(mixed), known)[place], []),
        Column("mixed patch", gray(image.result[sample], place), [(m[place], c, s) for m, c, s in outlines]),
        Column("mixed target", colours(mixed, known)[place], []),
    ]


def origin(patch: Tensor, batch: Batch, names: Names) -> tuple[bool, str]:
    """Whether a patch (C, *spatial) is one of the labeled ones of the batch, and the case that it is of.

    Raises: RuntimeError where it is none of the batch.
    """
    sources = [(True, batch.image, names.labeled), (False, batch.unlabeled, names.unlabeled)]
    if batch.unlabeled_weak is not None:
        sources.append((False, batch.unlabeled_weak, names.unlabeled))
    for is_labeled, patches, cases in sources:
        for known, case in zip(patches, cases, strict=True):
            if torch.equal(patch, known):
                return is_labeled, case
    raise RuntimeError("The method changes its patches before it mixes them: the preview cannot tell them apart.")


def plain_row(batch: Batch, sample: int, names: Names, regions: int) -> Row:
    """Columns of a method that does not mix: its patches."""
    labels = class_map(batch.labels[sample], regions)
    place = show_where(labels, labels > 0)
    slice_, case = number_of_slice(place, labels), names.unlabeled[sample]
    outlines = [(labels[place], LABELED, "solid")]
    row: Row = [
        Column("labeled patch", gray(batch.image[sample], place), outlines, names.labeled[sample], slice_),
        Column("unlabeled patch", gray(batch.unlabeled[sample], place), [], case, slice_),
    ]
    if batch.unlabeled_weak is not None:
        row.append(Column("its weak view", gray(batch.unlabeled_weak[sample], place), [], case, slice_))
    return row


def number_of_slice(place: tuple, patch: np.ndarray) -> tuple[int, int] | None:
    """Index and number of slices, for the `place` that is shown of a patch; None where the patch is one slice."""
    return None if patch.ndim == 2 else (place[0], len(patch))


def class_map(target: Tensor, regions: int) -> np.ndarray:
    """Labels (1, *spatial), probabilities or regions (C, *spatial) as one number per voxel, 0 for the background.

    Of regions, of which there are so many (0: these are classes), it is the number of those that a voxel lies in,
    which tells nested ones apart.
    """
    if len(target) == 1 and not regions:
        return target[0].cpu().numpy().astype(int)
    classes = (target[:regions] > 0.5).sum(0) if regions else target.argmax(0)
    return classes.cpu().numpy().astype(int)


def show_where(classes: np.ndarray, known: np.ndarray) -> tuple:
    """Index of the slice with the most foreground, if possible one with voxels of both sources; all of a 2D patch."""
    if classes.ndim == 2:
        return (slice(None), slice(None))
    both = known.any((1, 2)) & ~known.all((1, 2))
    foreground = (classes > 0).sum((1, 2))
    return (int(np.lexsort((foreground, both))[-1]),)


def gray(image: Tensor, place: tuple) -> np.ndarray:
    """Values (rows, columns) of the first channel (C, *spatial), 0 to 1 between its 1st and 99th percentile."""
    values = image[0].float().cpu().numpy()
    low, high = np.percentile(values, (1, 99))
    return np.clip((values[place] - low) / max(high - low, 1e-8), 0, 1)


def colours(classes: np.ndarray, known: np.ndarray) -> np.ndarray:
    """RGB (*spatial, 3): the hue says whether a voxel is labeled, the darkness its class; the background is pale."""
    hues = np.where(known[..., None], to_rgb(LABELED), to_rgb(UNLABELED))
    dark = 1 - 0.35 * (classes - 1) / max(1, classes.max())
    return np.where(classes[..., None] > 0, hues * dark[..., None], 1 - 0.25 * (1 - hues))


def draw(rows: Sequence[Row], axes: Sequence[str], output: Path, random: bool = False) -> None:
    """Writes rows of columns as a PNG file.

    Args:
        rows: all of the same size.
        axes: names of the three axes of the preprocessed scans, as "z", "y", "x".
        output: the file.
        random: the networks are not trained: what they predict is not drawn over the images.
    """
    number, (high, wide) = len(rows[0]), rows[0][0].values.shape[:2]
    inch = min(WIDTH / wide, HEIGHT / high)  # of a voxel
    captions = 0.5 if rows[0][0].slice else 0.3
    size = (max(number * inch * wide, 6), len(rows) * (inch * high + captions) + 0.8)
    figure = Figure(figsize=size, layout="compressed")  # no white space around flat patches
    panels = figure.subplots(len(rows), number, squeeze=False)
    for of_row, row in zip(panels, rows, strict=True):
        for axis, column in zip(of_row, row, strict=True):
            outlines = [o for o in column.outlines if not (random and o[1] == UNLABELED)]
            _draw_column(axis, column.values, outlines)
            axis.set_title(column.title if row is rows[0] else "", fontsize=10)
            lines = [column.case, ""]
            if column.slice:
                lines[1] = f"slice {column.slice[0] + 1} of {column.slice[1]} along {axes[0]}"
            # 14 letters an inch
            text = "\n".join(fill(line, max(12, int(14 * inch * wide))) for line in lines if line)
            axis.set_xlabel(text, fontsize=7)
    handles = [Patch(color=LABELED, label="labeled scan, label")]
    if any(colour == UNLABELED for column in rows[0] for _, colour, _ in column.outlines):
        text = f"unlabeled scan, pseudo label{' (of an untrained network)' * random}"
        handles.append(Patch(color=UNLABELED, label=text))
    title = f"plane {axes[1]}-{axes[2]} of the preprocessed scans"
    figure.legend(
        handles=handles, loc="outside lower center", ncols=2, frameon=False, title=title, fontsize=8, title_fontsize=8
    )
    with replacing(output) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")


def _draw_column(axis: Axes, values: np.ndarray, outlines: list) -> None:
    axis.imshow(values, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    for classes, colour, style in outlines:
        for value in range(1, classes.max(initial=0) + 1):
            outline(axis, classes >= value, colour, style, OUTLINE)
    axis.set(xticks=[], yticks=[])
