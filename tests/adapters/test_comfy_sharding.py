"""Every family whose tokens can be split, on real ranks: the output is that of the model on one device."""

import pytest
import torch
from adapters.sharding_cases import randn
from tiny_models import TINY_MODELS, build, host_version

pytestmark = pytest.mark.usefixtures("comfy")

TOLERANCE = 1e-6  # relative L2, float32: rounding in another order
RING, ULYSSES, BOTH, BATCH, ALL = (1, 2, 1), (1, 1, 2), (1, 2, 2), (2, 1, 1), (2, 2, 1)
# Prompts of two lengths are evaluated in two calls, equal ones in a call with two rows.
UNEQUAL, EQUAL = {"cfg": 4.0, "num_tokens": (9, 7)}, {"cfg": 4.0, "num_tokens": (7, 7)}
REFUSED = {
    "hidream", "ernie", "cosmos", "wan_s2v", "wan_humo", "wan_animate", "wan_animate2", "wandancer", "sd15", "sdxl",
    "svd",
}  # fmt: skip
SHARDED = [name for name in TINY_MODELS if name not in REFUSED]


@pytest.fixture
def on_ranks(gloo_ranks, comfyui):
    """(case, model, mesh, ...) -> the result of each rank."""

    def run(case, name, mesh, **settings):
        skip_if_absent(name)
        group = gloo_ranks(mesh[0] * mesh[1] * mesh[2], comfyui=comfyui)
        return group.run(f"adapters.sharding_cases.{case}", model=name, mesh=mesh, timeout=180.0, **settings)

    return run


@pytest.fixture
def compare(on_ranks):
    """Sample a model on a mesh and on one device; returns (rows, tokens) of each block, of each rank and alone."""

    def run(name, mesh, *calls, **change):
        results = on_ranks("compare", name, mesh, calls=list(calls), change=change)
        for errors, _, _ in results:
            assert len(errors) >= len(calls)
            assert max(errors) <= TOLERANCE
        return [here for _, here, _ in results], results[0][2]

    return run


@pytest.fixture
def compare_tokens(compare):
    """The same, where every token is on one rank, and no rank has two more than another."""

    def run(name, mesh, *calls, **change):
        here, alone = compare(name, mesh, *calls, **change)
        for (_, total), *parts in zip(alone, *here, strict=True):
            tokens = [tokens for _, tokens in parts]
            assert sum(tokens) == total
            assert max(tokens) - min(tokens) <= 1

    return run


def skip_if_absent(name):
    since = TINY_MODELS["wan_vace" if name == "wan_vace_every_block" else name].since
    if host_version() < tuple(map(int, since.split("."))):
        pytest.skip(f"ComfyUI {'.'.join(map(str, host_version()))} has no {TINY_MODELS[name].title}")


@pytest.mark.parametrize("name", SHARDED)
@pytest.mark.parametrize("mesh", [RING, ULYSSES, BOTH], ids=["ring", "ulysses", "both"])
def test_ranks_equal_one(compare_tokens, name, mesh):
    calls = [UNEQUAL] if mesh == BOTH else [UNEQUAL, EQUAL]
    compare_tokens(name, mesh, *calls)


def test_rows_of_a_batch_go_to_ranks_of_their_own(compare):
    here, alone = compare("flux", BATCH, EQUAL, {**EQUAL, "batch": 2}, {**EQUAL, "cfg": 1.0, "batch": 2})
    assert [rows for rows, _ in alone] == [2] * 5 + [4] * 5 + [2] * 5
    for rank in here:
        assert [rows for rows, _ in rank] == [1] * 5 + [2] * 5 + [1] * 5
        assert [tokens for _, tokens in rank] == [tokens for _, tokens in alone]


def test_rows_that_do_not_divide_are_on_every_rank(compare):
    here, alone = compare("flux", BATCH, UNEQUAL, {"cfg": 1.0, "batch": 3})
    assert here == [alone, alone]


def test_rows_and_tokens_are_split_at_once(compare):
    here, alone = compare("ltxav" if host_version() >= (0, 33) else "wan", ALL, EQUAL)
    assert [rows for rows, _ in alone] == [2] * 4
    for rank in here:
        assert [rows for rows, _ in rank] == [1] * 4
        assert all(abs(2 * mine - total) <= 1 for (_, mine), (_, total) in zip(rank, alone, strict=True))


def test_too_few_tokens_for_the_ranks_are_on_every_rank(compare):
    here, alone = compare("flux", RING, {"num_tokens": (1, 1)})
    assert here == [alone, alone]


@pytest.mark.parametrize("mesh", [RING, ULYSSES, BOTH], ids=["ring", "ulysses", "both"])
def test_joint_mask_with_rows_is_split(compare_tokens, mesh):
    mask = randn(9 + 35, 9 + 35)
    compare_tokens("flux", mesh, {"num_tokens": (9, 9)}, attention_mask=mask)


@pytest.mark.parametrize("mesh", [RING, BOTH], ids=["ring", "both"])
@pytest.mark.parametrize("name", ["hunyuan_video", "lens", "qwen_image", "mage_flow"])
def test_text_mask_is_split(compare_tokens, name, mesh):
    if name == "qwen_image" and host_version() < (0, 33):
        pytest.skip("ComfyUI 0.3 leaves the text mask of Qwen-Image out")
    mask = torch.ones(1, 9, dtype=torch.long)
    mask[:, 6:] = 0
    compare_tokens(name, mesh, {"num_tokens": (9, 9)}, attention_mask=mask.bool() if name == "lens" else mask)


# Of the image tokens of the tiny models; FLUX and Qwen take residuals for the first ones only.
RESIDUALS = {
    "flux": {"input": [(35, 256), (20, 256)], "output": [None, (35, 256), (10, 256)]},
    "chroma": {"input": [(35, 64), None], "output": [(35, 64)] * 3},
    "qwen_edit": {"input": [(35, 64), None, (56, 64), (12, 64)]},
    "lens": {"input": [(35, 64), (20, 64), (35, 64), (35, 64)]},
    "hunyuan_video": {"input": [(45, 64)], "output": [(45, 64)] * 3},
    "sd3": {"output": [(35, 128)] * 4},
}


@pytest.mark.parametrize("mesh", [RING, BOTH], ids=["ring", "both"])
@pytest.mark.parametrize("name", RESIDUALS)
def test_controlnet_residuals_are_split(compare_tokens, name, mesh):
    control = {
        kind: [None if shape is None else randn(1, *shape, seed=seed) for seed, shape in enumerate(shapes)]
        for kind, shapes in RESIDUALS[name].items()
    }
    kept = {kind: [None if tensor is None else tensor.clone() for tensor in found] for kind, found in control.items()}
    compare_tokens(name, mesh, {"num_tokens": (9, 9)}, control={"input": [], "output": [], **control})
    assert str(control) == str(kept)


@pytest.mark.parametrize("name", ["wan_5b", "ltxv", "ltxav", "cosmos_predict2"])
def test_timesteps_per_frame_and_token_are_split(compare_tokens, name):
    frames, height, width = (TINY_MODELS[name].parts[0])[1:]
    mask = torch.ones(1, 1, frames, height, width)
    mask[:, :, 0] = 0
    compare_tokens(name, RING, {**UNEQUAL, "noise_mask": mask})


@pytest.mark.parametrize("name", ["flux2", "krea2"])
def test_references_at_timestep_0_are_split(compare_tokens, name):
    compare_tokens(name, RING, {"num_tokens": (9, 9)}, ref_latents_method="index_timestep_zero")


def test_references_in_a_joint_stream_are_split(compare_tokens):
    compare_tokens("z_image", RING, {"num_tokens": (9, 9)}, ref_latents=[randn(1, 16, 6, 10)])


def test_guiding_frame_is_split(compare_tokens):
    compare_tokens("hunyuan_video", RING, {"num_tokens": (9, 9)}, guiding_frame_index=torch.tensor([0.0]))


def test_branch_behind_the_last_block_is_gathered(compare_tokens):
    compare_tokens("wan_vace_every_block", RING, UNEQUAL)


@pytest.mark.parametrize("name", SHARDED)
def test_quantized_weights_are_multiplied_alike(on_ranks, name):
    for num_layers, errors in on_ranks("quantized", name, RING):
        assert num_layers and max(errors) <= TOLERANCE


@pytest.mark.parametrize("name", SHARDED)
def test_first_block_cache_is_inside(on_ranks, name):
    for (computed, *reused), records, asked_every_block in on_ranks("cached", name, RING):
        assert computed <= TOLERANCE
        assert max(reused) <= 1e-5
        # Computed, measured, and foreseen without block 0, whose attention would otherwise be missed.
        assert records == [(False, True), (True, False), (True, True)]
        assert asked_every_block


@pytest.mark.parametrize("name", SHARDED)
def test_compiled_blocks_attend_to_all_ranks(on_ranks, name):
    for errors, num_compilations, uncompiled in on_ranks("compiled", name, RING):
        assert max(errors) <= TOLERANCE
        assert num_compilations and not uncompiled


def test_without_a_ring_the_host_s_own_function_runs_and_with_one_the_chosen_kernel(monkeypatch):
    """What each attention call is answered by: the function that the model has called, or a kernel by its name."""
    from para_core import mesh_ranks
    from para_core.adapters.comfy_sharding import AttentionOnRanks
    from para_core.attention import Axis, RankMesh

    def host(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **options):
        assert (heads, skip_reshape, skip_output_reshape, options) == (q.shape[1], True, True, {"scale": 0.5})
        return v + 1

    def context(q, k, v, *, attention, **_):
        return v if isinstance(attention, str) else attention(q[:, :1], k[:, :1], v[:, :1], None).expand_as(v)

    class Call:
        def __init__(self, mesh):
            self.ranks = mesh_ranks.MeshRanks(mesh, "xformers")

        def next_attention(self):
            return ("img",)

        def attention(self, over, q, k, v, **options):
            return self.ranks.attention(q, k, v, [3], **options)

    monkeypatch.setattr(mesh_ranks, "context_attention", context)
    x = torch.zeros(1, 3, 8)
    for mesh, expected in ((RankMesh(), 1.0), (RankMesh(ring=Axis(ranks=(0, 1))), 0.0)):
        override = AttentionOnRanks()
        with override.of(Call(mesh), None):
            assert override(host, x, x, x, 2, scale=0.5).unique().tolist() == [expected]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_obstacle_is_known_before_sampling(name):
    from para_core.adapters.comfy_sharding import sharded_forward
    from para_core.families import family_of
    from para_core.sharded_call import sharding_obstacle

    model = build(TINY_MODELS[name]).model.diffusion_model
    family = family_of(model)
    obstacle = sharding_obstacle(model, family)
    assert (obstacle is not None) == (name in REFUSED)
    if obstacle is not None:
        with pytest.raises(ValueError, match=f"^{type(model).__name__} cannot run on several devices: {obstacle}"):
            sharded_forward(model, family, None, ((), {}))


def test_unknown_subclass_is_refused():
    from para_core.families import family_of
    from para_core.sharded_call import sharding_obstacle

    model = build(TINY_MODELS["wan"]).model.diffusion_model
    model.__class__ = type("OtherWan", (type(model),), {})
    assert sharding_obstacle(model, family_of(model)) == "what it does between its blocks is not known"
