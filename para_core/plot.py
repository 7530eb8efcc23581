"""Draws a run's residual curve against the threshold, over strips of its computed and reused steps."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .cache_report import RunReport, StepRecord

INK, PALE, PAPER = (40, 44, 52), (214, 218, 226), (255, 255, 255)
REUSED, COMPUTED, THRESHOLD = (64, 176, 120), (150, 158, 172), (214, 84, 72)
CURVES = ((48, 104, 196), (222, 138, 32), (140, 84, 180), (20, 150, 160))
SCALE = 2  # drawn larger and reduced: PIL's lines are not antialiased


def draw_residual_curve(report: RunReport, size: tuple[int, int] = (720, 300), title: str | None = None) -> Image.Image:
    """An RGB picture of `size` pixels: per conditioning the residual difference at each evaluation, on a linear axis
    that ends above the threshold, and a strip in which reused evaluations are green.
    """
    return ResidualPlot(report, (size[0] * SCALE, size[1] * SCALE)).draw(title or report.summary()).resize(size)


class ResidualPlot:
    """The layout of one plot, in pixels of the enlarged canvas."""

    def __init__(self, report: RunReport, size: tuple[int, int]) -> None:
        self.report = report
        self.image = Image.new("RGB", size, PAPER)
        self.canvas = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(11 * SCALE)
        self.strip = 12 * SCALE
        num_strips = max(1, len(report.conditionings))
        self.left, self.right = 46 * SCALE, size[0] - 12 * SCALE
        self.top, self.bottom = 26 * SCALE, size[1] - 22 * SCALE - num_strips * (self.strip + 4 * SCALE)
        self.num_steps = max((len(records) for records in report.conditionings.values()), default=1)
        diffs = [record.diff for records in report.conditionings.values() for record in records if record.diff]
        # A few steps at the ends change far more than the rest: they may leave the picture at its upper edge.
        typical = sorted(diffs)[int(len(diffs) * 0.8)] if diffs else 0.1
        self.ceiling = max(1.4 * report.residual_diff_threshold, 1.3 * typical)

    def draw(self, title: str) -> Image.Image:
        self.canvas.text((self.left, 6 * SCALE), title, INK, self.font)
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
        for share in (0, 0.25, 0.5, 0.75, 1):
            y = self._y(share * self.ceiling)
            self.canvas.line((self.left, y, self.right, y), PALE, SCALE)
            label = f"{share * self.ceiling:.3f}"
            self.canvas.text((self.left - 5 * SCALE, y), label, INK, self.font, anchor="rm")
        if 0 < self.report.residual_diff_threshold:
            y = self._y(self.report.residual_diff_threshold)
            for x in range(self.left, self.right, 10 * SCALE):
                self.canvas.line((x, y, min(x + 6 * SCALE, self.right), y), THRESHOLD, SCALE)

    def _curve(self, records: Sequence[StepRecord], colour: tuple[int, int, int]) -> None:
        points = [(self._x(i), self._y(r.diff), r.reused) for i, r in enumerate(records) if r.diff is not None]
        self.canvas.line([point[:2] for point in points], colour, 2 * SCALE, "curve")
        radius = 3 * SCALE
        for x, y, reused in points:
            box = (x - radius, y - radius, x + radius, y + radius)
            self.canvas.ellipse(box, REUSED if reused else colour, PAPER, SCALE)

    def _strip(self, records: Sequence[StepRecord], label: str, number: int, colour: tuple[int, int, int]) -> None:
        y = self.bottom + 14 * SCALE + number * (self.strip + 4 * SCALE)
        self.canvas.text((self.left - 5 * SCALE, y + self.strip / 2), label[:8], colour, self.font, anchor="rm")
        half = (self.right - self.left) / self.num_steps / 2
        for i, record in enumerate(records):
            box = (self._x(i) - half + SCALE, y, self._x(i) + half - SCALE, y + self.strip)
            self.canvas.rectangle(box, REUSED if record.reused else COMPUTED)
