"""Compiled loops: built once, kept on disk, checked when they are loaded; without a compiler the eager engine runs."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from unrolled.engine.native import build

PROGRAM = """
import warnings
import torch
import unrolled as ur

torch.manual_seed(0)
cell = ur.RNNCell(3, 5).double()
rnn = ur.unroll(cell)
x = torch.randn(6, 2, 3, dtype=torch.float64)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    outputs, state = rnn(x)
right = ur.unroll(cell, engine="reference")(x)[0]
assert torch.allclose(outputs, right, rtol=0, atol=1e-12), "wrong numbers"
decision = rnn._plans.look_up(cell, x, cell.initial_state(2, dtype=torch.float64), None)
print("engine:", decision.engine, "why:", decision.why.replace(chr(10), " "))
print("warned:", *[str(w.message) for w in caught])
"""


def _environment(cache: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "UNROLLED_CACHE": str(cache), "OMP_NUM_THREADS": "1", **more}


def ran(cache: Path, program: str = PROGRAM, **more: str) -> str:
    """What a fresh process says that runs a program with this cache."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=_environment(cache, **more),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def full_cache(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache") / "unrolled"
    assert "engine: native" in ran(cache)
    return cache


@pytest.fixture
def cache(full_cache, tmp_path):
    copied = tmp_path / "unrolled"
    copied.mkdir(mode=0o700)
    for path in full_cache.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    return copied


def test_a_library_is_built_once_in_a_directory_of_the_users_own(full_cache):
    before = {path: path.stat().st_ino for path in full_cache.iterdir()}
    assert any(path.suffix == ".so" for path in before)
    assert stat.S_IMODE(full_cache.stat().st_mode) == 0o700
    assert "engine: native" in ran(full_cache)
    assert {path: path.stat().st_ino for path in full_cache.iterdir()} == before


def test_all_loops_of_a_plan_are_one_library(tmp_path):
    assert "engine: native" in ran(tmp_path)
    assert len(list(tmp_path.glob("*.so"))) == 2  # the other one has the kernel for products


def test_loops_are_prepared_together_whatever_their_numbers_and_those_that_are_not_emitted_are_named(tmp_path):
    said = ran(
        tmp_path,
        """
import torch
import unrolled as ur
from unrolled.engine import native
from unrolled.plan.plan import plan_step

loops = []
for dtype in (torch.float32, torch.float64, torch.bfloat16):
    cell = ur.RNNCell(3, 5).to(dtype)
    plan = plan_step(cell, torch.randn(2, 3, dtype=dtype), torch.randn(2, 5, dtype=dtype), None, 2, (True,))
    loops += plan.loops.values()
refused = native.prepare(loops)
print(refused == {loops[2]: "values of torch.bfloat16"}, native.prepare(loops) == refused)
""",
    )
    assert said == "True True\n"
    assert len(list(tmp_path.glob("*.so"))) == 4  # two dtypes, loops and products


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "emptied": lambda path: path.write_bytes(b""),
    "tampered with": lambda path: path.write_bytes(
        path.read_bytes().replace(b"ur_loop", b"ur_l00p").replace(b"answer", b"ansver")
    ),
    "removed": lambda path: path.unlink(),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "unreadable": lambda path: path.write_text("nothing"),
}


def answer(cache: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """What a small library says that is built, or found, in a cache."""
    monkeypatch.setattr(build, "cache_directory", lambda: cache)
    return build.library("int answer(void) { return 42; }").answer()


@pytest.mark.parametrize("suffix", [".so", ".sha256"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_rebuilt(damage, suffix, tmp_path, monkeypatch):
    # Each library is loaded from a directory of its own: the loader never opens the same name twice.
    made, copied = tmp_path / "made", tmp_path / "copied"
    made.mkdir()
    assert answer(made, monkeypatch) == 42
    shutil.copytree(made, copied)
    (entry,) = copied.glob(f"*{suffix}")
    DAMAGE[damage](entry)
    assert answer(copied, monkeypatch) == 42
    (built,), (mark,) = copied.glob("*.so"), copied.glob("*.sha256")
    assert mark.read_text() == hashlib.sha256(built.read_bytes()).hexdigest()


@pytest.mark.parametrize("damage", ["truncated", "tampered with"])
def test_a_process_that_finds_a_damaged_entry_has_the_right_numbers(damage, cache):
    for path in list(cache.glob("*.so")):
        DAMAGE[damage](path)
    assert "engine: native" in ran(cache)


def test_a_cache_that_others_may_write_to_is_not_used_and_this_is_said(cache):
    cache.chmod(0o777)
    said = ran(cache)
    assert "engine: native" in said
    assert "not kept between runs" in said


def test_a_cache_that_cannot_be_written_is_worked_around_and_this_is_said(tmp_path):
    file = tmp_path / "file"
    file.write_text("no directory")
    said = ran(file / "unrolled")
    assert "engine: native" in said
    assert "not kept between runs" in said


def test_the_cache_follows_xdg_cache_home(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("UNROLLED_CACHE", None)
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, check=True, capture_output=True)
    assert list((tmp_path / "unrolled").glob("*.so"))


def test_without_a_compiler_the_eager_engine_runs_and_the_decision_says_so(tmp_path):
    said = ran(tmp_path / "unrolled", CC="/nonexistent", PATH="")
    assert "engine: eager" in said
    assert "compiler" in said
    assert said.partition("warned:")[2].count("slower: there is no C compiler") == 1


def test_without_a_compiler_it_is_said_once_however_many_networks_there_are(tmp_path):
    program = PROGRAM.replace(
        "    outputs, state = rnn(x)", "    ur.unroll(ur.GRUCell(3, 5).double())(x)\n    outputs, state = rnn(x)"
    )
    assert ran(tmp_path / "unrolled", program, CC="/nonexistent", PATH="").count("slower: there is no C compiler") == 1


def _fake_compiler(folder: Path, script: str) -> str:
    path = folder / "fakecc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


COMPILERS = {
    "fails": "echo broken >&2; exit 1",
    "makes nothing": "exit 0",
    "makes no library": 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo nonsense > "$2"; shift; done; exit 0',
    "fails on real code": 'case "$*" in *loop.so*) echo too hard >&2; exit 1;; esac; exec gcc "$@"',
}


@pytest.mark.parametrize("fault", COMPILERS)
def test_a_compiler_that_fails_is_shown_and_the_eager_engine_runs(fault, tmp_path):
    said = ran(tmp_path / "unrolled", CC=_fake_compiler(tmp_path, COMPILERS[fault]))
    assert "engine: eager" in said
    assert "fakecc" in said


def test_two_processes_may_build_the_same_at_once(tmp_path):
    cache = tmp_path / "unrolled"
    running = [
        subprocess.Popen([sys.executable, "-c", PROGRAM], env=_environment(cache), stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert all("engine: native" in words for words in said)
    assert "engine: native" in ran(cache)


def test_entries_that_another_process_forgets_meanwhile_do_no_harm(tmp_path, monkeypatch):
    (tmp_path / "dangling.so").symlink_to(tmp_path / "gone")
    build._forget_oldest(tmp_path)


def test_the_cache_is_bounded_in_size(tmp_path, monkeypatch):
    for n in range(build._MOST_FILES + 5):
        (tmp_path / f"{n}.so").touch()
        (tmp_path / f"{n}.sha256").touch()
    build._forget_oldest(tmp_path)
    assert len(list(tmp_path.glob("*.so"))) == len(list(tmp_path.glob("*.sha256"))) == build._MOST_FILES


def test_a_fork_after_use_can_use_it_too(full_cache):
    said = ran(
        full_cache,
        PROGRAM
        + """
import os
torch.set_num_threads(2)
wide = ur.unroll(ur.LSTMCell(64, 64))
data = torch.randn(100, 16, 64)
wide(data)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as torch's own worker processes do: its thread pool does not survive a fork
    ok = torch.equal(rnn(x)[0], outputs) and bool(wide(data)[0].isfinite().all())
    os._exit(0 if ok else 3)
_, status = os.waitpid(child, 0)
print("child:", os.waitstatus_to_exitcode(status))
""",
    )
    assert "child: 0" in said


def test_sizes_are_checked_before_a_pointer_leaves_python(full_cache):
    said = ran(
        full_cache,
        """
import torch
import unrolled as ur
from unrolled.execution.protocol import LoopInputs
from unrolled.engine import native
from unrolled.lengths import Extent
from unrolled.plan.plan import plan_step

cell = ur.GRUCell(3, 5)
x, h = torch.randn(2, 3), torch.randn(2, 5)
plan = plan_step(cell, x, h, None, 2, (True,))
(loop,) = plan.loops.values()
values = loop.program.values
sequences = [torch.zeros(4, *values[v].sizes(2)) for v in loop.sequences]
fixed = [torch.zeros(values[v].sizes(2)) for v in loop.fixed]
states = [torch.zeros(values[v].sizes(2)) for v in loop.states]
run = lambda s, f, h, T=4, B=2: native.run_compiled(loop, LoopInputs(s, f, h, Extent(T, B), False))
native.prepare([loop])
run(sequences, fixed, states)
wrong = [
    lambda: run([s[:3] for s in sequences], fixed, states),
    lambda: run(sequences, fixed, states, T=5),
    lambda: run(sequences, fixed, states, B=3),
    lambda: run([s[:, :1] for s in sequences], fixed, states),
    lambda: run([s.double() for s in sequences], fixed, states),
    lambda: run(sequences, [f[..., :1] for f in fixed], states),
    lambda: run(sequences, fixed, [h[:1] for h in states]),
    lambda: run(sequences, fixed[:-1], states),
]
for number, call in enumerate(wrong):
    try:
        call()
    except ValueError:
        print("refused", number)
""",
    )
    assert [line for line in said.splitlines() if line.startswith("refused")] == [f"refused {n}" for n in range(8)]
