"""A MODEL that samples elsewhere: what goes there and comes back, with a group of one rank in this process."""

from dataclasses import dataclass

import pytest
import torch
from tiny_models import TINY_MODELS, build, fbcache, sample
from tiny_models.lora import lora

pytestmark = pytest.mark.usefixtures("comfy")
FLUX = TINY_MODELS["flux"]


@dataclass
class Context:
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")


class InProcess:
    """A group of one rank that answers at once. calls: the methods that were asked for."""

    alive = connected = True

    def __init__(self):
        from para_core.workers import GroupConfig

        self.config = GroupConfig(("cpu",), "unused:Service")
        from para_core.adapters.comfy_rank import Service

        self.recover = None
        self.service = Service(Context())
        self.calls = []

    def call(self, method, payload, *, cancelled=None):
        if cancelled is not None:
            cancelled()
        from para_core.workers import Shared

        self.calls.append(method)
        payload = {name: value.tensors if isinstance(value, Shared) else value for name, value in payload.items()}
        # The ranks' memory is this process's own here: what unloads it is the host already.
        return None if method == "unload" else getattr(self.service, method)(payload)


@pytest.fixture
def elsewhere():
    """Makes a MODEL sample on the group; the group is its second result."""
    from para_core.adapters.comfy_parallel import apply_parallel
    from para_core.adapters.comfy_session import Session
    from para_core.parallel_config import ParallelConfig

    group = InProcess()
    session = Session(group)

    def parallel(model, **settings):
        return apply_parallel(model, ParallelConfig(("cpu",), **settings), lambda config: session)

    parallel.group = group
    return parallel


@pytest.mark.parametrize(("cfg", "num_tokens"), [(1.0, (7, 7)), (4.0, (7, 7)), (4.0, (9, 5))])
def test_the_result_is_the_same(elsewhere, cfg, num_tokens):
    model = build(FLUX)
    expected = sample(model, FLUX, cfg=cfg, num_tokens=num_tokens)
    assert torch.equal(sample(elsewhere(model), FLUX, cfg=cfg, num_tokens=num_tokens), expected)
    assert torch.equal(sample(model, FLUX, cfg=cfg, num_tokens=num_tokens), expected)


@pytest.mark.parametrize("decision", ["first_block", "prediction"])
@pytest.mark.parametrize("first", ["cache", "launcher"])
def test_the_cache_decides_the_same_there(elsewhere, first, decision):
    model, reports = build(FLUX), []

    def cached(model):
        return fbcache(model, 100.0, reports.append, max_consecutive_hits=2, decision=decision)

    def wired(model):
        return elsewhere(cached(model)) if first == "cache" else cached(elsewhere(model))

    expected = sample(cached(model), FLUX, cfg=4.0)

    assert torch.equal(sample(wired(model), FLUX, cfg=4.0), expected)
    here, there = (report for report in reports if report.finished)
    assert there.conditionings == here.conditionings and there.num_block_calls == here.num_block_calls
    assert there.num_bytes == here.num_bytes > 0
    unmeasured = [record.reused and record.diff is None for record in here.conditionings["positive"]]
    assert any(unmeasured) == (decision == "prediction")


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
def test_a_lora_and_another_strength(elsewhere, behind):
    model = build(FLUX)
    plain = sample(elsewhere(model), FLUX)
    for strength in (1.0, 0.5):
        expected = sample(lora(model, strength), FLUX)
        wired = lora(elsewhere(model), strength) if behind else elsewhere(lora(model, strength))
        assert torch.equal(sample(wired, FLUX), expected)
        assert not torch.equal(expected, plain)
    assert torch.equal(sample(elsewhere(model), FLUX), plain)
    assert elsewhere.group.calls.count("load") == 1, "a changed strength loads no weights"


@pytest.mark.parametrize("scheme", ["fp8_dynamic_per_row", "int8_weight_only"])
def test_quantized_weights(elsewhere, scheme):
    from para_core.adapters.comfy_quantization import apply_quantization

    quantized, _ = apply_quantization(lora(build(FLUX), 0.7), scheme)
    assert torch.equal(sample(elsewhere(quantized), FLUX), sample(quantized, FLUX))


def test_a_second_run_asks_for_nothing_but_the_calls(elsewhere):
    model = elsewhere(build(FLUX))
    first = sample(model, FLUX)
    elsewhere.group.calls.clear()
    assert torch.equal(sample(model, FLUX), first)
    assert set(elsewhere.group.calls) == {"begin", "forward", "end"}


@pytest.mark.parametrize("decision", ["first_block", "prediction"])
def test_a_group_that_restarted_is_brought_to_where_it_was(elsewhere, decision):
    """With the cache, whose residuals went with the old processes: the calls so far are made again."""
    from para_core.adapters.comfy_rank import Service

    group, model = elsewhere.group, lora(build(FLUX), 0.7)
    cached = fbcache(elsewhere(model), 100.0, max_consecutive_hits=3, decision=decision)
    expected = sample(cached, FLUX, steps=8, cfg=4.0)
    original = group.call
    numbers = iter(range(1000))

    def dies_at_the_sixth(method, payload, **settings):
        if method == "forward" and next(numbers) == 5:
            group.service = Service(Context())
            group.recover()
        return original(method, payload, **settings)

    group.call = dies_at_the_sixth
    assert torch.equal(sample(cached, FLUX, steps=8, cfg=4.0), expected)
    assert group.calls.count("load") == 2
