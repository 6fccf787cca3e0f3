"""Paged keys and values in the decoding kernel, in Triton's interpreter; run by `test_kernels.py` in a process of its own."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from harness import inputs, oracle, paging, verify
from harness.inputs import Placement
from harness.problem import Problem, parse_problem
from harness.quicken import quicken
from harness.shadow import Role, shadow
from kernels import flash_decode
from kernels.attention import attention_paged
from tests.kernels.cases import DECODE, Answer, check
from tests.kernels.cases import ask as ask_any

quicken()

PAGES = (1, 3, 16, 64, 256)
# Where every tensor has strides of its own.
ODD = {
    "q": Placement(order=(2, 0, 3, 1), row_padding=3), "k": Placement(order=(2, 1, 0, 3), row_padding=5),
    "v": Placement(order=(0, 1, 3, 2), shift=1), "block_table": Placement(order=(1, 0), row_padding=2),
    "out": Placement(order=(1, 2, 3, 0), row_padding=1),
}  # fmt: skip


def ask(notation: str, config: dict[str, object] | None = None, **options: object) -> Answer:
    return ask_any(notation, config, kernel=flash_decode, **options)  # type: ignore[arg-type]


def filled(notation: str) -> tuple[dict[str, torch.Tensor], Problem]:
    """Inputs whose sequences are all as long as can be, with pools that hold numbers everywhere."""
    problem = parse_problem(notation)
    values = inputs.draw(problem, seed=2) | paging.full(problem, np.random.default_rng(1))
    for name in paging.POOLS:
        values[name] = torch.randn(values[name].shape, generator=torch.Generator().manual_seed(3)).to(
            values[name].dtype
        )
    return values, problem


@pytest.mark.parametrize("page", PAGES)
def test_pages_of_any_size(page: int) -> None:
    """One query and a few, blocks smaller and larger than a page, masks aligned with the end of each sequence."""
    for seed, (shape, mask, block_n) in enumerate((
        ("b3 h4/2 q1 k50 d16", "causal", 16), ("b2 h3/1 q5 k65 d24/16", "causal", 32), ("b3 h2/1 q3 k33 d16", "window=9:2", 16),
        ("b2 h2/1 q20 k17 d16", "causal top-left", 16), ("b2 h2 q2 k48 d16", "", 64),
    )):  # fmt: skip
        dtype = ("bf16", "fp16", "fp32")[(seed + page) % 3]
        config = {"block_n": block_n, "num_splits": 1 + seed % 3, "loops": "single" if seed % 2 else "split"}
        check(ask(f"{shape} {dtype} {mask} paged={page}", config, seed=seed))


@pytest.mark.parametrize("page", PAGES)
def test_the_output_counts_exactly_the_keys_of_each_sequence(page: int) -> None:
    """With scores 0 and one-hot values, which differ from page to page, there is nothing to tolerate."""
    for seed, mask in enumerate(("", "causal", "window=12:3")):
        answer = ask(f"b3 h2/1 q3 k70 d16 fp16 {mask} paged={page}", recipe="counting", seed=seed)
        truth = oracle.forward(answer.problem, answer.values)["out"]
        assert torch.equal(answer.outputs["out"], truth.half()), mask


def test_every_tensor_has_strides_of_its_own() -> None:
    for page in (3, 16, 64):
        check(ask(f"b2 h4/2 q3 k70 d16/24 bf16 causal paged={page}", placements=ODD, seed=page))


def test_sequences_without_keys_and_no_sequence_at_all() -> None:
    for shape in ("b2 h2/1 q5 k0", "b0 h2/1 q5 k9", "b2 h2/1 q0 k9"):
        ask(f"{shape} d16 bf16 causal paged=4")
    values, problem = filled("b3 h2/1 q2 k20 d16 bf16 paged=4")
    values["kv_lengths"][:] = torch.tensor([0, 20, 1])
    out, lse = flash_decode.flash_decode(**paging.spoiled(problem, values), config=DECODE)
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all() and lse[1:].isfinite().all()


@pytest.mark.parametrize("page, load", [(3, "pointer"), (16, "pointer"), (64, "pointer"), (64, "tma")])
def test_nothing_is_read_that_belongs_to_no_sequence(page: int, load: str) -> None:
    """Shadow memory, with what is not used marked as never written; the watch itself sees a read of such a row."""
    problem = parse_problem(f"b3 h2/1 q3 k75 d16 bf16 causal paged={page}")
    values = inputs.draw(problem, seed=1)
    holes = paging.holes(problem, values)
    assert all(hole.any() for hole in holes.values())
    for touched in ("", "k"):
        if touched:
            holes = {touched: torch.ones_like(holes[touched])}
        outputs = {"out": torch.empty_like(values["q"]), "lse": torch.empty(values["q"].shape[:3])}
        roles: dict[str, Role] = {**dict.fromkeys(values, "input"), **dict.fromkeys(outputs, "output")}  # type: ignore[dict-item]
        with shadow({**values, **outputs}, roles, holes=holes) as watch:
            flash_decode.flash_decode(
                **values, **outputs, window_right=0, config={**DECODE, "num_splits": 1, "load": load}
            )
        kinds = {(finding.kind, finding.tensor) for finding in watch.findings}
        assert kinds == ({("uninitialised read", "k")} if touched else set()), watch.findings


@pytest.mark.parametrize("page, config", [(16, {}), (64, {"load": "tma"}), (3, {"loops": "single"})])
def test_the_gate_passes_the_kernel_and_not_one_that_forgets_a_key(page: int, config: dict[str, object]) -> None:
    problem = parse_problem(f"b4 h4/2 q2 k300 d16 bf16 causal paged={page}")
    asked = {**DECODE, **config}
    verdict = verify.gate(flash_decode, problem, asked, seed=0, where="interpreter")  # type: ignore[arg-type]
    assert verdict.passed, verdict.detail

    def launches(*, kv_lengths: torch.Tensor, **given: Any) -> Any:
        return flash_decode.launches(**given, kv_lengths=(kv_lengths - 1).clamp(min=0))

    broken: Any = SimpleNamespace(PASS="fwd", launches=launches, workspaces=flash_decode.workspaces)
    assert verify.gate(broken, problem, asked, seed=0, where="interpreter").status == "wrong"  # type: ignore[arg-type]


def test_descriptors_and_pointers_give_equal_bits() -> None:
    for shape, page, block_n in (
        ("b2 h4/2 q3 k150 d40/24", 64, 16),
        ("b2 h2/1 q1 k64 d16", 64, 64),
        ("b2 h2 q2 k70 d16", 32, 32),
    ):
        problem = f"{shape} bf16 causal paged={page}"
        one, other = (ask(problem, {"load": load, "block_n": block_n}) for load in ("tma", "pointer"))
        check(one)
        assert one.same_bits(other)


def test_pages_say_as_much_as_the_same_keys_side_by_side() -> None:
    """Of sequences of one length, bit for bit, whatever the size of a page."""
    for page in (5, 16):
        values, problem = filled(f"b2 h4/2 q3 k47 d16 bf16 paged={page}")
        plain = {name: tensor for name, tensor in paging.dense(problem, values).items() if name in ("q", "k", "v")}
        for one, other in zip(
            flash_decode.flash_decode(**values, config=DECODE), flash_decode.flash_decode(**plain, config=DECODE), strict=True
        ):  # fmt: skip
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block_table": None}, "both a block_table and kv_lengths"),
        ({"kv_lengths": torch.zeros(3, dtype=torch.int32)}, "the first of 2 sequences"),
        ({"kv_lengths": torch.zeros(2, dtype=torch.int64)}, "must be int32"),
        ({"k": torch.zeros((5, 2, 4, 16))}, "v must have the shape"),
        ({"config": {**DECODE, "load": "tma"}}, "pages have 4 rows and block_n is 16"),
    ],
)
def test_what_does_not_go_together_is_refused(change: dict[str, object], message: str) -> None:
    values = inputs.draw(parse_problem("b2 h2/1 q2 k9 d16 fp32 paged=4"), seed=0)
    with pytest.raises(ValueError, match=message):
        flash_decode.flash_decode(**{**values, "config": DECODE, **change})  # type: ignore[arg-type]


def test_descriptors_need_unmasked_blocks_of_their_own() -> None:
    for config, mask in (({"loops": "single"}, "causal"), ({}, "causal window=9")):
        with pytest.raises(ValueError, match="needs loops='split' and no left window"):
            ask(f"b1 h1 q3 k64 d16 bf16 {mask} paged=16", {"load": "tma", **config})


# ---------------------------------------------------------------------------------------------------------------------
# The operation
# ---------------------------------------------------------------------------------------------------------------------


def test_the_operation_answers_as_the_kernel_and_says_what_it_is_not() -> None:
    problem = parse_problem("b2 h4/2 q3 k40 d16 fp32 causal paged=8")
    values = inputs.draw(problem, seed=4)
    args = [values[name] for name in ("q", "k", "v", "block_table", "kv_lengths")]
    out, lse = attention_paged(*args, causal=True, return_lse=True)
    answer = ask(str(problem), flash_decode.safe_config(*args[:4]), seed=4)
    check(answer)
    assert torch.equal(out, answer.outputs["out"]) and torch.equal(lse, answer.outputs["lse"])
    assert torch.equal(attention_paged(*args, window=(None, 0), config=flash_decode.safe_config(*args[:4])), out)
    learning = args[0].clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="q requires a gradient"):
        attention_paged(learning, *args[1:])
    with torch.no_grad():
        attention_paged(learning, *args[1:])
    with pytest.raises(ValueError, match="block_table must be int32"):
        attention_paged(*args[:3], args[3].long(), args[4])
    meta = attention_paged(*(tensor.to("meta") for tensor in args), return_lse=True)
    assert [tensor.shape for tensor in meta] == [out.shape, lse.shape]


def test_opcheck_of_the_operator() -> None:
    values = inputs.draw(parse_problem("b2 h2/1 q2 k9 d8 fp32 paged=4"), seed=4)
    args = tuple(values[name] for name in ("q", "k", "v", "block_table", "kv_lengths"))
    said = {"scale": None, "window_left": None, "window_right": 0, "top_left": False, "config": ""}
    torch.library.opcheck(
        torch.ops.flashtune.attention_paged.default, args, said, test_utils=("test_schema", "test_faketensor")
    )
