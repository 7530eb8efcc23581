"""The benchmark's results as JSON and as tables: figures at the budgets, and ours over the best of the others."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from .measurement import Measured
from .methods import BUDGETS, EXTRAPOLATING, OURS, PLAIN

TO_REACH = {PLAIN: 1 / 3, EXTRAPOLATING: 0.75}
PEERS = {PLAIN: "that does not extrapolate", EXTRAPOLATING: "that extrapolates"}
MARKS = {"measured": "", "interpolated": "", "extrapolated": "~", "out of reach": ""}


def as_json(model: str, num_prompts: int, measured: Sequence[Measured], left_out: Mapping[str, str]) -> dict:
    """What fbcache_benchmark.json holds; budgets are shares of block calls saved, errors are of the final latent."""
    cells: dict[object, dict] = {}
    for result in measured:
        schedule = result.task.schedule
        if result.task.method is None:
            cells[schedule] = {
                "sampler": schedule.sampler,
                "steps": schedule.num_steps,
                "calls": schedule.num_calls,
                "baseline_attribute_accuracy": result.accuracy,
                "methods": [],
            }
        else:
            cells[schedule]["methods"].append(_method(result))
    for cell in cells.values():
        cell["ratios"] = [_ratio(cell["methods"], str(budget)) for budget in BUDGETS]
    return {
        "model": model,
        "prompts": num_prompts,
        "budgets": list(BUDGETS),
        "versions": {name: _version(name) for name in ("torch", "diffusers", "cache-dit")},
        "cells": list(cells.values()),
        "left_out": dict(left_out),
    }


def _method(result: Measured) -> dict:
    at = {
        str(budget): {"how": found.how, **(asdict(found.figures) if found.figures else {})}
        for budget, found in result.at.items()
    }
    points = [
        {"setting": setting, **asdict(figures)}
        for setting, figures in sorted(zip(result.settings, result.points, strict=True), key=lambda p: p[1].saved)
    ]
    return {
        "name": result.task.method.name,
        "group": result.task.method.group,
        "at_budget": at,
        "points": points,
        "error_switched_off": result.off_error,
        "seconds": result.seconds,
    }


def _ratio(found: Sequence[dict], budget: str) -> dict:
    """At one budget: every variant of ours over the best other of each group, None where either is out of reach."""
    errors = {
        group: {m["name"]: m["at_budget"][budget]["rel_l2"] for m in found if m["group"] == group and _has(m, budget)}
        for group in (OURS, PLAIN, EXTRAPOLATING)
    }
    ratio = {"budget": float(budget), "ours": {}}
    for group in PEERS:
        best = min(errors[group], key=errors[group].get, default=None)
        ratio[group] = best
        for name, error in errors[OURS].items():
            over = error / errors[group][best] if best and errors[group][best] else None
            ratio["ours"].setdefault(name, {})[group] = over
    return ratio


def _has(method: dict, budget: str) -> bool:
    return "rel_l2" in method["at_budget"][budget]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def tables(result: dict) -> str:
    """The results as text: a table for each schedule, then the ratios."""
    parts = [f"model {result['model']}, {result['prompts']} prompts, torch {torch.__version__}"]
    parts += [part for cell in result["cells"] for part in (_table(cell), _ratios(cell))]
    parts += [f"left out: {name}: {reason}" for name, reason in result["left_out"].items()]
    parts.append(
        "rel. L2 of the final latent / PSNR of the decoded pictures in dB / attribute accuracy; ~ extrapolated from "
        "settings just beside the budget, - out of the method's reach"
    )
    return "\n\n".join(parts)


def _table(cell: dict) -> str:
    lines = [("saved:", *(f"{budget:.0%} of block calls" for budget in BUDGETS))]
    for method in cell["methods"]:
        lines.append((method["name"], *(_cell_text(method["at_budget"][str(budget)]) for budget in BUDGETS)))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    body = "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
    accuracy = cell["baseline_attribute_accuracy"]
    suffix = "" if accuracy is None else f"; attribute accuracy without a cache {accuracy:.3f}"
    return f"{cell['sampler']}, {cell['steps']} steps{suffix}\n{body}"


def _cell_text(figures: dict) -> str:
    if "rel_l2" not in figures:
        return "-"
    psnr, accuracy = figures["psnr_db"], figures["attribute_accuracy"]
    pictures = "" if accuracy is None else f" / {'equal' if psnr is None else f'{psnr:.1f}'} / {accuracy:.3f}"
    return f"{MARKS[figures['how']]}{figures['rel_l2']:.2e}{pictures}"


def _ratios(cell: dict) -> str:
    lines = []
    for ratio in cell["ratios"]:
        for group, words in PEERS.items():
            ranked = sorted((over[group] or math.inf, name) for name, over in ratio["ours"].items())
            if not ranked or ratio[group] is None:
                continue
            texts = [f"{name} {over:.2f}" for over, name in ranked if over < math.inf]
            verdict = "reached" if ranked[0][0] <= TO_REACH[group] else "NOT reached"
            goal = f"at most {TO_REACH[group]:.2f} {verdict}"
            lines.append(f"{ratio['budget']:.0%}: over the best {words} ({ratio[group]}), {goal}: {'; '.join(texts)}")
    return "\n".join(lines)
