"""Rendered text with exact labels: words and numbers, drawn with the fonts matplotlib carries."""

from __future__ import annotations

import importlib.util
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cora.tasks.data import DataNotFoundError
from cora.tasks.words import WORDS

try:
    from PIL import Image, ImageDraw, ImageFilter, ImageFont
except ImportError:  # reported by require_renderer()
    Image = None  # type: ignore[assignment]

__all__ = ["Style", "TextSource", "render_line", "split_of"]

Grey = NDArray[np.uint8]

FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSans-Oblique.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSerif-Italic.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralItalic.ttf",
)


def font_folder() -> Path | None:
    """The folder of matplotlib's TrueType fonts, found without importing matplotlib."""
    spec = importlib.util.find_spec("matplotlib")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        folder = Path(root) / "mpl-data" / "fonts" / "ttf"
        if (folder / FONTS[0]).is_file():
            return folder
    return None


def missing_renderer() -> str | None:
    """None when text can be rendered, else what to install."""
    if Image is None:
        return "Pillow (it renders the text): not found.\n  pip install pillow"
    if font_folder() is None:
        return "matplotlib (its fonts draw the text): not found.\n  pip install matplotlib"
    return None


def require_renderer() -> Path:
    """The folder of fonts.

    Raises:
        DataNotFoundError: Pillow or the fonts are not installed.
    """
    message, folder = missing_renderer(), font_folder()
    if message is not None or folder is None:
        raise DataNotFoundError(message)
    return folder


@lru_cache(maxsize=512)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A font of ``FONTS`` at a size in pixels; simple layout, so the same with every Pillow."""
    path = require_renderer() / name
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def split_of(text: str) -> str:
    """``"calibration"`` or ``"validation"``: which split a word belongs to, whatever its case."""
    return "calibration" if zlib.crc32(text.lower().encode()) % 5 < 2 else "validation"


class TextSource:
    """Seeded short texts: words in three cases, pairs of words, numbers, dates, prices, codes.

    Args:
        split: ``"calibration"`` or ``"validation"``; no word or number occurs in both.
        rng: the generator that chooses.
    """

    def __init__(self, split: str, rng: np.random.Generator) -> None:
        if split not in ("calibration", "validation"):
            raise ValueError(f"split: expected 'calibration' or 'validation', got {split!r}")
        self.split = split
        self.rng = rng
        self.words = [word for word in WORDS if split_of(word) == split]

    def word(self) -> str:
        """One word, in lower, title or upper case."""
        word = self.words[int(self.rng.integers(len(self.words)))]
        case = self.rng.random()
        return word if case < 0.6 else word.capitalize() if case < 0.85 else word.upper()

    def number(self) -> str:
        """A number, date, time, price, share or code, of this split."""
        while True:
            text = self._number()
            if split_of(text) == self.split:
                return text

    def text(self) -> str:
        """What one line shows, 2 to 13 characters."""
        kind = self.rng.random()
        if kind < 0.66:
            return self.word()
        if kind < 0.74:
            text = f"{self.word()} {self.word()}"
            return text if len(text) <= 12 else text.split()[0]
        if kind < 0.80:
            return self.word() + ",.;:!?"[int(self.rng.integers(6))]
        return self.number()

    def _number(self) -> str:
        draw = self.rng.integers
        kind = int(draw(7))
        if kind == 0:
            return str(draw(10, 100_000))
        if kind == 1:
            return f"{draw(1, 29):02d}/{draw(1, 13):02d}/{draw(1950, 2050)}"
        if kind == 2:
            return f"${draw(1, 2000)}.{draw(0, 100):02d}"
        if kind == 3:
            return f"{draw(0, 24):02d}:{draw(0, 60):02d}"
        if kind == 4:
            return f"{draw(0, 100)}.{draw(0, 10)}%"
        if kind == 5:
            return f"{draw(1950, 2050)}-{draw(1, 13):02d}-{draw(1, 29):02d}"
        letters = "ABCDEFGHKMNPRTUVWXYZ"
        code = "".join(letters[int(i)] for i in draw(len(letters), size=3))
        return f"{code}-{draw(100, 1000)}"


@dataclass(frozen=True, slots=True)
class Style:
    """How roughly a line is rendered; each value is an upper bound drawn from per line.

    Args:
        rotation: degrees either way.
        blur: radius of the Gaussian, pixels.
        noise: standard deviation of the pixel noise, grey levels.
        contrast: smallest difference of ink and paper, grey levels.
    """

    rotation: float = 3.0
    blur: float = 1.4
    noise: float = 17.0
    contrast: int = 60


def render_line(
    text: str,
    rng: np.random.Generator,
    *,
    height: int = 64,
    width: int = 128,
    style: Style | None = None,
) -> Grey:
    """One line of dark-on-light (sometimes light-on-dark) text on a plain, noisy background.

    The text is drawn as large as a random font size says and shrunk to fit the width.

    Args:
        text: what to draw.
        rng: chooses font, size, place, colours and distortions.
        height, width: size of the picture, pixels.
        style: how roughly.

    Returns:
        uint8 [height, width].
    """
    style = style or Style()
    name = FONTS[int(rng.integers(len(FONTS)))]
    size = int(rng.integers(height * 5 // 12, height * 2 // 3))
    box = load_font(name, size).getbbox(text)
    if box[2] - box[0] > width - 12:
        size = max(8, int(size * (width - 12) / (box[2] - box[0])))
        box = load_font(name, size).getbbox(text)
    paper = int(rng.integers(150, 256))
    ink = int(rng.integers(0, max(1, paper - style.contrast)))
    if rng.random() < 0.12:
        paper, ink = ink, paper
    slack_x, slack_y = width - (box[2] - box[0]), height - (box[3] - box[1])
    x = int(rng.integers(3, max(4, min(14, int(slack_x) - 2)))) - round(box[0])
    y = round(slack_y * rng.uniform(0.35, 0.65) - box[1])
    angle, radius = rng.uniform(-style.rotation, style.rotation), rng.uniform(0, style.blur)
    image = Image.new("L", (width, height), paper)
    ImageDraw.Draw(image).text((x, y), text, fill=ink, font=load_font(name, size))
    centre = (x + (box[0] + box[2]) / 2, y + (box[1] + box[3]) / 2)
    image = image.rotate(angle, Image.Resampling.BILINEAR, center=centre, fillcolor=paper)
    if radius > 0.3:
        image = image.filter(ImageFilter.GaussianBlur(radius))
    noise = rng.standard_normal((height, width), np.float32) * np.float32(
        rng.uniform(0, style.noise)
    )
    return np.clip(np.asarray(image, np.float32) + noise, 0, 255).round().astype(np.uint8)
