"""Parallel VAE Decode: on real processes the picture is that of one device; and what it asks the ranks for."""

import operator
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.usefixtures("comfy")


def demo_vae(*, file=torch.float32, dtype=None):
    """The demo's VAE from weights in the dtype of a file. dtype: in which it computes; None leaves that to the host."""
    import comfy.sd
    import comfy.utils

    from para_core.demo.weights import AUTOENCODER_FILE

    weights = comfy.utils.load_torch_file(str(AUTOENCODER_FILE))
    return comfy.sd.VAE(sd={name: tensor.to(file) for name, tensor in weights.items()}, dtype=dtype)


def latent(*size):
    return torch.randn(*size, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def parallel(groups):
    """Decodes on two ranks."""
    from para_core.adapters.comfy_parallel_vae import parallel_vae_decode
    from para_core.parallel_config import ParallelConfig

    config = ParallelConfig(("cpu", "cpu"))
    return lambda vae, samples, **settings: parallel_vae_decode(vae, samples, config, groups.session, **settings)


def test_the_picture_is_that_of_one_device(parallel):
    vae, samples = demo_vae(), latent(2, 16, 19, 13)
    expected = vae.decode(samples.clone())
    result = parallel(vae, samples)
    assert result.shape == expected.shape and result.dtype == expected.dtype
    assert (result - expected).abs().max() <= 1e-5
    assert torch.equal(vae.decode(samples.clone()), expected)


@pytest.mark.parametrize(("file", "dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_weights_that_the_host_casts_when_it_uses_them(parallel, dynamic_vram, file, dtype):
    """In another dtype than the file's; before the host has used the VAE, and after it has encoded with it."""
    vae, samples = demo_vae(file=file, dtype=dtype), latent(1, 16, 19, 13)
    assert {parameter.dtype for parameter in vae.first_stage_model.parameters()} == {file} != {vae.vae_dtype}
    unused = parallel(vae, samples)
    vae.encode(latent(1, 32, 32, 3).sigmoid())
    assert any(hasattr(module, "_v") for module in vae.first_stage_model.modules())
    used = parallel(vae, samples)
    expected = vae.decode(samples.clone())
    # One step of bfloat16 at 1: kernels may sum in another order over slices.
    tolerance = 1e-5 if dtype is torch.float32 else 2**-8
    assert (used - expected).abs().max() <= tolerance and (unused - expected).abs().max() <= tolerance


def in_process(fails=lambda samples: None):
    """A session with one rank in this process that raises what fails(samples) gives; what it is asked for."""
    from fixtures_in_process import InProcess

    from para_core.adapters.comfy_session import Session

    group = InProcess()
    asked, original = [], group.call

    def call(method, payload, **settings):
        if method == "decode_vae":
            asked.append(payload)
            if (error := fails(payload["samples"])) is not None:
                raise error
        return original(method, payload, **settings)

    group.call = call
    group.config = SimpleNamespace(devices=("cpu",) * 2)
    return Session(group), asked


@pytest.fixture
def loads(monkeypatch):
    """What the host's memory management is asked for to run models, in order: its keyword arguments."""
    import comfy.model_management

    found, original = [], comfy.model_management.load_models_gpu

    def load_models_gpu(models, **settings):
        if settings:  # else there is only something to stand in the list of models
            found.append(settings)
        return original(models, **settings)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load_models_gpu)
    return found


def test_ranks_and_host_make_room_for_their_part_of_the_activations(loads):
    from para_core.adapters.comfy_parallel_vae import parallel_vae_decode
    from para_core.parallel_config import ParallelConfig

    vae, samples = demo_vae(), latent(1, 16, 19, 13)
    vae.disable_offload = True
    session, _ = in_process()
    parallel_vae_decode(vae, samples, ParallelConfig(("cpu", "cpu")), lambda config: session)
    memory = vae.memory_used_decode(samples.shape, vae.vae_dtype) / 2
    assert loads == [{"memory_required": memory, "force_full_load": True}] * 2  # the host's own, and a rank's


def rank_error(cause):
    """As the line to the ranks makes it."""
    from para_core.workers.line import _error

    traceback = f'Traceback (most recent call last):\n  File "sd.py", line 1, in decode\n    decode()\n{cause}\n'
    return _error("decode_vae", {"rank": 1, "error": traceback})


def decode_with(fails, vae):
    """What comes of it, the kinds of notices, and the latents that the ranks were asked to decode."""
    from para_core.adapters.comfy_parallel_vae import parallel_vae_decode
    from para_core.parallel_config import ParallelConfig

    session, asked = in_process(fails)
    said = []
    config = ParallelConfig(("cpu", "cpu"))
    result = parallel_vae_decode(vae, latent(1, 16, 66, 40), config, lambda config: session, listener=said.append)
    return result, [notice.kind for notice in said], [tuple(payload["samples"].shape) for payload in asked]


OUT_OF_MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


def test_where_a_rank_runs_out_of_memory_the_host_decodes_in_tiles():
    """On the ranks, as it decodes in tiles on one device; that is said."""
    vae = demo_vae()
    result, said, asked = decode_with(lambda z: rank_error(OUT_OF_MEMORY) if z.shape[-2:] == (66, 40) else None, vae)
    assert torch.equal(result, vae.decode_tiled_(latent(1, 16, 66, 40)).movedim(1, -1))
    assert said == ["decoded_in_tiles"]
    assert asked[0] == (1, 16, 66, 40) and len(asked) > 3 and {shape[-2:] for shape in asked} != {(66, 40)}


def with_little_memory(decoder, num_values):
    """The decoder, which raises on a rank that is given so many latent values of a channel; that travels with it."""
    graph = torch.fx.Graph()
    z = graph.placeholder("z")
    shape = graph.call_function(getattr, (z, "shape"))
    height, width = (graph.call_function(operator.getitem, (shape, dim)) for dim in (-2, -1))
    fits = graph.call_function(operator.lt, (graph.call_function(operator.mul, (height, width)), num_values))
    here = graph.call_function(operator.not_, (graph.call_function(torch.distributed.is_initialized),))
    enough = graph.call_function(operator.or_, (fits, here))
    graph.call_function(torch._assert, (enough, "out of memory"))
    graph.output(z)
    return torch.nn.Sequential(torch.fx.GraphModule({}, graph), *decoder)


def test_ranks_that_ran_out_of_memory_decode_the_tiles(parallel):
    vae, samples, said = demo_vae(), latent(1, 16, 66, 40), []
    expected = vae.decode_tiled_(samples.clone()).movedim(1, -1)
    vae.first_stage_model.taesd_decoder = with_little_memory(vae.first_stage_model.taesd_decoder, 33 * 40)
    assert (parallel(vae, samples, listener=said.append) - expected).abs().max() <= 1e-5
    assert [notice.kind for notice in said] == ["decoded_in_tiles"]


@pytest.mark.parametrize(
    ("cause", "own_tiles", "number"),
    [("ValueError: no", False, 1), (OUT_OF_MEMORY, True, 1), (OUT_OF_MEMORY, False, 2)],
    ids=["another error", "a VAE that makes its tiles itself", "also in tiles"],
)
def test_other_errors_of_the_ranks_end_the_decoding(cause, own_tiles, number):
    from para_core.workers import WorkerError

    vae, raised = demo_vae(), []
    vae.handles_tiling = own_tiles

    def fails(samples):
        raised.append(rank_error(cause))
        return raised[-1]

    with pytest.raises(WorkerError, match="rank 1 raised in decode_vae: "):
        decode_with(fails, vae)
    assert len(raised) == number
