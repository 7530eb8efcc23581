"""Draws a run's residual curve against the threshold over strips of its steps, bars, and lines of text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont

from .cache_report import RunReport, StepRecord

INK, PALE, PAPER = (40, 44, 52), (214, 218, 226), (255, 255, 255)
REUSED, COMPUTED, THRESHOLD = (64, 176, 120), (150, 158, 172), (214, 84, 72)
CURVES = ((48, 104, 196), (222, 138, 32), (140, 84, 180), (20, 150, 160))
OVERSAMPLING = 2  # drawn larger and reduced: PIL's lines are not antialiased
FONT_SIZE, LINE_HEIGHT, LETTER_WIDTH = 11, 16, 5.6  # of the built-in font; letters are this wide on average
STRIP, MARGIN = 12, 12


def draw_residual_curve(
    report: RunReport, size: tuple[int, int] = (720, 300), title: str | None = None, *, density: int = 1
) -> Image.Image:
    """An RGB picture: per conditioning the residual difference at each evaluation, on a linear axis that ends above
    the threshold, and a strip in which reused evaluations are green.

    size: in units of which the letters are 11 high; density: pixels for each of them. A title may have several lines.
    """
    plot = ResidualPlot(report, size, title or report.summary(), density * OVERSAMPLING)
    return plot.draw().reduce(OVERSAMPLING)


def draw_text(text: str, width: int = 720, *, density: int = 1) -> Image.Image:
    """An RGB picture of nothing but lines of text, `width` wide in the units of draw_residual_curve."""
    lines = _wrapped(text, width - 2 * MARGIN)
    image = Image.new("RGB", (width * density, (len(lines) + 1) * LINE_HEIGHT * density), PAPER)
    font = ImageFont.load_default(FONT_SIZE * density)
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((MARGIN * density, (number + 0.5) * LINE_HEIGHT * density), line, INK, font)
    return image


def draw_bars(bars: Mapping[str, tuple[float, str]], title: str, width: int = 720, *, density: int = 1) -> Image.Image:
    """An RGB picture: lines of text over bars that start at 0; label to (length, what stands in the bar).

    The last bar is green. width: in the units of draw_residual_curve.
    """
    head = draw_text(title, width, density=density)
    line = LINE_HEIGHT * density
    image = Image.new("RGB", (head.width, head.height + (len(bars) + 1) * line), PAPER)
    image.paste(head)
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_SIZE * density)
    left, right = 58 * density, (width - MARGIN) * density
    longest = max((length for length, _ in bars.values()), default=0) or 1
    for number, (label, (length, words)) in enumerate(bars.items()):
        y = head.height + number * line
        end = left + (right - left) * length / longest
        canvas.rectangle((left, y, end, y + line - 3 * density), REUSED if number == len(bars) - 1 else COMPUTED)
        canvas.text((left - 5 * density, y + line / 2 - density), label, INK, font, anchor="rm")
        canvas.text((left + 5 * density, y + line / 2 - density), words, INK, font, anchor="lm")
    return image


def _wrapped(text: str, width: float) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, int(width / LETTER_WIDTH))]


class ResidualPlot:
    """The layout of one plot, in pixels; `scale` of them are one unit of `size`."""

    def __init__(self, report: RunReport, size: tuple[int, int], title: str, scale: int) -> None:
        self.report = report
        self.scale = scale
        self.image = Image.new("RGB", (size[0] * scale, size[1] * scale), PAPER)
        self.canvas = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(FONT_SIZE * scale)
        num_strips = max(1, len(report.conditionings))
        self.left, self.right = 58 * scale, (size[0] - MARGIN) * scale
        self.title = _wrapped(title, (self.right - self.left) / scale)
        self.top = (14 + len(self.title) * LINE_HEIGHT) * scale
        self.bottom = (size[1] - 22 - num_strips * (STRIP + 4)) * scale
        self.num_steps = max((len(records) for records in report.conditionings.values()), default=1)
        diffs = [record.diff for records in report.conditionings.values() for record in records if record.diff]
        # A few steps at the ends change far more than the rest: they may leave the picture at its upper edge.
        typical = sorted(diffs)[int(len(diffs) * 0.8)] if diffs else 0.1
        self.threshold = 0.0 if report.target_speedup else report.residual_diff_threshold
        self.ceiling = max(1.4 * self.threshold, 1.3 * typical)

    def draw(self) -> Image.Image:
        for number, line in enumerate(self.title):
            self.canvas.text((self.left, (6 + number * LINE_HEIGHT) * self.scale), line, INK, self.font)
        self._axes()
        for number, (label, records) in enumerate(self.report.conditionings.items()):
            colour = CURVES[number % len(CURVES)]
            self._curve(records, colour)
            self._strip(records, label, number, colour)
        return self.image

    def _x(self, step: float) -> float:
        return self.left + (step + 0.5) * (self.right - self.left) / self.num_steps

    def _y(self, diff: float) -> float:
        return self.bottom - min(diff / self.ceiling, 1) * (self.bottom - self.top)

    def _axes(self) -> None:
        scale = self.scale
        for share in (0, 0.25, 0.5, 0.75, 1):
            y = self._y(share * self.ceiling)
            self.canvas.line((self.left, y, self.right, y), PALE, scale)
            label = f"{share * self.ceiling:.3f}"
            self.canvas.text((self.left - 5 * scale, y), label, INK, self.font, anchor="rm")
        if self.threshold > 0:
            y = self._y(self.threshold)
            for x in range(self.left, self.right, 10 * scale):
                self.canvas.line((x, y, min(x + 6 * scale, self.right), y), THRESHOLD, scale)

    def _curve(self, records: Sequence[StepRecord], colour: tuple[int, int, int]) -> None:
        points = [(self._x(i), self._y(r.diff), r.reused) for i, r in enumerate(records) if r.diff is not None]
        if points:  # Pillow 13 refuses an empty line
            self.canvas.line([point[:2] for point in points], colour, 2 * self.scale, "curve")
        radius = 3 * self.scale
        for x, y, reused in points:
            box = (x - radius, y - radius, x + radius, y + radius)
            self.canvas.ellipse(box, REUSED if reused else colour, PAPER, self.scale)

    def _strip(self, records: Sequence[StepRecord], label: str, number: int, colour: tuple[int, int, int]) -> None:
        scale, height = self.scale, STRIP * self.scale
        y = self.bottom + (14 + number * (STRIP + 4)) * scale
        self.canvas.text((self.left - 5 * scale, y + height / 2), label[:8], colour, self.font, anchor="rm")
        half = (self.right - self.left) / self.num_steps / 2
        for i, record in enumerate(records):
            box = (self._x(i) - half + scale, y, self._x(i) + half - scale, y + height)
            self.canvas.rectangle(box, REUSED if record.reused else COMPUTED)
