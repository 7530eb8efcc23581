"""The folder by which the processes of a group find each other."""

import tempfile

import pytest

from para_core.workers import GroupConfig
from para_core.workers.directory import MAX_BASE, GroupDirectory

CONFIG = GroupConfig(("cpu",), "package.module:Service")


def test_sockets_fit_where_the_temporary_folder_has_a_long_name(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 100)))
    directory = GroupDirectory.create(CONFIG)
    try:
        assert len(str(directory.path)) < MAX_BASE + 40 and directory.config() == CONFIG
    finally:
        directory.remove()


def test_without_any_short_one_it_says_what_to_do(monkeypatch, tmp_path):
    from para_core.workers import directory

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 100)))
    monkeypatch.setattr(directory, "MAX_BASE", 2)
    with pytest.raises(ValueError, match=r"^the temporary folder .* \d+ bytes; .*Set TMPDIR to a shorter"):
        GroupDirectory.create(CONFIG)
