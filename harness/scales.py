"""Inputs of 8 bits: the numbers that they stand for, which are what they hold times a scale.

Scales are (batch, kv_heads), of packed sequences (sequences, kv_heads); query head h has that of key/value head h // group.
Refuses to know kernels, and to say what attention is.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from harness.problem import Problem


def describable(problem: Problem) -> Problem:
    """A problem whose rows, of 8 bits, descriptors can read: they hold whole 16 bytes."""
    if not problem.eight_bits:
        return problem
    return problem.replace(head_dim=-(-problem.head_dim // 16) * 16, v_head_dim=-(-problem.v_head_dim // 16) * 16)


def multiplied(problem: Problem, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The tensors with the numbers that q, k and v stand for, fp64; unchanged where these have no scales."""
    if not problem.eight_bits:
        return tensors
    found = dict(tensors)
    for name, group in (("q", problem.group), ("k", 1), ("v", 1)):
        # (batch, heads, 1 or length, 1), where packed sequences lie in one batch.
        scale = tensors[f"{name}_descale"].double().repeat_interleave(group, 1)[..., None, None]
        if problem.packed is not None:
            starts = tensors["q_starts" if name == "q" else "kv_starts"].long().contiguous()
            place = torch.arange(tensors[name].shape[2], device=starts.device)
            sequence = torch.searchsorted(starts, place, right=True) - 1
            scale = scale[sequence, :, 0].transpose(0, 1)[None]
        found[name] = tensors[name].double() * scale
    return found
