"""Properties whose answers are known in advance, mostly to the last bit: probes that read mask, softmax and gradients back.

The probes rest on one construction. Keys carry codes of a few signs, and a query asks for a code so strongly that its
softmax is uniform over the visible keys whose code is nearest, and exactly zero elsewhere. Outputs are then means of small
integers over n keys. Where the tensors have 16 bits, casts of P, dS and the outputs erase the noise of exponentials,
logarithms and sums in fp32, because the exact numbers are representable (or, as quotients of small integers, far from any
rounding boundary): the kernel must give the correctly rounded exact result. With fp32 tensors derived bounds judge.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from harness import oracle
from harness.bounds import RoundingContract
from harness.inputs import DTYPES
from harness.laws import BOTH, Property, Trial, filled, group_sum, repeated, seen, snaps
from harness.operation import shapes
from harness.problem import Problem

# exp of minus this is below half the smallest fp32 number.
_GAP = 110.0
# Quotients of integers below this are not near a rounding boundary of 16-bit numbers: they keep relative distance
# 1 / (n 2^12) from it, which is above the error of an fp32 division of exact counts.
_EXACT_COUNTS = 1 << 10
_MOST_BITS = 5
# Beyond this the log-sum-exp of a lowered probe would be so large that its rounding shows in fp16.
_MOST_LOWERED = 3
_NEAR = 16


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probe:
    """A question about classes of keys. `count` (batch, q_heads, q_len) is the number n of keys over which the softmax of a
    row is uniform, 0 in an empty row."""

    problem: Problem
    values: dict[str, Tensor]
    count: Tensor


def class_probe(trial: Trial, *, bits: int, dyadic: bool) -> Probe:
    """Draw a probe with codes of `bits` signs (0: every visible key counts), for the problem under test.

    One more feature sometimes lowers all scores below 0. V is -1, 0 or 1; dout one-hot of either sign. `dyadic` makes
    backward results exact: dout is 0 in rows whose n is not a small power of two, and the scale becomes a power of two.
    """
    problem = trial.problem
    scale = problem.softmax_scale
    if dyadic:
        # Never 1, which would hide a scale that is left out or applied twice.
        scale = math.copysign(float(trial.rng.choice([0.25, 0.5, 2.0])), scale)
    elif not 2.0**-8 <= abs(scale) <= 2.0**8:
        scale = math.copysign(0.5, scale)
    problem = problem if scale == problem.softmax_scale else problem.replace(scale=scale)
    loud = math.copysign(2.0 ** math.ceil(math.log2(_GAP / (2 * abs(scale)))), scale)
    bits = min(bits, problem.head_dim)
    lowered = 0 < bits <= _MOST_LOWERED and bits < problem.head_dim and bool(trial.rng.integers(2))
    values, common = _coded(trial, problem, bits, loud=loud, level=-loud * (bits + 1) if lowered else 0.0)
    count = (common == _best(common)).sum(-1) * (_best(common) > -math.inf).squeeze(-1)
    if problem.pass_ == "bwd":
        rows = values["q"].shape[:3]
        hot = torch.from_numpy(trial.rng.integers(0, problem.v_head_dim, rows))
        upstream = torch.nn.functional.one_hot(hot, problem.v_head_dim) * _signs(trial, (*rows, 1))
        values["dout"] = upstream * (_exact_rows(trial, count) if dyadic else 1)
    dtype = DTYPES[problem.dtype]
    return Probe(problem=problem, values={name: value.to(dtype) for name, value in values.items()}, count=count)


def _coded(trial: Trial, problem: Problem, bits: int, *, loud: float, level: float) -> tuple[dict[str, Tensor], Tensor]:
    """q, k, v, and the signs that each query and visible key have in common less those they have not, -inf where invisible:
    (batch, q_heads, q_len, kv_len). Scores are `loud` times that, plus `level`.

    Features beyond the code are random in Q where they are 0 in K, and the other way round, so that they do not change
    scores, but do enter dQ and dK.
    """
    shape_of = {name: shape for name, (shape, _) in shapes(problem).items()}
    sought, codes = (_signs(trial, (*shape_of[name][:3], bits)) for name in ("q", "k"))
    features = torch.from_numpy(trial.rng.permutation(problem.head_dim))
    code, rest = features[:bits], features[bits:]
    q, k = torch.zeros(shape_of["q"]), torch.zeros(shape_of["k"])
    q[..., code], k[..., code] = loud * sought, codes
    if level:
        q[..., rest[0]], k[..., rest[0]] = level, 1.0
        rest = rest[1:]
    only_q, only_k = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    q[..., only_q], k[..., only_k] = _ternary(trial, q[..., only_q].shape), _ternary(trial, k[..., only_k].shape)
    common = (sought @ repeated(problem, codes).mT).masked_fill(~seen(problem), -math.inf)
    return {"q": q, "k": k, "v": _ternary(trial, shape_of["v"])}, common


def _best(common: Tensor) -> Tensor:
    """The maximum over keys, -inf in an empty row: (batch, q_heads, q_len, 1)."""
    return torch.cat([common, common.new_full((*common.shape[:3], 1), -math.inf)], -1).amax(-1, keepdim=True)


def _signs(trial: Trial, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(trial.rng.integers(0, 2, shape) * 2.0 - 1.0).float()


def _ternary(trial: Trial, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(trial.rng.integers(-1, 2, shape)).float()


def _exact_rows(trial: Trial, count: Tensor) -> Tensor:
    """Where gradients are exact, (batch, q_heads, q_len, 1): n is a power of two, P, delta and dS = integer / n^2 fit the
    significand of the storage, and their sums over the rows of a group fit that of fp32."""
    rows = trial.problem.q_len * trial.problem.group
    most = min(0.5 / trial.contract.storage, math.sqrt(2.0**23 / max(rows, 1)))
    return ((count > 0) & (count & (count - 1) == 0) & (count <= most)).unsqueeze(-1)


def _read_back(trial: Trial, bits: int) -> None:
    probe = class_probe(trial, bits=bits, dyadic=False)
    asked = trial.ask(probe.values, probe.problem, structured=True)
    count = probe.count.unsqueeze(-1)
    # With codes the maximum is not 0, and a fused multiply-add leaves its rounding in P: only powers of two are safe.
    limit = (count < _EXACT_COUNTS) if bits == 0 else (count & (count - 1)) == 0
    exact = limit if snaps(trial.contract) else count == 0
    empty = probe.count == 0
    truth = oracle.forward(probe.problem, asked.values)["out"]
    integers = (truth * count).round()
    # In higher precision the keys that lose still show.
    truths = {"out": integers / count.clamp(min=1)} if snaps(trial.contract) else {}
    trial.matches(asked, f"codes of {bits} signs", exact={"out": exact, "lse": empty}, truths=truths)


def _exact_gradients(trial: Trial, bits: int) -> None:
    probe = class_probe(trial, bits=bits, dyadic=True)
    asked = trial.ask(probe.values, probe.problem, structured=True)
    everything = torch.tensor(snaps(trial.contract))
    trial.matches(asked, f"codes of {bits} signs", exact=dict.fromkeys(("dq", "dk", "dv"), everything))


def _dyadic_weights(trial: Trial) -> None:
    """Codes of 2 signs and scores that are whole numbers times ln 2, so that weights are 1, 1/2 and 1/4 over an integer."""
    problem = trial.problem.replace(scale=math.log(2.0))
    values, common = _coded(trial, problem, min(2, problem.head_dim), loud=0.5, level=0.0)
    asked = trial.ask(
        {name: value.to(DTYPES[problem.dtype]) for name, value in values.items()}, problem, structured=True
    )
    best = _best(common)
    quarters = torch.exp2((common - best.masked_fill(best == -math.inf, 0.0)) / 2 + 2).sum(-1, keepdim=True).double()
    truth = oracle.forward(problem, asked.values)["out"]
    truths = {"out": (truth * quarters).round() / quarters.clamp(min=1)}
    # Weights carry the error of an exponential into the sum, four times that of a division.
    exact = (quarters <= _EXACT_COUNTS // 4) if snaps(trial.contract) else quarters == 0
    trial.matches(asked, "weights 1, 1/2, 1/4", exact={"out": exact, "lse": quarters.squeeze(-1) == 0}, truths=truths)


def _mask_read_back(trial: Trial) -> None:
    _read_back(trial, 0)


def _saturated_read_back(trial: Trial) -> None:
    _read_back(trial, int(trial.rng.integers(2, _MOST_BITS + 1)))


def _uniform_gradients(trial: Trial) -> None:
    _exact_gradients(trial, 0)


def _saturated_gradients(trial: Trial) -> None:
    _exact_gradients(trial, int(trial.rng.integers(2, _MOST_BITS + 1)))


def _deep_scores(trial: Trial) -> None:
    """All scores moved by -30000 or +30000: one more feature, constant in Q and in K."""
    probe = class_probe(trial, bits=3, dyadic=False)
    problem = probe.problem
    shift = float(trial.rng.choice([-1.0, 1.0])) * 3e4 / problem.softmax_scale
    root = 2.0 ** round(math.log2(abs(shift)) / 2)
    values = dict(probe.values)
    silent = ((values["q"] == 0).all(dim=2).all(1).all(0) | (values["k"] == 0).all(dim=2).all(1).all(0)).nonzero()
    if not len(silent):
        return
    feature = int(silent[0])
    for name, number in (("q", root), ("k", round(shift / root))):
        values[name] = values[name].clone()
        values[name][..., feature] = float(number)
    asked = trial.ask(values, problem, structured=True)
    trial.matches(asked, "scores of 30000", exact={})


def _dead(trial: Trial) -> None:
    """Lengthen queries or keys until some see nothing. Wide windows are narrowed, so that little suffices."""
    problem = trial.problem
    problem = problem.replace(
        window_left=None if problem.window_left is None else min(problem.window_left, _NEAR),
        window_right=None if problem.window_right is None else min(problem.window_right, _NEAR),
    )
    extra = int(trial.rng.integers(1, 9))
    longer = []
    if problem.right is not None and not problem.top_left:
        longer.append(problem.replace(q_len=problem.kv_len + problem.right + extra))
    if problem.window_left is not None and not problem.top_left:
        longer.append(problem.replace(kv_len=problem.q_len + problem.window_left + extra))
    if problem.right is not None and problem.top_left:
        longer.append(problem.replace(kv_len=problem.q_len + problem.right + extra))
    if problem.window_left is not None and problem.top_left:
        longer.append(problem.replace(q_len=problem.kv_len + problem.window_left + extra))
    for other in longer:
        asked = trial.ask(trial.drawn(problem=other), other)
        mask = seen(other)
        rows, keys = ~mask.any(1), ~mask.any(0)
        for name, output in asked.outputs.items():
            where = rows[:, None] if name in ("out", "dq") else rows if name == "lse" else keys[:, None]
            value = -math.inf if name == "lse" else 0.0
            truth = torch.full_like(output, value, dtype=torch.float64)
            trial.check(asked, name, output, truth, "dead rows and keys", where=where.expand_as(output))


def _banded(problem: Problem, contract: RoundingContract) -> str | None:
    return filled(problem, contract) if problem.banded else "has no mask"


def _empty(trial: Trial) -> None:
    """No keys, no queries, no batch."""
    for change in ({"kv_len": 0}, {"q_len": 0}, {"batch": 0}):
        other = trial.problem.replace(**change)
        asked = trial.ask(trial.drawn(problem=other), other)
        for name, output in asked.outputs.items():
            value = -math.inf if name == "lse" else 0.0
            truth = torch.full_like(output, value, dtype=torch.float64)
            trial.check(asked, name, output, truth, f"{next(iter(change))} 0")


def _no_upstream(trial: Trial) -> None:
    values = trial.drawn()
    values["dout"] = torch.zeros_like(values["dout"])
    asked = trial.ask(values)
    for name, output in asked.outputs.items():
        trial.check(asked, name, output, torch.zeros_like(output, dtype=torch.float64), "dout = 0")


def _constant_values(trial: Trial) -> None:
    """V is the same for all keys of a head: out is that V, and moving weight between keys changes nothing."""
    values = trial.drawn()
    values["v"] = values["v"][:, :, :1].expand_as(values["v"]).contiguous()
    asked = trial.ask(values, structured=True)
    bounds_of = trial.expectation(asked).bounds
    if trial.backward:
        for name in ("dq", "dk"):
            trial.check(
                asked, name, asked.outputs[name], torch.zeros_like(bounds_of[name]), "constant V", bound=bounds_of[name]
            )
        return
    rows = seen(trial.problem).any(1)[:, None]
    truth = repeated(trial.problem, values["v"][:, :, :1]).double() * rows
    trial.check(
        asked, "out", asked.outputs["out"], truth.expand_as(bounds_of["out"]), "constant V", bound=bounds_of["out"]
    )


def _column_sums(trial: Trial) -> None:
    """sum_j dV_j = sum of dout over the rows that see something."""
    asked = trial.ask(trial.drawn())
    bound = trial.expectation(asked).bounds["dv"].sum(2)
    rows = seen(trial.problem).any(1)[:, None]
    truth = group_sum(trial.problem, (asked.values["dout"].double() * rows).sum(2))
    trial.check(asked, "dv", asked.outputs["dv"].double().sum(2), truth, "sum over keys", bound=bound)


_SNAPPING = (
    " Bitwise for 16-bit tensors whose sums are fp32 and whose P and dS are cast to 16 bits; within the worst-case bound of"
    " structured data otherwise."
)

PROBES: tuple[Property, ...] = (
    Property(
        name="mask read-back", kind="exact", passes=("fwd",), excludes=filled, relation=_mask_read_back,
        why="Q and K are orthogonal, so every P is exp2(0) = 1, sums are integers, and out is a quotient of integers below"
        " 1024, which one rounding and an approximate division cannot move over a rounding boundary; lse = ln n."
        + _SNAPPING,
    ),
    Property(
        name="saturated read-back", kind="exact", passes=("fwd",), excludes=filled, relation=_saturated_read_back,
        why="keys that share most signs with the query win by 110 nats, so the others underflow to 0 and n equal weights"
        " remain; where n is a power of two the mean of the integers V is representable. Invisible keys often match best."
        + _SNAPPING,
    ),
    Property(
        name="dyadic weights", kind="exact", passes=("fwd",), excludes=filled, relation=_dyadic_weights,
        why="scores are whole numbers times ln 2, so every P is a power of two and casts restore it, and so is every"
        " rescaling; out is a quotient of integers, exact where the divisor is at most 256." + _SNAPPING,
    ),
    Property(
        name="deep scores", kind="tolerance", passes=BOTH, excludes=filled, relation=_deep_scores,
        why="softmax does not change when all scores move by 30000 nats; a finite stand-in for -inf, or a maximum that"
        " starts at 0, wins or loses against real scores there. Within the worst-case bound.",
    ),
    Property(
        name="uniform gradients", kind="exact", passes=("bwd",), excludes=filled, relation=_uniform_gradients,
        why="all scores are 0, so P = 1/n and dS = integer / n^2 are exact in 16 bits where n is a small power of two (dout"
        " is 0 in other rows); their sums are exact in fp32, the scale is a power of two, so one rounding is left."
        + _SNAPPING,
    ),
    Property(
        name="saturated gradients", kind="exact", passes=("bwd",), excludes=filled, relation=_saturated_gradients,
        why="as for uniform gradients, over the n keys that win by 110 nats; the log-sum-exp is below 800, so its rounding"
        " moves P by less than half a 16-bit unit." + _SNAPPING,
    ),
    Property(
        name="dead rows and keys", kind="exact", passes=BOTH, excludes=_banded, relation=_dead,
        why="a query that sees no key has an empty sum: out 0, lse -inf, dq 0; a key that no query sees gets dk = dv = 0.",
    ),
    Property(
        name="empty tensors", kind="exact", passes=BOTH, excludes=filled, relation=_empty,
        why="sums over nothing are 0, and maxima over nothing -inf.",
    ),
    Property(
        name="no upstream", kind="exact", passes=("bwd",), excludes=filled, relation=_no_upstream,
        why="gradients are linear in dout, and products and sums of zeros are exactly 0.",
    ),
    Property(
        name="constant values", kind="tolerance", passes=BOTH, excludes=filled, relation=_constant_values,
        why="weights add up to 1: out = V where V is the same for all keys, and dP - delta = 0, so dq = dk = 0.",
    ),
    Property(
        name="column sums", kind="tolerance", passes=("bwd",), excludes=filled, relation=_column_sums,
        why="dV = P^T dout and every row of P that sees something adds up to 1.",
    ),
)  # fmt: skip
