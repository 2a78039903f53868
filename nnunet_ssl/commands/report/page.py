"""Pages of HTML in one file each: what is on them, and how they are written."""

from base64 import b64encode
from collections.abc import Callable, Sequence
from datetime import datetime
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import style
from matplotlib.figure import Figure

from nnunet_ssl.system.files import replacing

PAPER = {"light": "#ffffff", "dark": "#1b1f25"}  # behind drawings, as --card in the templates
LOOKS = {"light": "default", "dark": "dark_background"}  # of Matplotlib


class Picture(NamedTuple):
    """A picture as the page has it.

    Attributes:
        light: data URI.
        alt: what is seen, for those who do not see it.
        caption: what to look for.
        title: what it is; empty where its place on the page says so.
        dark: data URI for dark screens; empty: the same.
        wide: it is so wide that a phone shows a part of it at a time.
    """

    light: str
    alt: str
    caption: str
    title: str = ""
    dark: str = ""
    wide: bool = False


class Table(NamedTuple):
    """Heads of the columns, the first of which names the rows, and rows of texts."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


class Card(NamedTuple):
    """One scan: its name, its numbers with what they are, its picture or the reason why there is none."""

    title: str
    facts: Sequence[tuple[str, str]]
    picture: Picture | None
    note: str = ""


class Key(NamedTuple):
    """What a line of the pictures of scans stands for: a name, the line's colour and its style in Matplotlib."""

    name: str
    colour: str
    style: str


def as_uri(image: bytes, kind: str) -> str:
    """Bytes of an image file, as "png" or "jpeg", as a data URI."""
    return f"data:image/{kind};base64,{b64encode(image).decode()}"


def as_png(figure: Figure, dpi: int) -> str:
    """A figure as a data URI."""
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=dpi, pil_kwargs={"optimize": True})
    return as_uri(stream.getvalue(), "png")


def in_both_looks(draw: Callable[[str], str]) -> tuple[str, str]:
    """What a function that draws returns for bright and for dark screens; it is told which, "light" or "dark"."""
    found = []
    for look, name in LOOKS.items():
        colours = {"figure.facecolor": PAPER[look], "axes.facecolor": PAPER[look], "savefig.facecolor": PAPER[look]}
        # nnU-Net's progress.png leaves huge fonts behind
        with style.context(["default", name, colours]):
            found.append(draw(look))
    return found[0], found[1]


def require_place(output: Path) -> None:
    """Raises FileNotFoundError where the folder of a page does not exist, ValueError where the page is a folder."""
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"{output.absolute().parent} does not exist. Make it, or choose another -o.")
    if output.is_dir():
        raise ValueError(f"-o {output} is a folder. Give the name of the page, as {output / 'report.html'}.")


def write_page(template: str, output: Path, **content) -> None:
    """Fills in a template of this package and writes the page in one step; all texts are escaped."""
    loader = PackageLoader("nnunet_ssl.commands.report")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    programs = {name: metadata.version(name) for name in ("nnunet-ssl", "nnunetv2", "torch")}
    versions = ", ".join(f"{name} {version}" for name, version in programs.items())
    made = {"written": f"{datetime.now():%Y-%m-%d %H:%M}", "versions": versions, "paper": PAPER}
    text = environment.get_template(template).render(**made, **content)
    with replacing(output) as temporary:
        # names of files may have bytes that are no text
        temporary.write_text(text, encoding="utf-8", errors="replace")
