"""Properties that relate two answers of a subject: what must not change, or must change in a known way.

No reference is needed for those that are bitwise. They hold where equal numbers give equal bits wherever they lie
(`RoundingContract.reproducible`); elsewhere, and for sums whose order changes, two answers may lie two bounds apart.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from harness import inputs
from harness.bounds import RoundingContract
from harness.compare import OutputCheck
from harness.inputs import Placement
from harness.laws import (
    ALL,
    BOTH,
    STEADY,
    Property,
    Trial,
    coarse_values,
    filled,
    group_sum,
    repeated,
    several_heads,
    snaps,
    unmasked,
)
from harness.probes import class_probe
from harness.problem import Problem
from harness.subject import Subject

_LAYOUTS = ((0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (0, 1, 3, 2))


def _grouped(problem: Problem, contract: RoundingContract) -> str | None:
    return filled(problem, contract) or (None if problem.group > 1 else "has no groups")


def _slices(trial: Trial) -> None:
    """One batch entry and key/value head alone."""
    problem = trial.problem
    whole = trial.ask(trial.drawn())
    batch, head = int(trial.rng.integers(problem.batch)), int(trial.rng.integers(problem.kv_heads))
    members = slice(head * problem.group, (head + 1) * problem.group)

    def cut(name: str, value: Tensor) -> Tensor:
        return value[batch : batch + 1, slice(head, head + 1) if name in ("k", "v", "dk", "dv") else members]

    alone = trial.ask(
        {name: cut(name, value) for name, value in whole.values.items()},
        problem.replace(batch=1, kv_heads=1, q_heads=problem.group),
    )
    expected = {name: cut(name, value) for name, value in whole.outputs.items()}
    trial.agree(alone, expected, f"batch {batch}, head {head} alone", exact=ALL)


def _repeated_heads(trial: Trial) -> None:
    """K and V given to every query head."""
    problem = trial.problem
    grouped = trial.ask(trial.drawn())
    values = {name: repeated(problem, value) if name in ("k", "v") else value for name, value in grouped.values.items()}
    alone = trial.ask(values, problem.replace(kv_heads=problem.q_heads))
    rowwise = {name: value for name, value in grouped.outputs.items() if name in ("out", "lse", "dq")}
    trial.agree(alone, rowwise, "keys and values repeated", exact=() if trial.contract.one_tile else ALL)
    if trial.backward:
        bound, per_head = trial.expectation(grouped).bounds, trial.expectation(alone).bounds
        for name in ("dk", "dv"):
            total = group_sum(problem, alone.outputs[name].double())
            allowed = bound[name] + group_sum(problem, per_head[name])
            trial.check(grouped, name, grouped.outputs[name], total, "sum over the heads of a group", bound=allowed)


def _negation(trial: Trial) -> None:
    """Signs of (Q, K), of V and of dout drawn, not all positive."""
    first = trial.ask(trial.drawn())
    choice = int(trial.rng.integers(1, 8 if trial.backward else 4))
    scores, v, dout = (-1.0 if choice >> bit & 1 else 1.0 for bit in range(3))
    sign = {"q": scores, "k": scores, "v": v, "dout": dout, "out": v, "lse": 1.0}
    second = trial.ask({name: value * sign[name] for name, value in first.values.items()})
    sign |= {"dq": scores * v * dout, "dk": scores * v * dout, "dv": dout}
    expected = {name: value * sign[name] for name, value in first.outputs.items()}
    trial.agree(second, expected, f"signs of scores {scores:+.0f}, v {v:+.0f}, dout {dout:+.0f}", exact=ALL)


def _normal_in_both(first: Tensor, factor: float) -> Tensor:
    """Where neither x nor x * factor is subnormal; zeros are taken as normal."""
    smallest = torch.finfo(first.dtype).tiny * max(1.0, 1.0 / factor) * 2
    return (first.abs() >= smallest) | (first == 0)


def _balance(trial: Trial) -> None:
    """Q times 2^a, K times 2^-a or the scale times 2^-a."""
    problem = trial.problem
    first = trial.ask(coarse_values(trial))
    factor = 2.0 ** int(trial.rng.choice([-2, -1, 1, 2]))
    into_scale = bool(trial.rng.integers(2))
    values = dict(first.values)
    values["q"] = values["q"] * factor
    if into_scale:
        other = problem.replace(scale=problem.softmax_scale / factor)
    else:
        other = problem
        values["k"] = values["k"] / factor
    second = trial.ask(values, other)
    sizes = {"dq": 1 / factor, "dk": 1.0 if into_scale else factor}
    expected = {name: value * sizes.get(name, 1.0) for name, value in first.outputs.items()}
    where = {name: _normal_in_both(first.outputs[name], size) for name, size in sizes.items() if name in expected}
    what = f"q times {factor}, {'scale' if into_scale else 'k'} divided by it"
    trial.agree(second, expected, what, exact=ALL, where=where)


def _homogeneity(trial: Trial) -> None:
    """V times 2^a, dout times 2^b."""
    first = trial.ask(coarse_values(trial))
    v, dout = (2.0 ** int(trial.rng.integers(-2, 3)) for _ in range(2))
    sizes = {"v": v, "out": v, "dout": dout, "dq": v * dout, "dk": v * dout, "dv": dout}
    second = trial.ask({name: value * sizes.get(name, 1.0) for name, value in first.values.items()})
    expected = {name: value * sizes.get(name, 1.0) for name, value in first.outputs.items()}
    # dS is rounded to 16 bits on its own: in fp16 it may be subnormal, where rounding does not scale.
    exact = ("out", "lse", "dv") if trial.contract.tiny > 2.0**-64 else ALL
    where = {
        name: _normal_in_both(first.outputs[name], sizes[name]) for name in expected if name in sizes and name in exact
    }
    trial.agree(second, expected, f"v times {v}, dout times {dout}", exact=exact, where=where)


def _permuted(trial: Trial, length: int, axis: int, names: Sequence[str], what: str) -> None:
    """A permutation along one axis of some tensors, on a probe, where sums are exact in any order."""
    probe = class_probe(trial, bits=int(trial.rng.integers(0, 4)), dyadic=True)
    first = trial.ask(probe.values, probe.problem, structured=True)
    order = torch.from_numpy(trial.rng.permutation(length))

    def moved(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.index_select(axis, order) if name in names else value for name, value in values.items()}

    second = trial.ask(moved(first.values), probe.problem, structured=True)
    exact = [name for name in ALL if name != "lse"] if snaps(trial.contract) else []
    trial.agree(second, moved(first.outputs), f"{what} permuted", exact=exact)


def _value_columns(trial: Trial) -> None:
    _permuted(trial, trial.problem.v_head_dim, 3, ("v", "dout", "out", "dv"), "columns of v")


def _query_order(trial: Trial) -> None:
    _permuted(trial, trial.problem.q_len, 2, ("q", "out", "lse", "dout", "dq"), "queries")


def _key_order(trial: Trial) -> None:
    _permuted(trial, trial.problem.kv_len, 2, ("k", "v", "dk", "dv"), "keys")


def _layouts(trial: Trial, *, aligned: bool) -> None:
    """Every input with strides of its own, outputs in another layout."""
    problem = trial.problem
    values = trial.drawn()
    if trial.backward:
        values["dout"] = values["dout"][:, :, :1].expand_as(values["dout"]).contiguous()
    first = trial.ask(values, structured=trial.backward)
    placed = {name: _placed(trial, name, value, aligned=aligned) for name, value in first.values.items()}
    layout = str(trial.rng.choice(["bhsd", "bshd", "sbhd"]))
    second = trial.ask(placed, problem.replace(layout=layout), structured=trial.backward)
    strides = ", ".join(f"{name} {tuple(value.stride())}" for name, value in placed.items())
    trial.agree(second, first.outputs, f"strides {strides}", exact=ALL)


def _placed(trial: Trial, name: str, value: Tensor, *, aligned: bool) -> Tensor:
    """The same numbers elsewhere, between guards of NaN; what is the same in all rows may have stride 0."""
    if value.ndim != 4:
        order: tuple[int, ...] = tuple(int(axis) for axis in trial.rng.permutation(value.ndim))
    else:
        # Only rows whose elements follow each other are aligned.
        order = _LAYOUTS[int(trial.rng.integers(3 if aligned else len(_LAYOUTS)))]
    step = 16 if aligned else 1
    padding, shift = (int(trial.rng.integers(0, 5)) * step for _ in range(2))
    expanded = (2,) if name == "dout" and trial.rng.integers(2) else ()
    placement = Placement(order=order, row_padding=padding, shift=shift, expanded=expanded)
    return inputs.place(name, value, placement).view.to(value.device)


def _aligned_layouts(trial: Trial) -> None:
    _layouts(trial, aligned=True)


def _any_layouts(trial: Trial) -> None:
    _layouts(trial, aligned=False)


def _repeat(trial: Trial) -> None:
    """Other data at the same addresses, then the same data at other addresses."""
    problem = trial.problem
    structured = not trial.contract.reproducible
    if structured:
        # Without codes the numbers do not depend on the scale.
        bare = Trial(trial.subject, problem.bare, trial.rng)
        probes = [class_probe(bare, bits=0, dyadic=True) for _ in range(2)]
        problem = probes[0].problem
        earlier, later = (probe.values for probe in probes)
    else:
        earlier, later = trial.drawn(), trial.drawn()
    held = {name: value.clone() for name, value in trial.completed(problem, earlier).items()}
    trial.ask(held, problem, structured=structured)
    for name, value in trial.completed(problem, later).items():
        held[name].copy_(value)
    second = trial.ask(held, problem, structured=structured)
    elsewhere = {name: value.clone() for name, value in second.values.items()}
    third = trial.ask(elsewhere, problem, structured=structured)
    exact = ALL if trial.contract.reproducible or snaps(trial.contract) else ()
    trial.agree(third, second.outputs, "same data at another address", exact=exact)


def agreement(subjects: Sequence[Subject], problem: Problem, rng: np.random.Generator) -> tuple[OutputCheck, ...]:
    """Whether several subjects (one kernel under several configs) give the same bits on a probe; needs 16-bit tensors.

    What is exact in any order of summation cannot depend on tile sides, so a config that differs is wrong, or racy. Checks
    name the subject that differs from the first one; none if the contract leaves probes inexact or one refuses.
    """
    trials = [Trial(subject, problem, rng) for subject in subjects]
    if filled(problem, trials[0].contract) or not all(snaps(trial.contract) for trial in trials):
        return ()
    probe = class_probe(trials[0], bits=int(rng.integers(0, 4)), dyadic=True)
    answers = [
        (trial, trial.ask(probe.values, probe.problem, structured=True))
        for trial in trials
        if trial.subject.refuses(probe.problem) is None
    ]
    for position, (trial, asked) in enumerate(answers[1:], start=1):
        names = [name for name in answers[0][1].outputs if name != "lse"]
        expected = {name: answers[0][1].outputs[name] for name in names}
        trial.agree(asked, expected, f"subject {position}, {trial.subject.name}, against the first", exact=ALL)
    return tuple(check for trial in trials for check in (*trial.checks, *trial.faults))


PAIRS: tuple[Property, ...] = (
    Property(
        name="slices", kind="exact", passes=BOTH, excludes=several_heads, relation=_slices,
        why="batch entries and key/value heads are independent problems; assumes that the number of heads does not choose"
        " another algorithm." + STEADY,
    ),
    Property(
        name="repeated heads", kind="exact", passes=BOTH, excludes=_grouped, relation=_repeated_heads,
        why="grouped heads read the same numbers as heads that have copies: out, lse and dq keep their bits, unless the heads of"
        " a group are rows of one tile whose place matters; dk and dv are sums of the copies' within the bounds of all." + STEADY,
    ),
    Property(
        name="negation", kind="exact", passes=BOTH, excludes=filled, relation=_negation,
        why="scores are even in (Q, K) together, out is odd in V and gradients in dout; rounding to nearest and towards zero"
        " are symmetric." + STEADY,
    ),
    Property(
        name="balance", kind="exact", passes=BOTH, excludes=filled, relation=_balance,
        why="a power of two moved from Q to K or to the scale leaves scores and every rounding as they are; results that are"
        " subnormal are left out." + STEADY,
    ),
    Property(
        name="homogeneity", kind="exact", passes=BOTH, excludes=filled, relation=_homogeneity,
        why="out is linear in V and gradients in V and dout, and scaling by a power of two commutes with rounding; dq and dk"
        " of fp16, whose dS may be subnormal, within two bounds." + STEADY,
    ),
    Property(
        name="value columns", kind="exact", passes=BOTH, excludes=filled, relation=_value_columns,
        why="out, dv and a permutation of V's columns commute, and dP and delta are sums over them; on probes sums are exact in"
        " any order and at any place of a tile, so not a bit may change for 16-bit tensors; within two bounds otherwise.",
    ),
    Property(
        name="query order", kind="exact", passes=BOTH, excludes=unmasked, relation=_query_order,
        why="without a mask a row does not know its position. On probes, bitwise for 16-bit tensors, as for value columns;"
        " within two bounds otherwise.",
    ),
    Property(
        name="key order", kind="exact", passes=BOTH, excludes=unmasked, relation=_key_order,
        why="without a mask keys are a set. On probes, bitwise for 16-bit tensors, as for value columns; within two bounds"
        " otherwise.",
    ),
    Property(
        name="layout", kind="exact", passes=BOTH, excludes=filled, relation=_aligned_layouts, free=True,
        why="where numbers lie in memory is no part of the mathematics: strides, padding and offsets, in whole 16 bytes."
        + STEADY,
    ),
    Property(
        name="strides", kind="exact", passes=BOTH, excludes=filled, relation=_any_layouts, free=True,
        why="as for layout, with odd paddings and offsets, transposed matrices, and rows of dout that share memory." + STEADY,
    ),
    Property(
        name="repetition", kind="exact", passes=BOTH, excludes=filled, relation=_repeat, free=True,
        why="a function of its inputs gives equal bits for equal inputs, whatever was at these addresses before; where sums"
        " have no fixed order, probes on which every order is exact are asked.",
    ),
)  # fmt: skip
