"""The page of samples: one HTML file that needs no network, with pictures and sound inside of it."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from pretrain.generation.pieces import Piece
from pretrain.html_page import environment

_TYPES = {"png": "image/png", "wav": "audio/wav"}


@dataclass(frozen=True)
class ShownPrompt:
    """What the page shows of one prompt."""

    name: str
    pieces: Sequence[Piece]
    truth: Sequence[Piece] | None
    samples: Sequence[Sequence[Piece]]
    names: Sequence[str] = ()
    """What stands above each sample; empty: its number."""


def page(title: str, about: Sequence[str], prompts: Sequence[ShownPrompt]) -> str:
    """The whole page. `about`: lines below the title. Equal arguments give equal bytes."""
    templates = shown_environment(Path(__file__).parent)
    return templates.get_template("page.html.j2").render(title=title, about=about, prompts=prompts)


def shown_environment(folder: Path) -> jinja2.Environment:
    """Return the environment of templates in `folder` that show pieces of documents."""
    templates = environment(folder)
    templates.filters |= {"data_uri": _data_uri, "visible": _visible}
    return templates


def _data_uri(piece: Piece) -> str:
    return f"data:{_TYPES[piece.suffix]};base64,{base64.b64encode(piece.file).decode()}"


def _visible(text: str) -> str:
    """The text with a sign in the place of characters that HTML does not take."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
