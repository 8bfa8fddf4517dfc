"""Pictures as they stand in the page: for light and dark paper, some for wide and narrow screens, as data URIs."""

from __future__ import annotations

import base64
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agsel.monitor.pictures import DARK, LIGHT, Paper, png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE: Any = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "font.family": "DejaVu Sans"}
IS_DARK, IS_NARROW = "(prefers-color-scheme: dark)", "(max-width: 640px)"
FINE, COARSE = 150, 110
"""Pixels per inch: of small pictures, which screens with fine pixels show as large ones, and of large ones."""


@dataclass(frozen=True)
class Picture:
    """What is to be drawn.

    Attributes:
        title: above it.
        alternative: in words what it shows.
        draw: makes the figure.
        widths: in inches, for wide and for narrow screens; None for one picture as it is drawn.
    """

    title: str
    alternative: str
    draw: Callable[[Paper], Figure]
    widths: tuple[float, float] | None = None

    @property
    def drawings(self) -> int:
        """How many files it is in the page."""
        return 4 if self.widths else 2


@dataclass(frozen=True)
class Source:
    """A drawing in the page.

    Attributes:
        media: for which it is meant; empty for all others.
        address: with the whole file in it.
        width: in pixels.
        height: in pixels.
    """

    media: str
    address: str
    width: int
    height: int


@dataclass(frozen=True)
class Embedded:
    """A picture as the page has it; of its sources the first counts that fits the screen."""

    title: str
    alternative: str
    is_wide: bool
    sources: list[Source]


def embed(picture: Picture, advance: Callable[[float], None]) -> Embedded:
    """Draw a picture, and report each drawing that is done."""
    from matplotlib import rc_context

    sources = []
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the font has no Chinese; the page around the picture has
        for media, drawn in _drawings(picture):
            sources.append(_source(media, drawn))
            advance(1)
    return Embedded(picture.title, picture.alternative, picture.widths is not None, sources)


def _drawings(picture: Picture) -> Iterator[tuple[str, bytes]]:
    for paper, of_paper in ((DARK, [IS_DARK]), (LIGHT, [])):
        figure = picture.draw(paper)
        if picture.widths:
            wide, narrow = picture.widths
            yield " and ".join([*of_paper, IS_NARROW]), _drawn(figure, narrow, FINE)
            yield " ".join(of_paper), _drawn(figure, wide, COARSE)
        else:
            yield " ".join(of_paper), png(figure, FINE)


def _drawn(figure: Figure, width: float, pixels_per_inch: int) -> bytes:
    figure.set_size_inches(width, figure.get_figheight())
    return png(figure, pixels_per_inch)


def _source(media: str, drawn: bytes) -> Source:
    width, height = struct.unpack(">II", drawn[16:24])
    return Source(media, f"data:image/png;base64,{base64.b64encode(drawn).decode()}", width, height)
