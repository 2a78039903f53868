"""The unlabeled scans on the page, as `nnunet-ssl rank` has sorted them."""

import csv
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from nnunet_ssl.commands.ranking_files import IMAGES, LABELS, NETWORKS, NEXT, SETTINGS, TABLE
from nnunet_ssl.commands.report.page import Card, Key, Table
from nnunet_ssl.commands.report.pictures import keys_of
from nnunet_ssl.commands.report.scans import (
    FEW,
    NONE,
    Reading,
    first_channels,
    labeled_images,
    millilitres,
    number,
    show,
)
from nnunet_ssl.commands.report.training import Training
from nnunet_ssl.system.files import read_json, read_text
from nnunet_ssl.training.preflight import raw_folder

VOLUME = "volume_ml_"  # begin of the columns with the classes
NUMBERS = ("score", "disagreement", "volume_z")  # columns that are shown as such
UNUSUAL = 3  # robust z of a volume


class Ranking(NamedTuple):
    """A folder of `nnunet-ssl rank`.

    Attributes:
        rows: of its table, worst first.
        classes: names.
        keys: a line for every network.
        next: cases to annotate next; none where that was not asked for.
        images: per case the file of its first channel.
    """

    folder: Path
    rows: list[dict[str, str]]
    classes: list[str]
    keys: list[Key]
    next: list[str]
    images: dict[str, Path]

    def files(self, case: str, ending: str) -> list[Path]:
        """The label files of a case, one for every key."""
        places = [Path(NETWORKS, key.name) for key in self.keys] if (self.folder / NETWORKS).is_dir() else [LABELS]
        return [self.folder / place / f"{case}{ending}" for place in places]


def read_ranking(folder: Path, training: Training) -> Ranking:
    """Reads the tables of a folder of `nnunet-ssl rank`.

    Raises: FileNotFoundError where it is none, or not finished; ValueError where it is damaged, or of another training.
    """
    if not (folder / TABLE).is_file():
        raise FileNotFoundError(
            f"{folder / TABLE} is missing. Give the folder that nnunet-ssl rank has written with --rank; where it was "
            f"interrupted, run the same rank command again first."
        )
    settings = read_settings(folder, training)
    rows = read_rows(folder / TABLE, "case", "score", "missing")
    networks = settings.get("networks") or {}
    own = sorted(path.name for path in (folder / NETWORKS).glob("*") if path.is_dir())
    names = [name for name in networks if name in own] + [name for name in own if name not in networks]
    dataset, given = training.plans.dataset_name, settings.get("scans", "unlabeled")
    hidden = labeled_images(dataset, training.dataset_json) if given == "unlabeled" else {}
    scans = raw_folder(dataset, "imagesUn") if given == "unlabeled" else Path(given)
    folders = [folder / IMAGES, *([scans] if scans else [])]
    return Ranking(
        folder,
        rows,
        [name.removeprefix(VOLUME) for name in (rows[0] if rows else ()) if name.startswith(VOLUME)],
        keys_of(names or ["prediction"]),
        [row["case"] for row in read_rows(folder / NEXT, "case")] if (folder / NEXT).is_file() else [],
        hidden | first_channels(folders, training.dataset_json),
    )


def read_settings(folder: Path, training: Training) -> dict:
    """What a ranking was made from; raises ValueError where that is another training."""
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    if not isinstance(settings, dict):
        raise ValueError(f"{folder / SETTINGS} is damaged. Remove {folder} and run nnunet-ssl rank again.")
    plans, fold = training.plans, training.fold
    own = {"dataset": plans.dataset_name, "configuration": training.configuration, "plans": plans.plans_name}
    other = [f"{name} {settings[name]}" for name, value in own.items() if settings.get(name, value) != value]
    trainers = settings.get("trainers", [training.trainer])
    other += [] if training.trainer in trainers else [f"trainer {', '.join(map(str, trainers))}"]
    folds = settings.get("folds", [fold])
    other += [] if fold in folds else [f"fold {' '.join(map(str, folds))}"]
    if other:
        raise ValueError(
            f"{folder} ranks the predictions of {', '.join(other)}, this page is of {training.trainer}, "
            f"{', '.join(own.values())}, fold {fold}. Give the folder of this model with --rank."
        )
    return settings


def read_rows(file: Path, *needed: str) -> list[dict[str, str]]:
    """The rows of a table of `nnunet-ssl rank`; raises ValueError that names the file where it is damaged."""
    reader = csv.DictReader(StringIO(read_text(file), newline=""))
    rows = list(reader)
    lacking = [name for name in needed if name not in (reader.fieldnames or ())]
    if lacking:
        problem = f"it has no column {', '.join(lacking)}"
    elif any(None in row or None in row.values() for row in rows):
        problem = "a row is cut off"
    elif any(Path(row["case"]).name != row["case"] for row in rows):
        problem = "a case is no name of a file"
    elif not all(is_number(v) for row in rows for name, v in row.items() if name in NUMBERS or name.startswith(VOLUME)):
        problem = "a number is none"
    else:
        return rows
    raise ValueError(f"{file} is damaged ({problem}). Run the same nnunet-ssl rank command again.")


def is_number(text: str) -> bool:
    """Whether a cell is empty or a number."""
    try:
        float(text or 0)
    except ValueError:
        return False
    return True


def cards(ranking: Ranking, how: Reading, pictures: int) -> Iterator[Card]:
    """The worst scans, one after the other, behind a progress bar."""
    for row in tqdm(ranking.rows[:pictures], "Drawing unlabeled scans", unit="scan", disable=None):
        case = row["case"]
        facts = [("score", number(row["score"]))]
        if row.get("disagreement"):
            facts.append(("disagreement", number(row["disagreement"])))
        facts += [(f"volume of {name}", f"{millilitres(row[VOLUME + name])} ml") for name in ranking.classes]
        if row.get("components"):
            facts.append(("pieces", row["components"]))
        alt = f"Scan {case}, " + ", ".join(" ".join(fact) for fact in facts)
        files = ranking.files(case, how.ending)
        picture, note = show(ranking.images.get(case), files, ranking.keys, how, questions(row, ranking), alt)
        missing = f"Not predicted: {absent(row, ranking)}." if row["missing"] else ""
        yield Card(case, facts, picture, " ".join(filter(None, (missing, note))))


def questions(row: dict[str, str], ranking: Ranking) -> str:
    """What to look for in the picture of a scan."""
    if ranking.classes and not any(float(row[VOLUME + name] or 0) for name in ranking.classes):
        return "Is there really nothing in this scan?"
    found = []
    if number(row.get("disagreement", "")) not in (NONE, "0.00"):
        found.append("Where the lines part, which network is right?")
    if row.get("components", "").isdecimal() and int(row["components"]) > 1:
        found.append(f"Are all {row['components']} pieces real?")
    if float(row.get("volume_z") or 0) > UNUSUAL:
        found.append("The volume is unusual: is something left out, or too much?")
    return " ".join(found) or "Are the lines around the whole structure, and around nothing else?"


def absent(row: dict[str, str], ranking: Ranking) -> str:
    """The classes that are not predicted in a scan; the table has spaces between names, which may have some too."""
    return (
        ", ".join(name for name in ranking.classes if row[VOLUME + name] and not float(row[VOLUME + name]))
        or row["missing"]
    )


def rest(ranking: Ranking, pictures: int) -> Table:
    """The other scans as rows."""
    shown = ranking.classes if len(ranking.classes) <= FEW else []
    heads = ("scan", "score", "disagreement", *(f"{name} (ml)" for name in shown), "pieces", "not predicted")
    rows = [
        (
            row["case"],
            number(row["score"]),
            number(row.get("disagreement", "")),
            *(millilitres(row[VOLUME + name]) for name in shown),
            row.get("components", ""),
            absent(row, ranking),
        )
        for row in ranking.rows[pictures:]
    ]
    return Table(heads, rows)


def remarks(ranking: Ranking) -> list[str]:
    """Sentences on what all scans have in common."""
    found = []
    if not ranking.rows:
        return ["The table of the ranking has no scan."]
    if len(ranking.keys) == 1:
        found.append(
            "One network only: nothing can disagree. The score comes from the network's own doubt and from unusual "
            "volumes."
        )
    for name in ranking.classes:
        if all(not float(row[VOLUME + name] or 0) for row in ranking.rows):
            found.append(f"{name} is not predicted in any of these scans.")
    return found
