"""Compiled artifacts on disk for the next process: bounded, checked before they are trusted, discarded when stale."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

MAX_BYTES = 2 * 2**30  # of one torch and device
MAX_AGE = 30 * 24 * 3600  # seconds since a process last opened the folder
MANIFEST = "para_manifest.json"
# Torch reads the first whenever it needs the directory, and sets the second for Triton from it.
VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


class ArtifactCache:
    """Torch's own caches (graphs, kernels, shared objects), kept in a folder of `directory` for this torch and device.

    Torch's keys hold what else matters: the graph, its guards and the settings. A manifest holds the checksum of every
    file; where one does not fit, the folder is emptied before torch reads it, because it would execute it.
    """

    def __init__(self, directory: Path, device: torch.device, max_bytes: int = MAX_BYTES) -> None:
        self.directory, self.max_bytes = directory, max_bytes
        self.folder = directory / _name(device)
        self.num_bytes = 0
        self._known: dict[str, tuple[int, int, str]] = {}
        self._opened = self._discarded = False

    @contextmanager
    def used(self) -> Iterator[None]:
        """While code is called that may compile: torch's caches are in the folder."""
        self._open()
        before = {name: os.environ.get(name) for name in VARIABLES}
        os.environ[VARIABLES[0]] = str(self.folder)
        os.environ.pop(VARIABLES[1], None)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def discard(self, why: str) -> bool:
        """Empty the folder with one line in the log; False where that has been done already, or nothing was there."""
        there = bool(self._files())
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._known, self.num_bytes = {}, 0
        first, self._discarded = not self._discarded, True
        if there:
            logger.warning("compiled artifacts in %s are discarded: %s; they are made again", self.folder, why)
        return there and first

    def settle(self) -> None:
        """Enter what was added into the manifest, and remove what was not used for longest beyond `max_bytes`."""
        self.folder.mkdir(parents=True, exist_ok=True)  # another process may have taken it away
        files = self._files()
        total = sum(stat.st_size for stat in files.values())
        for name in sorted(files, key=lambda name: max(files[name].st_atime, files[name].st_mtime)):
            if total <= self.max_bytes:
                break
            total -= files.pop(name).st_size
            (self.folder / name).unlink(missing_ok=True)
        self.num_bytes = total
        self._known = {name: self._entry(name, stat) for name, stat in files.items()}
        temporary = self.folder / f"{MANIFEST}.{os.getpid()}"
        temporary.write_text(json.dumps({name: digest for name, (*_, digest) in self._known.items()}))
        temporary.replace(self.folder / MANIFEST)

    def _open(self) -> None:
        """Check what an earlier process has left, once."""
        if self._opened:
            return
        self._opened = True
        self.folder.mkdir(parents=True, exist_ok=True)
        os.utime(self.folder)
        for other in self.directory.iterdir():
            # Another device's or ComfyUI's may be in use.
            if other.name.startswith(PREFIX) and time.time() - other.stat().st_mtime > MAX_AGE:
                logger.warning("compiled artifacts of %s are discarded: unused for 30 days", other.name)
                shutil.rmtree(other, ignore_errors=True)
        try:
            manifest = dict(json.loads((self.folder / MANIFEST).read_text()))
        except FileNotFoundError:
            manifest = {}
        except (OSError, ValueError, TypeError):
            self.discard("the manifest cannot be read")
            return
        self._check(manifest)

    def _check(self, manifest: dict[str, str]) -> None:
        files = self._files()
        self._known = {name: self._entry(name, stat) for name, stat in files.items()}
        self.num_bytes = sum(stat.st_size for stat in files.values())
        # What is not in the manifest is of a process that was killed, or still runs.
        changed = [name for name, (*_, digest) in self._known.items() if manifest.get(name, digest) != digest]
        if changed:
            self.discard(f"{changed[0]} is not what was written")

    def _entry(self, name: str, stat: os.stat_result) -> tuple[int, int, str]:
        """(size, time of the last change, checksum) of a file; the last is read anew only where the others differ."""
        known = self._known.get(name)
        if known is not None and known[:2] == (stat.st_size, stat.st_mtime_ns):
            return known
        digest = hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
        return stat.st_size, stat.st_mtime_ns, digest

    def _files(self) -> dict[str, os.stat_result]:
        """By path in the folder; files of another process may go while this one looks."""
        found = {}
        for path in self.folder.rglob("*"):
            try:
                if path.is_file() and not path.name.startswith(MANIFEST) and path.suffix != ".lock":
                    found[path.relative_to(self.folder).as_posix()] = path.stat()
            except FileNotFoundError:
                continue
        return found


PREFIX = "torch"


def _name(device: torch.device) -> str:
    """What makes artifacts unusable when it changes and torch does not check before it loads them."""
    python = f"py{sys.version_info.major}.{sys.version_info.minor}"
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return f"{PREFIX}{torch.__version__}-{python}-{device.type}-{processor}".replace(" ", "_").replace("/", "_")
