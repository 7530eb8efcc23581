"""Draws the benchmark: the error over the share of block calls saved, a line for each method."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from para_core.plot import INK, PALE, PAPER

from .methods import EXTRAPOLATING, OURS, PLAIN

OVERSAMPLING = 2  # drawn larger and reduced: PIL's lines are not antialiased
PANEL, LEGEND, MARGIN, LEFT, TOP, BOTTOM = (620, 430), 260, 14, 58, 34, 40
SHADES = {  # by group: ours warm and thick, others blue and green, each from dark to light
    OURS: ((150, 16, 24), (214, 62, 40), (236, 122, 30), (232, 168, 40), (168, 60, 120), (214, 120, 170), (96, 60, 40)),
    PLAIN: ((22, 60, 140), (48, 104, 196), (96, 148, 220), (20, 120, 160), (60, 170, 200), (110, 120, 190)),
    EXTRAPOLATING: (
        (12, 92, 52), (36, 136, 76), (84, 172, 96), (96, 112, 30), (140, 156, 40), (20, 120, 110), (70, 170, 150),
        (110, 140, 110), (60, 90, 80), (150, 190, 150),
    ),
}  # fmt: skip
WIDTHS = {OURS: 3, PLAIN: 2, EXTRAPOLATING: 2}
MARKERS = {OURS: "circle", PLAIN: "square", EXTRAPOLATING: "triangle"}


def draw_chart(result: dict) -> Image.Image:
    """An RGB picture with a panel for each schedule, two in a row, and one legend."""
    cells = result["cells"]
    columns = min(2, len(cells))
    rows = math.ceil(len(cells) / columns)
    colours = _colours(cells)
    scale = OVERSAMPLING
    size = (columns * PANEL[0] + LEGEND, max(rows * PANEL[1], 60 + 18 * len(colours)) + MARGIN)
    image = Image.new("RGB", (size[0] * scale, size[1] * scale), PAPER)
    decades = _decades(cells)
    for number, cell in enumerate(cells):
        corner = number % columns * PANEL[0], number // columns * PANEL[1]
        Panel(image, corner, decades).draw(cell, colours)
    _legend(ImageDraw.Draw(image), columns * PANEL[0] + MARGIN, result, colours)
    return image.reduce(scale)


class Panel:
    """One schedule's axes: the share saved from 0 to 0.8, the error on a logarithmic axis over whole decades."""

    RIGHTMOST = 0.8

    def __init__(self, image: Image.Image, corner: tuple[int, int], decades: tuple[int, int]) -> None:
        self.canvas = ImageDraw.Draw(image)
        self.left, self.top = corner[0] + LEFT, corner[1] + TOP
        self.right, self.bottom = corner[0] + PANEL[0] - MARGIN, corner[1] + PANEL[1] - BOTTOM
        self.decades = decades

    def draw(self, cell: dict, colours: dict[str, tuple]) -> None:
        title = f"{cell['sampler']}, {cell['steps']} steps: error of the final latent (relative L2)"
        _text(self.canvas, (self.left, self.top - 22), title, 13)
        self._axes()
        for method in sorted(cell["methods"], key=lambda method: method["group"] == OURS):
            if not method["points"]:
                continue
            colour, group = colours[method["name"]]
            points = [self._place(p["saved"], p["rel_l2"]) for p in method["points"] if p["rel_l2"] > 0]
            self.canvas.line([_scaled(point) for point in points], colour, WIDTHS[group] * OVERSAMPLING, "curve")
            for point in points:
                _marker(self.canvas, point, MARKERS[group], colour)

    def _place(self, saved: float, error: float) -> tuple[float, float]:
        low, high = self.decades
        share = (min(max(math.log10(error), low), high) - low) / (high - low)
        x = self.left + min(max(saved / self.RIGHTMOST, 0), 1) * (self.right - self.left)
        return x, self.bottom - share * (self.bottom - self.top)

    def _axes(self) -> None:
        for decade in range(self.decades[0], self.decades[1] + 1):
            for digit in (1, 2, 5) if decade < self.decades[1] else (1,):
                y = self._place(0, digit * 10.0**decade)[1]
                self._line((self.left, y), (self.right, y), 1)
                _text(self.canvas, (self.left - 6, y), f"{digit}e{decade}", 10, anchor="rm")
        for tenths in range(0, 9):
            x = self._place(tenths / 10, 1)[0]
            self._line((x, self.top), (x, self.bottom), 1)
            _text(self.canvas, (x, self.bottom + 5), f"{tenths * 10} %", 10, anchor="ma")
        words = "block calls saved"
        _text(self.canvas, ((self.left + self.right) / 2, self.bottom + 20), words, 11, anchor="ma")

    def _line(self, start: tuple[float, float], end: tuple[float, float], width: int) -> None:
        self.canvas.line([_scaled(start), _scaled(end)], PALE, width * OVERSAMPLING)


def _colours(cells: Sequence[dict]) -> dict[str, tuple[tuple[int, int, int], str]]:
    """Of each method: colour and group, ordered by group."""
    found: dict[str, list[str]] = {group: [] for group in SHADES}
    for cell in cells:
        for method in cell["methods"]:
            if method["points"] and method["name"] not in found[method["group"]]:
                found[method["group"]].append(method["name"])
    return {
        name: (SHADES[group][number % len(SHADES[group])], group)
        for group, names in found.items()
        for number, name in enumerate(names)
    }


def _decades(cells: Sequence[dict]) -> tuple[int, int]:
    errors = [p["rel_l2"] for cell in cells for m in cell["methods"] for p in m["points"] if p["rel_l2"] > 0]
    low, high = min(errors, default=1e-3), max(errors, default=1.0)
    return math.floor(math.log10(low)), max(math.ceil(math.log10(high)), math.floor(math.log10(low)) + 1)


def _legend(canvas: ImageDraw.ImageDraw, x: int, result: dict, colours: dict[str, tuple]) -> None:
    _text(canvas, (x, 12), f"{result['model']}, {result['prompts']} prompts", 12)
    for line, (name, (colour, group)) in enumerate(colours.items()):
        y = 42 + 18 * line
        canvas.line([_scaled((x, y)), _scaled((x + 26, y))], colour, WIDTHS[group] * OVERSAMPLING)
        _marker(canvas, (x + 13, y), MARKERS[group], colour)
        _text(canvas, (x + 34, y), name, 11, anchor="lm")


def _marker(canvas: ImageDraw.ImageDraw, place: tuple[float, float], shape: str, colour: tuple) -> None:
    (x, y), radius = _scaled(place), 4 * OVERSAMPLING
    if shape == "triangle":
        canvas.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], colour, PAPER)
        return
    draw = canvas.ellipse if shape == "circle" else canvas.rectangle
    draw((x - radius, y - radius, x + radius, y + radius), colour, PAPER, OVERSAMPLING)


def _text(canvas: ImageDraw.ImageDraw, place: tuple[float, float], text: str, size: int, anchor: str = "la") -> None:
    canvas.text(_scaled(place), text, INK, ImageFont.load_default(size * OVERSAMPLING), anchor=anchor)


def _scaled(place: tuple[float, float]) -> tuple[float, float]:
    return place[0] * OVERSAMPLING, place[1] * OVERSAMPLING
