"""The Acceleration Report node: after a real sampling run, without one, and between the host's cached nodes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_models import FLUX, build, fbcache, sample

from para_core.cache_report import RunReport
from para_core.demo.workflow import to_api
from para_core.parallel_report import ParallelReport, RankReport
from para_core.quantization_plan import Selection

ROOT = Path(__file__).absolute().parent.parent
NODE = "ParaAccelerationReport"


@pytest.fixture
def report_node(pack):
    return pack.nodes[NODE]


@pytest.fixture
def sampled(pack):
    """A MODEL after a run in which every step but the first was reused."""
    model = fbcache(build(FLUX), 100.0)
    latent = sample(model, FLUX, steps=12, cfg=4.0)
    return model, latent


def green(image: np.ndarray) -> int:
    red, green, blue = (np.asarray(image, dtype=float) * 255).astype(int).transpose(2, 0, 1)
    return int(((green > red + 60) & (green > blue)).sum())


def test_report_gives_picture_text_and_numbers_of_the_run(report_node, sampled):
    from para_core.adapters.comfy_fbcache import last_report

    plot, text, values = report_node.execute(*sampled).args
    assert plot.ndim == 4 and plot.shape[0] == 1 and plot.shape[3] == 3
    assert str(plot.dtype) == "torch.float32" and 0 <= plot.min() and plot.max() <= 1
    assert green(plot[0].numpy()) > 1000, "reused steps are green"
    assert text.splitlines()[1:3] == ["positive: 11 of 12 steps reused", "negative: 11 of 12 steps reused"]
    assert RunReport.from_dict(json.loads(values)["fbcache"]) == last_report(sampled[0])
    assert json.loads(values)["fbcache"] == json.loads(json.dumps(dataclasses.asdict(last_report(sampled[0]))))


def test_picture_and_text_are_shown_on_the_node(report_node, sampled):
    output = report_node.execute(*sampled)
    (shown,) = output.ui["images"]
    assert shown["type"] == "temp"
    assert output.ui["text"] == (output.args[1],)
    assert json.loads(json.dumps(output.ui["para_report"])) == [
        {"workflow": None, "sections": json.loads(output.args[2])}
    ]


def test_model_behind_further_nodes_has_the_same_report(report_node, sampled):
    model, latent = sampled
    assert report_node.execute(model.clone(), latent).args[1] == report_node.execute(model, latent).args[1]


def test_latest_run_is_reported(report_node, sampled):
    model, _ = sampled
    latent = sample(model, FLUX, steps=3)
    assert "positive: 2 of 3 steps reused" in report_node.execute(model, latent).args[1]


def test_without_a_run_one_line_says_what_to_connect(report_node, sampled):
    """Also where the run was that of another patcher's MODEL."""
    unused = fbcache(build(FLUX), 0.1)
    with pytest.raises(ValueError, match='No run .* connect "model" to .* and "after" to the sampler') as error:
        report_node.execute(unused, sampled[1])
    assert len(str(error.value).splitlines()) == 1


def test_bypassed_patcher_is_no_error(report_node, sampled):
    """Comparing with the original by Ctrl+B must not break the workflow."""
    plain = build(FLUX)
    plot, text, values = report_node.execute(plain, sampled[1]).args
    assert text.startswith("Nothing to report: this MODEL has no acceleration.")
    assert json.loads(values) == {}
    assert plot.shape[3] == 3 and plot.min() < 0.5, "the words are in the picture"


def test_quantized_model_has_its_section(report_node, sampled, pack):
    """Without a run of its own: what was quantized is known at once."""
    from para_core.adapters.comfy_quantization import apply_quantization

    _, latent = sampled
    quantized, first = apply_quantization(build(FLUX), "fp8_dynamic_per_row", Selection(exclude=("single_blocks.*",)))
    plot, text, values = report_node.execute(quantized, latent).args
    assert text == first.text() and "\nLayers: 16 quantized, " in text
    assert "Note: cpu has no kernels for it: the reference computes the same numbers and is not faster" in text
    assert json.loads(values) == {"fp8": [json.loads(json.dumps(dataclasses.asdict(first)))]}
    green_of_one = green(plot[0].numpy())
    assert green_of_one > 1000, "what is left of the memory is green"
    both, second = apply_quantization(fbcache(quantized, 0.0), "int8_weight_only")
    sample(both, FLUX, steps=2)
    plot, text, values = report_node.execute(both, latent).args
    fbcache_text, *fp8_texts = text.split("\n\n")
    assert fbcache_text.startswith("FBCache (flux)") and fp8_texts == [first.text(), second.text()]
    assert list(json.loads(values)) == ["fbcache", "fp8"] and len(json.loads(values)["fp8"]) == 2
    assert green(plot[0].numpy()) > 1.5 * green_of_one
    assert "Left, already quantized (by this node): double_blocks.0.img_attn.qkv" in fp8_texts[1]


def on_ranks(model):
    """Behind the launcher, without one of its processes."""
    from para_core.adapters.comfy_parallel import apply_parallel
    from para_core.parallel_config import ParallelConfig

    return apply_parallel(model, ParallelConfig(("cpu", "cpu")), lambda config: pytest.fail("a group is started"))


def test_run_on_ranks_has_its_section(report_node, sampled):
    from para_core.adapters.comfy_parallel import parallel_option

    model, latent = sampled
    both = on_ranks(model)
    with pytest.raises(ValueError, match="No run"):
        report_node.execute(both, latent)
    ranks = RankReport("cuda:0", 3 * 2**30), RankReport("cuda:1", 2 * 2**30)
    report = parallel_option(both).log.report = ParallelReport("batch 1 x ring 1 x Ulysses 2", ranks, 1, True)
    plot, text, values = report_node.execute(both, latent).args
    assert text.split("\n\n")[1].splitlines() == [
        "Context-Parallel Launcher, 2 ranks: batch 1 x ring 1 x Ulysses 2",
        "Rank 0 (cuda:0): 3072 MiB",
        "Rank 1 (cuda:1): 2048 MiB",
        "Restarts during the run: 1; what was lost was computed again, with the same result",
    ]
    assert list(json.loads(values)) == ["fbcache", "parallel"]
    assert json.loads(values)["parallel"] == json.loads(json.dumps(dataclasses.asdict(report)))
    assert plot.shape[1] > report_node.execute(model, latent).args[0].shape[1], "its lines are in the picture"


def demo(server, **changes: dict) -> dict:
    """The demo workflow as an API prompt, with inputs changed: class name to {input: value}."""
    workflow = json.loads((ROOT / "workflows" / "para_demo.json").read_text(encoding="utf-8"))
    prompt = to_api(workflow, server.object_info())
    for class_type, inputs in changes.items():
        next(node for node in prompt.values() if node["class_type"] == class_type)["inputs"].update(inputs)
    return prompt


def report_of(run, prompt) -> dict:
    (node_id,) = (node_id for node_id, node in prompt.items() if node["class_type"] == NODE)
    return run.outputs[node_id]


def computed(run, prompt) -> set[str]:
    """The classes of the nodes that were executed and not taken from the host's cache."""
    cached = {node for event in run.events_of("execution_cached") for node in event["nodes"]}
    return {node["class_type"] for node_id, node in prompt.items() if node_id not in cached}


def test_new_seed_makes_a_new_report_from_the_cached_patcher(server):
    first, second = (
        demo(server, KSampler={"seed": seed, "steps": steps}, ParaFBCachePatcher={"residual_diff_threshold": 1.0})
        for seed, steps in ((101, 28), (102, 13))
    )
    before, after = server.run_workflow(first), server.run_workflow(second)
    assert "ParaFBCachePatcher" not in computed(after, second)
    assert NODE in computed(after, second)
    assert "of 28 steps" in report_of(before, first)["text"][0]
    assert "of 13 steps" in report_of(after, second)["text"][0]


def test_cached_run_keeps_its_report(server):
    prompt = demo(server, KSampler={"seed": 103}, ParaFBCachePatcher={"residual_diff_threshold": 1.0})
    first, again = server.run_workflow(prompt), server.run_workflow(prompt)
    assert computed(again, prompt) == set()
    assert report_of(again, prompt) == report_of(first, prompt)


def test_plot_of_the_demo_workflow_is_shown(server):
    prompt = demo(server, KSampler={"seed": 104}, ParaFBCachePatcher={"residual_diff_threshold": 1.0})
    run = server.run_workflow(prompt)
    (file,) = report_of(run, prompt)["images"]
    picture = Image.open(server.base_directory / file["type"] / file["subfolder"] / file["filename"])
    assert green(np.asarray(picture) / 255) > 1000


def test_report_added_after_a_run_tells_of_that_run(server):
    """The host has the sampler's result, so that the run is not repeated; the patcher still knows it."""
    prompt = demo(server, KSampler={"seed": 105}, ParaFBCachePatcher={"residual_diff_threshold": 1.0})
    server.run_workflow({node_id: node for node_id, node in prompt.items() if node["class_type"] != NODE})
    run = server.run_workflow(prompt)
    assert computed(run, prompt) == {NODE}
    assert "of 28 steps" in report_of(run, prompt)["text"][0]
