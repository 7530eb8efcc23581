"""Compiled artifacts on disk: trusted only as they were written, bounded, and out of torch's way otherwise."""

from __future__ import annotations

import logging
import os

import pytest
import torch

from para_core.artifact_cache import MANIFEST, ArtifactCache

CPU = torch.device("cpu")


def kept(directory, **files):
    """A folder as an earlier process left it."""
    cache = ArtifactCache(directory, CPU)
    with cache.used():
        for name, content in files.items():
            (cache.folder / name).write_bytes(content)
    cache.settle()
    return cache.folder


def test_torch_is_pointed_at_the_folder_only_within_the_context(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "before")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    cache = ArtifactCache(tmp_path, CPU)
    with cache.used():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache.folder)
        os.environ["TRITON_CACHE_DIR"] = "of torch"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "before" and "TRITON_CACHE_DIR" not in os.environ


def test_what_is_as_it_was_written_is_kept(tmp_path, caplog):
    folder = kept(tmp_path, kernel=b"code")
    cache = ArtifactCache(tmp_path, CPU)
    with cache.used():
        assert (folder / "kernel").read_bytes() == b"code"
    assert cache.num_bytes == 4 and caplog.text == ""


DAMAGE = {
    "truncated": lambda folder: (folder / "kernel").write_bytes(b"co"),
    "garbled": lambda folder: (folder / "kernel").write_bytes(b"c0de"),
    "manifest garbled": lambda folder: (folder / MANIFEST).write_text("{"),
    "manifest of another shape": lambda folder: (folder / MANIFEST).write_text('["kernel"]'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_discards_the_folder_with_one_line(tmp_path, caplog, damage):
    folder = kept(tmp_path, kernel=b"code", graph=b"graph")
    DAMAGE[damage](folder)
    with ArtifactCache(tmp_path, CPU).used():
        assert not (folder / "kernel").exists() and not (folder / "graph").exists()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "are discarded: " in caplog.text


def test_artifacts_of_another_torch_are_discarded_with_one_line_when_nobody_uses_them(tmp_path, caplog):
    old, other = tmp_path / "torch1.0-py3.9-cpu-x86_64", tmp_path / "torch2.0-py3.9-cuda-another"
    for folder in (old, other, tmp_path / "something else"):
        folder.mkdir()
        os.utime(folder, (0, 0))
    ArtifactCache(tmp_path, CPU)  # opens nothing before it is used
    os.utime(other)
    cache = ArtifactCache(tmp_path, CPU)
    with cache.used():
        assert {path.name for path in tmp_path.iterdir()} == {"something else", other.name, cache.folder.name}
    assert caplog.text.count("discarded") == 1 and "torch1.0" in caplog.text


def test_what_was_not_used_for_longest_makes_room(tmp_path):
    cache = ArtifactCache(tmp_path, CPU, max_bytes=20)
    with cache.used():
        for age, name in enumerate(("new", "middle", "old")):
            (cache.folder / name).write_bytes(b"x" * 10)
            os.utime(cache.folder / name, times=(1e9 - age, 1e9 - age))
    cache.settle()
    assert {path.name for path in cache.folder.iterdir()} == {"new", "middle", MANIFEST}
    assert cache.num_bytes == 20


def test_discarding_is_worth_a_second_try_only_once(tmp_path):
    cache = ArtifactCache(tmp_path, CPU)
    kept(tmp_path, kernel=b"code")
    assert cache.discard("it failed")
    kept(tmp_path, kernel=b"code")
    assert not cache.discard("it failed again")
