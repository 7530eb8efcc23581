"""A tiny FLUX pipeline, and cases for test_diffusers_parallel.py: one on each rank, beside the same alone."""

from __future__ import annotations

import functools

import diffusers
import torch


def transformer(num_heads: int = 2) -> diffusers.FluxTransformer2DModel:
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=num_heads,
        joint_attention_dim=24, pooled_projection_dim=24, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    return model.eval()


def pipeline(model: diffusers.FluxTransformer2DModel | None = None) -> diffusers.FluxPipeline:
    parts = {"vae": None, "text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.FluxPipeline(scheduler=scheduler, transformer=model or transformer(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, *, steps: int = 3, true_cfg: float = 4.0, batch: int = 1) -> torch.Tensor:
    randn = functools.partial(torch.randn, generator=torch.Generator().manual_seed(1))
    return pipe(
        prompt_embeds=randn(batch, 5, 24), pooled_prompt_embeds=randn(batch, 24), true_cfg_scale=true_cfg,
        negative_prompt_embeds=randn(batch, 5, 24), negative_pooled_prompt_embeds=randn(batch, 24),
        height=80, width=112, latents=randn(batch, 35, 16), num_inference_steps=steps, output_type="latent",
    ).images  # fmt: skip


@functools.cache
def mesh_of(shape: tuple[int, int, int]):
    from para_core.attention import init_context_parallel_mesh

    return init_context_parallel_mesh("cpu", max_batch_dim_size=shape[0], max_ring_dim_size=shape[1])


def relative(output: torch.Tensor, reference: torch.Tensor) -> float:
    return float((output - reference).norm() / reference.norm())


def compare(rank: int, world_size: int, *, mesh=None, num_heads=2, **settings) -> tuple[float, set[tuple[int, int]]]:
    """Relative error of the pictures, and the (rows, tokens) that the blocks' linear layers got."""
    from para_core.adapters.diffusers_parallel import parallelize_pipe

    pipe = pipeline(transformer(num_heads))
    expected = images(pipe, **settings)
    seen = set()
    for block in pipe.transformer.single_transformer_blocks:
        block.proj_out.register_forward_pre_hook(lambda module, args: seen.add(tuple(args[0].shape[:2])))
    parallel = parallelize_pipe(pipe, mesh=None if mesh is None else mesh_of(mesh))
    return relative(images(parallel, **settings), expected), seen


def quantized(rank: int, world_size: int, *, mesh, batch: int, scheme: str) -> tuple[float, float]:
    """Error against the same quantized pipeline alone, and that one's own error."""
    from para_core.adapters.diffusers_parallel import parallelize_pipe
    from para_core.adapters.diffusers_quantization import quantize_pipe

    settings = {"batch": batch, "steps": 1}
    pipe = pipeline(transformer(num_heads=4))  # narrower layers are not quantized
    exact = images(pipe, **settings)
    expected = images(quantize_pipe(pipe, scheme), **settings)
    output = images(parallelize_pipe(pipe, mesh=mesh_of(mesh)), **settings)
    return relative(output, expected), relative(expected, exact)


def cached(
    rank: int, world_size: int, *, mesh, parallel_first: bool, batch: int = 1
) -> tuple[float, list[bool], torch.Tensor]:
    """Error against the cache on one device, which steps were reused there and here, and the picture."""
    from para_core.adapters.diffusers import apply_cache_on_pipe
    from para_core.adapters.diffusers_parallel import parallelize_pipe

    reports = []
    settings = {"residual_diff_threshold": 1.2, "listener": reports.append}
    expected = images(apply_cache_on_pipe(pipeline(), **settings), steps=8, batch=batch)
    pipe = pipeline()
    if parallel_first:
        pipe = apply_cache_on_pipe(parallelize_pipe(pipe, mesh=mesh_of(mesh)), **settings)
    else:
        pipe = parallelize_pipe(apply_cache_on_pipe(pipe, **settings), mesh=mesh_of(mesh))
    output = images(pipe, steps=8, batch=batch)
    reused = [[record.reused for record in report.conditionings["positive"]] for report in reports]
    return relative(output, expected), reused, output


def compiled(rank: int, world_size: int, *, mesh, parallel_first: bool) -> tuple[float, int, list]:
    """Error of the second run with traced blocks (no code is generated), kinds found, what the second run compiled."""
    from para_core.adapters.diffusers_compile import compile_pipe
    from para_core.adapters.diffusers_parallel import parallelize_pipe

    pipe, reports = pipeline(), []
    expected = images(pipe)
    settings = {"backend": "eager", "fullgraph": True, "listener": reports.append}
    if parallel_first:
        pipe = compile_pipe(parallelize_pipe(pipe, mesh=mesh_of(mesh)), **settings)
    else:
        pipe = parallelize_pipe(compile_pipe(pipe, **settings), mesh=mesh_of(mesh))
    images(pipe)
    output = images(pipe)
    assert not reports[-1].uncompiled and reports[-1].num_compilations
    return relative(output, expected), reports[-1].num_kinds, list(reports[-1].compiled)


def refused(rank: int, world_size: int, *, mesh) -> tuple[str, str]:
    from para_core.adapters.diffusers_parallel import parallelize_pipe

    pipe = parallelize_pipe(pipeline(), mesh=mesh_of(mesh))
    messages = []
    for action in (
        lambda: pipe.transformer(
            hidden_states=torch.randn(1, 35, 16), encoder_hidden_states=torch.randn(1, 5, 24),
            pooled_projections=torch.randn(1, 24), timestep=torch.ones(1), img_ids=torch.zeros(35, 3),
            txt_ids=torch.zeros(5, 3), controlnet_block_samples=[torch.randn(1, 35, 32)],
        ),
        lambda: parallelize_pipe(pipeline(transformer(num_heads=3)), mesh=mesh_of(mesh)),
    ):  # fmt: skip
        try:
            action()
        except ValueError as error:
            messages.append(str(error))
    return tuple(messages)
