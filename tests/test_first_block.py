"""Model calls through the cache, on a toy model of two stacks with in-place blocks; no host involved."""

import pytest
import torch
from torch import nn

from para_core.block_forward import swapped_forwards
from para_core.cache_run import CacheRun
from para_core.families import BlockStack, ModelFamily, Stream
from para_core.first_block import Step
from para_core.residual_cache import CacheConfig


class Double(nn.Module):
    def __init__(self, index):
        super().__init__()
        self.calls, self.scale = 0, 0.3 + 0.1 * index

    def forward(self, img, txt):
        self.calls += 1
        img += self.scale * torch.sin(img + txt.mean(1, keepdim=True))
        txt += self.scale * torch.cos(txt)
        return img, txt


class Single(Double):
    def forward(self, x):
        self.calls += 1
        x += self.scale * torch.sin(2 * x + x.mean(1, keepdim=True))
        return x


class Toy(nn.Module):
    """order: of text and image where they are one tensor."""

    def __init__(self, order, num_double=2, num_single=3):
        super().__init__()
        self.order = order
        self.doubles = nn.ModuleList(Double(index) for index in range(num_double))
        self.singles = nn.ModuleList(Single(index) for index in range(num_single))

    def forward(self, img, txt, control=0.0):
        img, txt = img.clone(), txt.clone()
        for block in self.doubles:
            img, txt = block(img, txt=txt)
            img += control
        streams = {"img": img, "txt": txt}
        x = torch.cat([streams[name] for name in self.order], 1)
        start = 0 if self.order[0] == "img" else txt.shape[1]
        for block in self.singles:
            x = block(x)
            x[:, start : start + img.shape[1]] += control
        return x[:, start : start + img.shape[1]]


def family(order):
    streams = (Stream("img", 0, ("img",)), Stream("txt", 1, ("txt",)))
    return ModelFamily(
        "toy",
        ("Toy",),
        (
            BlockStack("doubles", streams, in_place=True),
            BlockStack("singles", (Stream("x", None, order),), in_place=True),
        ),
    )


ORDERS = pytest.mark.parametrize("order", [("txt", "img"), ("img", "txt")], ids="-".join)


def call(run, model, img, txt, *, keys=("a",), step=0, allowed=True, **kwargs):
    num_blocks = [len(model.doubles), len(model.singles)]
    with (
        run.call(run.family, num_blocks, {key: str(key) for key in keys}, Step(step, 1.0, allowed)) as cached,
        swapped_forwards(model, run.family, cached),
    ):
        return model(img, txt, **kwargs)


@ORDERS
def test_computed_call_is_bit_equal_and_reused_one_reproduces_it(order):
    model, run = Toy(order), CacheRun(family(order), CacheConfig(0.01))
    img, txt = torch.randn(2, 7, 4), torch.randn(2, 3, 4)
    expected = model(img, txt)
    assert torch.equal(call(run, model, img, txt), expected)
    torch.testing.assert_close(call(run, model, img, txt), expected)
    report = run.report()
    assert (report.num_calls, report.num_reused_calls) == (2, 1)
    assert (report.num_block_calls, report.num_block_calls_baseline) == (6, 10)
    assert [block.calls for block in model.doubles] == [3, 2]


@ORDERS
def test_what_the_host_adds_between_blocks_counts_once(order):
    model, run = Toy(order), CacheRun(family(order), CacheConfig(0.01))
    img, txt = torch.randn(1, 7, 4), torch.randn(1, 3, 4)
    expected = model(img, txt, control=0.2)
    assert not torch.allclose(expected, model(img, txt))
    for _ in range(2):
        torch.testing.assert_close(call(run, model, img, txt, control=0.2), expected)
    assert run.report().num_reused_calls == 1


def test_conditionings_are_cut_from_the_batch_and_stay_apart():
    order = ("txt", "img")
    model, run = Toy(order), CacheRun(family(order), CacheConfig(0.01))
    img, txt = torch.randn(2, 7, 4), torch.randn(2, 3, 4)
    expected = call(run, model, img, txt, keys=("b", "a"))
    alone = call(run, model, img[1:], txt[1:], keys=("a",))
    assert run.report().num_reused_calls == 1
    torch.testing.assert_close(alone, expected[1:])
    swapped = call(run, model, img.flip(0), txt.flip(0), keys=("a", "b"))
    assert run.report().num_reused_calls == 2
    torch.testing.assert_close(swapped, expected.flip(0))


def test_one_conditioning_that_changed_computes_the_whole_batch():
    order = ("txt", "img")
    model, run = Toy(order), CacheRun(family(order), CacheConfig(0.01))
    img, txt = torch.randn(2, 7, 4), torch.randn(2, 3, 4)
    call(run, model, img, txt, keys=("a", "b"))
    img[1] += 1
    assert torch.equal(call(run, model, img, txt, keys=("a", "b")), model(img, txt))


def test_threshold_0_never_reuses_but_shows_the_curve():
    order = ("txt", "img")
    model, run = Toy(order), CacheRun(family(order), CacheConfig(0.0))
    img, txt = torch.randn(1, 7, 4), torch.randn(1, 3, 4)
    for step in range(3):
        call(run, model, img + step, txt, step=step)
    (records,) = run.report().conditionings.values()
    assert [record.reused for record in records] == [False] * 3
    assert records[0].diff is None and records[1].diff > 0


def test_a_call_that_fails_leaves_the_blocks_and_the_run_as_they_were():
    order = ("txt", "img")
    model, run = Toy(order), CacheRun(family(order), CacheConfig(10.0))
    img, txt = torch.randn(1, 7, 4), torch.randn(1, 3, 4)
    expected = call(run, model, img, txt)
    broken = model.singles[1].scale
    model.singles[1].scale = "not a number"
    with pytest.raises(TypeError):
        call(run, model, img + 5, txt, allowed=False)
    model.singles[1].scale = broken
    assert all("forward" not in block.__dict__ for block in (*model.doubles, *model.singles))
    torch.testing.assert_close(call(run, model, img, txt), expected)
    assert run.report().num_calls == 2


def test_states_of_passes_that_ended_are_dropped():
    order = ("txt", "img")
    model, run = Toy(order), CacheRun(family(order), CacheConfig(0.01))
    img, txt = torch.randn(1, 7, 4), torch.randn(1, 3, 4)
    for step in range(40):
        call(run, model, img, txt, keys=(f"short-lived {step}",), step=step)
        call(run, model, img, txt, keys=("lasting",), step=step)
    one_state = 2 * img.numel() * img.element_size()
    assert run.report().num_bytes <= (CacheRun.STALE_STEPS + 3) * one_state


def test_a_model_of_one_block_is_left_alone():
    order = ("txt", "img")
    model, run = Toy(order, num_double=1, num_single=0), CacheRun(family(order), CacheConfig(10.0))
    img, txt = torch.randn(1, 7, 4), torch.randn(1, 3, 4)
    for _ in range(2):
        assert torch.equal(call(run, model, img, txt), model(img, txt))
    assert run.report().num_reused_calls == 0


def test_a_call_is_reused_exactly_where_the_change_is_below_the_threshold():
    order = ("txt", "img")
    model = Toy(order)
    img, txt = torch.randn(1, 7, 4), torch.randn(1, 3, 4)
    run = CacheRun(family(order), CacheConfig(0.05))
    for step in range(20):
        call(run, model, img * (1 + 0.02 * step), txt, step=step)
    (records,) = run.report().conditionings.values()
    assert {record.reused for record in records} == {True, False}
    assert all(record.reused == (record.diff < 0.05) for record in records[1:])
