"""What `replay --spaces` does, given its parsed options: judge search strategies on recorded spaces, ours and others'."""

import argparse
import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness import report, report_replay
from harness.commands import print_document
from harness.errors import HarnessError, UsageError
from harness.experience import expected_slowdown
from harness.landscape import Landscape, landscapes
from harness.replay import Floats, Replayed, exactly, replay, resampled
from harness.rivals import KERNEL_TUNER, PLAIN_TPE, PREFIX, rival, rivals
from harness.search import DEFAULT_STRATEGY, STRATEGIES, UNLEARNED, check_strategy
from harness.search_documents import OverallResult, SearchesDocument, SearchResult
from harness.stats import bootstrap_mean
from harness.workspace import package_version

AT = (10, 20, 50, 100, 200)
_NEAR, _NEARER = 0.95, 0.99
# Has no seed, and is no search.
_NOT_JUDGED = ("exhaustive",)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """All seeds of a strategy on one space of a folder."""

    folder: Path
    space: str
    strategy: str
    budget: int
    seeds: int
    noise: bool
    warm: bool


def run_searches(options: argparse.Namespace) -> int:
    """`flashtune replay --spaces DIR`: how near to the optimum each strategy comes, and how soon."""
    folder = Path(options.spaces)
    spaces = {land.name: land for land in landscapes(folder)}
    names = _strategies(options.strategies)
    jobs = [
        _Job(
            folder=folder, space=space, strategy=name, budget=options.budget, seeds=options.seeds, noise=options.noise,
            warm=options.warm and name in STRATEGIES and name not in UNLEARNED,
        )
        for space in spaces for name in names
    ]  # fmt: skip
    began = time.monotonic()
    found, left_out = _run(jobs, options)
    seconds = time.monotonic() - began
    _require_some(jobs, found, left_out)
    results = tuple(
        _result(spaces[job.space], job, several) for job, several in zip(jobs, found, strict=True) if several
    )
    document = SearchesDocument(
        results=results, overall=_overall(results, found, jobs), budget=options.budget, seeds=options.seeds,
        seconds=round(seconds, 1), left_out=left_out,
        versions={name: package_version(name) or "missing" for name in ("numpy", "optuna", "kernel-tuner")},
    )  # fmt: skip
    if options.json:
        print_document("replay-spaces", document)
    else:
        print("\n".join(report_replay.searches_lines(document)))
    return 0


def _require_some(jobs: Sequence[_Job], found: Sequence[Sequence[Replayed]], left_out: Mapping[str, str]) -> None:
    """Raise `UsageError` where nothing was asked that could be answered: no search ran, or none of the warm ones."""
    ran = [job for job, several in zip(jobs, found, strict=True) if several]
    if any(job.warm for job in jobs) and not any(job.warm for job in ran):
        raise UsageError(
            f"`--warm` has no search learn from others here: {'; '.join(dict.fromkeys(left_out.values()))}",
            hint="--spaces wants the same kernel on another device or problem beside it, or leave --warm out",
        )
    if not ran:
        raise UsageError("no search could run here: " + "; ".join(f"{name}: {why}" for name, why in left_out.items()))


def _strategies(text: str) -> tuple[str, ...]:
    ours = tuple(name for name in STRATEGIES if name not in _NOT_JUDGED)
    if text == "all":
        return (*ours, *rivals())
    if text == "ours":
        return ours
    if text == "default":
        return (DEFAULT_STRATEGY,)
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name != PLAIN_TPE and name not in {PREFIX + one for one in KERNEL_TUNER}:
            check_strategy(name)
        elif name != PLAIN_TPE:
            rivals()
    return names


def _run(jobs: Sequence[_Job], options: argparse.Namespace) -> tuple[list[tuple[Replayed, ...]], dict[str, str]]:
    """The replays of each job, none where a strategy could not run there, and why."""
    found: list[tuple[Replayed, ...]] = []
    left_out: dict[str, str] = {}
    err = report.open_console(sys.stderr)
    # A fresh interpreter each: Kernel Tuner draws from generators that belong to the whole process.
    context = multiprocessing.get_context("spawn")
    with (
        report.CountBar(err, shown=err.is_terminal and not options.quiet, total=len(jobs)) as bar,
        ProcessPoolExecutor(options.jobs or os.cpu_count() or 1, mp_context=context) as pool,
    ):
        for job, future in [(job, pool.submit(_replays, job)) for job in jobs]:
            try:
                found.append(future.result())
            except HarnessError as error:
                found.append(())
                left_out[f"{job.strategy} on {job.space}"] = str(error)
            bar.step()
    return found, left_out


@functools.cache
def _spaces(folder: Path) -> Mapping[str, Landscape]:
    return {land.name: land for land in landscapes(folder)}


def _replays(job: _Job) -> tuple[Replayed, ...]:
    spaces = _spaces(job.folder)
    land = spaces[job.space]
    if job.strategy not in STRATEGIES:
        return tuple(rival(land, job.strategy, budget=job.budget, seed=seed) for seed in range(job.seeds))
    expected = None
    if job.warm:
        past = [one for one in spaces.values() if one.name != land.name and one.kernel == land.kernel]
        expected = expected_slowdown(past, land.space)
        if expected is None:
            raise UsageError(f"no other space here is of the kernel of {land.name}")
    noise = resampled if job.noise else exactly
    return tuple(
        replay(land, job.strategy, budget=job.budget, seed=seed, noise=noise, expected=expected)
        for seed in range(job.seeds)
    )


def _result(land: Landscape, job: _Job, several: Sequence[Replayed]) -> SearchResult:
    at = [count for count in AT if count <= job.budget]
    fractions = {count: np.array([one.fraction_at(count) for one in several]) for count in at}
    return SearchResult(
        space=land.name, legal=len(land.space.legal), strategy=job.strategy + (" warm" if job.warm else ""),
        seeds=len(several), fraction_at=_means(fractions.items()), fraction_interval_at=_intervals(fractions.items()),
        share_095_at=_means((count, (one >= _NEAR).astype(float)) for count, one in fractions.items()),
        share_099_at=_means((count, (one >= _NEARER).astype(float)) for count, one in fractions.items()),
        seconds_at=_means((count, _seconds(several, count)) for count in at),
        ms_per_trial=round(float(np.mean([one.ms_per_trial for one in several])), 2),
    )  # fmt: skip


def _seconds(several: Sequence[Replayed], count: int) -> list[float]:
    return [one.seconds[min(count, len(one.seconds)) - 1] if one.seconds else 0.0 for one in several]


def _overall(
    results: Sequence[SearchResult], found: Sequence[Sequence[Replayed]], jobs: Sequence[_Job]
) -> tuple[OverallResult, ...]:
    """Spaces count alike; of strategies that could not run everywhere nothing is said."""
    spaces = len({job.space for job in jobs})
    lines = []
    for name in dict.fromkeys(result.strategy for result in results):
        own = [result for result in results if result.strategy == name]
        if len(own) < spaces:
            continue
        replays = [
            several for several, job in zip(found, jobs, strict=True)
            if job.strategy + (" warm" if job.warm else "") == name
        ]  # fmt: skip
        at = [int(count) for count in own[0].fraction_at]
        # By seed, the mean over the spaces.
        by_seed = {
            count: np.mean([[one.fraction_at(count) for one in several] for several in replays], axis=0) for count in at
        }
        lines.append(
            OverallResult(
                strategy=name, spaces=spaces, fraction_at=_means(by_seed.items()),
                fraction_interval_at=_intervals(by_seed.items()),
                worst_at={str(count): min(one.fraction_at[str(count)] for one in own) for count in at},
                share_095_at=_means((count, [one.share_095_at[str(count)] for one in own]) for count in at),
                share_099_at=_means((count, [one.share_099_at[str(count)] for one in own]) for count in at),
                ms_per_trial=max(one.ms_per_trial for one in own),
            )
        )  # fmt: skip
    last = str(max((int(count) for count in lines[0].fraction_at), default=0)) if lines else ""
    return tuple(sorted(lines, key=lambda line: -line.fraction_at.get(last, 0.0)))


def _means(by_count: Iterable[tuple[int, Sequence[float] | Floats]]) -> dict[str, float]:
    return {str(count): round(float(np.mean(values)), 4) for count, values in by_count}


def _intervals(by_count: Iterable[tuple[int, Floats]]) -> dict[str, tuple[float, float]]:
    rng = np.random.default_rng(0)
    found = {str(count): bootstrap_mean(values, rng=rng) for count, values in by_count}
    return {count: (round(one.low, 4), round(one.high, 4)) for count, one in found.items()}
