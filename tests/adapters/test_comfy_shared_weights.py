"""Weights are in memory once for all ranks of a machine: in the pages of their file, or where the server put them."""

import gc
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FLUX, build, host_version, relative, sample, size_of
from tiny_models.lora import NAMES, lora

pytestmark = [
    pytest.mark.usefixtures("comfy"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads of its memory in /proc"),
]
LARGE = replace(FLUX, title="large", unet_config=FLUX.unet_config | {"hidden_size": 512, "num_heads": 4})  # 128 MB


def saved(tiny, file: Path, *, aligned: bool = True) -> Path:
    """aligned: as memory that torch allocates is; over other memory the CPU's kernels sum in another order."""
    state = build(tiny).model.diffusion_model.state_dict()
    for padding in range(64):
        save_file(state, file, metadata={"padding": " " * padding})
        with file.open("rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        if ((8 + header) % 64 == 0) == aligned:
            return file
    raise AssertionError("no padding does it")


@pytest.fixture(scope="module")
def file(comfy, tmp_path_factory) -> Path:
    if host_version() < (0, 33):
        pytest.skip("ComfyUI 0.3's loaders leave no recipe")
    return saved(FLUX, tmp_path_factory.mktemp("weights") / "flux.safetensors")


def loaded(file: Path, **options):
    """As the server loads it."""
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(file), model_options=options)


def on_a_rank(file: Path, **options):
    import comfy.sd

    from para_core.adapters.comfy_rank_models import from_recipe

    return from_recipe(pickle.dumps((comfy.sd.load_diffusion_model, (str(file), options))))


def bytes_in_pages_of(file: Path, model) -> int:
    """Of the parameters, what lies where the system has mapped the file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    pages = [range(*(int(address, 16) for address in line[0].split("-"))) for line in lines]
    there = [p for p in model.model.parameters() if any(p.data_ptr() in one for one in pages)]
    return sum(parameter.nbytes for parameter in there)


def same_weights(model, other) -> bool:
    weights, others = model.model.state_dict(), other.model.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


def test_a_rank_uses_the_pages_of_the_file(file):
    here, there = loaded(file), on_a_rank(file)
    assert bytes_in_pages_of(file, here) == 0
    assert bytes_in_pages_of(file, there) == size_of(there) == size_of(here)
    assert same_weights(there, here)
    assert torch.equal(sample(there, FLUX, cfg=4.0), sample(here, FLUX, cfg=4.0))


def test_a_checkpoint_with_more_in_it(file, tmp_path):
    """The recipe that the host's Load Checkpoint leaves: keys with a prefix, the model as one of several results."""
    import comfy.sd

    from para_core.adapters.comfy_rank_models import from_recipe

    whole = tmp_path / "checkpoint.safetensors"
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in load_file(file).items()}, whole)
    recipe = comfy.sd.load_checkpoint_guess_config, (str(whole), False, False), 0
    there = from_recipe(pickle.dumps(recipe))
    assert bytes_in_pages_of(whole, there) == size_of(there)
    assert same_weights(there, loaded(file))


def test_pages_that_are_not_aligned_as_allocated_memory(file, tmp_path):
    """Which shows in nothing but float32's rounding."""
    file = saved(FLUX, tmp_path / "flux.safetensors", aligned=False)
    assert relative(sample(on_a_rank(file), FLUX, cfg=4.0), sample(loaded(file), FLUX, cfg=4.0)) <= 1e-6


def test_weights_that_are_cast_are_the_ranks_own(file):
    here, there = (load(file, dtype=torch.bfloat16) for load in (loaded, on_a_rank))
    assert bytes_in_pages_of(file, there) == 0
    assert same_weights(there, here)


def test_loras_come_and_go_and_the_file_stays(file):
    """Merged into weights of their own: neither the file nor what other ranks see of it changes."""
    before, here, there = file.read_bytes(), loaded(file), on_a_rank(file)
    plain = sample(here, FLUX)
    for strength in (1.0, 0.5):
        expected = sample(lora(here, strength), FLUX)
        changed = lora(there, strength)
        assert torch.equal(sample(changed, FLUX), expected)
        assert not torch.equal(expected, plain)
        own = sum(there.model.get_submodule(f"diffusion_model.{name}").weight.nbytes for name in NAMES)
        assert bytes_in_pages_of(file, there) == size_of(there) - own
    assert torch.equal(sample(there, FLUX), plain)
    assert bytes_in_pages_of(file, there) == size_of(there)
    assert file.read_bytes() == before


@pytest.mark.parametrize("strength", [None, 0.5], ids=["plain", "lora"])
def test_weights_that_leave_a_device_are_the_shared_ones_again(file, strength):
    """The device of this test keeps no values: whoever copied them back from there would fail."""
    there = on_a_rank(file)
    model = there if strength is None else lora(there, strength)
    model.load(torch.device("meta"), lowvram_model_memory=1e32)
    assert all(parameter.is_meta for parameter in there.model.parameters())
    model.unpatch_model(torch.device("cpu"))
    assert bytes_in_pages_of(file, there) == size_of(there)
    assert same_weights(there, loaded(file))


@pytest.mark.parametrize("strength", [None, 0.5], ids=["plain", "lora"])
def test_weights_of_which_a_part_leaves_a_device_are_the_shared_ones_again(file, strength):
    """As the host asks for between two models that take turns on one card."""
    there = on_a_rank(file)
    model = there if strength is None else lora(there, strength)
    model.load(torch.device("meta"), lowvram_model_memory=1e32)
    freed = model.partially_unload(torch.device("cpu"), size_of(model) // 2)
    left = sum(parameter.nbytes for parameter in there.model.parameters() if parameter.is_meta)
    assert size_of(model) // 2 <= freed == size_of(model) - left < size_of(model)
    assert bytes_in_pages_of(file, there) == freed
    model.unpatch_model(torch.device("cpu"))
    assert bytes_in_pages_of(file, there) == size_of(there)
    assert same_weights(there, loaded(file))


@pytest.mark.parametrize(("dtype", "shared"), [(None, True), (torch.bfloat16, False)])
def test_shared_weights_are_not_pinned(file, monkeypatch, dtype, shared):
    """CUDA writes to what it registers, as far as the system knows: private pages of a file would be copied."""
    import comfy.model_management

    pinned = []
    monkeypatch.setattr(comfy.model_management, "pin_memory", pinned.append)  # returns None: there is no CUDA
    there = on_a_rank(file, **{"dtype": dtype} if dtype else {})
    there.load(torch.device("meta"), lowvram_model_memory=size_of(there) // 3)
    if shared:  # others cannot be copied back from this device
        there.partially_unload(torch.device("cpu"), size_of(there) // 6)
    assert sum(weight.nbytes for weight in pinned) == (0 if shared else size_of(there) - there.loaded_size())


def memory_of(pid: int, folder: Path) -> int:
    """PSS of a process without files outside of the folder: of libraries it grows when others that use them end."""
    total, counted = 0, True
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        name, *values = line.split()
        if not name.endswith(":"):  # a mapping: address, permissions, offset, device, inode, file
            file = values[4] if len(values) > 4 else ""
            counted = not file.startswith("/") or file.startswith(("/memfd:", str(folder)))
        elif name == "Pss:" and counted:
            total += int(values[0]) * 1024
    return total


@pytest.mark.parametrize("scheme", [None, "int8_weight_only"], ids=["plain", "int8"])
def test_two_ranks_hold_a_checkpoint_once(groups, tmp_path, scheme):
    """In the place of a smaller one, which has paid for whatever else a first run costs.

    Of a file, or of a module in ComfyUI 0.3, whose loaders leave no recipe.
    """
    from para_core.adapters.comfy_parallel import apply_parallel
    from para_core.adapters.comfy_quantization import apply_quantization
    from para_core.parallel_config import ParallelConfig

    config = ParallelConfig(("cpu", "cpu"))

    def memory_with(tiny) -> tuple[int, int]:
        """PSS of the ranks with this model in them, and its own size."""
        gc.collect()  # the model before goes from the ranks once it is gone here
        model = build(tiny) if host_version() < (0, 33) else loaded(saved(tiny, tmp_path / f"{tiny.title}.safetensors"))
        size = size_of(model)
        if scheme is not None:
            model, report = apply_quantization(model, scheme)
            size -= report.bytes_before - report.bytes_after
        result = sample(apply_parallel(model, config, groups.session), tiny, steps=1)
        assert relative(result, sample(model, tiny, steps=1)) <= 1e-6
        return sum(memory_of(rank["pid"], tmp_path) for rank in groups.session(config).group.state()["ranks"]), size

    (before, small), (after, large) = memory_with(FLUX), memory_with(LARGE)
    assert after - before <= 1.15 * (large - small)
