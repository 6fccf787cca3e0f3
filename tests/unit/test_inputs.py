"""Values by recipe, layouts in memory, and the guards around them."""

import pytest
import torch

from harness import inputs
from harness.errors import UsageError
from harness.inputs import Placement
from harness.problem import LAYOUTS, parse_problem

PROBLEM = parse_problem("b2 h4/2 q5 k7 d8 fp16 bwd")


@pytest.mark.parametrize("recipe", inputs.RECIPES)
def test_a_seed_gives_the_same_values_always_and_in_all_layouts(recipe):
    first = inputs.draw(PROBLEM, seed=7, recipe=recipe)
    assert list(first) == ["q", "k", "v", "dout"]
    for layout in LAYOUTS:
        again = inputs.draw(PROBLEM.replace(layout=layout), seed=7, recipe=recipe)
        assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["k"], inputs.draw(PROBLEM, seed=8, recipe=recipe)["k"])
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in first.values())


def test_tensors_have_streams_of_their_own():
    backward, forward = (inputs.draw(PROBLEM.replace(pass_=pass_), seed=1) for pass_ in ("bwd", "fwd"))
    assert torch.equal(backward["v"], forward["v"])
    assert not torch.equal(forward["k"], forward["v"])


def test_the_global_generators_are_left_alone():
    state = torch.get_rng_state()
    inputs.draw(PROBLEM, seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_recipes_are_what_they_say():
    big = parse_problem("b1 h2 s300 d64 fp32")
    drawn = {name: inputs.draw(big, seed=0, recipe=name) for name in inputs.RECIPES}
    assert drawn["large"]["q"].std() > 3 * drawn["normal"]["q"].std()
    assert drawn["outliers"]["k"].abs().max() > 20 > drawn["normal"]["k"].abs().max()
    assert torch.equal(drawn["constant_rows"]["k"][:, :, :1].expand(1, 2, 300, 64), drawn["constant_rows"]["k"])
    assert drawn["constant_rows"]["v"].min() >= 0
    assert drawn["integers"]["v"].unique().tolist() == [-2, -1, 0, 1, 2]
    assert not drawn["counting"]["q"].any() and torch.equal(drawn["counting"]["v"].sum(-1), torch.ones(1, 2, 300))
    assert not torch.equal(drawn["counting"]["v"][:, 0], drawn["counting"]["v"][:, 1])


def test_an_unknown_recipe_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match="outliers"):
        inputs.draw(PROBLEM, seed=0, recipe="outlier")


PLACEMENTS = {
    "bhsd": inputs.placement_for("bhsd"),
    "bshd": inputs.placement_for("bshd"),
    "sbhd": inputs.placement_for("sbhd"),
    "padded": Placement(order=(0, 1, 2, 3), row_padding=3),
    "shifted": Placement(order=(0, 2, 1, 3), shift=1),
    "transposed": Placement(order=(0, 1, 3, 2), row_padding=2),
    "expanded": Placement(order=(0, 1, 2, 3), expanded=(2, 3)),
}
STRIDES = {
    "bhsd": (56, 28, 4, 1), "bshd": (56, 4, 8, 1), "sbhd": (8, 4, 16, 1), "padded": (98, 49, 7, 1),
    "shifted": (56, 4, 8, 1), "transposed": (72, 36, 1, 9), "expanded": (2, 1, 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_placements_keep_values_and_have_the_strides_they_promise(name, dtype):
    values = torch.arange(2 * 2 * 7 * 4).reshape(2, 2, 7, 4).to(dtype)
    found = inputs.place("x", values, PLACEMENTS[name])
    wanted = values[:, :, :1, :1].expand_as(values) if name == "expanded" else values
    assert torch.equal(found.view, wanted) and found.view.dtype == dtype
    assert found.view.stride() == STRIDES[name]
    assert (found.view.data_ptr() % 16 == 0) == (name != "shifted")
    assert found.unchanged() and found.stray_write() is None


@pytest.mark.parametrize("name", PLACEMENTS)
@pytest.mark.parametrize("make", ["place", "unwritten"])
def test_every_element_outside_the_view_is_guarded(name, make):
    shape = (2, 2, 7, 4)
    for offset in (-1, 0, 1):
        values = torch.ones(shape, dtype=torch.float16)
        found = (
            inputs.place("x", values, PLACEMENTS[name])
            if make == "place"
            else inputs.unwritten("x", shape, torch.float16, PLACEMENTS[name])
        )
        inside = torch.zeros_like(found.storage)
        inputs.reachable(inside, found.view).fill_(1)
        outside = (inside == 0).nonzero().flatten()
        gap = outside[len(outside) // 2 + offset] if name in ("padded", "transposed") else outside[offset]
        assert found.storage.view(torch.float16)[outside].isnan().all()
        found.storage[gap] = 0
        assert found.stray_write() == int(gap) - found.view.storage_offset()
        assert not found.unchanged()


def test_writing_the_view_is_no_stray_write_but_a_change():
    found = inputs.place("x", torch.ones(2, 2, 7, 4), PLACEMENTS["padded"])
    found.view[1, 1, 6, 3] = 2
    assert found.stray_write() is None and not found.unchanged()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_outputs_tell_what_was_not_written_from_a_computed_nan(dtype, large):
    found = inputs.unwritten("x", (1, 2, 3, 4), dtype, PLACEMENTS["bshd"], large=large)
    assert found.view.isfinite().all() if large else found.view.isnan().all()
    assert found.unwritten().all()
    found.view[0, 1, :, 2] = torch.nan
    assert found.unwritten().sum() == 21 and not found.unwritten()[0, 1, :, 2].any()


def test_moving_to_meta_keeps_strides():
    found = inputs.place("x", torch.ones(2, 2, 7, 4), PLACEMENTS["padded"], device="meta")
    assert found.view.is_meta and found.view.stride() == STRIDES["padded"] and found.stray_write() is None


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 2, 0, 4), (1, 1, 1, 1)])
def test_empty_and_single_tensors_can_be_placed(shape):
    for placement in PLACEMENTS.values():
        found = inputs.place("x", torch.ones(shape), placement)
        assert torch.equal(found.view, torch.ones(shape)) and found.stray_write() is None


def test_a_type_without_guards_is_refused():
    with pytest.raises(UsageError, match="torch.int8"):
        inputs.unwritten("x", (2, 3), torch.int8, Placement(order=(0, 1)))
