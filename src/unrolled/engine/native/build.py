"""Building: C source to a loaded library, by the system's compiler and through a cache on disk."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

import torch

from unrolled.errors import warn_caller

_MOST_FILES = 2048


class BuildError(Exception):
    """No compiler, or one that failed; the message has its command and what it said."""


@functools.cache
def compiler() -> tuple[str, ...]:
    """The system's C compiler with the flags that it takes here.

    Raises:
        BuildError: if there is none.
    """
    found = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if found is None:
        raise BuildError("there is no C compiler (cc, gcc or clang)")
    # -O3 gives nothing more: it unrolls short loops inside of others, and takes ten times as long.
    optimised = ("-O2", "-ftree-vectorize", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast")
    flags = (*optimised, "-std=gnu11", "-fPIC", "-shared")
    more = tuple(os.environ.get("UNROLLED_CFLAGS", "").split())  # `make sanitize` asks for checks this way
    simd = ("-fopenmp-simd", "-fvect-cost-model=dynamic")
    for tried in (("-march=native", *simd), simd, ()):
        command = (found, *flags, *tried, *more)
        probe = subprocess.run(
            [*command, "-x", "c", "-", "-o", os.devnull], input=b"int x;", capture_output=True, check=False
        )
        if probe.returncode == 0:
            return command
    raise BuildError(f"{' '.join(command)} cannot compile an empty file: {probe.stderr.decode(errors='replace')}")


@functools.cache
def machine() -> str:
    """What compiled code depends on other than its source: compiler, flags, processor."""
    command = compiler()
    version = subprocess.run([command[0], "--version"], capture_output=True, check=False).stdout
    # The macros that it defines say what -march=native means here.
    macros = subprocess.run([*command, "-dM", "-E", "-x", "c", os.devnull], capture_output=True, check=False).stdout
    return hashlib.sha256(
        b"\0".join([version, macros, " ".join(command).encode(), platform.machine().encode()])
    ).hexdigest()


# The vector width and the block of rows for this processor, as the compiler knows it.
_PROCESSOR = """
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define ROW_BLOCK 12
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define ROW_BLOCK 6
#else
#define VECTOR_BYTES 16
#define ROW_BLOCK 4
#endif
"""


def c_text(real: torch.dtype, *files: str) -> str:
    """C files of this package one after the other, for numbers of one dtype on this processor."""
    folder = resources.files("unrolled.engine.native")
    texts = [folder.joinpath(file).read_text(encoding="utf-8") for file in files]
    return "".join([_PROCESSOR, f"#define REAL_IS_FLOAT {int(real == torch.float32)}\n", *texts])


def library(source: str) -> ctypes.CDLL:
    """Load a library built from this source, building it if it is not in the cache.

    Raises:
        BuildError: if the compiler fails.
    """
    key = hashlib.sha256(f"{machine()}\0{source}".encode()).hexdigest()[:40]
    if not _unwritable:
        try:
            return _LibraryFile(cache_directory(), key).load(source)
        except OSError as error:
            _unwritable.append(error)
            warn_caller(f"compiled loops are not kept between runs: {error}")
    try:
        return _LibraryFile(_of_this_process(), key).load(source)
    except OSError as error:
        raise BuildError(f"{' '.join(compiler())} made no library: {error}") from error


# Why the cache cannot be written to, once it was found that it cannot: this process then builds elsewhere.
_unwritable: list[OSError] = []


class _LibraryFile:
    """A library in a folder, and next to it the digest by which a damaged one is known."""

    def __init__(self, folder: Path, key: str) -> None:
        self.path, self.digest = folder / f"{key}.so", folder / f"{key}.sha256"

    def load(self, source: str) -> ctypes.CDLL:
        """The library, built now if it is not there.

        Raises:
            BuildError: if the compiler fails, or makes what cannot be loaded.
            OSError: if nothing can be written there.
        """
        for _ in range(2):  # another process may forget a file between the look and the load
            if not self._intact():
                self._build(source)
                with contextlib.suppress(FileNotFoundError):  # another process forgets too
                    _forget_oldest(self.path.parent)
            try:
                os.utime(self.path)  # used last, forgotten last
                return ctypes.CDLL(str(self.path))
            except OSError as error:
                failure = error
                _remove(self.digest)
        raise BuildError(f"{' '.join(compiler())} made a library that cannot be loaded: {failure}")

    def _intact(self) -> bool:
        try:
            return self.digest.read_text() == hashlib.sha256(self.path.read_bytes()).hexdigest()
        except OSError:
            return False

    def _build(self, source: str) -> None:
        """Compile into files of our own and move them into place: another process may do the same at the same time."""
        with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
            made = Path(folder, "loop.so")
            command = [*compiler(), "-x", "c", "-", "-o", str(made), "-lm", "-lpthread"]
            run = subprocess.run(command, input=source.encode(), capture_output=True, check=False)
            if run.returncode and os.strerror(errno.ENOSPC).encode() in run.stderr:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path.parent))
            if run.returncode:
                raise BuildError(f"{' '.join(command)} failed: {run.stderr.decode(errors='replace')[:2000]}")
            digest = Path(folder, "digest")
            digest.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
            for path in (self.path, self.digest):
                if path.is_dir():
                    _remove(path)
            made.replace(self.path)
            digest.replace(self.digest)


@functools.cache
def cache_directory() -> Path:
    """A directory that is the user's own and that only they can write to; a temporary one if there is none."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(os.environ.get("UNROLLED_CACHE") or base / "unrolled")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.stat()
        if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise PermissionError(f"others may write to {path}")
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        warn_caller(f"compiled loops are not kept between runs: {error}")
        return _of_this_process()


@functools.cache
def _of_this_process() -> Path:
    return Path(tempfile.mkdtemp(prefix="unrolled-"))


def _forget_oldest(folder: Path) -> None:
    with os.scandir(folder) as entries:
        found = [
            (entry.stat(follow_symlinks=False).st_mtime, Path(entry.path))
            for entry in entries
            if entry.name.endswith(".so")
        ]
    for _, path in sorted(found)[:-_MOST_FILES]:
        path.unlink(missing_ok=True)
        path.with_suffix(".sha256").unlink(missing_ok=True)


def _remove(path: Path) -> None:
    """Remove what stands where an entry should, be it a file or a directory."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
