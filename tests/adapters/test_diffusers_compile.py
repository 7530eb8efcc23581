"""Compiled blocks in a diffusers pipeline: same pictures, with the cache in any order, and nothing left behind."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")

from adapters import diffusers_cases  # noqa: E402

from para_core.adapters.diffusers import apply_cache_on_pipe  # noqa: E402
from para_core.adapters.diffusers_compile import compile_pipe  # noqa: E402

ALWAYS = 100.0


@pytest.fixture(scope="module")
def transformer():
    return diffusers_cases.transformer()


@pytest.fixture
def pipe(transformer):
    return diffusers_cases.pipeline(transformer)


def run(pipe, *, height=80, num_tokens=5):
    torch.manual_seed(1)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=torch.randn(1, num_tokens, 24),
        pooled_prompt_embeds=torch.randn(1, 24),
        height=height,
        width=112,
        latents=torch.randn(1, height // 16 * 7, 16),
        num_inference_steps=4,
        output_type="latent",
    ).images


def test_blocks_are_compiled_for_all_sizes_and_nothing_is_left(pipe, transformer):
    sizes = [{}, {"height": 96}, {"height": 64, "num_tokens": 9}]
    expected = [run(pipe, **size) for size in sizes]
    reports = []
    compile_pipe(pipe, backend="eager", listener=reports.append)
    for size, picture in zip(sizes, expected, strict=True):
        assert torch.equal(run(pipe, **size), picture)
    finished = [report for report in reports if report.finished]
    assert [[one.reason for one in report.compiled] for report in finished] == [["", ""], ["another size"] * 2, []]
    assert finished[-1].uncompiled == {}
    blocks = (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
    assert all("forward" not in block.__dict__ for block in blocks)


@pytest.mark.parametrize("first", ["cache", "compile"])
def test_with_the_cache_in_any_order(pipe, first):
    settings = {"residual_diff_threshold": ALWAYS, "max_consecutive_hits": 1}
    expected = run(apply_cache_on_pipe(diffusers.FluxPipeline(**pipe.components), **settings))
    compilations, caches = [], []
    steps = [
        lambda: apply_cache_on_pipe(pipe, listener=caches.append, **settings),
        lambda: compile_pipe(pipe, backend="eager", listener=compilations.append),
    ]
    for step in steps if first == "cache" else reversed(steps):
        step()
    assert torch.equal(run(pipe), expected)
    assert [record.reused for record in caches[-1].conditionings["positive"]] == [False, True] * 2
    assert len(compilations[-1].compiled) == 2 and compilations[-1].uncompiled == {}


def test_other_pipelines_and_unknown_models_are_left_alone(pipe):
    reports = []
    other = diffusers.FluxPipeline(**pipe.components)
    compile_pipe(pipe, backend="eager", listener=reports.append)
    run(other)
    assert reports == []
    pipe.transformer = None
    with pytest.raises(ValueError, match="^FluxPipeline has no transformer"):
        compile_pipe(pipe)
