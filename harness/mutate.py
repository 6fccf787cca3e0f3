"""Mutants: what the proof is worth, measured by bugs that were planted on purpose.

A mutant is data beside its kernel (`kernels/STEM.mutants.toml`): one piece of source text replaced by another. Each is planted
in a copy of the kernels' folder and shown to judges, in processes that may crash or hang (`harness.mutate_child`). Refuses
to change a kernel where it lies, to guess where a piece of text has gone, and to decide what is wrong: judges do.
"""

import ast
import functools
import json
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from harness.cases import Case
from harness.errors import BugError, UsageError, did_you_mean
from harness.problem import Pass
from harness.worker import child_environment, describe_exit

# What goes wrong in attention kernels, with a published instance each, where there is one.
CLASSES: Mapping[str, str] = {
    "accumulates into what was there": "triton #54, #3004",
    "backward tile sides mixed up": "intel-xpu-backend-for-triton #7317",
    "causal loop split": "triton #8853",
    "changed scores": "flash-attention #2402, pytorch #145208",
    "code paths disagree": "flash-attention #2595",
    "dO read with other strides": "flash-attention #355, xformers #282",
    "gradient formula": "",
    "dropout": "flash-attention #2088, pytorch #197563",
    "grouped heads": "flash-attention #2301, vLLM #18100",
    "head dim padding": "flash-attention #2552, triton #621",
    "length no multiple of the block": "triton #4310, pytorch #136550",
    "log-sum-exp": "flash-attention #978, flashinfer #2113",
    "mask beyond the band": "sglang #39593",
    "online softmax": "",
    "out-of-bounds access": "triton #10573, sglang #39593",
    "packed sequences": "flash-attention #443, #2421",
    "paged keys": "vLLM's flash-attention #42, onnxruntime #32391",
    "precision": "",
    "preprocess and stale padding": "flash-attention #2337, #2194",
    "preprocess not waited for": "flash-attention #2756",
    "remembered across calls": "flash-attention #2143, #2507",
    "rows without keys": "pytorch #109517, flashinfer #4401",
    "scale": "aotriton #54, segment-anything-fast #71",
    "sinks and the gradient of the log-sum-exp": "",
    "split keys": "flash-attention #2550, sglang #2465",
    "store": "",
    "strides ignored": "pytorch #146377, flash-attention #2189",
    "window and unequal lengths": "flash-attention #895, transformers #39408",
    "zero and very different lengths": "flash-attention #443, #2470",
    "32-bit offsets": "flash-attention #2260, xformers #1462",
}

# The judge that is all judges, as the fuzzer draws them for a case.
SUITE = "suite"

# A case takes seconds in the interpreter at most; a process that says nothing for longer hangs.
HANG_S = 60.0

How = Literal["", "alarm", "crash", "timeout"]
_VALUE = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Mutant:
    """A planted bug of the kernel file `kernel`: in `file`, `anchor` becomes `replacement`, all `count` times that it occurs.

    `class_` is one of `CLASSES`; `passes` are those whose results the text can change; `needs` says what a problem or a run must
    have to be affected; `variants` are in `Problem.variants` or `.beyond`, one of which it has; `equivalent` argues: nothing is.
    """

    name: str
    kernel: str
    class_: str
    file: str
    anchor: str
    replacement: str
    why: str
    passes: tuple[Pass, ...]
    needs: tuple[str, ...] = ()
    variants: tuple[str, ...] = ()
    count: int = 1
    equivalent: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Trial:
    """What one judge said of one mutant (or of the kernel as it is).

    `how` it was killed ("" if not), after how many `cases`, the last included; of those that were `asked`, and not left out
    because they cannot be affected, the ones count that the judge had something to say about.
    `alarms` counts the cases it objected to, which is more than one only if it was not stopped at the first. `by` names the
    judges that objected, which are several where the judge is the whole suite.
    """

    judge: str
    how: How
    cases: int
    alarms: int
    seconds: float
    asked: int = 0
    detail: str = ""
    by: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class MutantResult:
    """What all judges said of one mutant."""

    name: str
    kernel: str
    equivalent: bool
    trials: tuple[Trial, ...]
    seconds: float

    @property
    def killed_by(self) -> tuple[str, ...]:
        """The judges that raised an alarm, and "crash" or "timeout" where the kernel ended the process of one."""
        killers = (name for trial in self.trials if trial.how for name in (trial.by or (trial.how,)))
        return tuple(dict.fromkeys(killers))

    @property
    def cases(self) -> int | None:
        """Cases to the kill by the quickest judge; None for a survivor."""
        return min((trial.cases for trial in self.trials if trial.how), default=None)


@dataclass(frozen=True, slots=True, kw_only=True, config=_VALUE)
class Task:
    """For a child: ask `judge` about `cases` of the kernel `stem` of `package` in `folder`; stop at the first alarm or not.

    The judge `SUITE` is what the fuzzer asks about each case; where it stops, the rest of the case's judges are asked too.
    """

    folder: Path
    package: str
    stem: str
    judge: str
    cases: tuple[Case, ...]
    hang_s: float
    stop: bool


TASKS: TypeAdapter[Task] = TypeAdapter(Task)
TRIALS: TypeAdapter[Trial] = TypeAdapter(Trial)


def mutants_file(folder: Path, stem: str) -> Path:
    """Where the mutants of `folder/STEM.py` are kept."""
    return folder / f"{stem}.mutants.toml"


def load_mutants(folder: Path, stem: str) -> tuple[Mutant, ...]:
    """The mutants of `folder/STEM.py`, in the order of their file. Raises `UsageError` that names the entry and the mistake."""
    path = mutants_file(folder, stem)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"the kernel `{stem}` has no mutants: cannot read {path} ({error.strerror})") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    entries = table.get("mutant")
    if not isinstance(entries, list) or not entries or len(table) != 1:
        raise UsageError(f"{path} must hold `[[mutant]]` entries and nothing else, found {sorted(table)}")
    mutants = tuple(_mutant(path, stem, position, entry) for position, entry in enumerate(entries, start=1))
    names = [mutant.name for mutant in mutants]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{path} has two mutants named `{twice}`")
    return mutants


def _mutant(path: Path, stem: str, position: int, entry: dict[str, Any]) -> Mutant:
    where = f"{path}, entry {position} (`{entry.get('name', 'without a name')}`)"
    values = {"class_" if name == "class" else name: value for name, value in entry.items()}
    try:
        mutant = Mutant(kernel=stem, **values)
    except (TypeError, ValidationError) as error:
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            raise UsageError(f"{where}: {first['msg']} at `{'.'.join(map(str, first['loc']))}`") from error
        raise UsageError(f"{where}: {error}") from error
    if mutant.class_ not in CLASSES:
        raise UsageError(
            f"{where}: there is no class `{mutant.class_}`", hint=did_you_mean(mutant.class_, list(CLASSES))
        )
    if Path(mutant.file).name != mutant.file or not (path.parent / mutant.file).is_file():
        raise UsageError(f"{where}: there is no file `{mutant.file}` in {path.parent}")
    if not mutant.anchor.strip() or mutant.anchor == mutant.replacement or mutant.count < 1:
        raise UsageError(f"{where}: needs an anchor, another replacement, and a count of at least 1")
    if not mutant.why.strip() or not mutant.passes:
        raise UsageError(f"{where}: needs a reason and a pass")
    return mutant


@functools.lru_cache(maxsize=8)
def _parsed(source: str) -> ast.AST:
    return ast.parse(source)


def planted(mutant: Mutant, kernels: Path) -> str:
    """The text of the mutant's file with the bug in it.

    Raises `UsageError` if the anchor does not occur `count` times, if the result is not Python, or is the same Python.
    """
    source = (kernels / mutant.file).read_text(encoding="utf-8")
    changed = source.replace(mutant.anchor, mutant.replacement)
    found = source.count(mutant.anchor)
    who = f"mutant `{mutant.name}` of `{mutant.kernel}`"
    if found != mutant.count:
        raise UsageError(
            f"{who}: its anchor occurs {found} times in {kernels / mutant.file}, not {mutant.count}:\n{mutant.anchor}",
            hint=f"the kernel has changed; adapt the entry in {mutants_file(kernels, mutant.kernel).name}",
        )
    try:
        tree = ast.parse(changed)
    except SyntaxError as error:
        raise UsageError(
            f"{who}: line {error.lineno} of the changed {mutant.file} is not Python: {error.msg}"
        ) from error
    if ast.dump(tree) == ast.dump(_parsed(source)):
        raise UsageError(f"{who} changes the text of {mutant.file}, but not the program")
    return changed


def plant(mutant: Mutant, kernels: Path, scratch: Path) -> str:
    """Copy the folder `kernels` into `scratch` with the bug planted; the name of the copy, a package importable from there.

    Raises `UsageError` as `planted` does.
    """
    changed = planted(mutant, kernels)
    package = _copy(f"{mutant.kernel}_{mutant.name}", kernels, scratch)
    (scratch / package / mutant.file).write_text(changed, encoding="utf-8")
    return package


def _copy(name: str, kernels: Path, scratch: Path) -> str:
    package = "mutant_" + "".join(letter if letter.isalnum() else "_" for letter in name)
    shutil.copytree(kernels, scratch / package, ignore=shutil.ignore_patterns("__pycache__", "*.toml"))
    return package


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------

# Cases by the name of the judge that is asked about them, a key of `harness.mutate_judges.EVERY`.
Asked = Mapping[str, Sequence[Case]]


def measure(
    mutants: Sequence[Mutant],
    kernels: Path,
    asked: Mapping[str, Asked],
    *,
    jobs: int = 2,
    hang_s: float = HANG_S,
    seen: Callable[[MutantResult], None] = lambda result: None,
) -> tuple[MutantResult, ...]:
    """Show every mutant to every judge until its first alarm; `asked` is by kernel, then by judge.

    A crash or a hang of a kernel is a kill, by "crash" or "timeout". Results are in the order of `mutants`; `seen` is told each
    as it comes, from any thread. Raises `UsageError` for a mutant that cannot be planted.
    """
    with tempfile.TemporaryDirectory(prefix="flashtune-mutants-") as folder:
        scratch = Path(folder)
        packages = [plant(mutant, kernels, scratch) for mutant in mutants]
        with _Children(scratch, hang_s) as children, ThreadPoolExecutor(jobs) as pool:

            def one(mutant: Mutant, package: str) -> MutantResult:
                result = _measure_one(children, mutant, package, asked[mutant.kernel])
                seen(result)
                return result

            return tuple(pool.map(one, mutants, packages))


def measure_kill(mutant: Mutant, kernels: Path, asked: Asked, *, hang_s: float = HANG_S) -> MutantResult:
    """Show one mutant to every judge in `asked`; see `measure`."""
    return measure([mutant], kernels, {mutant.kernel: asked}, jobs=1, hang_s=hang_s)[0]


def measure_alarms(
    stem: str, kernels: Path, asked: Asked, *, jobs: int = 2, hang_s: float = HANG_S
) -> tuple[Trial, ...]:
    """Show the kernel as it is to every judge, all cases: each alarm is a false one, if the kernel is right."""
    with tempfile.TemporaryDirectory(prefix="flashtune-mutants-") as folder:
        scratch = Path(folder)
        package = _copy(f"{stem}_unchanged", kernels, scratch)
        with _Children(scratch, hang_s) as children, ThreadPoolExecutor(jobs) as pool:

            def one(judge: str) -> Trial:
                return children.ask(package, stem, judge, asked[judge], stop=False)

            return tuple(pool.map(one, asked))


def _measure_one(children: "_Children", mutant: Mutant, package: str, asked: Asked) -> MutantResult:
    began = time.monotonic()
    trials = []
    for judge, cases in asked.items():
        # A case that does not carry the text out is passed by the kernel as it is, so it counts without being asked.
        able = [position for position, case in enumerate(cases) if affects(mutant, case)]
        trial = children.ask(package, mutant.kernel, judge, [cases[position] for position in able], stop=True)
        left_out = able[trial.asked - 1] + 1 - trial.asked if trial.asked else 0
        trials.append(replace(trial, cases=trial.cases + left_out))
    return MutantResult(
        name=mutant.name, kernel=mutant.kernel, equivalent=bool(mutant.equivalent), trials=tuple(trials),
        seconds=time.monotonic() - began,
    )  # fmt: skip


def affects(mutant: Mutant, case: Case) -> bool:
    """Whether a case can carry out the text that a mutant changes."""
    return not mutant.variants or not {*case.asked.beyond, *case.asked.variants}.isdisjoint(mutant.variants)


class _Children:
    """Processes that run kernels for whoever asks; one for each thread that asks at the same time, started when needed."""

    def __init__(self, scratch: Path, hang_s: float) -> None:
        self._scratch = scratch
        self._hang_s = hang_s
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        self._every: list[_Child] = []

    def __enter__(self) -> "_Children":
        return self

    def __exit__(self, *error: object) -> None:
        for child in self._every:
            child.close()

    def ask(self, package: str, stem: str, judge: str, cases: Sequence[Case], *, stop: bool) -> Trial:
        """Answer a task in any child that is free."""
        task = Task(
            folder=self._scratch, package=package, stem=stem, judge=judge, cases=tuple(cases), hang_s=self._hang_s,
            stop=stop,
        )  # fmt: skip
        try:
            child = self._idle.get_nowait()
        except queue.Empty:
            child = _Child()
            self._every.append(child)
        answer = child.ask(task)
        self._idle.put(child)
        return answer


class _Child:
    """One process of `harness.mutate_child`, which forks for every task, so that it outlives what kernels do."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "harness.mutate_child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=child_environment(interpret=True),
        )
        self._said: list[bytes] = []
        self._reader = threading.Thread(target=self._listen, args=(self._process.stderr,), daemon=True)
        self._reader.start()

    def ask(self, task: Task) -> Trial:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(TASKS.dump_json(task) + b"\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            said = b"".join(self._said).decode(errors="replace").strip()
            raise BugError(f"the process for mutants ended: {describe_exit(self._process.wait())}\n{said}")
        answer: dict[str, Any] = json.loads(line)
        return TRIALS.validate_python(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream:
                stream.close()

    def _listen(self, stream: IO[bytes]) -> None:
        for line in stream:
            self._said.append(line)
            del self._said[:-50]
