"""`flashtune doctor --campaign`: what this machine lacks for a campaign, before any of its time is spent.

Imports nothing that needs more than the standard library, because what it looks for may be missing; asks torch and Triton in
processes of their own. Reads only, but for one small kernel on the device and one small file. Refuses to install anything.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from harness import sanitizer
from harness.errors import WorkspaceError
from harness.workspace import environment, find_workspace, triton_cache

Severity = Literal["fine", "warning", "missing"]

# Import names by distribution, with the oldest version that will do, as pyproject.toml has them.
PACKAGES: Mapping[str, tuple[str, str]] = {
    "torch": ("torch", "2.6"), "triton": ("triton", "3.6"), "numpy": ("numpy", "1.26"), "pydantic": ("pydantic", "2.7"),
    "optuna": ("optuna", "4.5"), "pebble": ("pebble", "5.0.7"), "hypothesis": ("hypothesis", "6.100"),
    "pyelftools": ("elftools", "0.31"), "rich": ("rich", "13.7"),
}  # fmt: skip
# Names of distributions whose files say another one.
_ALIASES = {"pebble": "Pebble"}

_CACHE_BYTES = 8 << 30
_OUT_BYTES = 256 << 20
_CHILD_BYTES = 2 << 30
_IMPORT_S, _DEVICE_S, _SANITIZER_S = 120.0, 180.0, 120.0
_EXIT_MISSING = 3
_WIDTH = 100

# Found is not enough: what a package needs may be missing, and a binary may be of another Python.
_IMPORT_PROGRAM = """
import importlib, json
broken = {}
for name in %r:
    try:
        importlib.import_module(name)
    except BaseException as error:
        broken[name] = "%%s: %%s" %% (type(error).__name__, error)
print(json.dumps(broken))
"""

# What a campaign does first of all on a device, in small: compile a kernel with Triton, launch it, and capture it in a graph.
_DEVICE_PROGRAM = """
import json, sys
import torch
if not torch.cuda.is_available():
    print(json.dumps({"why": "torch %s sees no GPU" % torch.__version__})); sys.exit(0)
import triton, triton.language as tl
@triton.jit
def add(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + i, tl.load(x + i, mask=i < n) + 1, mask=i < n)
x = torch.zeros(1000, device="cuda")
add[(8,)](x, 1000, BLOCK=128)
stream = torch.cuda.Stream(); graph = torch.cuda.CUDAGraph()
torch.cuda.synchronize()
with torch.cuda.graph(graph, stream=stream):
    add[(8,)](x, 1000, BLOCK=128)
graph.replay(); torch.cuda.synchronize()
free, total = torch.cuda.mem_get_info()
right = bool((x == 2).all())
print(json.dumps({"name": torch.cuda.get_device_name(), "free": free, "total": total,
                  "why": "" if right else "a small kernel in a graph gave a wrong answer"}))
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Something that a campaign needs, or is better with: what there is, whether that will do, and what to do about it."""

    # This is written without pydantic, which may be missing; its schema is made where pydantic is there.
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    name: str
    found: str
    severity: Severity
    hint: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """What `flashtune doctor --campaign --json` prints. `ready` says that nothing is missing; `bring` are the commands that bring
    missing packages to a machine without a network, the last of them to be run there."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    ready: bool
    needs: tuple[Need, ...]
    bring: tuple[str, ...] = ()


def run_doctor(options: argparse.Namespace) -> int:
    """Print what there is; exit 3 where something is missing."""
    out = Path(options.out) if options.out else Path.cwd()
    needs = tuple(needs_of(out, options.workspace))
    missing = {need.name for need in needs if need.severity == "missing"}
    found = Readiness(ready=not missing, needs=needs, bring=wheels_for([name for name in PACKAGES if name in missing]))
    said = json.dumps(asdict(found), indent=1) if options.json else "\n".join(lines_of(found))
    sys.stdout.write(said + "\n")
    return 0 if found.ready else _EXIT_MISSING


def lines_of(found: Readiness) -> list[str]:
    """A line for each need, what is missing last."""
    order = ("fine", "warning", "missing")
    lines = []
    for need in sorted(found.needs, key=lambda need: order.index(need.severity)):
        mark = {"fine": " ", "warning": "!", "missing": "X"}[need.severity]
        lines += _wrapped(f"{mark} {need.name:<18}", need.found)
        if need.hint and need.severity != "fine":
            lines += _wrapped(f"{'':<20}hint: ", need.hint)
    lacking = sum(need.severity == "missing" for need in found.needs)
    if found.bring:
        lines += ["", "Without a network: where there is one, make a folder of wheels, carry it here, install from it:"]
        lines += [f"  {command}" for command in found.bring]
    return [*lines, "", f"Can a campaign start here?  {'yes' if found.ready else f'no: {lacking} missing'}"]


def wheels_for(names: Sequence[str]) -> tuple[str, ...]:
    """The commands that carry packages, with all that they need, to this machine's Python; none for no names.

    torch and Triton belong to the machine's driver, and are not among them."""
    wanted = " ".join(name for name in names if name not in ("torch", "triton"))
    if not wanted:
        return ()
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    machine = platform.machine()
    return (
        f"pip download -d wheels --only-binary=:all: --python-version {python} \\",
        f"  --platform manylinux2014_{machine} --platform manylinux_2_28_{machine} {wanted}",
        f"python3 -m pip install --no-index --find-links wheels {wanted}",
    )


def _wrapped(first: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip


def needs_of(
    out: Path,
    workspace: str | None,
    *,
    ask: Callable[[str, float], tuple[str, str]] | None = None,
    refuses: Callable[[float], str] = sanitizer.refuses,
) -> Iterator[Need]:
    """Everything in turn. `ask` runs a program of Python for so many seconds at most and gives what it printed, and why it
    failed; `refuses` says why the sanitizer does not work."""
    modern = sys.version_info >= (3, 11)
    yield Need(
        name="python", found=sys.version.split()[0], severity="fine" if modern else "missing", hint="3.11 or newer"
    )
    yield from _packages(ask or _ask)
    yield from _interpreter()
    yield _optional("pynvml", "nvidia-ml-py", "without it clocks and throttling cannot be watched")
    yield _compiler()
    yield from _machine()
    yield _disk("cache", triton_cache(), _CACHE_BYTES, "compiled kernels of a whole space are kept there")
    yield _disk("out", out, _OUT_BYTES, "what is found is written there")
    yield _workspace(workspace)
    device = _device(ask or _ask)
    yield device
    yield _sanitizer(refuses, device.severity == "fine")


def _packages(ask: Callable[[str, float], tuple[str, str]]) -> Iterator[Need]:
    there = [module for module, _ in PACKAGES.values() if importlib.util.find_spec(module) is not None]
    # The program for the device imports these two.
    out, why = ask(_IMPORT_PROGRAM % [one for one in there if one not in ("torch", "triton")], _IMPORT_S)
    try:
        broken = dict(json.loads(out.strip().splitlines()[-1]))
    except (ValueError, IndexError):
        broken = {}
        hint = "Python cannot import what is installed here: see what one of them alone says"
        yield Need(name="imports", found=why or "they said nothing", severity="missing", hint=hint)
    for name, (module, oldest) in PACKAGES.items():
        version = version_of(name)
        if module not in there:
            hint = "`make setup`; without a network, carry its wheel (see below)"
            yield Need(name=name, found="not installed", severity="missing", hint=hint)
        elif module in broken:
            hint = "its wheel, or one of a package that it needs, is missing or of another Python"
            yield Need(name=name, found=f"it cannot be imported: {broken[module]}", severity="missing", hint=hint)
        elif version is not None and release(version) < release(oldest):
            hint = f"pip install '{name}>={oldest}'"
            yield Need(name=name, found=f"{version}, which is too old", severity="missing", hint=hint)
        else:
            yield Need(name=name, found=version or "version unknown", severity="fine")


def _interpreter() -> Iterator[Need]:
    triton, numpy = version_of("triton"), version_of("numpy")
    if triton and numpy and release(triton)[:2] == (3, 6) and release(numpy) >= (2, 4):
        found = f"triton {triton} with numpy {numpy}: kernels with loops cannot be interpreted"
        hint = "`flashtune campaign --answers` records its answers where numpy is older; else they are left out"
        yield Need(name="interpreter", found=found, severity="warning", hint=hint)


def _optional(module: str, name: str, why: str) -> Need:
    if importlib.util.find_spec(module) is None:
        return Need(name=name, found="not installed", severity="warning", hint=why)
    return Need(name=name, found=version_of(name) or "version unknown", severity="fine")


def _compiler() -> Need:
    """Triton compiles the launcher of every kernel, with Python's header."""
    compiler = environment("CC") or next(filter(None, map(shutil.which, ("gcc", "clang"))), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if compiler is None:
        return Need(
            name="C compiler", found="none", severity="missing", hint="Triton needs gcc or clang for its launchers"
        )
    if not header.exists():
        return Need(
            name="C compiler", found=f"{compiler}, but no {header}", severity="warning", hint="install python3-dev"
        )
    return Need(name="C compiler", found=compiler, severity="fine")


def _machine() -> Iterator[Need]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    few = cores < 8
    hint = "a space is compiled by all cores at once; with few of them, the GPU waits"
    yield Need(name="cores", found=str(cores), severity="warning" if few else "fine", hint=hint)
    with contextlib.suppress(ValueError, OSError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        short = memory < cores * _CHILD_BYTES
        hint = (
            f"every compiling child may take {_CHILD_BYTES >> 30} GiB: pass `--jobs {max(memory // _CHILD_BYTES, 1)}`"
        )
        yield Need(name="memory", found=f"{memory / 2**30:.0f} GiB", severity="warning" if short else "fine", hint=hint)


def _disk(name: str, folder: Path, least: int, why: str) -> Need:
    there = next((one for one in (folder, *folder.absolute().parents) if one.is_dir()), Path("/"))
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"flashtune")
    except OSError as error:
        return Need(
            name=name, found=f"{there}: {error.strerror}", severity="missing", hint=f"choose another folder: {why}"
        )
    free = shutil.disk_usage(there).free
    found = f"{free / 2**30:.1f} GiB free in {there}"
    if free < least:
        return Need(name=name, found=found, severity="warning", hint=f"{least / 2**30:.1f} GiB are better: {why}")
    return Need(name=name, found=found, severity="fine")


def _workspace(given: str | None) -> Need:
    try:
        return Need(name="workspace", found=str(find_workspace(given).root), severity="fine")
    except WorkspaceError as error:
        return Need(name="workspace", found=error.message, severity="missing", hint=error.hint)


def _device(ask: Callable[[str, float], tuple[str, str]]) -> Need:
    out, why = ask(_DEVICE_PROGRAM, _DEVICE_S)
    try:
        found = json.loads(out.strip().splitlines()[-1])
    except (ValueError, IndexError):
        found = {"why": why or "it said nothing"}
    if found["why"]:
        hint = "a small Triton kernel must compile, launch and run in a CUDA graph before a campaign makes sense"
        return Need(name="GPU", found=found["why"], severity="missing", hint=hint)
    said = f"{found['name']}, {found['free'] / 2**30:.0f} of {found['total'] / 2**30:.0f} GiB free; a kernel runs in a graph"
    return Need(name="GPU", found=said, severity="fine")


def _sanitizer(refuses: Callable[[float], str], device: bool) -> Need:
    tool = sanitizer.find_program()
    if tool is None:
        hint = "memcheck is left out; it comes with the CUDA toolkit"
        return Need(name="compute-sanitizer", found="not installed", severity="warning", hint=hint)
    if not device:
        return Need(name="compute-sanitizer", found=f"{tool}, not tried without a GPU", severity="fine")
    why = refuses(_SANITIZER_S)
    if why:
        hint = "some virtual machines hide what it needs; memcheck is left out"
        return Need(name="compute-sanitizer", found=f"it does not work here: {why}", severity="warning", hint=hint)
    return Need(name="compute-sanitizer", found=f"{tool} works", severity="fine")


def _ask(program: str, seconds: float) -> tuple[str, str]:
    """What a program of Python printed, and why it failed, in a line."""
    # Triton reads a kernel's source from its file.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.py"
        file.write_text(program)
        try:
            done = subprocess.run(
                [sys.executable, str(file)], capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return "", f"no answer within {seconds:.0f} seconds"
        except OSError as error:
            return "", str(error)
    last = (done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or [""])[-1]
    return done.stdout, "" if done.returncode == 0 else last or f"exit code {done.returncode}"


def version_of(name: str) -> str | None:
    """The installed version of a distribution, without importing it."""
    for one in (name, _ALIASES.get(name, name)):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(one)
    return None


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()
