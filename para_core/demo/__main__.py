"""python -m para_core.demo: the small model with and without acceleration; a table, out/demo.json, out/demo.png."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..compilation import Compilation
from ..compile_config import CompileConfig, compile_obstacle
from ..residual_cache import CacheConfig
from .host_rows import host_rows
from .picture import draw_demo, to_image
from .scene import held_out_prompts
from .table import Row, figures, run_rows
from .weights import load_autoencoder, load_transformer

THRESHOLDS = (0.06, 0.08, 0.10, 0.12)
PREDICTION_THRESHOLDS = (0.06,)
SCHEMES = {
    "FP8 dynamic per tensor": "fp8_dynamic_per_tensor",
    "FP8 dynamic per row": "fp8_dynamic_per_row",
    "FP8 weight-only": "fp8_weight_only",
    "INT8 weight-only": "int8_weight_only",
    "NF4": "nf4",
}
FEW_PROMPTS = 2  # of the rows that no CPU is made for
TOGETHER = "fp8_dynamic_per_row"  # the scheme that is shown with the cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for demo.json, demo.png and pictures")
    parser.add_argument("--prompts", type=int, default=32, help="how many held-out prompts (default 32)")
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS, metavar="T")
    parser.add_argument("--prediction-thresholds", type=float, nargs="*", default=PREDICTION_THRESHOLDS, metavar="T")
    parser.add_argument("--schemes", nargs="*", choices=SCHEMES.values(), default=available(), metavar="SCHEME")
    parser.add_argument("--no-compile", action="store_true", help="leave out the rows with compiled blocks")
    parser.add_argument("--no-host", action="store_true", help="do not run the demo workflow in ComfyUI")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    try:
        run(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> None:
    rows = [Row("baseline"), *cache_rows(args), *quantized_rows(args.schemes)]
    rows += [] if args.no_compile else compiled_rows(args.schemes)
    if args.prompts < 1:
        raise ValueError(f"--prompts is {args.prompts}; allowed are whole numbers from 1.")
    transformer, autoencoder = load_transformer(), load_autoencoder()
    prompts = held_out_prompts(args.prompts, seed=7)
    run_rows(rows, transformer, autoencoder, prompts)
    result = figures(rows, prompts)
    args.out.mkdir(parents=True, exist_ok=True)
    shown = varied(prompts[:FEW_PROMPTS])
    for row, figure in zip(rows, result, strict=True):
        figure["image"] = f"demo_{re.sub('[^a-z0-9.]+', '_', row.name.lower())}.png"
        to_image(row.pictures[shown[0]]).save(args.out / figure["image"])
    draw_demo(rows, result, prompts, shown=shown).save(args.out / "demo.png")
    version, in_host = (None, []) if args.no_host else host_rows(args.out)
    written = {"device": "cpu", "torch": torch.__version__, "comfyui": version, "rows": result + in_host}
    (args.out / "demo.json").write_text(json.dumps(written, indent=1), encoding="utf-8")
    sys.stdout.write(f"{table(result + in_host)}\nwrote {args.out / 'demo.json'} and {args.out / 'demo.png'}\n")


def cache_rows(args: argparse.Namespace) -> list[Row]:
    """The published first-block cache, and the prediction that the node takes by default."""
    plain = [Row(f"FBCache {value:.2f}", CacheConfig(value)) for value in args.thresholds]
    thresholds = args.prediction_thresholds
    predicting = {value: CacheConfig(value, decision="prediction", order=1) for value in thresholds}
    return plain + [Row(f"prediction {value:.2f}", config) for value, config in predicting.items()]


def quantized_rows(schemes: Sequence[str]) -> list[Row]:
    """Each scheme alone, and FP8 with the cache at the model's own thresholds, which quantization shifts."""
    alone = [Row(name, scheme=scheme, num_prompts=FEW_PROMPTS) for name, scheme in SCHEMES.items() if scheme in schemes]
    if TOGETHER not in schemes:
        return alone
    caches = {"FBCache + FP8": CacheConfig(), "prediction + FP8": CacheConfig(decision="prediction", order=1)}
    return alone + [Row(name, config, TOGETHER, FEW_PROMPTS) for name, config in caches.items()]


def compiled_rows(schemes: Sequence[str]) -> list[Row]:
    """Compiled blocks alone, and everything together; none where there is no compiler."""
    config = CompileConfig()
    obstacle = compile_obstacle(config, torch.device("cpu"))
    if obstacle is not None:
        sys.stderr.write(f"no rows with compile: {obstacle}\n")
        return []
    chosen = [Row("compile")]
    if TOGETHER in schemes:
        chosen.append(Row("FBCache + FP8 + compile", CacheConfig(), TOGETHER))
    return [replace(row, num_prompts=FEW_PROMPTS, compilation=Compilation(config)) for row in chosen]


def available() -> list[str]:
    """The schemes whose packages are installed."""
    missing = {"nf4"} if importlib.util.find_spec("bitsandbytes") is None else set()
    return [scheme for scheme in SCHEMES.values() if scheme not in missing]


def varied(prompts: list[str]) -> list[int]:
    """The first prompt of each number of objects, at most three."""
    first = {prompt.count(","): number for number, prompt in reversed(list(enumerate(prompts)))}
    return sorted(first.values())[:3]


def table(figures: list[dict]) -> str:
    """The rows as text, aligned; below them what to know about some. of bf16: memory of the quantized layers."""
    head = ("", "wall s", "speedup", "reused", "block calls", "rel. L2", "PSNR dB", "attributes", "of bf16")
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
                "" if row["quantized_memory"] is None else f"{row['quantized_memory']:.3f}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    aligned = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    notes = {row["note"]: row["name"] for row in reversed(figures) if row["note"]}
    return "\n".join(aligned + [f"{name} and the like: {note}" for note, name in reversed(notes.items())])


if __name__ == "__main__":
    main()
