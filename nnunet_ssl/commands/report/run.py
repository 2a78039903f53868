"""What is on the page of a training: gathered, drawn and written."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunet_ssl.commands import preview
from nnunet_ssl.commands.report import labeled as labeled_scans
from nnunet_ssl.commands.report import ranking as unlabeled_scans
from nnunet_ssl.commands.report.curves import curves, warnings_of
from nnunet_ssl.commands.report.labeled import Labeled, given, validation
from nnunet_ssl.commands.report.page import Picture, as_uri, in_both_looks, require_place, write_page
from nnunet_ssl.commands.report.ranking import Ranking, read_ranking
from nnunet_ssl.commands.report.scans import Reading, number
from nnunet_ssl.commands.report.training import Training, data_and_plans, header, read_training, settings_of, state_of
from nnunet_ssl.system.device import require_device
from nnunet_ssl.system.wording import counted

FIRST = 3  # scans that are named at the top


def report(
    dataset: str,
    configuration: str,
    fold: int | str,
    trainer_name: str,
    output: Path,
    plans_identifier: str = "nnUNetPlans",
    ranking: Path | None = None,
    predictions: Path | None = None,
    labels: Path | None = None,
    images: Path | None = None,
    pictures: int = 40,
    device: str = "cpu",
    num_processes: int = 3,
) -> None:
    """Writes a page about a training: settings, curves, a batch, unlabeled scans worst first, scans with labels.

    One file of HTML that needs nothing else; what is missing is said on the page. Memory is that of one scan and of the
    page, at most 8 MB with 40 pictures.

    Args:
        dataset: id or name.
        configuration: of the training.
        fold: number or "all".
        trainer_name: any trainer; those that are not ours have less to show.
        output: the page; replaced in one step.
        plans_identifier: of the training.
        ranking: folder that `nnunet-ssl rank` has written; None: the page has no unlabeled scans.
        predictions: folder, of scans with labels; None: what nnU-Net has predicted of the validation cases.
        labels: folder of their labels.
        images: folder of their images; None: beside that of the labels, as imagesTs beside labelsTs.
        pictures: of unlabeled scans, the worst ones; the others are rows of a table.
        device: "cpu", "cuda" or "mps", for one batch.
        num_processes: scans with labels that are measured at a time.

    Raises:
        FileNotFoundError: no such training, or a folder that is missing; the message has the fix.
        ValueError: damaged files, or files that do not fit together.
    """
    name = str(maybe_convert_to_dataset_name(dataset))
    require_place(output)
    require_device(device)
    training = read_training(name, trainer_name, plans_identifier, configuration, fold)
    how = Reading.of(training.plans, configuration, training.dataset_json)
    ranked = read_ranking(ranking, training) if ranking is not None else None
    labeled = given(predictions, labels, images, training) if predictions is not None else validation(training)
    cases = labeled_scans.measure(labeled, training, how, num_processes) if labeled else {}
    warnings = warnings_of(training)
    batch, no_batch = draw_batch(training, plans_identifier, device)
    write_page(
        "report.html.j2",
        output,
        name=name,
        trainer=f"{trainer_name}, fold {fold}",
        header=header(training),
        short=in_short(training, len(warnings.rows), ranked, labeled, cases),
        data=data_and_plans(training),
        settings=settings_of(training),
        curves=curves(training),
        two_phases=training.supervised_epochs > 0,
        warnings=warnings,
        batch=batch,
        no_batch=no_batch,
        channel=how.channel,
        ranked=ranked,
        unlabeled_remarks=unlabeled_scans.remarks(ranked) if ranked else [],
        unlabeled_cards=list(unlabeled_scans.cards(ranked, how, pictures)) if ranked else [],
        unlabeled_rest=unlabeled_scans.rest(ranked, pictures) if ranked else None,
        labeled=labeled,
        labeled_keys=labeled_scans.KEYS,
        labeled_remarks=labeled_scans.remarks(cases) if cases else [],
        labeled_table=labeled_scans.table(cases) if cases else None,
        labeled_cards=list(labeled_scans.cards(cases, labeled, how)) if labeled else [],
    )


def draw_batch(training: Training, plans_identifier: str, device: str) -> tuple[Picture | None, str]:
    """The picture of `nnunet-ssl preview`, or None and the reason why there is none."""
    if training.checkpoint is None:
        return None, "there is no checkpoint yet"
    if not training.networks:
        return None, f"{training.trainer} learns from labeled scans alone"
    model = (training.plans.dataset_name, training.configuration, training.fold, training.trainer, plans_identifier)
    try:
        rows, axes = preview.rows_of_batch(*model, training.checkpoint.name, device)
    except (OSError, ValueError, RuntimeError) as error:  # data that was removed or changed since the training
        return None, str(error)

    def draw(look: str) -> str:
        with TemporaryDirectory(prefix="nnunet_ssl_report_") as folder:
            preview.draw(rows, axes, file := Path(folder, "batch.png"))
            return as_uri(file.read_bytes(), "png")

    light, dark = in_both_looks(draw)
    if preview.is_mixed(rows):
        advice = "Is the dashed line, what the network takes for the truth in an unlabeled scan, around the structure?"
        alt = "Rows of patches: a labeled and an unlabeled one with outlines, the mask, their mix, the mixed target."
    else:
        advice = "Do labeled and unlabeled scans look alike in gray values and in size?"
        alt = "Rows of patches: a labeled one with its outlines, and an unlabeled one."
    return Picture(light, alt, advice, dark=dark, wide=True), ""


def in_short(
    training: Training, warnings: int, ranked: Ranking | None, labeled: Labeled | None, cases: dict[str, Any]
) -> Sequence[tuple[str, str, str]]:
    """What a reader should know first: section, what it is, what it says."""
    found = [("training", "Training", state_of(training))]
    found.append(("training", "Warnings in the log", str(warnings or "none")))
    if ranked and ranked.rows:
        scans, worst = counted(len(ranked.rows), "unlabeled scan"), [row["case"] for row in ranked.rows[:FIRST]]
        found.append(("unlabeled", f"Look first, of {scans}", ", ".join(worst)))
    if labeled and cases:
        value = f"{number(labeled_scans.mean_dice(cases), 1)} % over {counted(len(cases), 'scan')}"
        found.append(("labeled", "Mean Dice of scans with labels", f"{value}; worst: {next(iter(cases))}"))
    return found
