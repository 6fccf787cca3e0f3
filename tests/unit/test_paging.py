"""Pages as they are drawn: every length that breaks kernels, shared pages, and nothing to read where nothing is to be read."""

import numpy as np
import pytest
import torch

from harness import inputs, paging
from harness.problem import parse_problem

PROBLEM = parse_problem("b4 h2/1 q2 k37 d8 bf16 paged=8")


def test_lengths_lie_at_and_around_pages_and_one_sequence_is_full():
    drawn = [inputs.draw(PROBLEM, seed=seed)["kv_lengths"].tolist() for seed in range(60)]
    assert all(max(lengths) == 37 and min(lengths) >= 0 for lengths in drawn)
    assert {0, 1, 7, 8, 9, 36} <= {length for lengths in drawn for length in lengths}


def test_pages_are_shuffled_and_sometimes_shared():
    tables = [paging.draw_table(PROBLEM, (4, 5), np.random.default_rng(seed)) for seed in range(40)]
    assert all(table.shape == (4, 5) and {*table.flat} <= {*range(21)} for table in tables)
    alone = [len(np.unique(table)) == table.size for table in tables]
    assert any(alone) and not all(alone)
    assert any((table[1:, 0] == table[0, 0]).any() for table in tables)
    assert any(len(np.unique(table[-1])) < 5 for table in tables)


@pytest.mark.parametrize("recipe", sorted(inputs.RECIPES))
def test_what_belongs_to_no_row_holds_nothing_and_the_rest_is_finite(recipe):
    tensors = inputs.draw(PROBLEM, seed=3, recipe=recipe)
    holes = paging.holes(PROBLEM, tensors)
    for name in paging.POOLS:
        assert torch.equal(tensors[name].isnan(), holes[name]) and holes[name].any() and not holes[name].all()
    assert ((tensors["block_table"] == paging.NO_PAGE) == holes["block_table"]).all() and holes["block_table"].any()
    assert not any(tensor.isnan().any() for tensor in paging.dense(PROBLEM, tensors).values())


def test_pages_of_the_counting_recipe_differ():
    """Otherwise a kernel could read any page in place of another."""
    values = inputs.draw(parse_problem("b1 h1 q1 k64 d16 fp16 paged=4"), seed=0, recipe="counting")["v"]
    used = [page for page in values[:, 0] if not page.isnan().any()]
    assert sum(torch.equal(one, other) for one in used for other in used) < len(used) ** 2 / 2


def test_the_dense_keys_are_the_rows_that_the_table_names():
    tensors = inputs.draw(PROBLEM, seed=3)
    dense = paging.dense(PROBLEM, tensors)
    for sequence, length in enumerate(tensors["kv_lengths"].tolist()):
        for row in range(37):
            found = dense["k"][sequence, :, row]
            page = int(tensors["block_table"][sequence, row // 8])
            assert torch.equal(found, tensors["k"][page, :, row % 8] if row < length else torch.zeros_like(found))


def test_what_is_timed_is_full_and_shares_no_page():
    added = inputs.draw_added(PROBLEM, seed=1)
    assert added["kv_lengths"].tolist() == [37] * 4 and len(added["block_table"].unique()) == 20


def test_without_pages_there_are_no_holes_and_nothing_is_gathered():
    problem = parse_problem("b1 h1 s8 d8 fp16")
    tensors = inputs.draw(problem, seed=0)
    assert paging.holes(problem, tensors) == {} and paging.dense(problem, tensors) is tensors
