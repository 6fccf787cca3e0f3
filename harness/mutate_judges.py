"""Every judge that mutants are shown to: those of the proof, the gate, fp64 arithmetic, shadow memory, other projects' criteria.

Refuses to define a property or a bound; a new judge is one more entry in `EVERY`.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from harness import bounds, compare, inputs, oracle, verify
from harness.cases import Case, structured, tensors_of
from harness.compare import OutputCheck
from harness.criteria import CRITERIA_JUDGES
from harness.errors import UsageError
from harness.inputs import DTYPES, Placement
from harness.judges import JUDGES, Judge
from harness.operation import operation_for, problem_keywords, shapes
from harness.problem import Problem
from harness.shadow import Role, shadow
from harness.subject import Kernel, KernelSubject, Subject

Asked = tuple[tuple[OutputCheck, ...], tuple[str, ...]]

# Elements between neighbouring batches, heads or rows of a far tensor. Each fits 32 bits, as a larger stride would be passed in
# 64 and widen whatever it is multiplied with; the offset of the third batch or head, or of row 16, does not.
_FAR = (1 << 30, 1 << 30, 1 << 27)


def _ours(subject: Subject) -> KernelSubject:
    if not isinstance(subject, KernelSubject):
        raise UsageError(f"{subject.name} is not a kernel file, which this judge needs")
    return subject


def _gate(subject: Subject, case: Case) -> Asked:
    """What `tune` asks of every candidate, with the case's problem as the one that is tuned for."""
    ours = _ours(subject)
    verdict = verify.gate(ours.kernel, case.asked, ours.config, seed=case.seed, where="interpreter")
    return verdict.checks, () if verdict.passed else (verdict.detail,)


def _fp64(subject: Subject, case: Case) -> Asked:
    """The same source in fp64: what is left of an error is not rounding."""
    ours = replace(_ours(subject), double=True)
    problem = case.asked
    given = {name: tensor.double() for name, tensor in tensors_of(case).items()}
    expect = bounds.expect_forward if problem.pass_ == "fwd" else bounds.expect_backward
    if problem.pass_ == "bwd":
        given |= oracle.forward(problem, given)
    expected = expect(problem, given, ours.contract(problem), structured=structured(case))
    answer = ours.run(problem, given)
    return compare.judge(answer.outputs, expected, case=case.problem), answer.faults


def _outputs(subject: Subject, case: Case) -> Asked:
    """The derived bound, with outputs whose last two axes are exchanged in memory and whose rows are padded."""
    orders = {axes: (*range(axes - 2), axes - 1, axes - 2) for axes in (3, 4)}
    outputs = {
        name: Placement(order=orders[len(shapes(case.asked)[name][0])], row_padding=3)
        for name in operation_for(case.asked).outputs
    }
    return JUDGES["bound"].ask(replace(_ours(subject), outputs=outputs), case)


def _shadow(subject: Subject, case: Case) -> Asked:
    """Every access of the case's launches is checked; the numbers are not looked at."""
    ours = _ours(subject)
    problem, given = case.asked, tensors_of(case)
    return _watched(ours, problem, given, case)


def _far(subject: Subject, case: Case) -> Asked:
    """The same with one axis of one input after the other so far apart in memory that offsets need 64 bits.

    Sees everything in problems of three batches, three heads (of keys, and in a group) and more rows than a tile has.
    """
    ours = _ours(subject)
    problem, given = case.asked, tensors_of(case)
    checks: list[OutputCheck] = []
    for name in ("q", "k", "v"):
        for axis, stride in enumerate(_FAR):
            checks += _watched(ours, problem, given | {name: _apart(given[name], axis, stride)}, case)[0]
    return tuple(checks), ()


def _apart(tensor: Tensor, axis: int, stride: int) -> Tensor:
    """The same elements with `stride` between neighbours along `axis`; memory that is never touched is never taken."""
    inner = [size for place, size in enumerate(tensor.shape) if place != axis]
    strides = [math.prod(inner[place + 1 :]) for place in range(len(inner))]
    strides.insert(axis, stride)
    span = stride * max(tensor.shape[axis] - 1, 0) + math.prod(inner)
    return torch.empty(span, dtype=tensor.dtype).as_strided(tensor.shape, strides).copy_(tensor)


def _watched(ours: KernelSubject, problem: Problem, given: Mapping[str, Tensor], case: Case) -> Asked:
    views, roles = _memory(ours.kernel, problem, given)
    if any(tensor.numel() == 0 for tensor in given.values()):
        return (), ()
    launches = ours.kernel.launches(**views, **problem_keywords(problem), **ours.config)
    with shadow(views, roles) as watch:
        for launch in launches:
            launch.run()
    found = (*watch.findings, *watch.unwritten())
    check = OutputCheck(
        output="memory", case=case.problem, ratio=float("inf") if found else 0.0, error=float(len(found)), bound=0.0, index=(),
        elements=1, detail="; ".join(map(str, found[:3])),
    )  # fmt: skip
    return (check,), ()


def _memory(kernel: Kernel, problem: Problem, given: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Role]]:
    operation = operation_for(problem)
    views = dict(given)
    roles: dict[str, Role] = dict.fromkeys(operation.inputs, "input")
    for name in operation.outputs:
        shape, dtype = shapes(problem)[name]
        placement = inputs.placement_for(problem.layout, len(shape))
        views[name] = inputs.unwritten(name, shape, DTYPES[dtype], placement).view
        roles[name] = "output"
    for name, (shape, kind) in kernel.workspaces(**{name: views[name] for name in operation.inputs}).items():
        views[name] = inputs.unwritten(name, shape, kind, Placement(order=tuple(range(len(shape))))).view
        roles[name] = "workspace"
    return views, roles


EVERY: Mapping[str, Judge] = {
    "gate": Judge("gate", "what `tune` asks of every candidate before it may be timed", _gate),
    "fp64": Judge("fp64", "the same source in fp64 separates the algorithm from its roundings", _fp64),
    "outputs": Judge("outputs", "outputs may lie as they like", _outputs),
    "shadow": Judge("shadow", "every access lies inside a tensor, and nothing is read before it was written", _shadow),
    "far": Judge("far", "offsets that leave 32 bits are computed in 64", _far),
    **JUDGES,
    **CRITERIA_JUDGES,
}
