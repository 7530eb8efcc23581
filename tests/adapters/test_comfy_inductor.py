"""Generated code in the real ComfyUI: as exact as float32 is at every size, alone and with the cache and int8."""

from __future__ import annotations

import pytest
from tiny_models import FLUX, build, fbcache, relative, sample

pytestmark = pytest.mark.usefixtures("comfy")

SIZES = [(16, 10, 14), (16, 12, 14), (16, 8, 8), (16, 16, 10), (16, 6, 22), (16, 14, 10)]
PROMPTS = [(7, 5), (6, 9), (3, 12), (16, 2)]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    return tmp_path_factory.mktemp("artifacts")


def compiled(patcher, directory):
    from para_core.adapters.comfy_compile import apply_compile
    from para_core.compile_config import CompileConfig

    return apply_compile(patcher, CompileConfig(), directory=directory)


def test_every_size_is_exact_and_nothing_is_compiled_after_warm_up(artifacts):
    from para_core.adapters.comfy_compile import last_compile_report

    model = build(FLUX)
    patcher = compiled(model, artifacts)
    errors = {}
    for latent in SIZES:
        for num_tokens in PROMPTS:
            settings = {"latent": latent, "num_tokens": num_tokens, "cfg": 4.0, "steps": 1}
            errors[latent, num_tokens] = relative(sample(patcher, FLUX, **settings), sample(model, FLUX, **settings))
    report = last_compile_report(patcher)
    assert max(errors.values()) <= 1e-5, errors
    assert report.num_compilations == 4, "the first size, and any other, of two kinds"
    cached = fbcache(patcher, 100.0, max_consecutive_hits=1)
    reference = fbcache(model, 100.0, max_consecutive_hits=1)
    assert relative(sample(cached, FLUX, cfg=4.0), sample(reference, FLUX, cfg=4.0)) <= 1e-5
    assert last_compile_report(patcher).num_compilations == 4
    assert report.cache_bytes is not None
