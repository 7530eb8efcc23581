"""The VAEs that ComfyUI ships, decoded in slices on real ranks: as on one device, or refused by name."""

from __future__ import annotations

import functools

import pytest
import torch
from tiny_models import relative
from tiny_models.vaes import SPLIT, VAES, build_vae, decode, latent

from para_core.parallel_vae import CannotSplit, check_supported, obstacle

TOLERANCE = 1e-5  # float32: group norms and attention add in another order


@pytest.fixture(scope="module")
def single(comfy):
    """title -> the picture of one process."""

    @functools.cache
    def decoded(title):
        with torch.inference_mode():
            return decode(build_vae(title), latent(title))

    return decoded


@pytest.mark.parametrize("title", SPLIT)
@pytest.mark.parametrize("num_ranks, dim", [(2, -2), (4, None)], ids=["2 ranks, height", "4 ranks, width"])
def test_slices_give_the_picture_of_one_device(gloo_ranks, comfyui, single, title, num_ranks, dim):
    expected = single(title)
    assert expected.std() > 0.05
    for found in gloo_ranks(num_ranks, comfyui=comfyui).run(
        "parallel_vae.comfy_cases.split_decode", title=title, dim=dim
    ):
        assert found.shape == expected.shape
        assert relative(found, expected) < TOLERANCE


@pytest.mark.parametrize("title", SPLIT)
def test_nothing_stands_in_the_way_of_those(comfy, title):
    assert obstacle(functools.partial(decode, build_vae(title)), latent(title)) is None


@pytest.mark.parametrize("title", [title for title in VAES if title not in SPLIT])
def test_others_are_refused_by_name_before_anything_runs(comfy, title):
    run, z = functools.partial(decode, build_vae(title)), latent(title)
    found = obstacle(run, z)
    assert found and found.startswith(VAES[title].refused) and found.endswith("decode this VAE on one device")
    with pytest.raises(CannotSplit, match=VAES[title].refused):
        check_supported(run, z)
