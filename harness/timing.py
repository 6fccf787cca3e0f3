"""A problem at its full size on the device: its tensors, and the times of candidates on them.

Runs in the one worker that owns the GPU. Refuses to judge: the gate has passed what comes here.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from harness import inputs, measure, oracle
from harness.inputs import DTYPES, placement_for
from harness.operation import ADDED_INPUTS, operation_for, problem_keywords, shapes
from harness.outcome import Samples
from harness.problem import Problem
from harness.space import Value
from harness.subject import workspaces_of

_ROWS_AT_ONCE = 512
# Where everything here lies.
DEVICE = "cuda"
# The canary: large enough that its time is its own and not that of its launch, some tens of microseconds on today's devices.
_CANARY_SIDE = 1024
_LAUNCH = measure.Policy(warmup_ms=0, min_samples=5, max_samples=7, budget_ms=100, method="graph")
_CANARY = measure.Policy(warmup_ms=0, min_samples=5, max_samples=5)


def sample(
    kernel: Any,
    problem: Problem,
    config: Mapping[str, Value],
    *,
    incumbent: Mapping[str, Value] | None,
    depth: measure.Depth,
    seed: int,
) -> Samples:
    """Times of `config`, in turns with `incumbent`, on the same tensors of the full problem here, and the canary's."""
    tensors = tensors_on_device(problem, seed)
    runs = [runner(kernel, problem, tensors, each) for each in (config, incumbent) if each is not None]
    drift_ms = canary_ms()
    found = measure.measure(
        runs[0],
        timer=timer(),
        policy=measure.POLICIES[depth],
        rng=np.random.default_rng(seed),
        incumbent=runs[1] if len(runs) == 2 else None,
    )
    alone = launches_ms(kernel, problem, tensors, config) if depth == "screen" else {}
    return replace(found, canary_ms=drift_ms, launches_ms=alone)


def launches_ms(
    kernel: Any, problem: Problem, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Value]
) -> dict[str, float]:
    """The time of each launch alone, by its kernel, with L2 flushed before each; nothing where there is only one. A few samples:
    they say which half of a config is good, and no champion is chosen by them."""
    # A call of PyTorch's has no grid, and is one.
    launches = [one for one in launches_of(kernel, problem, tensors, config) if 0 not in getattr(one, "grid", ())]
    if len(launches) < 2:
        return {}
    for one in launches:
        one.run()
    found: dict[str, float] = {}
    for one in launches:
        samples = measure.measure(one.run, timer=timer(), policy=_LAUNCH, rng=np.random.default_rng(0))
        found[one.name] = found.get(one.name, 0.0) + samples.median_ms
    return found


def race(
    kernel: Any, problem: Problem, entrants: Sequence[Mapping[str, Value]], rounds: int, seeds: Sequence[int]
) -> tuple[Samples, ...]:
    """Times of the entrants of a race, taken in turns: the next rounds of it."""
    tensors = tensors_on_device(problem, seeds[0])
    # They compute the same, one after the other: one set of outputs serves all.
    outputs = {name: _empty(name, problem) for name in operation_for(problem).outputs}
    runs = [runner(kernel, problem, tensors, each, outputs) for each in entrants]
    rng = np.random.default_rng(list(seeds))
    return measure.race(runs, timer=timer(), policy=measure.POLICIES["race"], rng=rng, rounds=rounds)


def canary_ms() -> float:
    """The time of a kernel that never changes, at this moment: what a drifting clock does to it, it does to every candidate."""
    found = measure.measure(_canary(), timer=timer(), policy=_CANARY, rng=np.random.default_rng(0))
    return found.median_ms


@functools.lru_cache(maxsize=1)
def _canary() -> Callable[[], None]:
    left = torch.ones(_CANARY_SIDE, _CANARY_SIDE, dtype=torch.float32, device=DEVICE)
    out = torch.empty_like(left)

    def run() -> None:
        torch.mm(left, left, out=out)

    return run


def runner(
    kernel: Any,
    problem: Problem,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Value],
    outputs: Mapping[str, torch.Tensor] | None = None,
) -> Callable[[], None]:
    """What launches a config: inputs are shared, and `outputs` if they are given; else those and workspaces are its own."""
    runs = [_timed(launch) for launch in launches_of(kernel, problem, tensors, config, outputs)]

    def run() -> None:
        for each in runs:
            each()

    return run


def launches_of(
    kernel: Any,
    problem: Problem,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Value],
    outputs: Mapping[str, torch.Tensor] | None = None,
) -> list[Any]:
    """The launches of a config, one after the other; see `runner`."""
    operation = operation_for(problem)
    inputs = {name: tensors[name] for name in operation.inputs}
    outputs = outputs or {name: _empty(name, problem) for name in operation.outputs}
    scratch = {
        name: torch.empty(shape, dtype=dtype, device=DEVICE)
        for name, (shape, dtype) in workspaces_of(kernel, inputs, config).items()
    }
    return list(kernel.launches(**inputs, **outputs, **scratch, **problem_keywords(problem), **config))


def _timed(launch: Any) -> Callable[[], None]:
    """What is timed of a launch: itself; of a call of PyTorch's, what it prepares, which does not copy results."""
    prepare = getattr(launch, "prepared", None)
    if prepare is None:
        run: Callable[[], None] = launch.run
        return run
    # Operations of a backward pass run on the stream that their forward ones ran on, and a graph is captured on one stream.
    with capture_stream():
        prepared: Callable[[], None] = prepare()
    return prepared


@functools.lru_cache(maxsize=1)
def timer() -> measure.CudaTimer:
    return measure.cuda_timer()


@contextlib.contextmanager
def capture_stream() -> Iterator[None]:
    """What runs within it runs on the stream on which graphs are captured, behind all that was launched before."""
    stream = timer().stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def free_bytes() -> int:
    """Memory of the device that nobody uses."""
    return int(torch.cuda.mem_get_info()[0])


def begin_peak() -> int:
    """Bytes that are allocated on the device; `peak_bytes` gives the most that were since."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak_bytes() -> int:
    """The most bytes that were allocated on the device since `begin_peak`."""
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


_drawn: dict[tuple[Problem, int], dict[str, torch.Tensor]] = {}


def tensors_on_device(problem: Problem, seed: int) -> dict[str, torch.Tensor]:
    """The inputs of a problem, kept for its next candidate. Those of another problem are let go before they are made."""
    if (problem, seed) not in _drawn:
        _drawn.clear()
        _drawn[problem, seed] = _draw(problem, seed)
    return _drawn[problem, seed]


def _draw(problem: Problem, seed: int) -> dict[str, torch.Tensor]:
    """Normal inputs in the problem's layout, drawn on the device because at full size the CPU would take minutes."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    tensors = {}
    # What a problem adds is small, or has a distribution of its own.
    added = inputs.draw_added(problem, seed=seed)
    for name in operation_for(problem).inputs:
        if name in ("out", "lse"):
            continue
        tensors[name] = _empty(name, problem)
        if name in ADDED_INPUTS:
            tensors[name].copy_(added[name])
        elif problem.eight_bits:
            # Generators fill no types of 8 bits.
            tensors[name].copy_(torch.empty_like(tensors[name], dtype=torch.float16).normal_(generator=generator))
        else:
            tensors[name].normal_(generator=generator)
    if problem.pass_ == "bwd":
        tensors["out"], tensors["lse"] = _empty("out", problem), _empty("lse", problem)
        attend(problem, tensors)
    return tensors


def attend(problem: Problem, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fill `out` and `lse` from `q`, `k`, `v` in fp32, a block of rows at a time: what a backward pass is handed.

    Times do not depend on the last bits, so this is no oracle; a backward pass on arbitrary numbers would overflow. Only where
    a problem adds to plain attention does the oracle answer.
    """
    if problem.variants:
        made = oracle.forward(problem, tensors)
        for name in ("out", "lse"):
            tensors[name].copy_(made[name])
        return
    positions = torch.arange(problem.kv_len, device=tensors["q"].device)
    for batch in range(problem.batch):
        for head in range(problem.q_heads):
            k, v = (tensors[name][batch, head // problem.group].float() for name in ("k", "v"))
            for start in range(0, problem.q_len, _ROWS_AT_ONCE):
                rows = slice(start, min(start + _ROWS_AT_ONCE, problem.q_len))
                scores = problem.softmax_scale * tensors["q"][batch, head, rows].float() @ k.T
                diagonal = torch.arange(rows.start, rows.stop, device=positions.device)[:, None] + problem.offset
                if problem.right is not None:
                    scores.masked_fill_(positions > diagonal + problem.right, -math.inf)
                if problem.window_left is not None:
                    scores.masked_fill_(positions < diagonal - problem.window_left, -math.inf)
                lse = torch.logsumexp(scores, -1)
                weights = torch.exp(scores - lse[:, None]).nan_to_num_(0.0)
                tensors["lse"][batch, head, rows] = lse
                tensors["out"][batch, head, rows] = (weights @ v).to(tensors["out"].dtype)


def _empty(name: str, problem: Problem) -> torch.Tensor:
    """An uninitialised tensor of the problem, with the memory order of its layout."""
    shape, dtype = shapes(problem)[name]
    order = placement_for(problem.layout, len(shape)).order
    memory = torch.empty([shape[axis] for axis in order], dtype=DTYPES[dtype], device=DEVICE)
    return memory.permute([order.index(axis) for axis in range(len(shape))])
