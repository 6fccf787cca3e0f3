"""Champions behind the operation: `harness.attending.Lookup` as the `lookup` of `attention`. Run by `test_operation.py`."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd import grad

from harness.attending import Lookup, problem_of
from harness.errors import MissError
from harness.lookup import Database, Entry, open_database
from harness.quicken import quicken
from harness.trust import Here
from harness.workspace import find_workspace
from kernels import flash_fwd
from kernels.attention import Question, attention
from tests.fake_champions import certificate, champion, champion_file
from tests.operation.questions import drawn

quicken()

PROBLEM = "b1 h2/1 q33 k40 d16 fp32 causal"


def database(kernel: str, problem: str = PROBLEM, **changes: Any) -> Database:
    """The real space of a kernel, and one champion: the default with another tile."""
    found = open_database(find_workspace(), kernel)
    made = champion(problem, kernel_digest="k", source_digest="k")
    config = dict(found.default(made.read(), _device()))
    names = [name for name in config if name.endswith("block_m")]
    made = made.model_copy(update={"config": config | dict.fromkeys(names, 64), **changes})
    entry = Entry("a.json", champion_file(made, kernel=kernel), made, made.read())
    return Database(
        kernel=kernel, entries=[entry], here=Here(kernel_digest="k"), space=found.space, default=found.default
    )


def _device() -> Any:
    from harness.device import find_target

    return find_target("h200")


@pytest.fixture(scope="module")
def databases() -> dict[str, Database]:
    return {"fwd": database("flash_fwd"), "bwd": database("flash_bwd", f"{PROBLEM} bwd")}


def tensors() -> tuple[torch.Tensor, ...]:
    return tuple(drawn((1, 2, 33, 16), (1, 1, 40, 16), (1, 1, 40, 16)))


def test_attention_takes_the_champions_of_both_passes(databases: dict[str, Database]) -> None:
    lookup, asked = Lookup(databases, "h200"), []

    def told(question: Question) -> Any:
        asked.append((question, lookup(question)))
        return asked[-1][1]

    q, k, v = tensors()
    out = attention(q, k, v, causal=True, lookup=told)
    gradients = grad(out.sum(), (q, k, v))
    configs = {question.pass_: config for question, config in asked}
    for pass_, config in configs.items():
        assert config == dict(databases[pass_].entries[0].champion.config)
    given = attention(q, k, v, causal=True, config=configs["fwd"], backward_config=configs["bwd"])
    assert torch.equal(out, given) and all(map(torch.equal, gradients, grad(given.sum(), (q, k, v))))
    assert configs["fwd"] != flash_fwd.safe_config(q, v)
    assert str(problem_of(asked[0][0])) == f"{PROBLEM} fwd"
    # The second time nothing is looked for.
    databases["fwd"].entries, kept = [], databases["fwd"].entries
    assert lookup(asked[0][0]) == configs["fwd"]
    databases["fwd"].entries = kept


def test_it_compiles_into_one_graph(databases: dict[str, Database]) -> None:
    torch._dynamo.reset()
    lookup = Lookup(databases, "h200")
    function = lambda q, k, v: attention(q, k, v, causal=True, lookup=lookup)  # noqa: E731
    q, k, v = tensors()
    out = torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(out, function(q, k, v))


def test_what_no_notation_says_is_left_to_the_kernel_and_a_miss_is_the_default(databases: dict[str, Database]) -> None:
    lookup, asked = Lookup(databases, "h200"), []
    q, k, v = tensors()
    attention(q.detach(), k.detach(), v.detach(), lookup=asked.append)
    attention(q.detach(), k.detach(), v.detach(), chunk=8, lookup=asked.append)
    attention(q.detach(), k.detach(), v.detach(), softcap=2.0, lookup=asked.append)
    attention(q.detach().double(), k.detach().double(), v.detach().double(), lookup=asked.append)
    plain, chunked, capped, double = asked
    # Another band than the champion's: the default of the space.
    assert lookup(plain) == dict(databases["fwd"].default(problem_of(plain), _device()))
    assert lookup(chunked) is None and lookup(double) is None
    assert str(problem_of(capped)) == "b1 h2/1 q33 k40 d16 fp32 softcap=1.0 fwd"
    with pytest.raises(MissError):
        Lookup(databases, "h200", mode="require")(plain)


def test_who_wants_equal_bits_gets_no_champion_that_nobody_saw_repeat(databases: dict[str, Database]) -> None:
    unseen = {"fwd": database("flash_fwd", certificate=certificate("k", repeated=0))}
    asked: list[Question] = []
    q, k, v = (each.detach() for each in tensors())
    for deterministic in (True, False):
        attention(q, k, v, causal=True, deterministic=deterministic, lookup=asked.append)
    config = dict(unseen["fwd"].entries[0].champion.config)
    assert [Lookup(unseen, "h200")(question) == config for question in asked] == [False, True]


def test_numbers_of_eight_bits_have_champions_of_their_own() -> None:
    q, k, v = (each.detach().to(torch.float8_e4m3fn) for each in tensors())
    asked: list[Question] = []
    attention(q, k, v, causal=True, k_descale=torch.tensor(0.5), lookup=asked.append)
    assert str(problem_of(asked[0])) == f"{PROBLEM.replace('fp32', 'fp8e4m3')} fwd"
    assert str(problem_of(replace(asked[0], dtype=torch.float8_e5m2))) == f"{PROBLEM.replace('fp32', 'fp8e5m2')} fwd"


def test_who_allows_other_bits_gets_atomic_champions_first(databases: dict[str, Database]) -> None:
    lookup, asked = Lookup(databases, "h200"), []
    q, k, v = tensors()
    attention(q, k, v, causal=True, deterministic=False, lookup=asked.append).sum().backward()
    forward, backward = asked
    assert (
        str(problem_of(forward)) == f"{PROBLEM} fwd" and str(problem_of(backward)) == f"{PROBLEM} nondeterministic bwd"
    )
    assert str(problem_of(replace(backward, deterministic=True))) == f"{PROBLEM} bwd"
    # There is none that adds atomically: one that does not does it too, and so where a miss is an error.
    plain = dict(databases["bwd"].entries[0].champion.config)
    assert lookup(backward) == plain == Lookup(databases, "h200", mode="require")(backward)
    free = problem_of(backward)
    legal = databases["bwd"].space(free, _device()).legal
    atomic = dict(next(config for config in legal if config["structure"] == "atomic"))
    found = Lookup({"bwd": database("flash_bwd", str(free), config=atomic)}, "h200")
    assert found(backward) == atomic and found(replace(backward, deterministic=True)) != atomic


def test_under_dynamic_shapes_every_length_is_answered_right(databases: dict[str, Database]) -> None:
    torch._dynamo.reset()
    lookup = Lookup(databases, "h200")
    compiled = torch.compile(
        lambda q, k, v: attention(q, k, v, causal=True, lookup=lookup), dynamic=True, backend="aot_eager"
    )
    for length in (33, 40):
        q, k, v = (each.detach() for each in drawn((1, 2, length, 16), (1, 1, 40, 16), (1, 1, 40, 16)))
        assert torch.equal(compiled(q, k, v), attention(q, k, v, causal=True, lookup=lookup))
