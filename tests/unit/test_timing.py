"""Tensors of a problem at full size: those of one problem at a time."""

import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from harness import bounds, compare, timing
from harness.bounds import library_contract
from harness.problem import Problem, parse_problem
from harness.simulated import SimulatedDevice

ONE, OTHER = parse_problem("b1 h2 s32 d16 fp16"), parse_problem("b1 h2 s64 d16 fp16")


def test_tensors_are_kept_for_the_next_candidate_and_let_go_before_those_of_another_problem_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "_drawn", {})
    alive: list[weakref.ref[torch.Tensor]] = []

    def draw(problem: Problem, seed: int) -> dict[str, torch.Tensor]:
        assert all(one() is None for one in alive), "two problems' tensors would lie on the device together"
        made = torch.zeros(problem.q_len)
        alive.append(weakref.ref(made))
        return {"q": made}

    monkeypatch.setattr(timing, "_draw", draw)
    assert timing.tensors_on_device(ONE, 0)["q"] is timing.tensors_on_device(ONE, 0)["q"]
    assert len(timing.tensors_on_device(OTHER, 0)["q"]) == 64
    assert len(timing.tensors_on_device(OTHER, 1)["q"]) == 64
    assert len(alive) == 3


def test_inputs_lie_as_the_problem_says_and_a_backward_problem_is_handed_what_a_forward_one_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "DEVICE", "cpu")
    problem = parse_problem("b1 h4/2 q20 k33 d16 fp32 causal window=9 bshd bwd")
    tensors = timing._draw(problem, 3)
    assert tensors["q"].shape == (1, 4, 20, 16) and tensors["q"].stride() == (1280, 16, 64, 1)
    assert torch.equal(tensors["k"], timing._draw(problem, 3)["k"]) and not torch.equal(
        tensors["k"], timing._draw(problem, 4)["k"]
    )
    expected = bounds.expect_forward(problem, tensors, library_contract(problem), structured=False)
    checks = compare.judge({name: tensors[name] for name in ("out", "lse")}, expected, case=str(problem))
    assert compare.status_of(checks) == "passed"


def test_each_launch_is_timed_alone_where_there_are_several(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimulatedDevice(np.random.default_rng(0))
    made = {
        "one": SimpleNamespace(name="one", grid=(1, 1, 1), run=device.kernel("one", 2.0)),
        "two": SimpleNamespace(name="two", grid=(4, 1, 1), run=device.kernel("two", 0.5)),
        "empty": SimpleNamespace(name="empty", grid=(0, 1, 1), run=lambda: pytest.fail("an empty grid is no launch")),
    }
    monkeypatch.setattr(timing, "timer", lambda: device)
    monkeypatch.setattr(timing, "launches_of", lambda kernel, problem, tensors, config: [made[one] for one in config])
    assert timing.launches_ms(None, ONE, {}, ("one", "two", "empty")) == {"one": 2.0, "two": 0.5}
    # L2 is flushed before each, as it is for the whole.
    assert device.log.count("flush") == device.launches - 2 - device.log.count("capture 1")
    assert timing.launches_ms(None, ONE, {}, ("one", "empty")) == {}
