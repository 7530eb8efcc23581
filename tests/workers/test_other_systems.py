"""Systems that have no ranks: the pack is imported there all the same, and a group says what it needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from para_core.workers import GroupConfig, WorkerGroup, attach, launch

ROOT = Path(__file__).absolute().parents[2]
FILES = sorted(file for folder in ("nodes", "para_core") for file in (ROOT / folder).rglob("*.py"))
# Of the standard library, by its documentation: "Availability: Unix".
MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
WITHOUT = """
import importlib, mmap, os, pkgutil, re, select, signal, socket, sys
import torch, torch.distributed
import torch.distributed.device_mesh, torch.distributed._functional_collectives
lacking = {
    os: r"fork|getuid|getpgrp|killpg|memfd_create|MFD_|waitid|W[A-Z]+$|P_|pread|O_NOFOLLOW|O_NONBLOCK|O_CLOEXEC|CLD_",
    socket: r"AF_UNIX|send_fds|recv_fds|CMSG_|MSG_CMSG_|SCM_|SO_REUSEPORT|socketpair",
    signal: r"SIGKILL|SIGUSR|SIGHUP|SIGCHLD|SIGALRM|SIGSTOP|SIGCONT|pthread_|alarm|setitimer",
    select: r"poll|POLL|epoll|EPOLL|kqueue",
    mmap: r"MAP_|PROT_|MADV_",
}
for module, names in lacking.items():
    for name in [name for name in vars(module) if re.match(names, name)]:
        delattr(module, name)
sys.modules |= dict.fromkeys(MODULES)
import para_core
for found in pkgutil.iter_modules(para_core.__path__):
    if found.name != "adapters":
        importlib.import_module(f"para_core.{found.name}")
from para_core.workers import GroupConfig, WorkerGroup
sys.platform = "win32"
try:
    WorkerGroup.start(GroupConfig(("cpu", "cpu"), "package.module:Service"))
except ValueError as error:
    sys.stdout.write(str(error))
"""


def test_pack_is_imported_where_posix_is_lacking():
    script = f"MODULES = {sorted(MODULES)}\n{WITHOUT}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cannot run on win32" in done.stdout


def test_no_file_imports_a_module_of_posix_with_itself():
    """Adapters and nodes need a host to be imported, and this one is no Windows."""
    found = {file.name: imported_with(ast.parse(file.read_text(encoding="utf-8"))) & MODULES for file in FILES}
    assert not {name: modules for name, modules in found.items() if modules}


def imported_with(node: ast.AST) -> set[str]:
    found = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found |= {name.name.partition(".")[0] for name in child.names}
        elif isinstance(child, ast.ImportFrom) and not child.level:
            found.add(child.module.partition(".")[0])
        elif not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found |= imported_with(child)
    return found


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_group_is_refused_elsewhere_than_on_linux_before_anything_starts(monkeypatch, system, tmp_path):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *given, **named: pytest.fail("a process was started"))
    monkeypatch.setattr(launch.GroupDirectory, "create", lambda config: pytest.fail("a folder was made"))
    wanted = rf"cannot run on {system}.*Linux.*one device"
    with pytest.raises(ValueError, match=wanted):
        WorkerGroup.start(GroupConfig(("cpu", "cpu"), "package.module:Service"))
    with pytest.raises(ValueError, match=wanted):
        attach(tmp_path / "group.sock")
