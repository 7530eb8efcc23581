"""Acceleration Report: what this pack's nodes did in a MODEL's latest run, as a picture, as text and as JSON."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from PIL import Image
from server import PromptServer

from ..para_core.adapters.comfy_compile import has_compile, last_compile_report
from ..para_core.adapters.comfy_fbcache import has_fbcache, last_report
from ..para_core.adapters.comfy_parallel import last_parallel_report, parallel_option
from ..para_core.adapters.comfy_quantization import quantization_reports
from ..para_core.plot import draw_bars, draw_residual_curve, draw_text
from ..para_core.quantization_report import size
from .events import running_workflow

WIDTH, CURVE_HEIGHT, LINE_HEIGHT = 640, 230, 16
DENSITY = 2  # pixels for each unit of these
NO_RUN = (
    'No run of this MODEL was recorded: connect "model" to the MODEL that the sampler got (from the last node of this '
    'pack, or behind it), and "after" to the sampler\'s output.'
)
NOTHING = (
    'Nothing to report: this MODEL has no acceleration. Are the nodes of this pack bypassed, or is "model" connected '
    "in front of them?"
)


@dataclass(frozen=True)
class Section:
    """The part of the report about one acceleration. values: for the JSON; picture: as wide as the others."""

    name: str
    text: str
    values: dict[str, object] | list[dict[str, object]]
    picture: Image.Image


def fbcache_section(model: ModelPatcher) -> Section | None:
    """The first-block cache's; None for a MODEL without one. Raises ValueError where no run was recorded."""
    if not has_fbcache(model):
        return None
    report = last_report(model)
    if report is None:
        raise ValueError(NO_RUN)
    curve = {"prediction": "estimated error of reusing", "first_block": "change of the first block"}[report.decision]
    title = f"{report.text()}\nCurve: {curve}. {'' if report.target_speedup else 'Dashed: threshold. '}Green: reused."
    size = (WIDTH, CURVE_HEIGHT + LINE_HEIGHT * len(title.splitlines()))
    picture = draw_residual_curve(report, size, title, density=DENSITY)
    return Section("fbcache", report.text(), asdict(report), picture)


def fp8_section(model: ModelPatcher) -> Section | None:
    """What the FP8 Quantize nodes did, each of them; needs no run."""
    reports = quantization_reports(model)
    if not reports:
        return None
    pictures = []
    for report in reports:
        memory = {"before": report.bytes_before, "after": report.bytes_after}
        bars = {label: (num_bytes, size(num_bytes)) for label, num_bytes in memory.items()}
        pictures.append(draw_bars(bars, report.text(), WIDTH, density=DENSITY))
    text = "\n\n".join(report.text() for report in reports)
    return Section("fp8", text, [asdict(report) for report in reports], _below_each_other(pictures))


def compile_section(model: ModelPatcher) -> Section | None:
    """Compile Model's; None for a MODEL without it. Raises ValueError where no run was recorded."""
    if not has_compile(model):
        return None
    report = last_compile_report(model)
    if report is None:
        raise ValueError(NO_RUN)
    return Section("compile", report.text(), asdict(report), draw_text(report.text(), WIDTH, density=DENSITY))


def parallel_section(model: ModelPatcher) -> Section | None:
    """The Context-Parallel Launcher's; None for a MODEL without it. Raises ValueError where no run was recorded."""
    if parallel_option(model) is None:
        return None
    report = last_parallel_report(model)
    if report is None:
        raise ValueError(NO_RUN)
    return Section("parallel", report.text(), asdict(report), draw_text(report.text(), WIDTH, density=DENSITY))


# One for each acceleration of the pack; it looks at the MODEL and says nothing where it is not on it.
SECTIONS: tuple[Callable[[ModelPatcher], Section | None], ...] = (
    fbcache_section,
    fp8_section,
    compile_section,
    parallel_section,
)


class AccelerationReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParaAccelerationReport",
            display_name="Acceleration Report",
            category="para",
            description="Shows what the accelerations on a MODEL did in its latest run: steps reused, block calls "
            "saved, time, memory, the residual curve against the threshold, and what was quantized.",
            search_aliases=["fbcache report", "cache statistics", "speedup", "residual plot", "fp8 report"],
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", tooltip="The MODEL that the sampler got: from the FBCache Patcher or a node behind it."
                ),
                io.AnyType.Input(
                    "after",
                    tooltip="The sampler's LATENT, or the IMAGE decoded from it: the report is made after the run.",
                ),
            ],
            outputs=[
                io.Image.Output("plot", display_name="plot", tooltip="The report as a picture."),
                io.String.Output("text", display_name="text", tooltip="The report as lines of text."),
                io.String.Output("json", display_name="json", tooltip="All numbers, step by step, as JSON."),
            ],
        )

    @classmethod
    def execute(cls, model, after) -> io.NodeOutput:
        sections = [section for make in SECTIONS if (section := make(model)) is not None]
        text = "\n\n".join(section.text for section in sections) or NOTHING
        pictures = [section.picture for section in sections] or [draw_text(NOTHING, WIDTH, density=DENSITY)]
        plot = _to_tensor(_below_each_other(pictures))
        values = {section.name: section.values for section in sections}
        shown = {**ui.PreviewImage(plot, cls=cls).as_dict(), **ui.PreviewText(text).as_dict(), **_for_panel(values)}
        return io.NodeOutput(plot, text, json.dumps(values), ui=shown)


def _for_panel(values: dict[str, object]) -> dict[str, list]:
    """What the interface draws the report from, in the person's language."""
    workflow = running_workflow(getattr(PromptServer, "instance", None))
    return {"para_report": [{"workflow": workflow, "sections": values}]}


def _below_each_other(pictures: list[Image.Image]) -> Image.Image:
    together = Image.new("RGB", (pictures[0].width, sum(picture.height for picture in pictures)))
    top = 0
    for picture in pictures:
        together.paste(picture, (0, top))
        top += picture.height
    return together


def _to_tensor(picture: Image.Image) -> torch.Tensor:
    """(1, H, W, 3), float32 in 0..1, as the host's IMAGE."""
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.reshape(1, picture.height, picture.width, 3).float() / 255
