"""The gate: whether a candidate computes attention, asked of small problems of the same family before it may be timed.

The small problems are built so that every kind of tile occurs (untouched by the mask, on the diagonal, on a window's edge,
ragged at the end, without any visible key), so a candidate that is wrong anywhere in the family is wrong there. Refuses to
time anything and to catch what a kernel raises: a crash is the caller's to report, who runs this in a process of its own.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from harness import bounds, compare, inputs, oracle
from harness.bounds import Expectation, RoundingContract
from harness.compare import OutputCheck, Status, Verdict
from harness.operation import operation_for
from harness.problem import Problem
from harness.space import Value
from harness.subject import Kernel, Memory, Run, launch_guarded

ORACLE = "fp64 reference, derived elementwise bounds"
INTERPRETER_BLIND = ("num_warps", "num_stages", "races", "compiler")
# One problem of a family cannot see what only its size brings about.
SIZE_BLIND = ("offsets beyond 2^31", "sums longer than a few tiles")

# Counts up to here divide to the correctly rounded quotient, even with an approximate fp32 division (2 ulp).
_EXACT_COUNTS = 1 << 10

# The interpreter runs one program after the other: only what was never written can differ, and one case shows that.
_ASKED_TWICE = 1

Where = Literal["interpreter", "device"]


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Tile sides of a config: the largest over queries and over keys, the least over keys and of all. `span` is a multiple
    of every side, since sides are powers of two."""

    rows: int
    keys: int
    least_keys: int
    least: int

    @property
    def span(self) -> int:
        return max(self.rows, self.keys)


def gate_cases(problem: Problem, config: Mapping[str, Value]) -> tuple[Problem, ...]:
    """The small problems that a candidate is asked, depending on the family and on the config's tile sides only.

    Same pass, dtype, head dims, layout, scale, kind of mask and alignment, in three cases:
    - *like*: lengths and windows that the tiles divide just when they divide the real ones, with tiles inside the mask;
    - *ragged*: more queries than keys, so some see nothing in a causal problem, and all heads of a group;
    - *short*: fewer queries than keys; two batches, and two key/value heads if there is more than one.
    Groups keep their size up to 4 query heads in *ragged*, 2 (3 if odd) in the others; larger ones become 4 (3 if odd).
    """
    blocks = _blocks(config)
    whole = _group(problem, 4)
    part = _group(problem, 2)
    heads = min(problem.kv_heads, 2)
    span = blocks.span
    ragged = (span + blocks.least) // 2 + 5
    near = {
        "window_left": _least(problem.window_left, span // 2 + 3),
        "window_right": _least(problem.window_right, span // 4 + 1),
    }
    return (
        _similar(problem, blocks).replace(batch=1, kv_heads=1, q_heads=part),
        problem.replace(batch=1, kv_heads=1, q_heads=whole, q_len=ragged + 11, kv_len=ragged, **near),
        problem.replace(
            batch=2, kv_heads=heads, q_heads=heads * part, q_len=blocks.rows // 4 + 1, kv_len=blocks.keys + 5, **near
        ),
    )


def _group(problem: Problem, limit: int) -> int:
    """Query heads for each key/value head: more than `limit` find nothing that `limit`, or 3 if odd, do not."""
    if problem.group <= limit:
        return problem.group
    return 3 if problem.group % 2 else limit


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

    Each case runs on guarded inputs and poisoned outputs and workspaces, then again in fresh memory with another poison
    (in the interpreter, which has no races, only *ragged*), and must give the same bits. The status is "wrong" if an
    output exceeds its bound, an element was not written, an input or a guard was written to; else "flaky" if two runs
    differ; "unknown" if nothing could be compared. What the kernel raises reaches the caller.

    A backward kernel is given the exact out and lse, rounded to the dtype and to fp32: what an ideal forward pass hands
    over, so that a fault of the forward kernel cannot be taken for one of the backward kernel, nor hide one.
    """
    cases = gate_cases(problem, config)
    contract = bounds.contract_for(problem.dtype, key_block=_blocks(config).least_keys)
    checks: list[OutputCheck] = []
    faults: list[str] = []
    differences: list[str] = []
    for position, (case, recipe) in enumerate(zip(cases, _recipes(problem), strict=True)):
        question = _ask(case, seed, recipe, contract, device)
        first = _answer(kernel, question, config, large=False)
        checks += compare.judge(first.views(), question.expected, case=question.name)
        faults += first.faults(question.name)
        if where == "interpreter" and position != _ASKED_TWICE:
            continue
        second = _answer(kernel, question, config, large=True)
        faults += [fault for fault in second.faults(question.name) if fault not in faults]
        differences += _differences(first, second, question.name)
    status = compare.status_of(checks)
    if faults:
        status = "wrong"
    elif status == "passed" and differences:
        status = "flaky"
    return Verdict(
        status=status,
        where=where,
        oracle=ORACLE,
        cases=tuple(str(case) for case in cases),
        seed=seed,
        checks=tuple(checks),
        blind_to=(*(INTERPRETER_BLIND if where == "interpreter" else ()), *SIZE_BLIND),
        detail=_detail(status, checks, faults, differences),
    )


def _recipes(problem: Problem) -> tuple[str, ...]:
    return ("normal", "normal", "counting") if problem.pass_ == "fwd" else ("normal", "normal", "normal")


def _blocks(config: Mapping[str, Value]) -> _Blocks:
    def sides(word: str) -> list[int]:
        found = [value for name, value in config.items() if word in name and not isinstance(value, str | bool)]
        return found or [16]

    rows, keys = sides("block_m"), sides("block_n")
    return _Blocks(max(rows), max(keys), min(keys), min(rows + keys))


def _least(bound: int | None, limit: int) -> int | None:
    return None if bound is None else min(bound, limit)


def _similar(problem: Problem, blocks: _Blocks) -> Problem:
    """The problem with lengths and windows shortened by whole multiples of the tiles, so that all remainders are kept.

    A window side keeps at least two tiles, so that a tile inside it needs no mask, and lengths reach a tile beyond it.
    """
    span = blocks.span
    left, right = (
        None if side is None else _shortened(side, 2 * span - 1, span) for side in (problem.window_left, problem.right)
    )
    reach = max(left or 0, right or 0)
    least = reach + span if reach else span + 1
    q_len = _shortened(problem.q_len, least if problem.banded else 1, span)
    kv_len = _shortened(problem.kv_len, least, span)
    # What is longer stays longer, so that the diagonal begins on the same side.
    if problem.q_len < problem.kv_len and q_len >= kv_len:
        kv_len += span
    if problem.q_len > problem.kv_len and q_len <= kv_len:
        q_len += span
    return problem.replace(q_len=q_len, kv_len=kv_len, window_left=left, window_right=None if problem.causal else right)


def _shortened(length: int, least: int, span: int) -> int:
    """The smallest number of at least `least` that `length` exceeds by a multiple of `span`; `length` if it is smaller."""
    return length if length < least else least + (length - least) % span


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Question:
    """A case with its input values and what is expected. The values are never given away, only copies."""

    case: Problem
    name: str
    values: Mapping[str, Tensor]
    expected: Expectation
    device: str


@functools.lru_cache(maxsize=16)
def _ask(case: Problem, seed: int, recipe: str, contract: RoundingContract, device: str) -> _Question:
    """Cached, because the candidates of one tune ask the same few questions."""
    values = inputs.draw(case, seed=seed, recipe=recipe)
    structured = inputs.recipe_for(recipe).structured
    if case.pass_ == "fwd":
        expected = bounds.expect_forward(case, values, contract, structured=structured)
        if recipe == "counting" and contract.operand and case.kv_len < _EXACT_COUNTS:
            expected = expected.exact("out", inputs.DTYPES[case.dtype])
    else:
        expected = bounds.expect_backward(case, values, contract, structured=structured)
        made = oracle.forward(case, values)
        values |= {"out": made["out"].to(inputs.DTYPES[case.dtype]), "lse": made["lse"].float()}
    on_device = Expectation(
        truth={name: truth.to(device) for name, truth in expected.truth.items()},
        bounds={name: bound.to(device) for name, bound in expected.bounds.items()},
        largest=expected.largest,
    )
    return _Question(case=case, name=f"{case} [{recipe}]", values=values, expected=on_device, device=device)


def _answer(kernel: Kernel, question: _Question, config: Mapping[str, Value], *, large: bool) -> Run:
    """Launch everything on fresh memory; `large` poisons with a large number instead of NaN."""
    case, device = question.case, question.device
    given = []
    for name in operation_for(case).inputs:
        values = question.values[name]
        given.append(inputs.place(name, values, inputs.placement_for(case.layout, values.ndim), device=device))
    return launch_guarded(kernel, case, given, config, Memory(device=device, large=large))


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
