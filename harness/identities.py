"""Properties that tie the outputs of attention to each other and to its inputs by an equation or an inequality.

Most need no reference, so that they also judge sizes for which none can be computed; tolerances are the derived bounds of
the outputs that take part, carried through the equation.
"""

import math

import torch
from torch import Tensor

from harness import oracle
from harness.bounds import RoundingContract
from harness.compare import OutputCheck
from harness.laws import (
    BOTH,
    MEMORY,
    Asked,
    Property,
    Trial,
    coarse_values,
    filled,
    group_sum,
    repeated,
    seen,
    unmasked,
)
from harness.problem import Problem

# Terms of first order in a sensitivity leave out products of two errors, each far below a few percent.
_SLACK = 1.05


def _memory(trial: Trial) -> None:
    """One ordinary run without a fault; the trial itself collects faults."""
    trial.ask(trial.drawn())
    if not trial.faults:
        trial.checks.append(
            OutputCheck(output=MEMORY, case=str(trial.problem), ratio=0.0, error=0.0, bound=0.0, index=(), elements=1)
        )


def _hull(trial: Trial) -> None:
    """min V <= out <= max V over visible keys, max s <= lse <= max s + ln n."""
    asked = trial.ask(trial.drawn())
    expected = trial.expectation(asked)
    mask = seen(trial.problem)
    rows = mask.any(1)
    low, high = (torch.zeros(asked.outputs["out"].shape, dtype=torch.float64) for _ in range(2))
    values = repeated(trial.problem, asked.values["v"].double())
    for row in rows.nonzero().flatten().tolist():
        visible = values[:, :, mask[row]]
        low[:, :, row], high[:, :, row] = visible.amin(2), visible.amax(2)
    trial.between(asked, "out", asked.outputs["out"], (low, high), "hull of V", expected.bounds["out"])
    if "lse" not in asked.outputs:
        return
    for block in oracle.rows(trial.problem, asked.values):
        found = asked.outputs["lse"].flatten(0, 1)[block.heads, block.queries]
        least = block.maximum.masked_fill(block.lse == -math.inf, -math.inf)
        most = least + block.visible.sum(-1).double().log()
        bound = expected.bounds["lse"].flatten(0, 1)[block.heads, block.queries]
        trial.between(asked, "lse", found, (least, most), "largest score", bound)


def _halves(trial: Trial, values: dict[str, Tensor]) -> tuple[Asked, Asked, Asked]:
    """The whole problem, and two parts of its keys."""
    problem = trial.problem
    cut = int(trial.rng.integers(1, problem.kv_len))
    whole = trial.ask(values)
    parts = []
    for keys in (slice(0, cut), slice(cut, problem.kv_len)):
        part = {name: value[:, :, keys] if name in ("k", "v") else value for name, value in values.items()}
        parts.append(trial.ask(part, problem.replace(kv_len=part["k"].shape[2])))
    return whole, parts[0], parts[1]


def _divisible(problem: Problem, contract: RoundingContract) -> str | None:
    return unmasked(problem, contract) or (None if problem.kv_len > 1 else "has one key only")


def _split(trial: Trial) -> None:
    """The answers for two parts of the keys, merged by their log-sum-exps, are the answer for all keys."""
    whole, *parts = _halves(trial, trial.drawn())
    if "lse" not in whole.outputs:
        return
    expected = trial.expectation(whole)
    errors = [trial.expectation(part).bounds for part in parts]
    lse = torch.logaddexp(*(part.outputs["lse"].double() for part in parts))
    weights = [(part.outputs["lse"].double() - lse).exp().unsqueeze(-1) for part in parts]
    out = sum(
        (weight * part.outputs["out"].double() for weight, part in zip(weights, parts, strict=True)), 0 * weights[0]
    )
    # d lse = sum w d lse_i; d out = sum w d out_i + sum w (out_i - out) d lse_i.
    lse_bound, out_bound = expected.bounds["lse"].clone(), expected.bounds["out"].clone()
    for weight, part, error in zip(weights, parts, errors, strict=True):
        lse_bound += _SLACK * weight.squeeze(-1) * error["lse"]
        distance = (part.outputs["out"].double() - out).abs()
        out_bound += _SLACK * weight * (error["out"] + distance * error["lse"].unsqueeze(-1))
    trial.check(whole, "lse", whole.outputs["lse"], lse, "merged parts", bound=lse_bound)
    trial.check(whole, "out", whole.outputs["out"], out, "merged parts", bound=out_bound)


def _monotone(trial: Trial) -> None:
    """More keys, a larger log-sum-exp."""
    whole, part, _ = _halves(trial, trial.drawn())
    if "lse" not in whole.outputs:
        return
    bound = trial.expectation(whole).bounds["lse"] + trial.expectation(part).bounds["lse"]
    found = whole.outputs["lse"]
    highest = torch.full_like(found, math.inf, dtype=torch.float64)
    trial.between(whole, "lse", found, (part.outputs["lse"].double(), highest), "more keys", bound)


def _duplicates(trial: Trial) -> None:
    """Every key twice: out and dq stay, lse grows by ln 2, the copies share dk and dv."""
    problem = trial.problem
    single = trial.ask(trial.drawn(), structured=True)
    copies = {
        name: torch.cat([value, value], 2) if name in ("k", "v") else value
        for name, value in single.values.items()
        if name not in ("out", "lse")
    }
    double = trial.ask(copies, problem.replace(kv_len=2 * problem.kv_len), structured=True)
    bound, other = trial.expectation(single).bounds, trial.expectation(double).bounds
    for name, found in double.outputs.items():
        if name not in single.outputs:
            continue
        value, allowed = found.double(), other[name]
        if name == "lse":
            value = value - math.log(2.0)
        if name in ("dk", "dv"):
            value, allowed = (torch.add(*part.chunk(2, 2)) for part in (value, allowed))
        trial.check(single, name, single.outputs[name], value, "keys twice", bound=bound[name] + allowed)


def _score_shift(trial: Trial) -> None:
    """One vector w added to all keys: every score of a row moves by the same number."""
    problem = trial.problem
    values = coarse_values(trial)
    first = trial.ask(values, structured=True)
    shift = torch.from_numpy(trial.rng.integers(-2, 3, problem.head_dim) * 1.0).to(values["k"].dtype)
    moved = trial.ask({**values, "k": values["k"] + shift}, structured=True)
    bound, other = trial.expectation(first).bounds, trial.expectation(moved).bounds
    rises = problem.softmax_scale * (values["q"].double() @ shift.double())
    for name, found in moved.outputs.items():
        # dk does not change either: it is a sum of dS q.
        value = found.double() - rises if name == "lse" else found.double()
        trial.check(first, name, first.outputs[name], value, "all keys moved", bound=bound[name] + other[name])


def _linearity(trial: Trial) -> None:
    """out(V1 + V2) = out(V1) + out(V2)."""
    values, more = coarse_values(trial), coarse_values(trial)
    one = trial.ask(values)
    two = trial.ask({**values, "v": more["v"]})
    both = trial.ask({**values, "v": values["v"] + more["v"]})
    bound = sum((trial.expectation(asked).bounds["out"] for asked in (one, two)), trial.expectation(both).bounds["out"])
    total = one.outputs["out"].double() + two.outputs["out"].double()
    trial.check(both, "out", both.outputs["out"], total, "sum of two V", bound=bound)


def _euler(trial: Trial) -> None:
    """<V, dV> = <out, dout> and <Q, dQ> = <K, dK>, for each key/value head."""
    problem = trial.problem
    asked = trial.ask(trial.drawn())
    bound, contract = trial.expectation(asked).bounds, trial.contract
    values = {name: value.double() for name, value in asked.values.items()}
    found = {name: value.double() for name, value in asked.outputs.items()}
    inner = {name: (values[name] * found[f"d{name}"]).flatten(2).sum(2) for name in ("q", "k", "v")}
    noise = {name: (values[name].abs() * bound[f"d{name}"]).flatten(2).sum(2) for name in ("q", "k", "v")}
    upstream = group_sum(problem, (values["out"] * values["dout"]).flatten(2).sum(2))
    # The out that was handed over is itself rounded.
    rounding = contract.storage * values["out"].abs() + contract.tiny
    allowed = noise["v"] + group_sum(problem, (rounding * values["dout"].abs()).flatten(2).sum(2))
    trial.check(asked, "dv", inner["v"], upstream, "<V, dV> = <out, dout>", bound=allowed)
    trial.check(
        asked, "dk", inner["k"], group_sum(problem, inner["q"]), "<K, dK> = <Q, dQ>",
        bound=noise["k"] + group_sum(problem, noise["q"]),
    )  # fmt: skip


IDENTITIES: tuple[Property, ...] = (
    Property(
        name="memory", kind="exact", passes=BOTH, excludes=filled, relation=_memory, free=True,
        why="every element of every output is written and nothing else is: neither inputs nor memory around a tensor.",
    ),
    Property(
        name="hull", kind="inequality", passes=("fwd",), excludes=filled, relation=_hull,
        why="weights are positive and add up to 1, so out lies between the smallest and the largest visible V; lse lies"
        " between the largest score and that plus ln n. Exceeded by no more than the bound.",
    ),
    Property(
        name="split", kind="tolerance", passes=("fwd",), excludes=_divisible, relation=_split,
        why="a softmax over two sets of keys is their softmaxes weighted by exp(lse_i - lse). Within the bounds of all three.",
    ),
    Property(
        name="more keys", kind="inequality", passes=("fwd",), excludes=_divisible, relation=_monotone,
        why="every key adds a positive exponential. Within the bounds of both.",
    ),
    Property(
        name="duplicate keys", kind="tolerance", passes=BOTH, excludes=unmasked, relation=_duplicates,
        why="equal keys share their weight equally. Within the bounds of both.",
    ),
    Property(
        name="score shift", kind="tolerance", passes=BOTH, excludes=filled, relation=_score_shift,
        why="softmax does not change when all scores of a row move together, and lse moves with them; dq only stays because"
        " the dS of a row add up to 0. Within the bounds of both.",
    ),
    Property(
        name="linearity", kind="tolerance", passes=("fwd",), excludes=filled, relation=_linearity,
        why="weights do not depend on V. Within the bounds of all three.",
    ),
    Property(
        name="Euler", kind="tolerance", passes=("bwd",), excludes=filled, relation=_euler,
        why="<out, dout> is homogeneous of degree 1 in V, and depends on Q and K only through their products. Within the"
        " bounds of the gradients.",
    ),
)  # fmt: skip
