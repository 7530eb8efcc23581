"""What the cache costs, counted rather than timed: operations and multiplications of computed and reused steps."""

import pytest
import torch
from tiny_models import TINY_MODELS, build, with_sampler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

pytestmark = pytest.mark.usefixtures("comfy")


class OperationCounter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def cost(patcher, tiny):
    """(operations, multiply-adds) of the second of two equal model calls."""
    counted = []

    def twice(model, x, sigmas):
        model(x, sigmas[0])
        with OperationCounter() as operations:
            model(x, sigmas[0])
        with FlopCounterMode(display=False) as flops:
            model(x, sigmas[0])
        counted.extend((operations.count, flops.get_total_flops()))

    with_sampler(patcher, tiny, twice)
    return counted


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_reused_step_costs_little_more_than_block_0(name):
    from para_core.adapters.comfy_fbcache import apply_fbcache
    from para_core.families import family_of
    from para_core.residual_cache import CacheConfig

    tiny = TINY_MODELS[name]
    cut = build(tiny)
    first, *others = family_of(cut.model.diffusion_model).stacks
    model = cut.model.diffusion_model
    setattr(model, first.blocks, torch.nn.ModuleList([getattr(model, first.blocks)[0]]))
    for stack in others:
        setattr(model, stack.blocks, torch.nn.ModuleList())
    operations, flops = cost(cut, tiny)
    reused_operations, reused_flops = cost(apply_fbcache(build(tiny), CacheConfig(0.01)), tiny)
    assert reused_flops == flops > 0
    assert reused_operations <= operations * 1.2


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_threshold_0_adds_no_operation_on_tokens(name):
    from para_core.adapters.comfy_fbcache import apply_fbcache
    from para_core.residual_cache import CacheConfig

    tiny = TINY_MODELS[name]
    operations, flops = cost(build(tiny), tiny)
    patched_operations, patched_flops = cost(apply_fbcache(build(tiny), CacheConfig(0.0)), tiny)
    assert patched_flops == flops > 0
    assert patched_operations - operations <= 2  # reading sigma
