"""What exact means: a computed model call is bit-equal to the one without the cache, a reused one reproduces it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from .sampling import fbcache, relative, with_sampler
from .tiny_model import build


def node(path, /, *args, **kwargs):
    """A patch of a MODEL by one of ComfyUI's own nodes, as module.class; settings it does not know are left out."""
    module, name = path.split(".")

    def patch(model):
        found = getattr(__import__(f"comfy_extras.{module}", fromlist=[name]), name, None)
        if found is None:
            pytest.skip(f"this ComfyUI has no {name}")
        function = found.execute if hasattr(found, "execute") else getattr(found(), found.FUNCTION)
        known = inspect.signature(function).parameters
        result = function(model, *args, **{key: value for key, value in kwargs.items() if key in known})
        return getattr(result, "args", result)[0]

    return patch


def twice(patcher, tiny, **settings):
    """Two guided model calls with identical inputs."""
    outputs = []

    def call(model, x, sigmas):
        outputs.extend(model(x, sigmas[0]).clone() for _ in range(2))

    with_sampler(patcher, tiny, call, **settings)
    return outputs


@contextmanager
def all_foreseen() -> Iterator[None]:
    """Within the context a reused call is never measured with the prediction decision, as if all were clear."""
    with mock.patch("para_core.forecast.Forecast.at", lambda *_: 0.0):
        yield


def check(tiny, patch=lambda model: model, **settings):
    """Computed calls are bit-equal, reused ones reproduce them, whether block 0 runs or not and wherever the patch is
    wired; returns the report."""
    model = build(tiny)
    expected, _ = twice(patch(model), tiny, **settings)
    for wired in (lambda *args: fbcache(patch(model), *args), lambda *args: patch(fbcache(model, *args))):
        reports = []
        computed, reused = twice(wired(0.01, reports.append), tiny, **settings)
        assert torch.equal(computed, expected)
        for label, records in reports[-1].conditionings.items():
            assert [record.reused for record in records] == [False, True], label
        assert relative(reused, computed, tiny) <= 1e-5
    foreseen = []
    with all_foreseen():
        outputs = twice(fbcache(patch(model), 0.01, foreseen.append, decision="prediction"), tiny, **settings)
    assert torch.equal(outputs[0], expected)
    for label, records in foreseen[-1].conditionings.items():
        assert [record.reused for record in records] == [False, True], label
    assert relative(outputs[1], expected, tiny) <= 1e-5
    plain = {name: value for name, value in settings.items() if name in ("cfg", "batch")}
    assert relative(expected, twice(build(tiny), tiny, **plain)[0]) > 1e-3, "no effect, so this test shows nothing"
    return reports[-1]
