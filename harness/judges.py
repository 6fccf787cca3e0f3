"""Every oracle of the proof behind one interface: a named judge asks a subject about a case and says what it found.

Refuses to choose cases, and to catch what a subject raises.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from harness import bounds, compare, inputs, oracle, paging
from harness.cases import Case, structured, tensors_of
from harness.compare import OutputCheck
from harness.errors import UsageError
from harness.footprint import zeros
from harness.inputs import DTYPES, Placement
from harness.laws import Trial, snaps
from harness.operation import operation_for, shapes
from harness.probes import class_probe
from harness.problem import Problem
from harness.properties import PROPERTIES, Property, agreement
from harness.shadow import Role, shadow
from harness.subject import KernelSubject, Subject, blaming, described, launches_of, workspaces_of

Asked = tuple[tuple[OutputCheck, ...], tuple[str, ...]]

# Elements between neighbouring batches or heads of a far tensor. It fits 32 bits, as a larger stride would be passed in 64 and
# widen whatever it is multiplied with; the offset of the third batch or head does not. Of rows, either the first behind the
# largest tile is the first whose offset does not, or one within the smallest tile.
_FAR = 1 << 30
_FAR_ROWS = 9
_LEAST_SIDE = 16
# A pool outgrows 32 bits by its pages.
_OF_PAGES = 0.6


@dataclass(frozen=True, slots=True)
class Finding:
    """What one judge found wrong with one case, in words."""

    judge: str
    detail: str


def _always(subject: Subject, case: Case) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Judge:
    """An oracle. `ask` returns the checks it made (none: it had nothing to compare) and faults in words; `excludes` says why
    it has nothing to say about a subject and a case, or None."""

    name: str
    why: str
    ask: Callable[[Subject, Case], Asked]
    excludes: Callable[[Subject, Case], str | None] = _always

    def find(self, subject: Subject, case: Case) -> tuple[Finding | None, tuple[OutputCheck, ...]]:
        """None if it found nothing wrong, and the checks behind that."""
        checks, faults = self.ask(subject, case)
        failed = [check for check in checks if not check.ratio <= 1]
        reasons = [compare.sentence(compare.worst(failed))] if failed else []
        detail = "; ".join([*reasons, *faults[:3]])
        return (Finding(self.name, detail) if detail else None), checks


# ---------------------------------------------------------------------------------------------------------------------
# Of numbers
# ---------------------------------------------------------------------------------------------------------------------


def _bound(subject: Subject, case: Case) -> Asked:
    problem, given = case.asked, tensors_of(case)
    expect = bounds.expect_forward if problem.pass_ == "fwd" else bounds.expect_backward
    expected = expect(problem, given, subject.contract(problem), structured=structured(case))
    answer = subject.run(problem, given)
    found = {name: answer.outputs[name] for name in expected.truth if name in answer.outputs}
    # A log-sum-exp that a subject does not give is not judged; anything else that is missing is a fault, said by it or not.
    missing = (
        ()
        if answer.faults
        else tuple(f"gave no {name} for `{problem}`" for name in expected.truth if name not in found and name != "lse")
    )
    expected = replace(
        expected,
        truth={name: expected.truth[name] for name in found},
        bounds={name: expected.bounds[name] for name in found},
    )
    return compare.judge(found, expected, case=case.problem), (*answer.faults, *missing)


# A race may go well nine times. The interpreter runs one program after the other, so there the second run shows everything.
_REPEATS = 10


def _repeat(subject: Subject, case: Case) -> Asked:
    """Run several times on equal inputs: every bit must be equal; where a problem allows other bits, on a probe, whose sums are
    exact in any order."""
    problem, given = case.asked, tensors_of(case)
    if problem.nondeterministic:
        trial = Trial(subject, problem.bare, np.random.default_rng([case.seed, len(case.problem)]))
        probe = class_probe(trial, bits=0, dyadic=True)
        problem, given = probe.problem, trial.completed(probe.problem, probe.values)
    first = {name: output.clone() for name, output in subject.run(problem, given).outputs.items()}
    interpreted = isinstance(subject, KernelSubject) and subject.device == "cpu"
    checks: tuple[OutputCheck, ...] = ()
    for _ in range(1 if interpreted else _REPEATS - 1):
        again = subject.run(problem, given).outputs
        checks = tuple(
            _same_bits(name, first[name], again[name], case.problem) for name in first if first[name].numel()
        )
        if any(not check.ratio <= 1 for check in checks):
            break
    return checks, ()


def _same_bits(name: str, first: Tensor, second: Tensor, case: str) -> OutputCheck:
    differing = (first != second) & ~(first.isnan() & second.isnan())
    count = int(differing.sum())
    index = tuple(int(place) for place in differing.nonzero()[0]) if count else (0,) * first.ndim
    error = float((first - second).abs().nan_to_num(torch.inf).max())
    return OutputCheck(
        output=name,
        case=case,
        ratio=float("inf") if count else 0.0,
        error=error,
        bound=0.0,
        index=index,
        elements=first.numel(),
        detail=f"{count} elements differ between two runs" if count else "",
    )


def _fp64(subject: Subject, case: Case) -> Asked:
    """The same source in fp64: what is left of an error is not rounding."""
    ours = replace(_ours(subject), double=True)
    problem = case.asked
    given = {
        name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors_of(case).items()
    }
    expect = bounds.expect_forward if problem.pass_ == "fwd" else bounds.expect_backward
    if problem.pass_ == "bwd":
        given |= oracle.forward(problem, given)
    expected = expect(problem, given, ours.contract(problem), structured=structured(case))
    answer = ours.run(problem, given)
    return compare.judge(answer.outputs, expected, case=case.problem), answer.faults


def _agreement(subject: Subject, case: Case) -> Asked:
    """Ask a probe of the same kernel with other tile sides and splits: what is exact in any order cannot depend on them."""
    ours = _ours(subject)
    other = {
        name: (16 if value > 16 else 32) if "block" in name and isinstance(value, int) else value
        for name, value in ours.config.items()
    } | {
        name: 1 if value > 1 else 3
        for name, value in ours.config.items()
        if "splits" in name and isinstance(value, int)
    }
    rng = np.random.default_rng([case.seed, len(case.problem)])
    return agreement((ours, replace(ours, config=other)), case.asked, rng), ()


# ---------------------------------------------------------------------------------------------------------------------
# Of memory
# ---------------------------------------------------------------------------------------------------------------------


def _ours(subject: Subject) -> KernelSubject:
    if not isinstance(subject, KernelSubject):
        raise UsageError(f"{subject.name} is not a kernel file, which this judge needs")
    return subject


def _uninterpreted(subject: Subject, case: Case) -> str | None:
    if not isinstance(subject, KernelSubject):
        return "needs a kernel file"
    return None if subject.interpreted else "needs Triton's interpreter"


def _inexact(subject: Subject, case: Case) -> str | None:
    if case.asked.beyond:
        return "probes are of attention inside a band"
    return _untouchable(subject, case) or (None if snaps(subject.contract(case.asked)) else "has no exact probes")


def _shifting(subject: Subject, case: Case) -> str | None:
    """Of a problem that allows other bits in every run, only sums that are exact in any order can be compared."""
    if not case.asked.nondeterministic:
        return None
    if 0 in (case.asked.batch, case.asked.q_len, case.asked.kv_len):
        return "has no elements"
    return None if snaps(subject.contract(case.asked)) else "may have other bits in every run, and no exact probes"


def _untouchable(subject: Subject, case: Case) -> str | None:
    empty = 0 in (case.asked.batch, case.asked.q_len, case.asked.kv_len)
    return _uninterpreted(subject, case) or ("has no elements" if empty else None)


def _immovable(subject: Subject, case: Case) -> str | None:
    return _untouchable(subject, case) or ("uses descriptors" if described(case.config, ("k",)) else None)


def _shadow(subject: Subject, case: Case) -> Asked:
    """Every access of the case's launches is checked; the numbers are not looked at."""
    return _watched(_ours(subject), case.asked, tensors_of(case))


def _far(subject: Subject, case: Case) -> Asked:
    """A relative of the case, with one axis of one input so far apart in memory that offsets need 64 bits.

    The axis has three batches (or the pages of three), three heads (of queries in one group, or of keys), or more rows than any
    tile has; the other axes are as short as that allows.
    """
    ours = _ours(subject)
    rng = np.random.default_rng([case.seed, len(case.config)])
    names = [name for name in operation_for(case.asked).inputs if name not in ("lse", *inputs.LINED)]
    name, axis = names[int(rng.integers(len(names)))], int(rng.integers(3))
    axis = min(axis, len(shapes(case.asked)[name][0]) - 1)
    if case.asked.paged is not None and name in paging.POOLS and rng.random() < _OF_PAGES:
        axis = 0
    if case.asked.packed is not None:
        # There is one batch only.
        axis = max(axis, 1) if len(shapes(case.asked)[name][0]) > 1 else 0
    sides = [side for key, side in case.config.items() if "block" in key and isinstance(side, int)]
    side = max([_LEAST_SIDE, *sides])
    rows = side + _FAR_ROWS
    problem = case.asked.replace(
        batch=3 if axis == 0 and case.asked.packed is None else 1,
        kv_heads=3 if axis == 1 and name in ("k", "v") else 1,
        q_heads=3 if axis == 1 else 1,
        q_len=rows if axis == 2 else max(1, min(case.asked.q_len, rows)),
        kv_len=rows if axis == 2 else max(1, min(case.asked.kv_len, rows)),
    )
    stride = _FAR if axis < 2 else int(rng.choice([(1 << 31) // side, (1 << 31) // (_LEAST_SIDE // 2)]))
    given = tensors_of(replace(case, problem=str(problem), lies={}, patches=()))
    return _watched(ours, problem, {**given, name: _apart(given[name], axis, stride)})


def _apart(tensor: Tensor, axis: int, stride: int) -> Tensor:
    """The same elements with `stride` between neighbours along `axis`; memory that is never touched is never taken."""
    inner = [size for place, size in enumerate(tensor.shape) if place != axis]
    strides = [math.prod(inner[place + 1 :]) for place in range(len(inner))]
    strides.insert(axis, stride)
    span = stride * max(tensor.shape[axis] - 1, 0) + math.prod(inner)
    bytes_ = torch.from_numpy(zeros(span * tensor.element_size(), np.uint8))
    return bytes_.view(tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


def _watched(ours: KernelSubject, problem: Problem, given: Mapping[str, Tensor]) -> Asked:
    views, roles = _memory(ours, problem, given)
    with blaming(problem):
        launches = launches_of(ours.kernel, problem, views, ours.config)
        with shadow(views, roles, holes=paging.holes(problem, given)) as watch:
            for launch in launches:
                launch.run()
    found = (*watch.findings, *watch.unwritten())
    check = OutputCheck(
        output="memory", case=str(problem), ratio=float("inf") if found else 0.0, error=float(len(found)), bound=0.0, index=(),
        elements=1, detail="; ".join(map(str, found[:3])),
    )  # fmt: skip
    return (check,), ()


def _memory(
    ours: KernelSubject, problem: Problem, given: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Role]]:
    operation = operation_for(problem)
    views = dict(given)
    roles: dict[str, Role] = dict.fromkeys(operation.inputs, "input")
    for name in operation.outputs:
        shape, dtype = shapes(problem)[name]
        placement = ours.outputs.get(name, inputs.placement_for(problem.layout, len(shape)))
        views[name] = inputs.unwritten(name, shape, DTYPES[dtype], placement).view
        roles[name] = "output"
    inputs_only = {name: views[name] for name in operation.inputs}
    for name, (shape, kind) in workspaces_of(ours.kernel, inputs_only, ours.config).items():
        views[name] = inputs.unwritten(name, shape, kind, Placement(order=tuple(range(len(shape))))).view
        roles[name] = "workspace"
    return views, roles


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def _property_judge(position: int, item: Property) -> Judge:
    def ask(subject: Subject, case: Case) -> Asked:
        return item.judge(subject, case.asked, np.random.default_rng([case.seed, position])), ()

    def excludes(subject: Subject, case: Case) -> str | None:
        return item.applies(case.asked, subject.contract(case.asked))

    return Judge(item.name, item.why, ask, excludes)


JUDGES: Mapping[str, Judge] = {
    "bound": Judge("bound", "every element lies within a bound derived from the fp64 reference", _bound),
    "repeat": Judge(
        "repeat", "equal inputs give equal bits, or exact sums do where other bits are allowed", _repeat, _shifting
    ),
    "fp64": Judge("fp64", "the same source in fp64 separates the algorithm from its roundings", _fp64, _uninterpreted),
    "agreement": Judge(
        "agreement",
        "on probes all tile sides and splits give the same bits, as every order of a sum is exact",
        _agreement,
        _inexact,
    ),
    "shadow": Judge(
        "shadow", "every access lies inside a tensor, and nothing is read before it was written", _shadow, _untouchable
    ),
    "far": Judge("far", "offsets that leave 32 bits are computed in 64", _far, _immovable),
    **{item.name: _property_judge(position, item) for position, item in enumerate(PROPERTIES)},
}


def applicable(subject: Subject, case: Case) -> list[str]:
    """Names of the judges that have something to say about a case, in the order of the table."""
    return [name for name, judge in JUDGES.items() if judge.excludes(subject, case) is None]
