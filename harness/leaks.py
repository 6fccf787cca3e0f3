"""Properties about what must not be seen: invisible keys, other rows, other heads, keys that are appended later.

Hidden numbers take part with weight exactly 0, so the outputs that do not see them keep their bits, whatever the numbers are
(large ones; NaN where no sum touches them). `harness.metamorphic` says when bits may be asked for.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from harness.bounds import RoundingContract
from harness.laws import ALL, BOTH, STEADY, Asked, Property, Trial, filled, repeated, seen, several_heads
from harness.problem import Problem

_LARGE = 2.0**12


def _keys_leak(trial: Trial) -> None:
    """Other values, large ones, in some keys of one head: rows that do not see them keep their bits."""
    problem = trial.problem
    first = trial.ask(trial.drawn())
    batch, head = int(trial.rng.integers(problem.batch)), int(trial.rng.integers(problem.kv_heads))
    start = int(trial.rng.integers(problem.kv_len))
    stop = int(trial.rng.integers(start, problem.kv_len)) + 1
    values = {name: first.values[name].clone() for name in ("q", "k", "v", "dout") if name in first.values}
    for name in ("k", "v"):
        place = values[name][batch, head, start:stop]
        signs = torch.from_numpy(trial.rng.integers(0, 2, tuple(place.shape)) * 2.0 - 1)
        place.copy_(signs * _LARGE)
    untouched = torch.ones(problem.batch, problem.kv_heads, problem.q_len, dtype=torch.bool)
    untouched[batch, head] = ~seen(problem)[:, start:stop].any(1)
    untouched = repeated(problem, untouched)
    second = trial.ask(_given(trial, problem, values, first, untouched))
    where = {"out": untouched.unsqueeze(-1), "lse": untouched, "dq": untouched.unsqueeze(-1)}
    expected = {name: first.outputs[name] for name in where if name in first.outputs}
    trial.agree(second, expected, f"keys {start}:{stop} of head {head} changed", exact=ALL, where=where)


def _given(
    trial: Trial, problem: Problem, values: Mapping[str, Tensor], first: Asked, kept: Tensor
) -> dict[str, Tensor]:
    """`values` with the out and lse that belong to them; rows in `kept` (batch, q_heads, q_len of the first question) have
    the very bits of the first question."""
    completed = trial.completed(problem, values)
    if problem.pass_ == "bwd":
        for name, rows in (("out", kept.unsqueeze(-1)), ("lse", kept)):
            old = completed[name][:, :, : kept.shape[2]]
            old.copy_(torch.where(rows, first.values[name], old))
    return completed


def _queries_leak(trial: Trial) -> None:
    """Other values in some queries: other rows, and keys that those queries do not see, keep their bits."""
    problem = trial.problem
    first = trial.ask(trial.drawn())
    batch, head = int(trial.rng.integers(problem.batch)), int(trial.rng.integers(problem.q_heads))
    start = int(trial.rng.integers(problem.q_len))
    stop = int(trial.rng.integers(start, problem.q_len)) + 1
    values = {name: first.values[name].clone() for name in ("q", "k", "v", "dout") if name in first.values}
    for name in ("q", "dout"):
        if name in values:
            values[name][batch, head, start:stop] *= -2.0
    untouched = torch.ones(problem.batch, problem.q_heads, problem.q_len, dtype=torch.bool)
    untouched[batch, head, start:stop] = False
    keys = torch.ones(problem.batch, problem.kv_heads, problem.kv_len, dtype=torch.bool)
    keys[batch, head // problem.group] = ~seen(problem)[start:stop].any(0)
    second = trial.ask(_given(trial, problem, values, first, untouched))
    rows, columns = untouched.unsqueeze(-1), keys.unsqueeze(-1)
    where = {"out": rows, "lse": untouched, "dq": rows, "dk": columns, "dv": columns}
    trial.agree(second, first.outputs, f"queries {start}:{stop} of head {head} changed", exact=ALL, where=where)


def _heads_leak(trial: Trial) -> None:
    """NaN in all of one head's keys and queries: all other groups keep their bits."""
    problem = trial.problem
    first = trial.ask(trial.drawn())
    batch, head = int(trial.rng.integers(problem.batch)), int(trial.rng.integers(problem.kv_heads))
    members = slice(head * problem.group, (head + 1) * problem.group)
    values = {}
    for name, value in first.values.items():
        values[name] = value.clone()
        values[name][batch, head if name in ("k", "v") else members] = torch.nan
    second = trial.ask(values)
    groups = torch.ones(problem.batch, problem.kv_heads, 1, dtype=torch.bool)
    groups[batch, head] = False
    heads = repeated(problem, groups)
    where = {
        "out": heads.unsqueeze(-1), "lse": heads, "dq": heads.unsqueeze(-1), "dk": groups.unsqueeze(-1),
        "dv": groups.unsqueeze(-1),
    }  # fmt: skip
    # A bound cannot be computed from NaN; the first question has the same one where it counts.
    judged = Asked(problem=problem, values=first.values, outputs=second.outputs, structured=False)
    trial.agree(judged, first.outputs, f"head {head} of batch {batch} is NaN", exact=ALL, where=where)


def _appended(trial: Trial) -> None:
    """More queries and keys behind the last: rows that were there, and see no new key, keep their bits."""
    problem = trial.problem
    count = int(trial.rng.integers(1, 40))
    longer = problem.replace(
        q_len=problem.q_len if problem.top_left else problem.q_len + count, kv_len=problem.kv_len + count
    )
    untouched = ~seen(longer)[: problem.q_len, problem.kv_len :].any(1)
    values = trial.drawn()
    if trial.backward:
        values["dout"] *= untouched.to(values["dout"].dtype)[:, None]
    first = trial.ask(values)
    fresh = trial.drawn(problem=longer)
    joined = {name: torch.cat([value, fresh[name][:, :, value.shape[2] :] * 8], 2) for name, value in values.items()}
    if trial.backward:
        joined["dout"][:, :, problem.q_len :] = 0.0
    rows = untouched.expand(problem.batch, problem.q_heads, -1)
    second = trial.ask(_given(trial, longer, joined, first, rows), longer)
    old = {name: value[:, :, : first.outputs[name].shape[2]].contiguous() for name, value in second.outputs.items()}
    judged = Asked(problem=problem, values=first.values, outputs=old, structured=False)
    # A left edge is attended out of order: which keys come first then depends on the lengths. So do the parts of keys.
    exact = ("out", "lse", "dq") if problem.window_left is None and trial.contract.in_order else ()
    where = {"out": rows.unsqueeze(-1), "lse": rows, "dq": rows.unsqueeze(-1)}
    trial.agree(judged, first.outputs, f"{count} keys appended", exact=exact, where=where)


def _right_bounded(problem: Problem, contract: RoundingContract) -> str | None:
    if problem.right is None:
        return "does not hide keys on the right"
    return filled(problem, contract)


LEAKS: tuple[Property, ...] = (
    Property(
        name="no leak from keys", kind="exact", passes=BOTH, excludes=filled, relation=_keys_leak,
        why="the weight of an invisible key is exactly 0, and 0 times a finite number, added, changes no bit." + STEADY,
    ),
    Property(
        name="no leak from queries", kind="exact", passes=BOTH, excludes=filled, relation=_queries_leak,
        why="rows are independent of each other, and a key gets exactly 0 from a query that does not see it." + STEADY,
    ),
    Property(
        name="no leak between heads", kind="exact", passes=BOTH, excludes=several_heads, relation=_heads_leak,
        why="no element of another head or batch entry enters a sum, so not even NaN may show." + STEADY,
    ),
    Property(
        name="appended keys", kind="exact", passes=BOTH, excludes=_right_bounded, relation=_appended,
        why="old rows see no new key, whose blocks add exact zeros: out, lse and dq keep their bits where blocks are visited"
        " in ascending order (no left window, keys not divided), else they agree within two bounds, as dk and dv do." + STEADY,
    ),
)  # fmt: skip
