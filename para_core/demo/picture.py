"""The demo's picture: the same prompts with and without acceleration, over the residual curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..plot import INK, PAPER, draw_residual_curve
from .table import Row

TILE, GAP, HEAD = 160, 10, 44
COLUMNS = 7  # rows of the table beside each other, at most


def to_image(picture: Tensor) -> Image.Image:
    """An RGB image from (H, W, 3) in 0..1."""
    return Image.fromarray((picture * 255).round().byte().numpy())


def draw_demo(
    rows: Sequence[Row], figures: Sequence[dict], prompts: Sequence[str], *, shown: Sequence[int]
) -> Image.Image:
    """Columns are rows of the table, with the prompts numbered `shown` below each other, then a curve for each cache.

    The curves are those of the first prompt shown.
    """
    cached = [row for row in rows if row.reports]
    num_bands = math.ceil(len(rows) / COLUMNS)
    columns = math.ceil(len(rows) / num_bands)
    width = max(columns * (TILE + GAP) + GAP, 900)
    curve = ((width - 3 * GAP) // 2, 230)
    band = HEAD + len(shown) * (TILE + GAP + 18) + 10
    top = band * num_bands
    image = Image.new("RGB", (width, top + (len(cached) + 1) // 2 * (curve[1] + GAP)), PAPER)
    for first in range(0, len(rows), columns):
        chosen = slice(first, first + columns)
        _draw_band(image, first // columns * band, rows[chosen], figures[chosen], {n: prompts[n] for n in shown})
    for number, row in enumerate(cached):
        report = row.reports[shown[0]]
        title = f"{row.name}: the estimate at each step, {report.num_reused_calls} steps reused (green)"
        place = (GAP + number % 2 * (curve[0] + GAP), top + number // 2 * (curve[1] + GAP))
        image.paste(draw_residual_curve(report, curve, title), place)
    return image


def _draw_band(
    image: Image.Image, top: int, rows: Sequence[Row], figures: Sequence[dict], prompts: Mapping[int, str]
) -> None:
    """The pictures of some rows beside each other. prompts: number to prompt."""
    canvas = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    for column, (row, figure) in enumerate(zip(rows, figures, strict=True)):
        x = GAP + column * (TILE + GAP)
        canvas.text((x, top + 6), row.name, INK, font)
        detail = f"{figure['speedup']:.2f}x, {figure['reused_steps']:.1f} of {figure['steps']} reused"
        canvas.text((x, top + 25), detail, INK, small)
        for line, number in enumerate(prompts):
            tile = to_image(row.pictures[number]).resize((TILE, TILE), Image.Resampling.LANCZOS)
            image.paste(tile, (x, top + HEAD + 18 + line * (TILE + GAP + 18)))
    for line, prompt in enumerate(prompts.values()):
        canvas.text((GAP, top + HEAD + 1 + line * (TILE + GAP + 18)), prompt, INK, small)
