"""The last step of shrinking: a counterexample whose every part is as plain as the failure allows.

Hypothesis shrinks the choices that made a case and may stop at a local minimum of them (a length drawn at the side of one
config's tile); this changes the case itself, one part at a time. Refuses to decide what fails: it is told.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from harness.cases import Case
from harness.errors import ProblemError
from harness.problem import Dtype, Problem
from harness.space import Config

# Tries, at most: each is one question to the judge that failed.
MOST = 120


def shrink(
    case: Case, configs: Mapping[Dtype, Sequence[Config]], fails: Callable[[Case], bool], *, most: int = MOST
) -> Case:
    """The plainest case found from `case` for which `fails` still holds, after at most `most` tries."""
    tried = {case.id}
    left = most
    while True:
        for simpler in _simpler(case, configs):
            if simpler.id in tried:
                continue
            tried.add(simpler.id)
            left -= 1
            if left < 0:
                return case
            if fails(simpler):
                case = simpler
                break
        else:
            return case


def _simpler(case: Case, configs: Mapping[Dtype, Sequence[Config]]) -> Iterator[Case]:
    """Cases that differ from `case` in one part, which is plainer; the greatest steps first."""
    if case.lies:
        yield replace(case, lies={})
        for name in case.lies:
            yield replace(case, lies={other: lie for other, lie in case.lies.items() if other != name})
    if case.patches:
        yield replace(case, patches=())
        yield replace(case, patches=case.patches[1:])
    for problem in _simpler_problems(case.asked):
        yield replace(case, problem=str(problem))
    first = next(iter(configs.get(case.asked.dtype, ())), None)
    if first is not None and dict(first) != dict(case.config):
        yield replace(case, config=dict(first))
    if case.recipe != "normal":
        yield replace(case, recipe="normal")
    if case.seed:
        yield replace(case, seed=0)


def _simpler_problems(problem: Problem) -> Iterator[Problem]:
    changes: list[dict[str, object]] = [
        {"batch": 1},
        {"kv_heads": 1, "q_heads": 1},
        {"kv_heads": 1, "q_heads": problem.group},
        {"kv_heads": problem.kv_heads, "q_heads": problem.kv_heads},
        {"layout": "bhsd"},
        {"scale": None},
        {"window_left": None},
        {"window_right": None},
        {"top_left": False},
        {"v_head_dim": problem.head_dim},
        {"head_dim": 16, "v_head_dim": 16},
        {"causal": False, "window_right": problem.window_right},
    ]
    changes += [{"kv_heads": 1, "q_heads": 2}] if problem.q_heads > 2 else []
    changes += [{"scale": 1.0}] if problem.scale is not None else []
    for length in _shorter(problem.q_len):
        changes += [{"q_len": length, "kv_len": length}] if problem.q_len == problem.kv_len else []
    changes += [{"q_len": length} for length in _shorter(problem.q_len)]
    changes += [{"kv_len": length} for length in _shorter(problem.kv_len)]
    for side in ("window_left", "window_right"):
        value = getattr(problem, side)
        changes += [{side: length} for length in (0, *_shorter(value))] if value else []
    for change in changes:
        if all(getattr(problem, name) == value for name, value in change.items()):
            continue
        try:
            yield problem.replace(**change)
        except ProblemError:
            continue


def _shorter(length: int) -> list[int]:
    """A few lengths below `length`, the least first; 0 is another question, and never plainer."""
    return sorted({value for value in (1, 2, 3, length // 2, length - 1) if 0 < value < length})
