"""Keys and values in pages: which page is whose, what of a pool nobody may read, and the dense tensors that a table stands for.

k and v are pools (pages, kv_heads, rows of a page, head dim). Row j of sequence b is row j % size of page
block_table[b, j // size], for j < kv_lengths[b]. Refuses to know kernels, and to say what attention is.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from harness.problem import Problem

# In entries of a table that belong to no row: no page, and far from any.
NO_PAGE = 0x5A5A5A5A
POOLS = ("k", "v")


def draw_lengths(problem: Problem, generator: np.random.Generator) -> np.ndarray:
    """A length for each sequence: at and around whole pages, nothing at all, or anything; one of them is kv_len."""
    size, most = problem.paged or 1, problem.kv_len
    whole = int(generator.integers(0, most // size + 1)) * size
    edges = np.array([0, 1, size - 1, size, size + 1, whole, whole + 1, most - 1])
    near = generator.choice(edges, problem.batch).clip(0, most)
    lengths = np.where(generator.random(problem.batch) < 0.6, near, generator.integers(0, most + 1, problem.batch))
    lengths[generator.integers(max(problem.batch, 1)) :][:1] = most
    return lengths


def draw_table(problem: Problem, shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Pages in any order. Some sequences begin like the first one, on the same pages; some pages occur twice in one."""
    batch, columns = shape
    table = generator.permutation(batch * columns + 1)[: batch * columns].reshape(shape)
    if not columns:
        return table
    for sequence in range(1, batch):
        if generator.random() < 0.3:
            shared = int(generator.integers(1, columns + 1))
            table[sequence, :shared] = table[0, :shared]
    if batch and generator.random() < 0.2:
        table[-1, generator.integers(columns)] = table[-1, 0]
    return table


def full(problem: Problem, generator: np.random.Generator) -> dict[str, Tensor]:
    """A table and lengths for timing: every sequence is as long as kv_len, and no page is shared."""
    columns = -(-problem.kv_len // (problem.paged or 1))
    table = generator.permutation(problem.batch * columns + 1)[: problem.batch * columns].reshape(
        problem.batch, columns
    )
    lengths = torch.full((problem.batch,), problem.kv_len, dtype=torch.int32)
    return {"block_table": torch.from_numpy(table).to(torch.int32), "kv_lengths": lengths}


def spoiled(problem: Problem, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with what nobody may read made NaN, and no page in a table."""
    for name, unused in holes(problem, tensors).items():
        tensors[name] = tensors[name].masked_fill(unused, NO_PAGE if name == "block_table" else torch.nan)
    return tensors


def holes(problem: Problem, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By name, which elements of the tensors belong to no row of any sequence: bool, in their shapes; nothing unless paged."""
    if problem.paged is None:
        return {}
    table, lengths = tensors["block_table"], tensors["kv_lengths"].long()
    columns = torch.arange(table.shape[1], device=table.device)
    found = {"block_table": columns * problem.paged >= lengths[:, None]}
    page, row, used = _places(problem, tensors)
    for name in POOLS:
        if name in tensors:
            pool = tensors[name]
            free = torch.ones(pool.shape[0], problem.paged, dtype=torch.bool, device=pool.device)
            free[page[used], row.expand_as(page)[used]] = False
            found[name] = free[:, None, :, None].expand(pool.shape)
    return found


def describable(problem: Problem, config: Mapping[str, int | str | bool]) -> Problem:
    """A problem whose pages descriptors can read under a config: they hold whole key blocks, and those that no mask touches
    have a loop of their own. Where the config has none, nothing is paged."""
    if problem.paged is None or config.get("loops") == "single":
        return problem.replace(paged=None)
    most = max(value for name, value in config.items() if "block_n" in name and isinstance(value, int))
    return problem.replace(paged=-(-problem.paged // most) * most, window_left=None)


def dense(problem: Problem, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors with k and v as (batch, kv_heads, kv_len, head dim), 0 behind the end of a sequence."""
    if problem.paged is None:
        return tensors
    page, row, used = _places(problem, tensors)
    gathered = {
        name: tensors[name][page, :, row].masked_fill(~used[:, :, None, None], 0.0).transpose(1, 2) for name in POOLS
    }
    return {**tensors, **gathered}


def _places(problem: Problem, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of each sequence its page (batch, kv_len), its row there (kv_len), and whether it exists (batch, kv_len)."""
    table = tensors["block_table"].long()
    position = torch.arange(problem.kv_len, device=table.device)
    used = position < tensors["kv_lengths"].long()[:, None]
    size = problem.paged or 1
    page = table[:, position // size] if problem.kv_len else table.new_zeros(used.shape)
    return page.masked_fill(~used, 0), position % size, used
