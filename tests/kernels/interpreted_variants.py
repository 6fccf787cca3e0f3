"""What a problem may add to attention inside a band, forward and backward, in Triton's interpreter; see `test_kernels.py`."""

import pytest
import torch

from harness import inputs, oracle
from harness.inputs import Placement
from harness.problem import parse_problem
from harness.quicken import quicken
from kernels import flash_bwd, flash_fwd
from tests.kernels.cases import ask, check

quicken()

VARIANTS = (
    "softcap=1.5", "alibi", "bias=bhqk", "bias=hk", "sinks", "dropout=0.3", "prefix causal", "chunk=20", "documents", "mask=bk",
    "mask=bhqk", "packed=3",
)  # fmt: skip
TOGETHER = "softcap=2.0 alibi sinks dropout=0.5 prefix documents chunk=24 window=20:9"
SLOW_SHAPES = ("b1 h1 q0 k33", "b1 h1 q17 k0", "b1 h1 q1 k1", "b1 h3/1 q16 k31", "b1 h2 q33 k32")
# Where every tensor has strides of its own.
ODD = {
    "slopes": Placement(order=(1, 0), row_padding=2), "bias": Placement(order=(1, 3, 0, 2), row_padding=5),
    "mask": Placement(order=(2, 0, 3, 1), row_padding=3), "q_documents": Placement(order=(1, 0), shift=1),
    "dlse": Placement(order=(2, 0, 1)), "dbias": Placement(order=(3, 1, 2, 0), row_padding=1),
    "q": Placement(order=(2, 0, 1, 3), row_padding=3), "k": Placement(order=(0, 1, 3, 2), shift=1),
    "dout": Placement(order=(0, 1, 2, 3), expanded=(1, 2)),
}  # fmt: skip


@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_at_the_edges_of_a_block(variant: str, pass_: str) -> None:
    for position, shape in enumerate(SLOW_SHAPES):
        dtype = ("fp16", "bf16", "fp32")[(position + len(variant)) % 3]
        check(ask(f"{shape} d16 {dtype} {variant} {pass_}", seed=position), structured=True)


@pytest.mark.parametrize("heads", ["h3/1", "h5/1", "h15/1", "h4/2"])
def test_ratios_of_heads(heads: str) -> None:
    for variant in ("alibi sinks bias=h", "mask=hqk"):
        for pass_ in ("fwd", "bwd"):
            check(ask(f"b1 {heads} q18 k21 d16 fp16 {variant} causal {pass_}"))


@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
@pytest.mark.parametrize("added", ["bias=bhqk mask=hqk", "packed=4", "bias=q top-left"])
def test_variants_together(added: str, pass_: str) -> None:
    slope = "lse-grad" if pass_ == "bwd" else ""
    notation = f"b1 h2/1 q30 k35 d24/16 bf16 {TOGETHER} {added} {slope} {pass_}"
    names = {*inputs.draw(parse_problem(notation), seed=0), "dbias"}
    check(ask(notation, placements={name: lie for name, lie in ODD.items() if name in names}), structured=True)


def test_the_output_counts_exactly_what_masks_leave() -> None:
    for variant in ("prefix causal", "chunk=13", "documents", "mask=bhqk", "packed=4 causal", "mask=hk window=9:30"):
        batch = 1 if "packed" in variant else 2
        answer = ask(f"b{batch} h2 q37 k52 d16 fp16 {variant} fwd", recipe="counting", seed=3)
        truth = oracle.forward(answer.problem, answer.values)
        assert torch.equal(answer.outputs["out"], truth["out"].half()), variant


def test_a_bias_of_minus_infinity_hides() -> None:
    problem = parse_problem("b1 h2 q20 k40 d16 fp16 bias=qk")
    values = inputs.draw(problem, seed=1)
    hidden = torch.rand(1, 1, 20, 40, generator=torch.Generator().manual_seed(0)) < 0.6
    hidden[:, :, 3] = True
    bias = torch.zeros(1, 1, 20, 40, dtype=torch.float16).masked_fill(hidden, -torch.inf)
    out, lse = flash_fwd.flash_fwd(values["q"], values["k"], values["v"], bias=bias)
    masked = flash_fwd.flash_fwd(values["q"], values["k"], values["v"], mask=~hidden)
    assert torch.equal(out, masked[0]) and torch.equal(lse, masked[1])
    assert (out[:, :, 3] == 0).all() and (lse[:, :, 3] == -torch.inf).all()
    gradients = flash_bwd.flash_bwd(values["q"], values["k"], values["v"], out, lse, values["v"][:, :, :20], bias=bias)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_one_seed_drops_the_same_pairs_in_both_passes_and_another_others() -> None:
    problem = parse_problem("b1 h1 q16 k32 d16 fp32")
    values = inputs.draw(problem, seed=2)
    q, k, v = torch.zeros_like(values["q"]), values["k"], torch.eye(32)[None, None]
    wide = torch.zeros(1, 1, 16, 32)
    kept = {}
    for seed in (1, 2, 1 << 40):
        out, lse = flash_fwd.flash_fwd(q, k, v, dropout=0.5, dropout_seed=seed)
        kept[seed] = out[0, 0] != 0
        _, _, dv = flash_bwd.flash_bwd(
            q, k, v, out, lse, torch.ones_like(wide), dropout=0.5, dropout_seed=seed
        )  # fmt: skip
        # A key's dv adds up 2/32 for every query that kept it.
        assert torch.equal((dv[0, 0, :, 0] * 16).round().int(), kept[seed].sum(0).int())
    assert not torch.equal(kept[1], kept[2]) and not torch.equal(kept[1], kept[1 << 40])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"bias": torch.zeros(1, 1, 3, 1)}, "bias must have the shape"),
        ({"mask": torch.zeros(1, 1, 1, 1)}, "mask must be boolean"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"dropout": 1.0}, "dropout must be"),
        ({"q_documents": torch.zeros(1, 4, dtype=torch.int32)}, "documents must be given"),
        ({"q_starts": torch.zeros(2, dtype=torch.int32)}, "starts of sequences must be given"),
        ({"sinks": torch.zeros(3)}, "sinks must have the shape"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_by_name(wrong: dict[str, object], words: str) -> None:
    q = torch.zeros(1, 2, 4, 16)
    with pytest.raises(ValueError, match=words):
        flash_fwd.flash_fwd(q, q, q, **wrong)


def test_packed_sequences_refuse_tensors_of_pairs() -> None:
    q, starts = torch.zeros(1, 2, 4, 16), torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="cannot be combined with bias"):
        flash_fwd.flash_fwd(q, q, q, q_starts=starts, kv_starts=starts, bias=torch.zeros(1, 1, 1, 1))
