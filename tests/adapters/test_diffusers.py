"""The first-block cache on diffusers models: exact where nothing is reused, the class and other pipelines untouched."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")

from adapters import diffusers_cases  # noqa: E402

from para_core.adapters.diffusers import apply_cache_on_pipe, cache_run  # noqa: E402
from para_core.residual_cache import CacheConfig  # noqa: E402

ALWAYS = 100.0
NEVER = 1e-30  # goes through the cache, where 0 leaves the blocks alone


@pytest.fixture(scope="module")
def transformer():
    return diffusers_cases.transformer()


@pytest.fixture
def pipe(transformer):
    return diffusers_cases.pipeline(transformer)


def run(pipe, *, steps=6, true_cfg=4.0, seed=0):
    torch.manual_seed(1)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=torch.randn(1, 5, 24),
        pooled_prompt_embeds=torch.randn(1, 24),
        negative_prompt_embeds=torch.randn(1, 5, 24),
        negative_pooled_prompt_embeds=torch.randn(1, 24),
        true_cfg_scale=true_cfg,
        height=80,
        width=112,
        latents=torch.randn(1, 35, 16, generator=torch.Generator().manual_seed(seed)),
        num_inference_steps=steps,
        output_type="latent",
    ).images


@pytest.mark.parametrize("true_cfg", [1.0, 4.0])
@pytest.mark.parametrize("threshold", [0.0, NEVER])
def test_never_reusing_is_bit_equal(pipe, true_cfg, threshold):
    expected = run(pipe, true_cfg=true_cfg)
    assert torch.equal(run(apply_cache_on_pipe(pipe, residual_diff_threshold=threshold), true_cfg=true_cfg), expected)


def test_threshold_0_counts_its_calls_and_leaves_the_blocks_alone(pipe, monkeypatch):
    reports = []
    monkeypatch.setattr("para_core.adapters.diffusers.swapped_forwards", None)  # would fail if it were called
    run(apply_cache_on_pipe(pipe, residual_diff_threshold=0.0, listener=reports.append))
    (report,) = reports
    assert {label: len(records) for label, records in report.conditionings.items()} == {"positive": 6, "negative": 6}
    assert (report.num_block_calls, report.num_bytes) == (report.num_block_calls_baseline, 0)


@pytest.mark.parametrize("decision", ["first_block", "prediction"])
def test_a_controlnet_that_starts_and_grows_is_computed_where_it_does(transformer, decision):
    """A pipeline gives residuals at every step, scaled by 0 where the ControlNet is not to act."""
    torch.manual_seed(1)
    given = {
        "hidden_states": torch.randn(1, 35, 16), "encoder_hidden_states": torch.randn(1, 5, 24),
        "pooled_projections": torch.randn(1, 24), "img_ids": torch.zeros(35, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    residual = torch.randn(1, 35, transformer.inner_dim)
    config = CacheConfig(ALWAYS, decision=decision)
    with torch.no_grad(), cache_run(transformer, config, num_steps=20) as cached:
        for number, scale in enumerate((0.0, 0.0, 1.0, 1.2, 5.0, 5.0, 0.0, 0.0)):
            transformer(
                **given, timestep=torch.ones(1) * (1 - 0.05 * number), controlnet_block_samples=[scale * residual]
            )
    (records,) = cached.report().conditionings.values()
    assert [number for number, record in enumerate(records) if not record.reused] == [0, 2, 4, 6]


def test_contexts_are_apart_and_runs_repeat(pipe, transformer):
    reports = []
    expected = run(pipe)
    cached = apply_cache_on_pipe(pipe, residual_diff_threshold=ALWAYS, max_consecutive_hits=1, listener=reports.append)
    first = run(cached)
    assert not torch.equal(first, expected)
    assert torch.equal(run(cached), first)
    reused = {label: [record.reused for record in steps] for label, steps in reports[0].conditionings.items()}
    assert reused == {"positive": [False, True] * 3, "negative": [False, True] * 3}
    assert all("forward" not in block.__dict__ for block in transformer.transformer_blocks)


def test_applying_again_replaces_and_other_pipelines_are_untouched(pipe, transformer):
    expected = run(pipe)
    other = diffusers.FluxPipeline(**pipe.components)
    apply_cache_on_pipe(apply_cache_on_pipe(pipe, residual_diff_threshold=ALWAYS), residual_diff_threshold=0.0)
    assert torch.equal(run(pipe), expected)
    apply_cache_on_pipe(pipe, residual_diff_threshold=ALWAYS)
    assert not torch.equal(run(pipe), expected)
    assert torch.equal(run(other), expected)


def test_hit_on_identical_inputs_reproduces_the_output(transformer):
    torch.manual_seed(2)
    inputs = {
        "hidden_states": torch.randn(2, 35, 16),
        "encoder_hidden_states": torch.randn(2, 5, 24),
        "pooled_projections": torch.randn(2, 24),
        "timestep": torch.tensor([0.7, 0.7]),
        "img_ids": torch.randint(0, 8, (35, 3)).float(),
        "txt_ids": torch.zeros(5, 3),
    }
    reports = []
    with torch.no_grad(), cache_run(transformer, CacheConfig(0.01), listener=reports.append):
        computed, reused = (transformer(**inputs).sample for _ in range(2))
    assert reports[0].num_reused_calls == 1
    assert (reused - computed).abs().mean() <= 1e-5 * computed.abs().mean()


def test_offloading_forwards_are_called_and_kept(transformer):
    calls = []
    block = transformer.transformer_blocks[0]
    original = block.forward

    def offloading(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    block.forward = offloading
    try:
        with cache_run(transformer, CacheConfig(NEVER)), torch.no_grad():
            transformer(
                hidden_states=torch.randn(1, 4, 16), encoder_hidden_states=torch.randn(1, 5, 24),
                pooled_projections=torch.randn(1, 24), timestep=torch.tensor([0.7]),
                img_ids=torch.zeros(4, 3), txt_ids=torch.zeros(5, 3),
            )  # fmt: skip
        assert calls == [1] and block.forward is offloading
    finally:
        del block.forward


def test_pipeline_without_transformer_is_refused():
    scheduler = diffusers.DDPMScheduler()
    pipe = diffusers.DDPMPipeline(diffusers.UNet2DModel(sample_size=8, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2), scheduler)  # fmt: skip
    with pytest.raises(ValueError, match="^DDPMPipeline has no transformer"):
        apply_cache_on_pipe(pipe)
