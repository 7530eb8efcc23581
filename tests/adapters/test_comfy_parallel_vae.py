"""Parallel VAE Decode on real processes: the picture is that of one device."""

import pytest
import torch

pytestmark = pytest.mark.usefixtures("comfy")


@pytest.fixture
def vae():
    import comfy.sd
    import comfy.utils

    from para_core.demo.weights import AUTOENCODER_FILE

    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(AUTOENCODER_FILE)))


def test_the_picture_is_that_of_one_device(groups, vae):
    from para_core.adapters.comfy_parallel_vae import parallel_vae_decode
    from para_core.parallel_config import ParallelConfig

    latent = torch.randn(2, 16, 19, 13, generator=torch.Generator().manual_seed(3))
    expected = vae.decode(latent.clone())
    result = parallel_vae_decode(vae, latent, ParallelConfig(("cpu", "cpu")), groups.session)
    assert result.shape == expected.shape and result.dtype == expected.dtype
    assert (result - expected).abs().max() <= 1e-5
    assert torch.equal(vae.decode(latent.clone()), expected)
