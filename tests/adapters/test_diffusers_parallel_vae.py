"""diffusers' VAEs decoded on two ranks: the picture of one, through the library's own decode."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")

from para_core.adapters.diffusers_parallel_vae import parallelize_vae  # noqa: E402

CASES = "adapters.parallel_vae_cases"


@pytest.mark.parametrize("title", ["AutoencoderKL", "AutoencoderTiny", "demo", "AutoencoderKLWan"])
def test_decode_gives_the_picture_of_one_rank(gloo_ranks, title):
    for rank, (error, kind, seen) in enumerate(gloo_ranks(2).run(f"{CASES}.decode", timeout=180, title=title)):
        assert error < 1e-5
        assert kind == "DecoderOutput"
        assert seen == [9, (5, 4)[rank]], "a rank decoded more than its slice, or nothing was compared"


def test_only_this_object_changes_and_applying_again_replaces(gloo_ranks):
    assert gloo_ranks(2).run(f"{CASES}.other_objects") == [(True, True, True)] * 2


def test_mesh_chooses_the_ranks(gloo_ranks):
    for error, message in gloo_ranks(2).run(f"{CASES}.meshes"):
        assert error < 1e-5
        assert message.startswith("the mesh has the dims ('ring', 'ulysses') and covers 1 of 2 ranks")


def test_tiling_is_refused(gloo_ranks):
    for message in gloo_ranks(2).run(f"{CASES}.tiled"):
        assert message.startswith("AutoencoderKL has tiling enabled") and message.endswith("disable_tiling() on it.")


def test_script_without_ranks_is_told_how():
    with pytest.raises(ValueError, match="there is no process group to decode with.*torchrun"):
        parallelize_vae(_WithDecode())


def test_model_without_decode_is_refused():
    with pytest.raises(ValueError, match="Linear has no decode; parallelize_vae takes a VAE"):
        parallelize_vae(torch.nn.Linear(1, 1))


class _WithDecode(torch.nn.Module):
    def decode(self, z):
        return z
