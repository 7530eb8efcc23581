"""Compiling blocks without any host: kinds, sizes, failures, and starts with artifacts of an earlier process."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from para_core import compile_watch
from para_core.compilation import Compilation, compiled_blocks
from para_core.compile_config import CompileConfig, compile_obstacle
from para_core.compiled_kind import MAX_SIZES
from para_core.families import BlockStack, ModelFamily, Stream

FAMILY = ModelFamily("toy", ("Toy",), (BlockStack("blocks", (Stream(0, None, ("x",)),), in_place=True),))


class Block(nn.Module):
    def __init__(self, width: int, breaks: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.breaks = breaks

    def forward(self, x, options=None):
        x += self.linear(x).sin()
        if self.breaks:
            torch._dynamo.graph_break()
        return x.cos()


class Toy(nn.Module):
    def __init__(self, widths=(4, 4, 4), breaks=False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, breaks) for width in widths)

    def forward(self, x):
        for block in self.blocks:
            x = block(x.clone())
        return x


def names(run):
    return [one.name for one in run.compiled]


def call(compilation, model, *shapes):
    """One run with a call for each shape, compared with the model as it is."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        inputs = [torch.randn(shape, generator=generator) for shape in shapes]
        expected = [model(x) for x in inputs]
        with compilation.run(model, FAMILY) as run:
            for x, wanted in zip(inputs, expected, strict=True):
                assert torch.equal(model(x), wanted)
    assert not any("forward" in block.__dict__ for block in model.blocks)
    return run


def eager(**settings):
    return Compilation(CompileConfig(backend="eager", **settings))


def test_auto_compiles_the_first_size_exactly_and_all_others_once():
    compilation = eager()
    run = call(compilation, Toy(), (2, 3, 4), (2, 3, 4), (2, 5, 4), (2, 7, 4), (3, 9, 4), (2, 3, 4))
    assert [one.reason for one in run.compiled] == ["", "another size"]
    assert call(compilation, Toy(), (2, 3, 4), (5, 6, 4)).compiled == []


def test_dynamic_on_and_off():
    sizes = [(2, length, 4) for length in range(2, MAX_SIZES + 4)]
    assert len(call(eager(dynamic="on"), Toy(), *sizes[:3]).compiled) == 1
    off = eager(dynamic="off")
    assert len(call(off, Toy(), *sizes, *sizes[-3:]).compiled) == len(sizes), "a limit was hit, or a size forgotten"
    (kind,) = off._kinds.values()
    assert len(kind._by_size) == MAX_SIZES


def test_blocks_that_are_built_differently_are_kinds_of_their_own():
    class Uneven(Toy):
        def forward(self, x):
            return [block(x[..., : block.linear.in_features].clone()) for block in self.blocks][-1]

    run = call(eager(), Uneven((4, 6, 4, 6)), (2, 3, 6))
    assert names(run) == ["block", "block"] and [one.reason for one in run.compiled] == ["", ""]


def test_owners_share_nothing_and_forget_with_the_owner():
    assert len(call(eager(), Toy(), (2, 3, 4)).compiled) == 1
    assert len(call(eager(), Toy(), (2, 3, 4)).compiled) == 1


def test_compiled_code_goes_with_its_owner():
    compilation, model = eager(), Toy()
    call(compilation, model, (2, 3, 4), (2, 5, 4))
    (kind,) = compilation._kinds.values()
    gone = [weakref.ref(kept) for kept in (compilation, kind, kind._by_size["any"])]
    del compilation, kind, model
    gc.collect()
    assert [kept() for kept in gone] == [None] * len(gone)


def test_no_report_of_a_compilation_comes_behind_its_end(monkeypatch):
    """On a busy machine, the thread that ticks may be in the middle of a report when the compilation ends."""
    monkeypatch.setattr(compile_watch, "TICK", 0.001)
    seen = []

    def listener(report):
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.1)
        seen.append((report.compiling, threading.active_count()))

    before = threading.active_count()
    model = Toy()
    with torch.no_grad(), eager().run(model, FAMILY, listener=listener):
        model(torch.randn(2, 3, 4))
    assert any(compiling for compiling, _ in seen)
    assert seen[-1] == (None, before)


def test_a_forward_that_another_library_replaced_is_left_and_named():
    model = Toy()
    model.blocks[1].forward = lambda x: x * 2
    x = torch.randn(2, 3, 4)
    expected = model(x)
    with torch.no_grad(), compiled_blocks(model, FAMILY, CompileConfig(backend="eager")) as run:
        assert torch.equal(model(x), expected)
    assert run.uncompiled == {"another extension has replaced the block's forward": 1}
    assert "forward" in model.blocks[1].__dict__


def test_reports_tell_what_goes_on():
    seen = []
    compilation = eager()
    model = Toy()
    with torch.no_grad(), compilation.run(model, FAMILY, listener=seen.append):
        model(torch.randn(2, 3, 4))
    assert seen[0].compiling == "block" and seen[0].summary() == "compiling block, 0 s"
    assert seen[-1].finished and seen[-1].compiling is None and seen[-1].num_blocks == 3
    assert "1 compilations in" in seen[-1].summary()


def test_an_error_leaves_no_block_behind():
    model = Toy()
    with pytest.raises(KeyError), eager().run(model, FAMILY):
        raise KeyError
    assert not any("forward" in block.__dict__ for block in model.blocks)


def test_fullgraph_refuses_what_breaks_unless_it_may_run_uncompiled():
    with pytest.raises(ValueError, match="^block cannot be compiled: .*; turn fullgraph off; or set allow_uncompiled"):
        call(eager(fullgraph=True), Toy(breaks=True), (2, 3, 4))
    run = call(eager(fullgraph=True, allow_uncompiled=True), Toy(breaks=True), (2, 3, 4), (2, 3, 4))
    assert list(run.uncompiled.values()) == [6]
    assert len(call(eager(), Toy(breaks=True), (2, 3, 4)).compiled) > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "os.system"}, "^backend is 'os.system'; allowed are inductor, cudagraphs"),
        ({"mode": "fast"}, "^mode is 'fast'; allowed are default"),
        ({"dynamic": "maybe"}, "^dynamic is 'maybe'; allowed are auto"),
        ({"scope": "half"}, "^scope is 'half'; allowed are blocks"),
        ({"mode": "max-autotune", "backend": "eager"}, "^mode is 'max-autotune' with backend 'eager'"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        CompileConfig(**settings)


def test_obstacles_say_what_to_do(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert "choose inductor" in compile_obstacle(CompileConfig(backend="cudagraphs"), cpu)
    assert compile_obstacle(CompileConfig(backend="eager"), cuda) is None
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert "pip install triton" in compile_obstacle(CompileConfig(), cuda)


PROCESS = """
import json, sys, time
sys.path[:0] = sys.argv[2:]
import torch
from pathlib import Path
from test_compilation import FAMILY, Toy
from para_core.artifact_cache import ArtifactCache
from para_core import compile_watch
from para_core.compilation import Compilation
from para_core.compile_config import CompileConfig

torch.set_num_threads(1)
torch.manual_seed(0)
model, cpu = Toy((64,) * 3), torch.device("cpu")
compilation = Compilation(CompileConfig(), ArtifactCache(Path(sys.argv[1]), cpu))
with torch.no_grad():
    x = torch.randn(2, 5, 64)
    expected = model(x)
    with compilation.run(model, FAMILY) as run:
        error = float((model(x) - expected).abs().max())
from torch._dynamo.utils import counters
print(json.dumps({"error": error, "hits": counters["inductor"]["fxgraph_cache_hit"] +
                  counters["aot_autograd"]["autograd_cache_hit"], "compiled": len(run.compiled)}))
"""


def process(directory):
    here = Path(__file__).parent
    command = [sys.executable, "-c", PROCESS, str(directory), str(here), str(here.parent)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1]) | {"log": ended.stderr}


def test_a_second_process_starts_from_the_artifacts_and_a_damaged_one_from_nothing(tmp_path):
    first, second = process(tmp_path), process(tmp_path)
    assert first["error"] < 1e-5 and first["hits"] == 0
    assert second["error"] < 1e-5 and second["hits"] > 0 and second["compiled"] == 1
    for file in tmp_path.rglob("*"):
        if file.is_file() and "manifest" not in file.name:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    third = process(tmp_path)
    assert third["error"] < 1e-5 and third["hits"] == 0
    assert third["log"].count("are discarded") == 1
