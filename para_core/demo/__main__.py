"""python -m para_core.demo: the small model with and without the cache; a table, out/demo.json and out/demo.png."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

import torch

from ..residual_cache import CacheConfig
from .host_rows import host_rows
from .picture import draw_demo, to_image
from .scene import held_out_prompts
from .table import Row, figures, run_rows
from .weights import load_autoencoder, load_transformer

THRESHOLDS = (0.06, 0.08, 0.10, 0.12)
PREDICTION_THRESHOLDS = (0.04, 0.06)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for demo.json, demo.png and pictures")
    parser.add_argument("--prompts", type=int, default=32, help="how many held-out prompts (default 32)")
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS, metavar="T")
    parser.add_argument("--prediction-thresholds", type=float, nargs="*", default=PREDICTION_THRESHOLDS, metavar="T")
    parser.add_argument("--no-host", action="store_true", help="do not run the demo workflow in ComfyUI")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    try:
        run(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> None:
    rows = [
        Row("baseline"),
        *(Row(f"FBCache {value:.2f}", CacheConfig(value)) for value in args.thresholds),
        *(
            Row(f"prediction {value:.2f}", CacheConfig(value, decision="prediction", order=1))
            for value in args.prediction_thresholds
        ),
    ]
    if args.prompts < 1:
        raise ValueError(f"--prompts is {args.prompts}; allowed are whole numbers from 1.")
    transformer, autoencoder = load_transformer(), load_autoencoder()
    prompts = held_out_prompts(args.prompts, seed=7)
    run_rows(rows, transformer, autoencoder, prompts)
    result = figures(rows, prompts)
    args.out.mkdir(parents=True, exist_ok=True)
    shown = varied(prompts)
    for row, figure in zip(rows, result, strict=True):
        figure["image"] = f"demo_{row.name.lower().replace(' ', '_')}.png"
        to_image(row.pictures[shown[0]]).save(args.out / figure["image"])
    draw_demo(rows, result, prompts, shown=shown).save(args.out / "demo.png")
    version, in_host = (None, []) if args.no_host else host_rows(args.out)
    written = {"device": "cpu", "torch": torch.__version__, "comfyui": version, "rows": result + in_host}
    (args.out / "demo.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
    sys.stdout.write(f"{table(result + in_host)}\nwrote {args.out / 'demo.json'} and {args.out / 'demo.png'}\n")


def varied(prompts: list[str]) -> list[int]:
    """The first prompt of each number of objects, at most three."""
    first = {prompt.count(","): number for number, prompt in reversed(list(enumerate(prompts)))}
    return sorted(first.values())[:3]


def table(figures: list[dict]) -> str:
    """The rows as text, aligned."""
    head = ("", "wall s", "speedup", "reused", "block calls", "rel. L2", "PSNR dB", "attributes")
    lines = [head]
    for row in figures:
        lines.append(
            (
                row["name"],
                f"{row['wall_s']:.3f}",
                f"{row['speedup']:.2f}x",
                f"{row['reused_steps']:.1f}/{row['steps']}",
                f"{row['block_calls']:.0f}/{row['block_calls_baseline']}",
                f"{row['rel_l2']:.4f}",
                "equal" if row["psnr_db"] is None else f"{row['psnr_db']:.1f}",
                f"{row['attribute_accuracy']:.3f}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


if __name__ == "__main__":
    main()
