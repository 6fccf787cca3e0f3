"""Asking the stock kernels a question in the interpreter: guarded inputs, poisoned outputs, the derived bounds as judge."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from harness import bounds, compare, inputs, oracle
from harness.inputs import Guarded, Placement
from harness.operation import operation_for, problem_keywords, shapes
from harness.problem import Problem, parse_problem
from harness.subject import shifted, workspaces_of
from kernels import flash_bwd, flash_decode, flash_fwd

KERNELS = {"fwd": flash_fwd, "bwd": flash_bwd}

FORWARD: Mapping[str, Any] = {
    "block_m": 16, "block_n": 32, "num_warps": 4, "num_stages": 1, "load": "pointer", "loops": "split", "masked_stages": 1,
    "head_order": "outer", "warp_specialize": False, "waves_per_eu": 0, "maxnreg": 0, "groups_together": 1,
    "programs_per_sm": 0, "flatten": False, "lone_accumulator": False,
    "v_load": "late", "cache_hints": False, "precision": "ieee", "lag": 0, "head_chunks": False,
    "scaled_queries": False, "mfma_side": 0, "kpack": 1,
}  # fmt: skip
BACKWARD: Mapping[str, Any] = {
    "dkdv_block_m": 16, "dkdv_block_n": 32, "dkdv_warps": 4, "dkdv_stages": 1, "dkdv_load": "pointer",
    "dq_block_m": 16, "dq_block_n": 32, "dq_warps": 4, "dq_stages": 1, "dq_load": "pointer", "waves_per_eu": 0,
    "structure": "separate", "mfma_side": 0, "kpack": 1,
}  # fmt: skip
DECODE: Mapping[str, Any] = {
    "block_m": 16, "block_n": 16, "num_splits": 4, "num_warps": 4, "num_stages": 1, "load": "pointer", "loops": "split",
    "waves_per_eu": 0,
}  # fmt: skip
CONFIGS = {flash_fwd: FORWARD, flash_bwd: BACKWARD, flash_decode: DECODE}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a kernel made of a question: its outputs, and the memory around everything."""

    problem: Problem
    values: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]
    memory: Mapping[str, Guarded] = field(repr=False)
    config: Mapping[str, Any] = field(default_factory=dict)

    def same_bits(self, other: "Answer") -> bool:
        return all(torch.equal(self.memory[name].bits, other.memory[name].bits) for name in self.outputs)


def ask(
    notation: str | Problem,
    config: Mapping[str, Any] | None = None,
    *,
    kernel: ModuleType | None = None,
    seed: int = 0,
    recipe: str = "normal",
    placements: Mapping[str, Placement] | None = None,
) -> Answer:
    """Run a kernel, the plain one of the pass if none is given; fails if it wrote to an input or beside an output, or left
    an element of an output unwritten."""
    problem = notation if isinstance(notation, Problem) else parse_problem(notation)
    kernel, operation = kernel or KERNELS[problem.pass_], operation_for(problem)
    config = {**CONFIGS[kernel], **(config or {})}
    values = dict(inputs.draw(problem, seed=seed, recipe=recipe))
    memory: dict[str, Guarded] = {}

    def lie(name: str, axes: int) -> Placement:
        return (placements or {}).get(name, inputs.placement_for(problem.layout, axes))

    for name, tensor in list(values.items()):
        memory[name] = inputs.place(name, tensor, lie(name, tensor.ndim))
        values[name] = memory[name].view
    if problem.pass_ == "bwd":
        made = oracle.forward(problem, values)
        for name, tensor in {"out": made["out"].to(values["q"].dtype), "lse": made["lse"].float()}.items():
            memory[name] = inputs.place(name, tensor, lie(name, tensor.ndim))
            values[name] = memory[name].view
    for name in operation.outputs:
        shape, dtype = shapes(problem)[name]
        memory[name] = inputs.unwritten(name, shape, inputs.DTYPES[dtype], lie(name, len(shape)))
    for name, (shape, dtype) in workspaces_of(kernel, values, config).items():
        memory[name] = inputs.unwritten(name, shape, dtype, Placement(order=tuple(range(len(shape)))))
    tensors = {name: guarded.view for name, guarded in memory.items()}
    for launch in kernel.launches(**tensors, **problem_keywords(problem), **config):
        launch.run()
    for name, guarded in memory.items():
        assert guarded.stray_write() is None, f"{problem}: memory beside {name} was written to"
        assert name not in values or guarded.unchanged(), f"{problem}: input {name} was written to"
        assert name in values or not guarded.unwritten().any(), f"{problem}: part of {name} was not written"
    outputs = {name: memory[name].view for name in operation.outputs}
    return Answer(problem=problem, values=values, outputs=outputs, memory=memory, config=config)


def check(answer: Answer, *, structured: bool = False, key_block: int = 16) -> None:
    """Fail unless every element of every output lies within its derived bound, and empty rows are exact."""
    problem, values = answer.problem, answer.values
    contract = bounds.contract_for(problem.dtype, key_block=key_block)
    contract = shifted(contract, KERNELS[problem.pass_], problem.dtype, answer.config)
    expect = bounds.expect_forward if problem.pass_ == "fwd" else bounds.expect_backward
    expected = expect(problem, values, contract, structured=structured)
    for found in compare.judge(answer.outputs, expected, case=str(problem)):
        assert found.ratio <= 1, compare.sentence(found)
    if not problem.q_len:
        return
    heads = problem.batch * problem.q_heads
    seen = oracle.visible_pairs(problem, values, slice(0, heads), slice(0, problem.q_len))
    seen = seen.expand(heads, *seen.shape[1:]).unflatten(0, (problem.batch, problem.q_heads))
    nobody = ~seen.any(3)
    if problem.pass_ == "fwd":
        assert (answer.outputs["out"][nobody] == 0).all()
        assert problem.sinks or (answer.outputs["lse"][nobody] == -torch.inf).all()
        return
    assert (answer.outputs["dq"][nobody] == 0).all()
    unseen = ~seen.unflatten(1, (problem.kv_heads, problem.group)).any(2).any(2)
    for name in ("dk", "dv"):
        assert (answer.outputs[name][unseen] == 0).all()
