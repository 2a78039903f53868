"""The folder of `nnunet-ssl rank`, whose content rank.py describes: its settings, what is done, its tables."""

import csv
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_ssl.commands.labeling import DISAGREEMENT, SCRATCH, disagreeing, write_labels
from nnunet_ssl.commands.ranking import choose, scores, volume_z
from nnunet_ssl.data.scans import changed_at
from nnunet_ssl.system.files import read_json, replacing
from nnunet_ssl.system.wording import counted

SETTINGS, TABLE, NEXT = "settings.json", "rank.csv", "next.csv"
LABELS, NETWORKS, MEASURED, IMAGES = "labels", "networks", "measured", "images"


def require_same_settings(output: Path, origin: dict) -> None:
    """Raises FileExistsError where a folder has other content, ValueError where it was made with other settings."""
    file = output / SETTINGS
    if not file.is_file():
        # hidden files: locks, and what a run that was killed at once has left
        if output.exists() and (not output.is_dir() or any(p.name[0] != "." for p in output.iterdir())):
            raise FileExistsError(f"{output} is no folder of nnunet-ssl rank. Choose another -o, or remove it.")
        return
    made = read_ranking_settings(output)
    changed = [key for key, value in json.loads(json.dumps(origin)).items() if made.get(key) != value]
    if changed:
        raise ValueError(
            f"{output} was made with other {', '.join(changed)} ({file}). Choose another -o, or remove the folder; "
            f"networks change when a model is trained on."
        )


def start_or_continue(output: Path, origin: dict) -> None:
    """Notes the settings and makes the folders; raises as `require_same_settings`."""
    require_same_settings(output, origin)
    with replacing(output / SETTINGS) as temporary:
        temporary.write_text(json.dumps(origin, indent=1))
    for folder in (LABELS, MEASURED, *(f"{NETWORKS}/{network}" for network in origin["networks"])):
        (output / folder).mkdir(parents=True, exist_ok=True)


def read_ranking_settings(output: Path) -> dict:
    """What a folder of `rank` was made from; raises FileNotFoundError, or ValueError where the file is damaged."""
    file = output / SETTINGS
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: {output} is no folder of nnunet-ssl rank.")
    settings = read_json(file)
    kinds = {"dataset": str, "configuration": str, "plans": str, "folds": list, "networks": dict, "file_ending": str}
    if not isinstance(settings, dict) or not all(isinstance(settings.get(k), kind) for k, kind in kinds.items()):
        raise ValueError(f"{file} is damaged. Remove {output} and run nnunet-ssl rank again.")
    return settings


def finished(output: Path, origin: dict, scans: dict[str, list[str]]) -> set[str]:
    """The scans that are done, and not newer than what was made of them."""
    folders = [output / LABELS, *(output / NETWORKS / network for network in origin["networks"])]
    done = set()
    for case, files in scans.items():
        row, label = output / MEASURED / f"{case}.json", f"{case}{origin['file_ending']}"
        if row.is_file() and all((folder / label).is_file() for folder in folders):
            done |= {case} if row.stat().st_mtime_ns >= max(map(changed_at, files)) else set()
    return done


def table(output: Path, cases: Iterable[str]) -> list[dict]:
    """The rows of rank.csv, worst first."""
    rows = [{"case": case, **read_json(output / MEASURED / f"{case}.json")["row"]} for case in cases]

    def column(name: str) -> list[float]:
        return [np.nan if row[name] is None else row[name] for row in rows]

    def columns(prefix: str) -> dict[str, list[float]]:
        return {name: column(name) for name in rows[0] if name.startswith(prefix)}

    volumes = columns("volume_ml_")
    values = scores(column("disagreement"), columns("entropy_"), volumes, column("components"))
    for row, score, z in zip(rows, values, volume_z(volumes), strict=True):
        row |= {"score": float(score), "volume_z": float(z), "missing": " ".join(row["missing"])}
    return sorted(rows, key=lambda row: (-row["score"], row["case"]))


def write_table(file: Path, rows: Sequence[dict], classes: Sequence[str]) -> None:
    """Writes rank.csv in one step."""
    columns = ["case", "score", "disagreement"]
    columns += [f"{kind}_{name}" for kind in ("disagreement", "entropy", "volume_ml") for name in classes]
    columns += ["volume_z", "components", "missing"]
    with replacing(file) as temporary, temporary.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{v:.6g}" if isinstance(v, float) else v for key, v in row.items()})


def read_features(output: Path, cases: Sequence[str]) -> np.ndarray | None:
    """Features of scans, (cases, dimensions) in float32; None where the network has none."""
    found = []
    for case in cases:
        features = read_json(output / MEASURED / f"{case}.json")["features"]
        if features is None:
            return None
        found.append(np.array(features, dtype=np.float32))
    return np.stack(found)


def choose_next(output: Path, rows: Sequence[dict], number: int, seed: int) -> list[str]:
    """Writes next.csv, and returns lines with the scans to annotate next and what a random choice would have been."""
    points = read_features(output, [row["case"] for row in rows])
    chosen, distances = choose([row["score"] for row in rows], points, number)
    # RandomState: NumPy guarantees its stream for good
    by_chance = np.random.RandomState(seed).permutation(sorted(row["case"] for row in rows))[:number]
    with replacing(output / NEXT) as temporary, temporary.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["order", "case", "score", "distance", "random_case"])
        for order, (index, distance, other) in enumerate(zip(chosen, distances, by_chance, strict=True), start=1):
            own = "" if np.isinf(distance) else f"{distance:.6g}"
            writer.writerow([order, rows[index]["case"], f"{rows[index]['score']:.6g}", own, other])
    without = [] if points is not None else ["The network has no encoder stages: near duplicates were not looked for."]
    return [
        f"To annotate next: {' '.join(rows[index]['case'] for index in chosen)}",
        f"A random choice (seed {seed}) would be: {' '.join(by_chance)}",
        *without,
        f"Both are in {output / NEXT}. That they teach a network more than the random ones is not proven.",
    ]


# ---- for pseudo-label ----


def require_usable(
    output: Path, expected: dict[str, object], folds: Sequence[int | str], scans: dict[str, list[str]]
) -> dict:
    """The settings of a folder whose labels shall become pseudo labels.

    Args:
        output: of `rank`.
        expected: "dataset", "configuration" and "plans" that they must be of.
        folds: that the models must have been trained as.
        scans: that must be there, and not newer than their labels; per case its files.

    Raises: FileNotFoundError, ValueError.
    """
    settings = read_ranking_settings(output)
    for key, value in {**expected, "scans": "unlabeled"}.items():
        if settings.get(key) != value:
            raise ValueError(
                f"{output} has predictions of {key} {settings.get(key)}, not {value}. Rank the scans anew."
            )
    if set(settings["folds"]) != set(folds):
        was, now = (" ".join(map(str, values)) for values in (settings["folds"], folds))
        raise ValueError(f"{output} has predictions of -f {was}, not {now}: those models may know hidden labels.")
    missing = sorted(scans.keys() - finished(output, settings, scans))
    if missing:
        raise FileNotFoundError(
            f"{counted(len(missing), 'unlabeled scan is', 'unlabeled scans are')} not in {output}, or changed since: "
            f"{', '.join(missing[:5])}. Run nnunet-ssl rank again with the same arguments: it predicts these."
        )
    return settings


def take_labels(
    case: str,
    output: Path,
    settings: dict,
    unfinished: Path,
    ignore_label: int | None,
    plans: PlansManager,
    dataset_json: dict,
) -> None:
    """Copies a label of `rank` into `labelsTr` of a folder, with the disagreement; arguments as `labeling.export`."""
    name, scratch = f"{case}{settings['file_ending']}", unfinished / SCRATCH / case
    measured = read_json(output / MEASURED / f"{case}.json")
    if "changed" not in measured:
        raise ValueError(f"{output} was made by an earlier version. Rank the scans anew, in another folder.")
    if measured["changed"] is not None:
        (unfinished / DISAGREEMENT).mkdir(exist_ok=True)
        with replacing(unfinished / DISAGREEMENT / f"{case}.txt") as temporary:
            temporary.write_text(repr(measured["changed"]))
    if ignore_label is None:
        for file in (f"{case}.json", name):  # .json: the spacing of a TIFF
            if (output / LABELS / file).is_file():
                with replacing(unfinished / "labelsTr" / file) as temporary:
                    shutil.copyfile(output / LABELS / file, temporary)
        return
    reader = plans.image_reader_writer_class()
    files = [output / LABELS / name, *(output / NETWORKS / network / name for network in settings["networks"])]
    (labels, properties), *each = [reader.read_seg(str(file)) for file in files]
    labels = labels[0].astype(np.uint8 if ignore_label < 256 else np.uint16)
    labels[disagreeing([own[0] for own, _ in each])] = ignore_label
    write_labels(case, labels, properties, plans, dataset_json, unfinished / "labelsTr", scratch)
