"""The folder by which the processes of a group find each other."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

import pytest

from para_core.workers import GroupConfig, attach
from para_core.workers.__main__ import key_beside
from para_core.workers.directory import MAX_BASE, GroupDirectory, write_private

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a group of ranks needs Linux")

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


def test_what_is_written_reaches_nothing_that_lies_there(tmp_path):
    others = tmp_path / "others"
    others.write_bytes(b"theirs")
    secret = tmp_path / "key"
    for name in (secret.name, f"{secret.name}.{os.getpid()}"):
        tmp_path.joinpath(name).symlink_to(others)
    write_private(secret, b"ours")
    assert others.read_bytes() == b"theirs" and not secret.is_symlink()
    assert secret.read_bytes() == b"ours" and secret.stat().st_mode & 0o777 == 0o600


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    tmp_path.joinpath("key").mkdir()
    with pytest.raises(IsADirectoryError):
        write_private(tmp_path / "key", b"ours")
    assert [entry.name for entry in tmp_path.iterdir()] == ["key"]


def readable(path):
    path.write_bytes(bytes(32))
    path.chmod(0o640)


def linked(path):
    path.with_name("elsewhere").write_bytes(bytes(32))
    path.with_name("elsewhere").chmod(0o600)
    path.symlink_to("elsewhere")


def pipe(path):
    os.mkfifo(path, 0o600)


def of_another_user(path):
    path.write_bytes(bytes(32))
    path.chmod(0o600)


@pytest.mark.parametrize("planted", [readable, linked, pipe, of_another_user])
@pytest.mark.parametrize("use", [attach, key_beside], ids=["attach", "rank 0"])
def test_key_that_is_not_the_users_alone_is_refused(tmp_path, monkeypatch, planted, use):
    planted(tmp_path / "group.sock.key")
    if planted is of_another_user:
        monkeypatch.setattr(os, "getuid", lambda: os.geteuid() + 1)
    with pytest.raises(ValueError, match=r"group\.sock\.key is not yours alone: .*Delete it, .*--address"):
        use(tmp_path / "group.sock")


def test_folder_goes_also_while_a_dying_process_writes_into_it(monkeypatch):
    def tree_removed(path, *, ignore_errors):
        removed(path, ignore_errors=ignore_errors)
        if not writes:
            writes.append(path)
            path.mkdir()
            path.joinpath("rank0.log").touch()

    directory, removed, writes = GroupDirectory.create(CONFIG), shutil.rmtree, []
    monkeypatch.setattr(shutil, "rmtree", tree_removed)
    directory.remove()
    assert writes and not directory.path.exists()
