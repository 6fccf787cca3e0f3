"""The bounds against attention computed with explicit roundings, in several orders: right ones pass, wrong ones do not."""

import math
from collections import defaultdict
from dataclasses import dataclass, replace

import pytest
import torch

from harness import bounds, compare, inputs, oracle
from harness.problem import Problem, parse_problem

LOG2_E, LOG_2 = math.log2(math.e), math.log(2.0)
KINDS = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp8e4m3": torch.float8_e4m3fn,
    "fp8e5m2": torch.float8_e5m2,
}


def cut(x: torch.Tensor) -> torch.Tensor:
    """fp32 numbers truncated to 11 significant bits, as matrix units read them."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def rounded_to_tf32(x: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of 11 significant bits, ties away from zero."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


ORDERS = ("forward", "backward", "diagonal last", "shuffled")


@dataclass(frozen=True)
class Emulation:
    """Flash attention in fp32, block by block. `cast` is what P and dS are rounded to, `stored` the outputs; `products` is
    how operands of matrix products are cut down, as in `bounds.contract_for`; `flaw` is one of those in `WRONG`."""

    problem: Problem
    cast: torch.dtype
    stored: torch.dtype
    block: int = 16
    order: str = "forward"
    products: str = "ieee"
    flaw: str = ""

    def blocks(self) -> list[slice]:
        found = [slice(start, start + self.block) for start in range(0, self.problem.kv_len, self.block)]
        if self.order == "backward":
            found.reverse()
        if self.order == "diagonal last":
            found = found[1::2] + found[::2]
        if self.order == "shuffled":
            found = [found[i] for i in torch.randperm(len(found), generator=torch.Generator().manual_seed(5))]
        return found

    def product(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        left, right = left.float(), right.float()
        if self.products == "tf32":
            left, right = cut(left), cut(right)
        if self.products == "tf32x3":
            high = [rounded_to_tf32(x) for x in (left, right)]
            low = [cut(x - near) for x, near in zip((left, right), high, strict=True)]
            return self._summed(low[0], high[1]) + self._summed(high[0], low[1]) + self._summed(*high)
        return self._summed(left, right)

    def _summed(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        if self.order == "backward":  # one product after the other, from the last one on, each rounded by itself
            total = torch.zeros(*left.shape[:-1], right.shape[-1])
            for i in reversed(range(left.shape[-1])):
                total = total + left[..., i : i + 1] * right[..., i : i + 1, :]
            return total
        return left @ right

    def _factor(self) -> torch.Tensor:
        off = 1 + 2.0**-10 if self.flaw == "scale" else 1.0
        return torch.tensor(self.problem.softmax_scale * LOG2_E * off, dtype=torch.float32)

    def _repeated(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(self.problem.group, 1)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
        keys, values, seen = self._repeated(k), self._repeated(v), oracle.visible_keys(self.problem, slice(None))
        m, z = torch.full(q.shape[:3], -torch.inf), torch.zeros(q.shape[:3])
        acc = torch.zeros(*q.shape[:3], v.shape[3])
        for block in self.blocks():
            s = self.product(q, keys[:, :, block].mT) * self._factor()
            s = s.masked_fill(~seen[:, block], -torch.inf)
            grown = torch.maximum(m, s.amax(-1))
            shift = grown.masked_fill(grown == -torch.inf, 0.0)
            p, shrink = torch.exp2(s - shift[..., None]), torch.exp2(m - shift)
            p = p.to(self.cast).float() if self.flaw == "rounded before the sum" else p
            z = z * shrink + p.sum(-1)
            acc = acc * shrink[..., None] + self.product(p.to(self.cast).float(), values[:, :, block])
            acc = acc.half().float() if self.flaw == "16-bit accumulator" else acc
            m = grown
        out = acc / z.masked_fill(z == 0, 1.0)[..., None]
        if self.flaw == "one column in 128":
            out[..., -1, :] *= 1 + 2.0**-7
        lse = torch.where(z > 0, (m + z.log2()) * LOG_2, -torch.inf)
        return {"out": out.to(self.stored), "lse": lse}

    def backward(self, q, k, v, dout, out, lse) -> dict[str, torch.Tensor]:
        keys, values, seen = self._repeated(k), self._repeated(v), oracle.visible_keys(self.problem, slice(None))
        delta = (out.float() * dout.float()).sum(-1)
        two = torch.where(lse == -torch.inf, torch.inf, lse * LOG2_E)
        delta = delta.half().float() if self.flaw == "16-bit delta" else delta
        sums = {"dq": torch.zeros(q.shape), "dk": torch.zeros(keys.shape), "dv": torch.zeros(values.shape)}
        for block in self.blocks():
            s = self.product(q, keys[:, :, block].mT) * self._factor() - two[..., None]
            p = torch.exp2(s.masked_fill(~seen[:, block], -torch.inf))
            ds = p * (self.product(dout, values[:, :, block].mT) - delta[..., None])
            p, ds = p.to(self.cast).float(), ds.to(self.cast).float()
            sums["dq"] += self.product(ds, keys[:, :, block])
            sums["dk"][:, :, block] = self.product(ds.mT, q)
            sums["dv"][:, :, block] = self.product(p.mT, dout)
        grouped = (*k.shape[:2], self.problem.group, k.shape[2], -1)
        scale = torch.tensor(self.problem.softmax_scale, dtype=torch.float32)
        found = {
            "dq": sums["dq"] * scale,
            "dk": sums["dk"].view(grouped).sum(2) * scale,
            "dv": sums["dv"].view(grouped).sum(2),
        }
        return {name: value.to(self.stored) for name, value in found.items()}


def random_problem(seed: int, dtype: str, pass_: str, *, small: bool = False) -> Problem:
    """A few heads, one to 150 keys (40 if `small`), every kind of mask."""
    generator = torch.Generator().manual_seed(seed)

    def one_of(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    heads = one_of("h2", "h4/2", "h3/1")
    lengths = one_of("s1", "s2", "s17", "q3 k40", "q40 k9", "s64", "q20 k150")
    mask = one_of("", "", "causal", "causal top-left", "window=5:3", "causal window=20", "window=inf:2")
    dims, scale = one_of("d8", "d8", "d16", "d32/8", "d64"), one_of("", "scale=0.5", "scale=-0.25", "scale=0.1")
    if small:
        heads, lengths, dims = (
            one_of("h2", "h2/1"),
            one_of("s2", "s5", "q3 k17", "q17 k3", "q4 k40"),
            one_of("d8", "d8/16"),
        )
    return parse_problem(" ".join(f"b1 {heads} {lengths} {dims} {dtype} {mask} {scale} {pass_}".split()))


def ratios(problem: Problem, contract: bounds.RoundingContract, emulation: Emulation, seed: int, recipe="normal"):
    """Greatest error over bound of each output."""
    values = inputs.draw(problem, seed=seed, recipe=recipe)
    if emulation.cast.itemsize == 1:  # the numbers that 8-bit tensors and their scales stand for
        values = {name: x.to(emulation.cast).double() * 0.75 for name, x in values.items()}
    structured = inputs.recipe_for(recipe).structured
    expect = bounds.expect_forward if problem.pass_ == "fwd" else bounds.expect_backward
    expected = expect(problem, values, contract, structured=structured)
    if problem.pass_ == "fwd":
        found = emulation.forward(**values)
    else:
        made = oracle.forward(problem, values)
        out, lse = made["out"].to(emulation.stored), made["lse"].float()
        if contract.chained:
            out, lse = emulation.forward(values["q"], values["k"], values["v"]).values()
        found = emulation.backward(**values, out=out, lse=lse)
    return {check.output: check.ratio for check in compare.judge(found, expected, case=str(problem))}


def campaign(dtype: str, pass_: str, count: int, **changes) -> dict[str, float]:
    worst: dict[str, float] = defaultdict(float)
    products = changes.pop("products", "ieee")
    for seed in range(count):
        kind = KINDS[dtype]
        stored = torch.bfloat16 if kind.itemsize == 1 else kind
        problem = random_problem(seed, dtype if kind.itemsize > 1 else "bf16", pass_)
        order = ORDERS[seed % len(ORDERS)]
        block = (16, 32)[seed % 2]
        contract = bounds.contract_for(dtype, key_block=block, where="interpreter", fp32_products=products, **changes)
        emulation = Emulation(problem, kind, stored, block, order, products)
        recipe = ("normal", "normal", "outliers", "large", "integers", "constant_rows")[seed % 6]
        for name, ratio in ratios(problem, contract, emulation, seed, recipe).items():
            worst[name] = max(worst[name], ratio)
    return dict(worst)


@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "fp8e4m3", "fp8e5m2"])
def test_the_bounds_are_neither_loose_nor_wrong(dtype, pass_):
    found = campaign(dtype, pass_, 120)
    assert set(found) == ({"out", "lse"} if pass_ == "fwd" else {"dq", "dk", "dv"})
    assert all(0.1 < ratio < 1 for ratio in found.values()), found


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_nor_are_those_of_a_chain(dtype):
    """In fp32 both passes round the same scores alike, and what they lose does not add up as the bound has to fear."""
    found = campaign(dtype, "bwd", 60, chained=True)
    assert all((0.05 if dtype == "fp32" else 0.1) < ratio < 1 for ratio in found.values()), found


@pytest.mark.parametrize("products", ["tf32", "tf32x3"])
@pytest.mark.parametrize("pass_", ["fwd", "bwd"])
def test_nor_are_those_of_products_cut_to_tf32(pass_, products):
    """What three products lose of one has several parts, which are seldom all at their worst."""
    found = campaign("fp32", pass_, 60, products=products)
    assert all((0.05 if products == "tf32x3" else 0.1) < ratio < 1 for ratio in found.values()), found


@pytest.mark.parametrize(("coarser", "agreed"), [("tf32", "tf32x3"), ("tf32", "ieee")])
def test_coarser_products_than_agreed_are_out_of_bounds(coarser, agreed):
    problem = parse_problem("b1 h4/2 q40 k60 d64 fp32 causal")
    values = inputs.draw(problem, seed=1)
    contract = bounds.contract_for("fp32", where="interpreter", fp32_products=agreed)
    expected = bounds.expect_forward(problem, values, contract, structured=False)
    for products, passes in ((agreed, True), (coarser, False)):
        found = Emulation(problem, torch.float32, torch.float32, products=products).forward(**values)
        assert (compare.status_of(compare.judge(found, expected, case="")) == "passed") == passes


WRONG = [
    ("fp16", "rounded before the sum", "lse"),
    ("bf16", "rounded before the sum", "lse"),
    ("fp32", "scale", "out"),
    ("fp32", "scale", "lse"),
    ("fp32", "16-bit accumulator", "out"),
    ("fp16", "one column in 128", "out"),
    ("fp32", "scale", "dq"),
    ("fp32", "scale", "dv"),
    ("fp32", "16-bit delta", "dk"),
    ("fp32", "16-bit delta", "dq"),
]


@pytest.mark.parametrize(("dtype", "flaw", "output"), WRONG)
@pytest.mark.parametrize("where", ["device", "interpreter"])
def test_what_is_slightly_wrong_is_out_of_bounds(dtype, flaw, output, where):
    pass_ = "fwd" if output in ("out", "lse") else "bwd"
    problem = parse_problem(f"b1 h4/2 q40 k400 d32 {dtype} causal {pass_}")
    contract = bounds.contract_for(dtype, where=where)
    right = Emulation(problem, KINDS[dtype], KINDS[dtype])
    assert ratios(problem, contract, right, 3)[output] < 1
    assert ratios(problem, contract, replace(right, flaw=flaw), 3)[output] > 1


@pytest.mark.parametrize(("narrow", "agreed"), [("fp8e5m2", "fp8e4m3"), ("fp8e4m3", "bf16"), ("bf16", "fp16")])
def test_a_narrower_cast_of_the_weights_than_agreed_is_out_of_bounds(narrow, agreed):
    problem = parse_problem("b1 h4/2 q40 k30 d32 bf16 causal")
    values = {name: x.to(torch.float8_e5m2).double() for name, x in inputs.draw(problem, seed=1).items()}
    contract = bounds.contract_for(agreed, where="interpreter")
    expected = bounds.expect_forward(problem, values, contract, structured=False)
    stored = KINDS[agreed] if agreed in ("fp16", "bf16") else torch.bfloat16
    for cast, passes in ((agreed, True), (narrow, False)):
        found = Emulation(problem, KINDS[cast], stored).forward(**values)
        assert (compare.status_of(compare.judge(found, expected, case="")) == "passed") == passes
