"""Merging partial attention, in Triton's interpreter. Run by `test_kernels.py` in a process of its own.

A merge is attention: one query of one feature, 1, reads as many keys as there are parts; a part's log-sum-exp is its key, so
that the scores are the log-sum-exps, and its output the value. So the derived bounds of attention judge it.
"""

from dataclasses import replace

import pytest
import torch

from harness import bounds, compare
from harness.bounds import contract_for
from harness.inputs import DTYPES
from harness.problem import Problem
from harness.quicken import quicken
from kernels import primitives
from kernels.merge import merge, merge_launch

quicken()


def parts(
    count: int, shape: tuple[int, ...], columns: int, dtype: str = "fp32", spread: float = 2.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """outs (count, *shape, columns) and lses (count, *shape)."""
    generator = torch.Generator().manual_seed(count)
    outs = torch.randn((count, *shape, columns), generator=generator).to(DTYPES[dtype])
    return outs, spread * torch.randn((count, *shape), generator=generator)


def check(
    outs: torch.Tensor, lses: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor], *, dtype: str = "fp32"
) -> None:
    """Judge every row among the parts that saw something in it."""
    stored = contract_for(dtype)
    rows = outs[0, ..., 0].numel()
    flat = outs.flatten(1, 3).transpose(0, 1), lses.flatten(1).transpose(0, 1)
    for row in range(rows):
        out, lse = (tensor[row] for tensor in flat)
        out, lse = out[lse > -torch.inf], lse[lse > -torch.inf]
        exact = "fp64" if found[1].dtype == torch.float64 else "fp32"
        contract = contract_for(exact, key_block=1, where="interpreter")
        if exact == "fp32":
            contract = replace(contract, storage=stored.storage, tiny=stored.tiny, largest=stored.largest)
        problem = Problem(
            batch=1, q_heads=1, kv_heads=1, q_len=1, kv_len=len(lse), head_dim=1, v_head_dim=out.shape[-1], dtype="fp32",
            scale=1.0,
        )  # fmt: skip
        given = {"q": lse.new_ones((1, 1, 1, 1)), "k": lse[None, None, :, None], "v": out[None, None]}
        expected = bounds.expect_forward(problem, given, contract, structured=True)
        merged = {name: tensor.flatten(0, 2)[row] for name, tensor in zip(("out", "lse"), found, strict=True)}
        merged = {"out": merged["out"][None, None, None], "lse": merged["lse"][None, None, None]}
        for verdict in compare.judge(merged, expected, case=f"row {row}"):
            assert verdict.ratio <= 1, compare.sentence(verdict)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 37])
@pytest.mark.parametrize("columns", [24, 600])
def test_any_number_of_parts(count: int, columns: int) -> None:
    outs, lses = parts(count, (1, 2, 3), columns)
    check(outs, lses, merge(outs, lses))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_outs_of_any_type(dtype: str) -> None:
    outs, lses = parts(3, (2, 1, 3), 16, dtype)
    out, lse = merge(outs, lses)
    assert (out.dtype, lse.dtype) == (outs.dtype, torch.float32)
    check(outs, lses, (out, lse), dtype=dtype)
    out, lse = merge(outs, lses, dtype=torch.float32)
    assert out.dtype == torch.float32
    check(outs, lses, (out, lse))


def test_fp64_is_merged_in_fp64() -> None:
    outs, lses = (tensor.double() for tensor in parts(3, (1, 2, 2), 16))
    out, lse = merge(outs, lses)
    assert out.dtype == lse.dtype == torch.float64
    check(outs, lses, (out, lse))


@pytest.mark.parametrize("spread", [0.0, 30.0, 300.0])
def test_log_sum_exps_near_and_far_from_each_other(spread: float) -> None:
    outs, lses = parts(4, (1, 1, 4), 16, spread=spread)
    check(outs, lses, merge(outs, lses))
    check(outs, lses - 1000, merge(outs, lses - 1000))


def test_parts_that_saw_nothing_count_for_nothing() -> None:
    outs, lses = parts(3, (1, 2, 4), 16)
    for row in range(4):
        for part in range(3):
            if row >> part & 1 or row == 3:
                lses[part, 0, 0, row], outs[part, 0, 0, row] = -torch.inf, 0.0
    out, lse = merge(outs, lses)
    assert (out[0, 0, 3] == 0).all() and lse[0, 0, 3] == -torch.inf
    keep = [0, 1, 2]
    check(outs[:, :, :, keep], lses[:, :, :, keep], (out[:, :, keep], lse[:, :, keep]))


def test_one_part_is_itself_bit_by_bit() -> None:
    outs, lses = parts(1, (2, 3, 5), 16)
    lses[0, 0, 0, 0], outs[0, 0, 0, 0] = -torch.inf, 0.0
    out, lse = merge(outs, lses)
    assert torch.equal(out, outs[0]) and torch.equal(lse, lses[0])


def test_no_part_at_all_is_empty() -> None:
    out, lse = merge(torch.empty((0, 1, 2, 3, 16)), torch.empty((0, 1, 2, 3)))
    assert (out == 0).all() and (lse == -torch.inf).all()
    assert merge(torch.empty((2, 1, 2, 0, 16)), torch.empty((2, 1, 2, 0)))[0].shape == (1, 2, 0, 16)


@pytest.mark.parametrize("where", ["outs", "lses"])
def test_nan_reaches_the_row_that_it_is_in_and_no_other(where: str) -> None:
    outs, lses = parts(3, (1, 2, 2), 16)
    (outs if where == "outs" else lses)[1, 0, 1, 0] = torch.nan
    out, lse = merge(outs, lses)
    bad = torch.zeros((1, 2, 2), dtype=torch.bool)
    bad[0, 1, 0] = True
    assert torch.equal(out.isnan().all(-1), bad) and torch.equal(out.isnan().any(-1), bad)
    assert torch.equal(lse.isnan(), bad if where == "lses" else torch.zeros_like(bad))


def test_any_strides_and_any_destination() -> None:
    outs, lses = parts(3, (2, 3, 5), 16)
    plain = merge(outs, lses)
    strange = outs.permute(4, 3, 0, 2, 1).contiguous().permute(2, 4, 3, 1, 0)
    odd = lses.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    assert strange.stride() != outs.stride() and odd.stride() != lses.stride()
    out, lse = torch.full((2, 5, 3, 20), 7.0)[..., 2:18].transpose(1, 2), torch.full((5, 3, 2), 7.0).permute(2, 1, 0)
    found = merge(strange, odd, out=out, lse=lse)
    assert found[0] is out and found[1] is lse
    assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1])
    listed = merge(list(outs), tuple(lses))
    assert torch.equal(listed[0], plain[0]) and torch.equal(listed[1], plain[1])
    same = outs[:1].expand(4, -1, -1, -1, -1)
    check(same, lses[:1].expand(4, -1, -1, -1), merge(same, lses[:1].expand(4, -1, -1, -1)))


def test_offsets_beyond_32_bits() -> None:
    """Parts lie 2^31 elements apart; only the pages that are touched exist."""
    outs, lses = parts(2, (1, 1, 2), 16)
    far = torch.empty((1 << 31) + 32).as_strided(outs.shape, (1 << 31, 32, 32, 16, 1)).copy_(outs)
    for found, expected in zip(merge(far, lses), merge(outs, lses), strict=True):
        assert torch.equal(found, expected)


def test_more_heads_than_a_grid_axis_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(primitives, "_GRID_LIMIT", 2)
    outs, lses = parts(2, (3, 5, 2), 16)
    check(outs, lses, merge(outs, lses))


def test_finished_parts_and_states_say_the_same() -> None:
    """A state (m, z, acc) with m to base 2 finishes as out = acc / z and lse = ln(z) + m ln(2)."""
    outs, lses = parts(3, (1, 2, 2), 16)
    totals = torch.tensor([1.0, 2.0, 4.0])[:, None, None, None].expand_as(lses)
    maxima = torch.round(lses)
    finished = maxima.double() * torch.log(torch.tensor(2.0, dtype=torch.float64)) + totals.double().log()
    out, lse = torch.empty((1, 2, 2, 16)), torch.empty((1, 2, 2))
    merge_launch(outs * totals[..., None], maxima, totals, out, lse).run()
    check(outs.double(), finished, (out, lse))


def test_equal_questions_get_equal_bits() -> None:
    outs, lses = parts(37, (1, 2, 3), 16)
    assert all(torch.equal(one, two) for one, two in zip(merge(outs, lses), merge(outs, lses), strict=True))


def test_tensors_that_do_not_go_together_are_refused() -> None:
    outs, lses = parts(2, (1, 1, 3), 16)
    with pytest.raises(ValueError, match=r"lses must have the shape \(2, 1, 1, 3\), found \(2, 1, 1, 2\)"):
        merge(outs, lses[..., :2])
    with pytest.raises(ValueError, match="outs must have 5 axes, parts first"):
        merge(outs[0], lses)
    with pytest.raises(ValueError, match=r"lses of outs of torch.float32 must be torch.float32, found torch.float16"):
        merge(outs, lses.half())
    with pytest.raises(ValueError, match="tensors of one shape and type, at least one"):
        merge([], lses)
    with pytest.raises(ValueError, match="tensors of one shape and type, at least one"):
        merge([outs[0], outs[1].half()], lses)
    with pytest.raises(ValueError, match="out must have the shape"):
        merge(outs, lses, out=torch.empty((1, 1, 3, 8)))
