"""Spaces, champions and what the estimate is worth: the steps of a campaign on a GPU that the tuner does.

A part in flight has a journal of its own, so a cut costs one trial. Refuses to search by itself: `harness.tune` does.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harness import judging, recorded
from harness.ahead import Ahead, InOrder
from harness.bench import Bench, short, slug
from harness.campaign import Given
from harness.cases import SCHEMA
from harness.commands import champions_of, keep_champions
from harness.errors import MachineError, OutOfTimeError
from harness.estimates import estimate_all
from harness.landscape import of_recorded
from harness.outcome import Measured, Record, value_ms
from harness.problem import Problem, parse_problem
from harness.replay import follow
from harness.search import DEFAULT_STRATEGY, make_strategy, open_study
from harness.space import Config, Space
from harness.store import read_journal
from harness.tune import Budget, Settled, Task, Tried, tune
from harness.workspace import package_version

# Trials of a champion's search; seconds that the next trials take at most, and the choice at the end (its race, its proof, its
# final measurement): with less left, they are not begun.
TRIALS = 24
_NEXT_S, _SETTLE_S = 8.0, 80.0
_CHUNK = 64
_REPLAYS = 9
Groups = Sequence[Sequence[str]]
_ESTIMATE_S = 90.0
# Inputs, outputs, what the rest of a step keeps, and a second set while one problem makes way for another.
_SETS = 3


@dataclass(slots=True, eq=False)
class Tuning:
    """What is found out by the tuner."""

    bench: Bench
    runs: Sequence[Mapping[str, Any]] = ()

    def space(self, stem: str, problem: Problem, groups: Groups) -> Given:
        """Measure every config of a slice, in an order that makes any beginning of it a fair sample: the default, then shuffled.

        Its champion is sought by a part of its own: this one only measures.
        """
        bench = self.bench
        space, default = bench.slice(stem, problem, groups)
        order = [
            default,
            *(space.legal[place] for place in np.random.default_rng(bench.seed).permutation(len(space.legal))),
        ]
        order = list(dict.fromkeys(order))
        path = bench.spaces_path(stem, problem)
        with closing(bench.journal(path, stem, problem)) as journal:
            unknown = [config for config in order if journal.find(problem.key, config) is None]
            runner = Ahead(bench.kernel(stem), problem, unknown, depth=2 * bench.jobs, left=bench.left)
            task = Task(problem=problem, space=space, default=default, strategy=InOrder(order))
            whole = self._measure(tune(task, runner, journal, budget=Budget(), seed=bench.seed), len(order))
            records = tuple(journal.records)
        data = _progress(space, default, records) | {"file": path.name}
        if not whole:
            return Given(status="partial", reason=f"{data['tried']} of {len(order)} configs", data=data)
        found = self._record(stem, problem, groups, records)
        kept = recorded.write_recorded(bench.folder / "spaces", slug(stem, problem), found)
        return Given(status="done", data=data | {"file": kept.name})

    def _measure(self, events: Iterator[Tried | Settled], total: int) -> bool:
        """Whether all trials were made before the time ended; nothing is settled."""
        try:
            for tried, _ in enumerate(events, 1):
                if tried == total:
                    return True
                if self.bench.left() < _NEXT_S:
                    return False
        except OutOfTimeError:
            return False
        return total == 0

    def champion(self, stem: str, problem: Problem) -> Given:
        """Search for the fastest config of a problem, as `flashtune tune` does."""
        bench = self.bench
        if bench.memory_bytes is not None and _SETS * problem.least_bytes > bench.memory_bytes:
            need, there = _SETS * problem.least_bytes / 2**30, bench.memory_bytes / 2**30
            return Given(status="skipped", reason=f"it would take {need:.0f} GiB, the device has {there:.0f}")
        space, default = bench.space(stem, problem)
        path = bench.tuning_path(stem, problem)
        with closing(bench.journal(path, stem, problem)) as journal:
            study = open_study(f"{stem} {problem}")
            strategy = make_strategy(DEFAULT_STRATEGY, space, default, study=study, seed=bench.seed)
            runner = Ahead(bench.kernel(stem), problem, (), depth=0, left=bench.left)
            task = Task(problem=problem, space=space, default=default, strategy=strategy)
            budget = Budget(trials=min(TRIALS, len(space.legal)))
            settled = self._search(tune(task, runner, journal, budget=budget, seed=bench.seed), budget.trials or 0)
            records = tuple(journal.records)
        data = _progress(space, default, records)
        if settled is None:
            return Given(status="partial", reason=f"{data['tried']} of {budget.trials} trials", data=data)
        return Given(
            status="done", data=data | self._champion(stem, settled) | {"counterexamples": _not_proved(records)}
        )

    def _search(self, events: Iterator[Tried | Settled], total: int) -> Settled | None:
        """The end of a search, or None if the time ended before."""
        tried = 0
        try:
            for event in events:
                if isinstance(event, Settled):
                    return event
                tried += 1
                if self.bench.left() < (_SETTLE_S if tried == total else _NEXT_S):
                    return None
        except OutOfTimeError:
            return None
        return None

    def _champion(self, stem: str, settled: Settled) -> dict[str, Any]:
        """The champion as JSON values, kept in the workspace too."""
        bench = self.bench
        found = champions_of([settled], bench.workspace, bench.setting, stem)
        if found is None:
            return {"champion": None, "why": "no candidate passed its gate and its proof"}
        faster = settled.against_default
        given = found.model_dump(mode="json", by_alias=True, exclude={"digest"})
        (champion,) = given.pop("champions")
        given = {
            "champion": champion, "of": given, "against_default": None if faster is None else faster.verdict,
        }  # fmt: skip
        try:
            keep_champions([settled], bench.workspace, bench.setting, stem, draft=False)
        except MachineError as refused:
            # The ledger has it, and `--adopt` keeps it elsewhere.
            given["not_kept"] = refused.message
        return given

    def estimate(self, stem: str, problem: Problem, groups: Groups) -> Given:
        """What the estimate is worth on a space, as far as it is measured."""
        folder = self.bench.folder / "spaces"
        path = next((one for one in sorted(folder.glob(f"{slug(stem, problem)}.jsonl*"))), None)
        if path is not None:
            found = recorded.read_recorded(path)
        else:
            journal = self.bench.spaces_path(stem, problem)
            if not journal.exists():
                return Given(status="skipped", reason="nothing of the space is measured yet")
            found = self._record(stem, problem, groups, read_journal(journal)[1])
        judged = judging.judge_estimate(found)
        if judged is None:
            return Given(status="partial", reason=f"{len(found.measured)} measured configs are too few")
        data = {
            "configs": judged.configs, "legal": judged.legal, "best_ms": short(judged.best_ms),
            "correlation": short(judged.correlation), "near": short(judged.near),
            "regret": {str(count): short(one) for count, one in judged.regret.items()},
            "random_regret": {str(count): short(one) for count, one in judged.random_regret.items()},
            "default_regret": short(judged.default_regret),
        }  # fmt: skip
        if not found.header.complete:
            return Given(status="partial", reason="the space is not complete", data=data)
        return Given(status="done", data=data | {"search": self._replayed(found, stem, problem, groups)})

    def _replayed(self, found: recorded.Recorded, stem: str, problem: Problem, groups: Groups) -> dict[str, Any]:
        """What the search is worth on a space that is known: regrets and seconds of several seeds, in order of the regrets."""
        space, default = self.bench.slice(stem, problem, groups)
        land = of_recorded(f"{stem} {problem}", self.bench.spaces_path(stem, problem), found)
        replays = []
        for seed in range(_REPLAYS):
            study = open_study(f"replay {seed} of {stem} {problem}")
            strategy = make_strategy(DEFAULT_STRATEGY, space, default, study=study, seed=seed)
            one = follow(land, strategy, DEFAULT_STRATEGY, budget=TRIALS, seed=seed)
            replays.append((1 / one.fractions[-1] - 1 if one.fractions[-1] else math.inf, one.seconds[-1]))
        times = [line.time_ms for line in found.measured if line.time_ms is not None]
        return {
            "trials": TRIALS, "regrets": [short(regret) for regret, _ in sorted(replays)],
            "seconds": [short(seconds) for _, seconds in sorted(replays)],
            "random_regret": short(judging.expected_least(times, TRIALS) / min(times) - 1),
        }  # fmt: skip

    def _record(self, stem: str, problem: Problem, groups: Groups, records: Sequence[Record]) -> recorded.Recorded:
        """The trials as a recorded space, with an estimate of each that has a time."""
        bench = self.bench
        space, default = bench.slice(stem, problem, groups)
        timed = [one for one in records if one.role == "screen" and isinstance(one.outcome, Measured)]
        parts = [timed[start : start + _CHUNK] for start in range(0, len(timed), _CHUNK)]
        waits = [
            bench.kernel(stem).call(
                "compiler", "estimate", estimate_all, problem, bench.device,
                [(Config(one.config), one.outcome.artifact) for one in part if isinstance(one.outcome, Measured)],
                limit_s=_ESTIMATE_S,
            ) for part in parts
        ]  # fmt: skip
        estimates: dict[int, float] = {}
        for part, wait in zip(parts, waits, strict=True):
            given = wait()
            if isinstance(given, list):
                estimates |= {one.trial: value for one, value in zip(part, given, strict=True)}
        header = {
            "kernel": stem, "problem": problem.key, "device": bench.device.name, "arch": bench.device.arch,
            "default": default, "runs": tuple(self.runs), "versions": self._versions(stem, space, timed),
            "estimates": _model() if estimates else "", "groups": tuple(map(tuple, groups)),
            "of": len(bench.space(stem, problem)[0].legal),
        }  # fmt: skip
        return recorded.record(space, records, header=header, estimates=estimates)

    def _versions(self, stem: str, space: Space, timed: Sequence[Record]) -> dict[str, str | None]:
        outcome = timed[0].outcome if timed else None
        return {
            "kernel": self.bench.workspace.kernel_digest(stem), "space": space.fingerprint,
            "toolchain": outcome.artifact.toolchain if isinstance(outcome, Measured) else None,
            "method": outcome.samples.method if isinstance(outcome, Measured) else None,
            **{name: package_version(name) for name in ("triton", "torch", "numpy")},
        }  # fmt: skip

    def tidy(self, done: Sequence[Mapping[str, Any]]) -> None:
        """Remove the journals of parts that are done: what they held is in the ledger, and in the recorded space."""
        for what in done:
            if what["do"] not in ("space", "champion"):
                continue
            stem, problem = what["kernel"], parse_problem(what["problem"])
            whole = list((self.bench.folder / "spaces").glob(f"{slug(stem, problem)}.jsonl*"))
            if what["do"] == "space" and whole:
                self.bench.spaces_path(stem, problem).unlink(missing_ok=True)
            if what["do"] == "champion":
                self.bench.tuning_path(stem, problem).unlink(missing_ok=True)


def _not_proved(records: Sequence[Record]) -> list[Any]:
    """The cases in which finalists were wrong, as files of a corpus have them."""
    found_with = {name: str(package_version(name)) for name in ("triton", "torch", "numpy")}
    found = []
    for proof in (one.proof for one in records if one.role == "proof"):
        if proof is not None and proof.counterexample is not None:
            judge, _, detail = proof.detail.partition(": ")
            case = {"case": proof.counterexample, "judge": judge, "detail": detail}
            found.append({"schema": SCHEMA, "found_with": found_with} | case)
    return found


def _model() -> str:
    from harness.estimate import MODEL

    return MODEL


def _progress(space: Space, default: Config, records: Sequence[Record]) -> dict[str, Any]:
    """How far a search has come, in a few numbers; times in milliseconds, seconds of all its trials together."""
    trials = [one for one in records if one.role == "screen"]
    valued = [(value, one) for one in trials if (value := value_ms(one.outcome)) is not None]
    best = min(valued, key=lambda pair: (pair[0], pair[1].trial), default=None)
    first = next((value for value, one in valued if Config(one.config) == default), None)
    return {
        "legal": len(space.legal), "tried": len(trials), "measured": len(valued),
        "outcomes": dict(sorted(Counter(one.outcome.kind for one in trials).items())),
        "best_ms": short(best[0]) if best else None, "default_ms": short(first),
        "trials_to_best": best[1].trial + 1 if best else None, "seconds": round(sum(one.seconds for one in records), 1),
    }  # fmt: skip


def journals_in(folder: Path) -> list[Path]:
    """The journals of parts in flight."""
    return sorted([*folder.glob("tuning-*.jsonl"), *(folder / "spaces").glob("*.journal.jsonl")])
