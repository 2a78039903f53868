"""What an interrupted `nnunet-ssl pseudo-label` has left in its hidden folder, and how the next run goes on with it."""

import shutil
from pathlib import Path

from nnunet_ssl.commands.labeling import SCRATCH
from nnunet_ssl.data.scans import changed_at, unpacked
from nnunet_ssl.system.files import replacing
from nnunet_ssl.system.pool import run_all, worker_pool

RECORD = "model.json"  # in the hidden folder of a run that is not finished


def finished_labels(unfinished: Path, record: str, scans: dict[str, list[str]], ending: str) -> set[str]:
    """The scans that an interrupted run of the same model has labeled, and that are not newer than their labels.

    Args:
        unfinished: the hidden folder; it may be missing.
        record: what determines the labels; those of a folder with another one do not count.
        scans: per case its image files.
        ending: of the label files.
    """
    file = unfinished / RECORD
    if not file.is_file() or file.read_bytes() != record.encode():
        return set()
    labels = {case: unfinished / "labelsTr" / f"{case}{ending}" for case in scans}
    written = {case: label.stat().st_mtime_ns for case, label in labels.items() if label.is_file()}
    return {case for case, time in written.items() if all(changed_at(f) <= time for f in scans[case])}


def start_or_resume(unfinished: Path, record: str, kept: set[str], number: int, ending: str) -> None:
    """Makes the hidden folder with its record, or removes from an existing one all that is not kept, and says so.

    Args:
        kept: scans whose labels stay, from `finished_labels`.
        number: of all scans.
        ending: of the label files.
    """
    labels = unfinished / "labelsTr"
    dropped = len(list(labels.glob(f"*{ending}"))) - len(kept)
    if dropped:
        print(
            f"Dropped labels of an interrupted run: {dropped}. Their scans have changed since, or another model, "
            f"checkpoint or mirroring made them."
        )
    if kept:
        print(f"Labeled by an interrupted run of the same model, and kept: {len(kept)} of {number} scans.")
        shutil.rmtree(unfinished / SCRATCH, ignore_errors=True)
        names = {f"{case}{suffix}" for case in kept for suffix in (ending, ".json")}  # .json: beside a TIFF
        for file in labels.iterdir():
            if file.name not in names:
                file.unlink()
        return
    if unfinished.exists():
        shutil.rmtree(unfinished)
    labels.mkdir(parents=True)
    with replacing(unfinished / RECORD) as temporary:
        temporary.write_text(record, encoding="utf-8")


def convert_series(case: str, files: list[str], folder: Path, ending: str) -> list[str]:
    """A scan's files as nnU-Net reads them: a DICOM series, a folder, becomes a file in `folder`, which is made.

    A file that an interrupted run has converted, and that is not older than the series, is kept.
    """
    source = Path(files[0])
    if not source.is_dir():
        return files
    target = folder / f"{case}_0000{ending}"
    if not target.is_file() or changed_at(target) < changed_at(source):
        target.parent.mkdir(exist_ok=True)
        with unpacked(source, ending, to_keep=True) as path, replacing(target) as temporary:
            shutil.copyfile(path, temporary)
    return [str(target)]


def convert_all(scans: dict[str, list[str]], folder: Path, ending: str, num_processes: int) -> dict[str, list[str]]:
    """`convert_series` for all scans, those that are DICOM series behind a progress bar."""
    series = {case: (case, files, folder, ending) for case, files in scans.items() if Path(files[0]).is_dir()}
    with worker_pool(min(num_processes, len(series))) as pool:
        return scans | run_all(pool, convert_series, series, "Converting DICOM series", unit="scan")
