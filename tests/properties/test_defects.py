"""Every property is seen to fail on a subject with a defect of its own, and the others not to mind where they should not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from harness import bounds, oracle
from harness.bounds import RoundingContract
from harness.inputs import DTYPES
from harness.problem import Problem, parse_problem
from harness.properties import MEMORY, PROPERTIES, property_for
from harness.subject import Answer, KernelSubject

CONFIG = {"block_m": 16, "block_n": 16}
SEEDS = range(6)
CAUSAL = parse_problem("b2 h4/2 s24 d16 fp16 causal scale=0.5")
FULL = parse_problem("b2 h4/2 q17 k24 d16 fp16 scale=0.5")

Hook = Callable[[Problem, Mapping[str, Tensor], dict[str, Tensor]], None]


@dataclass
class Defective:
    """The exact answer, rounded once, which `hook` spoils in place."""

    hook: Hook
    name: str = "defective"

    def refuses(self, problem: Problem) -> str | None:
        return None

    def contract(self, problem: Problem) -> RoundingContract:
        return bounds.contract_for(problem.dtype)

    def run(self, problem: Problem, inputs: Mapping[str, Tensor]) -> Answer:
        exact = oracle.forward(problem, inputs) if problem.pass_ == "fwd" else oracle.backward(problem, inputs)
        outputs = {
            name: value.to(torch.float32 if name == "lse" else DTYPES[problem.dtype]) for name, value in exact.items()
        }
        self.hook(problem, inputs, outputs)
        return Answer(outputs=outputs)


def scores(problem: Problem, inputs: Mapping[str, Tensor]) -> float:
    """The greatest absolute score."""
    keys = inputs["k"].repeat_interleave(problem.group, 1)
    found = (inputs["q"].float() @ keys.float().mT * problem.softmax_scale).abs()
    return float(found.max()) if found.numel() else -1.0


def whole(values: Tensor) -> bool:
    """Whether all numbers are whole: those of a probe."""
    return bool((values == values.round()).all())


def nudge(outputs: dict[str, Tensor], *names: str) -> None:
    """About one unit in the last place, which no bound sees."""
    for name in names or tuple(outputs):
        factor = 1 + 2.0**-22 if outputs[name].dtype == torch.float32 else 1 + 2.0**-10
        outputs[name].mul_(factor)


def when(condition: Callable[[Problem, Mapping[str, Tensor]], bool], *names: str, factor: float | None = None) -> Hook:
    """Spoils the outputs named (all without names) wherever `condition` holds."""

    def hook(problem: Problem, inputs: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> None:
        if condition(problem, inputs):
            if factor is None:
                nudge(outputs, *names)
            else:
                for name in names:
                    outputs[name].mul_(factor)

    return hook


def dead(problem: Problem, inputs: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> None:
    if 0 < problem.kv_len < problem.q_len:
        outputs["out"][:, :, : problem.q_len - problem.kv_len] = 2.0**-12


def upwards(problem: Problem, inputs: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> None:
    if not whole(inputs["v"]):
        bits = outputs["out"].view(torch.int16)
        bits.add_((outputs["out"] > 0).to(torch.int16))


def other_rows(problem: Problem, inputs: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> None:
    if not whole(inputs["q"]):
        outputs["out"][:, :, 0] *= 1 + 2.0**-9 * int((inputs["q"][..., 0] > 0).sum() % 2)


def place_matters(problem: Problem, inputs: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> None:
    outputs["out"][..., 0] *= 1 + 2.0**-9


def first_query(problem: Problem, inputs: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> None:
    outputs["out"][:, :, :1] *= 1 + 2.0**-9


def first_key(problem: Problem, inputs: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> None:
    outputs["dv"][:, :, :1] *= 1 + 2.0**-9


def bias(problem: Problem, inputs: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> None:
    outputs["dv"] += 2.0**-3


def squares(problem: Problem, inputs: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> None:
    if inputs["v"].numel():
        outputs["out"] += 2.0**-6 * inputs["v"].float().square().mean()


@dataclass(frozen=True)
class Defect:
    """`fails` is the property that must see it; `only` says that no other may."""

    fails: str
    problem: Problem
    hook: Hook
    only: bool = True
    also: frozenset[str] = field(default_factory=frozenset)


BACKWARD, FULL_BACKWARD = CAUSAL.replace(pass_="bwd"), FULL.replace(pass_="bwd")
DEFECTS = (
    Defect("mask read-back", CAUSAL, when(lambda p, x: scores(p, x) == 0, "out")),
    Defect("saturated read-back", CAUSAL, when(lambda p, x: 50 < scores(p, x) < 5000 and whole(x["q"]), "out")),
    Defect("dyadic weights", CAUSAL, when(lambda p, x: 0.69 < p.softmax_scale < 0.7, "out")),
    Defect("deep scores", CAUSAL, when(lambda p, x: scores(p, x) > 9000 and whole(x["q"]), "out", factor=1.5)),
    Defect("uniform gradients", BACKWARD, when(lambda p, x: scores(p, x) == 0, "dq")),
    Defect("saturated gradients", BACKWARD, when(lambda p, x: 50 < scores(p, x) < 5000, "dv")),
    Defect("dead rows and keys", CAUSAL, dead),
    Defect("empty tensors", CAUSAL, lambda p, x, y: y["lse"].fill_(0.0) if not p.kv_len else None),
    Defect("no upstream", BACKWARD, lambda p, x, y: y["dq"].add_(2.0**-14) if not x["dout"].any() and p.kv_len else None),
    Defect(
        "constant values", CAUSAL,
        when(lambda p, x: p.kv_len > 1 and bool((x["v"] == x["v"][:, :, :1]).all()), "out", factor=1.01),
    ),
    Defect("column sums", BACKWARD, bias, only=False),
    Defect("no leak from keys", CAUSAL, when(lambda p, x: bool((x["k"].abs() == 4096).any()))),
    Defect("no leak from queries", CAUSAL, other_rows, only=False),
    Defect("no leak between heads", CAUSAL, when(lambda p, x: bool(x["k"].isnan().any()))),
    Defect("appended keys", CAUSAL, when(lambda p, x: p.kv_len > CAUSAL.kv_len)),
    Defect("slices", CAUSAL, when(lambda p, x: p.batch == p.kv_heads == 1)),
    Defect("repeated heads", CAUSAL, when(lambda p, x: p.group == 1)),
    Defect("negation", CAUSAL, upwards),
    Defect(
        "balance", FULL,
        when(lambda p, x: not whole(x["q"]) and p.kv_len > 0 and bool(x["q"].std() > 1.3), "out"),
    ),
    Defect("homogeneity", FULL, when(lambda p, x: not whole(x["v"]) and bool(1.2 < x["v"].abs().median() < 4), "out")),
    Defect("value columns", FULL, place_matters, only=False),
    Defect("query order", FULL, first_query, only=False),
    Defect("key order", FULL_BACKWARD, first_key, only=False),
    Defect("layout", CAUSAL, when(lambda p, x: p.layout != "bhsd"), also=frozenset({"strides"})),
    Defect("strides", CAUSAL, when(lambda p, x: x["k"].stride(3) != 1)),
    Defect("hull", CAUSAL, lambda p, x, y: y["out"].mul_(2.0), only=False),
    Defect("split", FULL, lambda p, x, y: y["lse"].sub_(0.01) if 0 < p.kv_len < FULL.kv_len else None),
    Defect("more keys", FULL, lambda p, x, y: y["lse"].mul_(-1.0), only=False),
    Defect("duplicate keys", FULL, when(lambda p, x: p.kv_len == 2 * FULL.kv_len, "out", factor=1.02)),
    Defect("score shift", CAUSAL, when(lambda p, x: bool(x["k"].float().mean().abs() > 0.2), "out", factor=1.1), only=False),
    Defect("linearity", FULL, squares, only=False),
    Defect("Euler", BACKWARD, lambda p, x, y: y["dv"].mul_(1.1), only=False),
)  # fmt: skip


def failing(subject: object, problem: Problem) -> set[str]:
    """The names of the properties that fail at least once."""
    found = set()
    for position, law in enumerate(PROPERTIES):
        for seed in SEEDS:
            checks = law.judge(subject, problem, np.random.default_rng([seed, position]))
            if any(not check.ratio <= 1 for check in checks):
                found.add(law.name)
    return found


@pytest.mark.parametrize("problem", [CAUSAL, FULL, BACKWARD, FULL_BACKWARD], ids=str)
def test_without_a_defect_nothing_fails(problem):
    assert failing(Defective(lambda p, x, y: None), problem) == set()


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.fails)
def test_a_defect_fails_its_property(defect):
    subject = Defective(defect.hook)
    if defect.only:
        assert failing(subject, defect.problem) == {defect.fails} | defect.also
        return
    law = property_for(defect.fails)
    checks = [check for seed in SEEDS for check in law.judge(subject, defect.problem, np.random.default_rng(seed))]
    assert any(not check.ratio <= 1 for check in checks)


def test_every_property_has_a_defect():
    assert {law.name for law in PROPERTIES} == {defect.fails for defect in DEFECTS} | {"memory", "repetition"}


def test_an_answer_remembered_by_address_is_seen():
    known: dict[int, dict[str, Tensor]] = {}

    def remember(problem: Problem, inputs: Mapping[str, Tensor], outputs: dict[str, Tensor]) -> None:
        outputs.update(known.setdefault(inputs["q"].data_ptr(), dict(outputs)))

    checks = property_for("repetition").judge(Defective(remember), CAUSAL, np.random.default_rng(0))
    assert {check.output for check in checks if not check.ratio <= 1} == {"out", "lse"}


@pytest.mark.parametrize(
    ("defect", "words"),
    [
        ("never launched", "nothing was launched"),
        ("input written", "input k"),
        ("stray write", "memory -3 elements"),
        ("unwritten", "were not written"),
    ],
)
def test_faults_fail_every_property_as_memory(emulated, defect, words):
    subject = KernelSubject(kernel=emulated.Emulated("fwd", defect), config=CONFIG)
    for name in ("memory", "negation"):
        checks = property_for(name).judge(subject, CAUSAL, np.random.default_rng(0))
        found = [check for check in checks if check.output == MEMORY]
        assert found and all(not check.ratio <= 1 for check in found)
        assert words in found[0].detail
