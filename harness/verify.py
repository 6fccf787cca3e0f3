"""The gate: whether a candidate computes attention, asked of small problems of the same family before it may be timed.

`harness.gate_cases` says which. Refuses to time anything and to catch what a kernel raises: a crash is the caller's to report,
who runs this in a process of its own.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from harness import bounds, compare, inputs, oracle, paging
from harness.bounds import Expectation, RoundingContract
from harness.compare import OutputCheck, Status, Verdict
from harness.gate_cases import GateCase, blocks_of, gate_cases
from harness.operation import operation_for, shapes
from harness.problem import Problem
from harness.space import Value
from harness.subject import Kernel, Memory, Run, calls_pytorch, launch_guarded, products_of, shifted

ORACLE = "fp64 reference, derived elementwise bounds"
SHADOW = "shadow memory"
# Of a kernel that PyTorch compiles: no code of it ran.
REFERENCE = ", asked of PyTorch's own reference on the CPU"
INTERPRETER_BLIND = ("num_warps", "num_stages", "races", "compiler")
# One problem of a family cannot see what only its size brings about.
SIZE_BLIND = ("offsets beyond 2^31", "sums longer than a few tiles")

# Counts up to here divide to the correctly rounded quotient, even with an approximate fp32 division (2 ulp).
_EXACT_COUNTS = 1 << 10

# The case that runs under shadow memory in the interpreter: ragged at every end, with gaps between rows. Watching costs
# little more than running, but what leads the kernel astray is then kept from doing harm, so the others run without.
_WATCHED = 2
# Programs that write the same bits twice waste time, and are right.
_HARMLESS = ("double write",)
# A race that shows in one run of three stays hidden in six runs of one case 1 time in 11, and in those of four cases less than
# once in 10,000. The interpreter runs one program after the other, so there a second run could only repeat the first.
_DEVICE_RUNS = 6

Where = Literal["interpreter", "device"]


def gate(
    kernel: Kernel,
    problem: Problem,
    config: Mapping[str, Value],
    *,
    seed: int,
    where: Where,
    device: str = "cpu",
) -> Verdict:
    """Ask `kernel` under `config` every case of `gate_cases`, and judge.

    Each case runs on guarded inputs and poisoned outputs and workspaces. On a device it runs again in fresh memory, with
    two kinds of poison in turn, and must give the same bits, unless the problem allows others; in Triton's interpreter every
    access of one case is checked by shadow memory. The status is "wrong" if an output exceeds its bound, an element was not
    written, an input or a guard was written to, or an access was not allowed; else "flaky" if two runs differ; "unknown" if
    nothing could be compared.
    What the kernel raises reaches the caller.

    A backward kernel is given the exact out and lse, rounded to the dtype and to fp32: what an ideal forward pass hands
    over, so that a fault of the forward kernel cannot be taken for one of the backward kernel, nor hide one.
    """
    cases = gate_cases(problem, config, unit=where == "device")
    contract = _contract(kernel, problem, config, where)
    foreign = calls_pytorch(kernel)
    shadowed = where == "interpreter" and not foreign and _interpreting()
    checks: list[OutputCheck] = []
    faults: list[str] = []
    differences: list[str] = []
    for position, case in enumerate(cases):
        question = _ask(case, seed, contract, device)
        watched = _Watched(kernel, question) if shadowed and position == _WATCHED else None
        first = _answer(watched or kernel, question, config, large=watched is not None)
        checks += compare.judge(first.views(), question.expected, case=question.name)
        faults += first.faults(question.name) + (watched.found if watched else [])
        for repeat in range(1, _DEVICE_RUNS if where == "device" else 1):
            again = _answer(kernel, question, config, large=repeat % 2 == 1)
            faults += [fault for fault in again.faults(question.name) if fault not in faults]
            if problem.nondeterministic:
                # Its bits may differ, if every run is right.
                checks += compare.judge(again.views(), question.expected, case=question.name)
            else:
                differences += _differences(first, again, question.name)
    status = compare.status_of(checks)
    if faults:
        status = "wrong"
    elif status == "passed" and differences:
        status = "flaky"
    return Verdict(
        status=status,
        where=where,
        oracle=f"{ORACLE}, {SHADOW}" if shadowed else ORACLE + (REFERENCE if foreign and where != "device" else ""),
        cases=tuple(dict.fromkeys(str(case.problem) for case in cases)),
        seed=seed,
        checks=tuple(checks),
        blind_to=(*_blind_to(kernel, where), *SIZE_BLIND),
        detail=_detail(status, checks, faults, differences),
    )


def _contract(kernel: Kernel, problem: Problem, config: Mapping[str, Value], where: Where) -> RoundingContract:
    if calls_pytorch(kernel):
        return bounds.library_contract(problem)
    products = products_of(config, where)
    contract = bounds.contract_for(problem.dtype, key_block=blocks_of(config).least_keys, fp32_products=products)
    return shifted(contract, kernel, problem.dtype, config)


def _blind_to(kernel: Kernel, where: Where) -> tuple[str, ...]:
    if where == "device":
        return ("the code for one length: others are compiled for any",) if calls_pytorch(kernel) else ()
    return tuple(getattr(kernel, "UNSEEN", ())) or INTERPRETER_BLIND


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Question:
    """A case with its input values and what is expected. The values are never given away, only copies."""

    asked: GateCase
    name: str
    values: Mapping[str, Tensor]
    expected: Expectation
    device: str


@functools.lru_cache(maxsize=32)
def _ask(asked: GateCase, seed: int, contract: RoundingContract, device: str) -> _Question:
    """Cached, because the candidates of one tune ask the same few questions."""
    case = asked.problem
    values = asked.values(seed)
    if case.pass_ == "fwd":
        expected = bounds.expect_forward(case, values, contract, structured=asked.structured)
        if asked.recipe == "counting" and contract.operand and case.kv_len < _EXACT_COUNTS and not case.dropout:
            expected = expected.exact("out", inputs.DTYPES[shapes(case)["out"][1]])
    else:
        expected = bounds.expect_backward(case, values, contract, structured=asked.structured)
        made = oracle.forward(case, values)
        values |= {"out": made["out"].to(inputs.DTYPES[case.dtype]), "lse": made["lse"].float()}
    on_device = Expectation(
        truth={name: truth.to(device) for name, truth in expected.truth.items()},
        bounds={name: bound.to(device) for name, bound in expected.bounds.items()},
        largest=expected.largest,
    )
    return _Question(asked=asked, name=f"{case} [{asked.recipe}]", values=values, expected=on_device, device=device)


def _answer(kernel: Kernel, question: _Question, config: Mapping[str, Value], *, large: bool) -> Run:
    """Launch everything on fresh memory; `large` poisons with a large number instead of NaN."""
    case, device, placements = question.asked.problem, question.device, question.asked.placements()
    operation = operation_for(case)
    given = [inputs.place(name, question.values[name], placements[name], device=device) for name in operation.inputs]
    outputs = {name: placements[name] for name in operation.outputs}
    return launch_guarded(kernel, case, given, config, Memory(device=device, large=large, outputs=outputs))


class _Watched:
    """A kernel whose launches run under shadow memory; `found` says in words what was seen."""

    def __init__(self, kernel: Kernel, question: _Question) -> None:
        self.PASS = kernel.PASS
        self.found: list[str] = []
        self.workspaces: Callable[..., Any] = kernel.workspaces
        self._kernel = kernel
        self._question = question

    def launches(self, **arguments: Any) -> Any:
        launches = list(self._kernel.launches(**arguments))
        tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
        return [_Together(lambda: self._run(launches, tensors))] if launches else []

    def _run(self, launches: list[Any], tensors: Mapping[str, Tensor]) -> None:
        from harness.shadow import Role, shadow  # on a device nothing is interpreted

        operation = operation_for(self._question.asked.problem)
        roles: dict[str, Role] = dict.fromkeys(tensors, "workspace")
        roles.update(dict.fromkeys(operation.inputs, "input"))
        roles.update(dict.fromkeys(operation.outputs, "output"))
        with shadow(tensors, roles, holes=paging.holes(self._question.asked.problem, tensors)) as watch:
            for launch in launches:
                launch.run()
        self.found += [
            f"{finding} in `{self._question.name}`" for finding in watch.findings if finding.kind not in _HARMLESS
        ]


@dataclass(frozen=True, slots=True)
class _Together:
    """All launches of a kernel as one, because what one of them wrote another may read."""

    run: Callable[[], None]


def _interpreting() -> bool:
    """Whether Triton interprets in this process; a fake kernel needs no Triton, and cannot be watched."""
    import triton  # whoever only reads verdicts needs none

    return bool(triton.knobs.runtime.interpret)


def _differences(first: Run, second: Run, case: str) -> list[str]:
    found = []
    for one, two in zip(first.made, second.made, strict=True):
        differing = one.bits != two.bits
        count = int(differing.sum())
        if count:
            index = ", ".join(str(int(position)) for position in differing.nonzero()[0])
            found.append(
                f"{count} of {one.view.numel()} elements of {one.name} of `{case}` differ between two"
                f" runs, first [{index}]"
            )
    return found


def _detail(status: Status, checks: list[OutputCheck], faults: list[str], differences: list[str]) -> str:
    """The reasons in words, the worst element first; empty for a pass."""
    if status == "passed":
        return ""
    reasons = []
    failed = [check for check in checks if not check.ratio <= 1]
    if failed:
        reasons.append(compare.sentence(compare.worst(failed)))
        if len(failed) > 1:
            names = sorted({check.output for check in failed})
            reasons.append(f"{len(failed)} of {len(checks)} comparisons failed ({', '.join(names)})")
    if not checks:
        reasons.append("nothing could be compared")
    return "; ".join(reasons + faults[:3] + differences[:3])
