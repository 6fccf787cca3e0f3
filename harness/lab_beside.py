"""Ours beside others', and ours beside itself: the comparisons of a campaign on a GPU.

Every pair is sampled in turns; a ratio is a rival's time over ours, so above 1 ours is the faster one. Refuses to time a config
of ours that has not passed its gate here and now.
"""

import json
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness import beside, judging, lab_truth, profiler
from harness.bench import Bench, seed_of, short
from harness.beside import Pair
from harness.campaign import Given, Part
from harness.campaign_plan import FLEX, TUNED_FLEX, anchor_of, champion_name
from harness.compare import Verdict
from harness.errors import OutOfTimeError, UsageError
from harness.outcome import Artifact, CompileFailed, LaunchFailed, TimedOut
from harness.problem import Problem, parse_problem
from harness.profiler import Traffic
from harness.prune import prune
from harness.space import Config
from harness.stats import compare, median

# FlexAttention compiles inductor's code for its shape first.
_PAIR_S: Mapping[str, float] = {"flex": 120.0, TUNED_FLEX: 120.0}
_ANY_PAIR_S = 45.0
_OVER_S = 1.0
# A profiler runs each kernel several times, and begins with a process of its own.
_TRAFFIC_S = 90.0


@dataclass(slots=True, eq=False)
class Beside:
    """What is found out by comparing."""

    bench: Bench
    _coming: deque[Part] = field(default_factory=deque)
    _started: dict[tuple[str, Problem, Config], Callable[[], Any]] = field(default_factory=dict)

    def expect(self, parts: Sequence[Part]) -> None:
        """What will be compared next."""
        self._coming = deque(part for part in parts if part.what["do"] == "beside")

    def _start_more(self) -> None:
        """Compile ours for what comes next, while the device is busy with this."""
        while self._coming and len(self._started) < self.bench.jobs:
            what = self._coming.popleft().what
            stem, problem = what["kernel"], parse_problem(what["problem"])
            try:
                config = self._ours(stem, problem)[0]
            except UsageError:
                # It is said when its turn comes.
                continue
            key = (stem, problem, config)
            self._started[key] = self._started.get(key) or self.bench.kernel(stem).compile(problem, config)

    def rivals(self, stem: str, problem: Problem, names: list[str], before: Mapping[str, Any] | None) -> Given:
        """Our champion (or default) in turns with each rival; what `before` has of them is not measured again."""
        default = self.bench.space(stem, problem)[1]
        config, origin = self._ours(stem, problem)
        why = self._why_unfit(stem, problem, config)
        if why and config != default:
            config, origin = default, "default"
            why = self._why_unfit(stem, problem, config)
        if why:
            return Given(status="failed", reason=f"our default is not timed: {why}")
        data: dict[str, Any] = {
            "problem": problem.key,
            "flops": problem.flops,
            "config": dict(config),
            "config_of": origin,
            "rivals": {},
        }
        if before and before.get("config") == dict(config):
            data["rivals"] = dict(before["rivals"])
        for name in names:
            if name in data["rivals"] or (name == "default" and config == default):
                continue
            try:
                rival, why = self._rival(name, stem, problem)
                data["rivals"][name] = (
                    {"not_measured": why}
                    if rival is None
                    else self._pair(stem, problem, config, rival, _PAIR_S.get(name, _ANY_PAIR_S))
                )
            except OutOfTimeError as cut:
                return Given(status="partial", reason=cut.message, data=data)
        return Given(status="done", data=data)

    def _rival(self, name: str, stem: str, problem: Problem) -> tuple[beside.Rival | None, str]:
        """Who is meant by a name; or None, and why there is nobody."""
        if name == "default":
            default = self.bench.space(stem, problem)[1]
            why = self._why_unfit(stem, problem, default)
            return (None if why else default), why
        if name != TUNED_FLEX:
            return name, ""
        other = FLEX[problem.pass_]
        if other not in self.bench.workspace.stems:
            return None, f"this workspace has no kernel `{other}`"
        try:
            config, origin = self._ours(other, problem)
        except UsageError as refusal:
            return None, refusal.message
        if origin == "default":
            return None, "FlexAttention was not tuned for this problem, nor for one that stands for it"
        why = self._why_unfit(other, problem, config)
        return (None, why) if why else (beside.Other(self.bench.workspace.root, other, dict(config)), "")

    def traffic(self, stem: str, problem: Problem) -> Given:
        """Bytes of device memory that standard attention and ours move, as Nsight Compute reads them, where it can."""
        program = profiler.find_program()
        config, origin = self._ours(stem, problem)
        why = "`ncu` (Nsight Compute) is not installed" if program is None else self._why_unfit(stem, problem, config)
        data: dict[str, Any] = {
            "problem": problem.key, "flops": problem.flops, "least_bytes": problem.least_bytes, "config": dict(config),
            "config_of": origin, "traffic": {},
        }  # fmt: skip
        asked = {"root": str(self.bench.workspace.root), "kernel": stem, "problem": problem.key}
        for name, who in (("standard", {"rival": "sdpa:math"}), ("ours", {"config": dict(config)})):
            found: Traffic | str = why
            if not why and program is not None:
                command = [sys.executable, "-m", "harness.traffic_child", json.dumps({**asked, **who})]
                found = self._read(profiler.wrapped(command, program))
            data["traffic"][name] = (
                {"not_measured": found}
                if isinstance(found, str)
                else {"dram_bytes": short(found.bytes_), "launches": found.launches}
            )
        return Given(status="done", data=data)

    def _read(self, command: list[str]) -> Traffic | str:
        seconds = max(min(self.bench.left() / 2, _TRAFFIC_S), _OVER_S)
        code, out, said = lab_truth.run_within(command, seconds, cwd=self.bench.workspace.root)
        if code is None:
            return f"it took more than {seconds:.0f} s under `ncu`"
        found = profiler.read_traffic(out)
        if code and not isinstance(found, str):
            last = said.strip().splitlines()[-1:]
            return f"`ncu` ended with exit code {code}{f': {last[0]}' if last else ''}"
        return found

    def same(self, stem: str, problem: Problem, runs: int) -> Given:
        """The default beside itself: whoever calls one of them faster is mistaken."""
        _, default = self.bench.space(stem, problem)
        why = self._why_unfit(stem, problem, default)
        if why:
            return Given(status="failed", reason=f"our default is not timed: {why}")
        found = []
        for turn in range(runs):
            asked = _Asked(stem, problem, default, default, self.bench.seed + turn)
            pair = self._sampled(asked, "graph", _ANY_PAIR_S)
            if not isinstance(pair, Pair):
                return Given(status="failed", reason=pair)
            found.append(compare(pair.rival_ms, pair.ours_ms, rng=np.random.default_rng(turn)))
        alarms, count = judging.false_alarms(found)
        rows = [
            {"ratio": short(one.ratio), "interval": [short(one.interval.low), short(one.interval.high)] if one.interval else None,
             "verdict": one.verdict, "pairs": one.pairs} for one in found
        ]  # fmt: skip
        return Given(status="done", data={"runs": rows, "false_alarms": alarms, "of": count})

    def _ours(self, stem: str, problem: Problem) -> tuple[Config, str]:
        """The champion of the problem, or of the one that stands for it, or the default; and whose it is."""
        space, default = self.bench.space(stem, problem)
        for whose in (problem, anchor_of(problem)):
            found = self.bench.known(champion_name(stem, whose))
            if found and found.get("champion"):
                try:
                    return space.check(found["champion"]["config"]), f"champion of {whose}"
                except UsageError:
                    # It is not legal at this length.
                    continue
        return default, "default"

    def _why_unfit(self, stem: str, problem: Problem, config: Config) -> str:
        """Why a config may not be timed; empty if it may."""
        runner = self.bench.kernel(stem)
        started = self._started.pop((stem, problem, config), None) or runner.compile(problem, config)
        self._start_more()
        artifact = self._in_time(started())
        if not isinstance(artifact, Artifact):
            return _reason(artifact)
        pruned = prune(artifact, config, self.bench.device)
        if pruned is not None and pruned.rule != "spills":
            return pruned.detail
        verdict = self._in_time(runner.verify(problem, config)())
        if not isinstance(verdict, Verdict):
            return _reason(verdict)
        return "" if verdict.passed else f"{verdict.status}: {verdict.detail}"

    def _pair(self, stem: str, problem: Problem, config: Config, rival: beside.Rival, limit_s: float) -> dict[str, Any]:
        seed = seed_of(problem.key)
        asked = _Asked(stem, problem, config, rival, seed)
        pair = self._sampled(asked, "graph", limit_s)
        if not isinstance(pair, Pair):
            # What a graph cannot hold is timed with its launches.
            by_graph = pair
            pair = self._sampled(asked, "event", limit_s)
            if not isinstance(pair, Pair):
                return {"not_measured": pair if pair == by_graph else f"{pair} (in a graph: {by_graph})"}
        compared = compare(pair.rival_ms, pair.ours_ms, rng=np.random.default_rng(seed))
        found: dict[str, Any] = {
            "rival_ms": short(median(pair.rival_ms)), "ours_ms": short(median(pair.ours_ms)), "samples": len(pair.rival_ms),
            "ratio": short(compared.ratio), "verdict": compared.verdict, "method": pair.method,
            "rival_bytes": pair.rival_bytes, "ours_bytes": pair.ours_bytes,
        }  # fmt: skip
        if compared.interval is not None:
            found["interval"] = [short(compared.interval.low), short(compared.interval.high)]
        return found | ({"throttled": True} if pair.throttled else {})

    def _sampled(self, asked: "_Asked", method: str, limit_s: float) -> Pair | str:
        """Samples of both, or why there are none."""
        arguments = (asked.problem, asked.config, asked.rival, method, asked.seed)
        wait = self.bench.kernel(asked.stem).call("device", "measure", beside.pair, *arguments, limit_s=limit_s)
        found = self._in_time(wait())
        return found if isinstance(found, Pair) else _reason(found)

    def _in_time(self, found: Any) -> Any:
        if isinstance(found, TimedOut) and self.bench.left() < _OVER_S:
            raise OutOfTimeError("the time ended before all rivals had their turn; those left go on next time")
        return found


@dataclass(frozen=True, slots=True)
class _Asked:
    """A kernel under a config, and a rival."""

    stem: str
    problem: Problem
    config: Config
    rival: beside.Rival
    seed: int


def _reason(found: Any) -> str:
    if isinstance(found, TimedOut):
        return f"took more than {found.limit_s:.0f} s"
    return found.reason if isinstance(found, LaunchFailed | CompileFailed) else str(found)
