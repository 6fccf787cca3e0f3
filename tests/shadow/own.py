"""Run in the interpreter by `test_own_kernels.py`: the project's kernels, and copies with a planted bug, under a watch.

usage: own.py clean | planted KERNELS_FOLDER SCRATCH_FOLDER [NAME ...]. JSON lines on stdout.
"""

import dataclasses
import importlib
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from harness import inputs
from harness.inputs import DTYPES, Guarded, Placement, placement_for
from harness.operation import operation_for, problem_keywords, shapes
from harness.problem import Problem, parse_problem
from harness.quicken import quicken
from harness.shadow import shadow
from harness.subject import workspaces_of

FORWARD = {
    "block_m": 32, "block_n": 16, "num_warps": 4, "num_stages": 1, "load": "pointer", "loops": "split",
    "masked_stages": 1, "head_order": "outer", "warp_specialize": False, "waves_per_eu": 0,
}  # fmt: skip
BACKWARD = {
    "dkdv_block_m": 16, "dkdv_block_n": 32, "dkdv_warps": 4, "dkdv_stages": 1, "dkdv_load": "pointer",
    "dq_block_m": 32, "dq_block_n": 16, "dq_warps": 4, "dq_stages": 1, "dq_load": "pointer", "waves_per_eu": 0,
}  # fmt: skip
DECODE = {
    "block_m": 16, "block_n": 16, "num_splits": 3, "num_warps": 4, "num_stages": 1, "load": "pointer", "loops": "split",
    "waves_per_eu": 0,
}  # fmt: skip
TMA = {"load": "tma", "dkdv_load": "tma", "dq_load": "tma"}
OTHER = {"loops": "single", "head_order": "inner"}
# Placements that no layout of a problem gives.
PADDED = Placement(order=(0, 2, 1, 3), row_padding=8)
SHIFTED = Placement(order=(0, 1, 3, 2), shift=5)
EXPANDED = Placement(order=(0, 1, 2, 3), expanded=(2, 3))


@dataclass(frozen=True)
class Case:
    """A problem, both passes, with what differs from the usual config and placements."""

    problem: str
    config: Mapping[str, Any] = field(default_factory=dict)
    placements: Mapping[str, Placement] = field(default_factory=dict)


CLEAN = (
    Case("b2 h4/2 q37 k45 d48 fp16"),
    Case("b1 h4/1 q37 k33 d32 bf16 causal", OTHER),
    Case("b1 h2 s40 d16/24 fp32 causal window=9 bshd"),
    Case("b1 h2/1 q30 k50 d32 fp16 window=7:5 sbhd", OTHER),
    Case("b1 h2/1 q37 k45 d32 bf16 causal bshd", TMA),
    Case("b1 h2/1 s64 d64 fp16", TMA | OTHER),
    Case("b1 h2/1 q33 k40 d16 fp32 window=12:0", TMA),
    Case("b1 h2 q0 k20 d16 fp16"),
    Case("b1 h2 q20 k0 d16 fp16"),
    Case("b1 h2/1 q1 k1 d16 bf16 causal"),
    Case("b1 h2/1 q1 k40 d16 fp16", TMA),
    Case("b1 h2/1 q40 k1 d16 fp16 causal"),
    Case("b0 h2/1 q40 k1 d16 fp16"),
    Case("b1 h2/1 q20 k25 d24 fp16 causal top-left", placements={"dout": EXPANDED, "q": PADDED, "out": PADDED}),
    Case(
        "b1 h2/1 q20 k25 d24 bf16", placements={"k": SHIFTED, "v": PADDED, "dq": SHIFTED, "dk": PADDED, "out": SHIFTED}
    ),
    Case("b2 h2 q20 k25 d16 fp16", placements={"q": Placement(order=(0, 1, 2, 3), expanded=(0,)), "k": EXPANDED}),
)

# One row each, in tensors whose rows would be 2^30 elements apart.
FAR = "b1 h1 q1 k1 d16 fp16 far"
PLAIN = "b1 h2/1 q37 k45 d24 fp16"


@dataclass(frozen=True)
class Planted:
    """A bug: in `file`, the anchor becomes what is planted, once; `kinds` (kind, tensor) is exactly what must be found.
    `zeroed` is what the host has written before."""

    name: str
    file: str
    anchor: str
    change: str
    pass_: str
    kinds: tuple[tuple[str, str], ...]
    problem: str = PLAIN
    zeroed: str = ""


INSIDE = "inside = (start + row < length)[:, None] & (col < COLS)[None, :]"
UNMASKED = "inside = (row >= 0)[:, None] & (col < COLS)[None, :]"
DQ_STORE = "store_tile(dq_sum, dq_base, start_m, q_len,"

PLANTED = (
    Planted(
        "rows beyond the end of out stored", "primitives.py", INSIDE, UNMASKED, "fwd",
        (("out of bounds store", "out"), ("write race", "out")),
    ),
    Planted(
        "rows beyond the end of gradients stored", "primitives.py", INSIDE, UNMASKED, "bwd",
        (("out of bounds store", "dk"), ("out of bounds store", "dv"), ("out of bounds store", "dq"), ("write race", "dq")),
    ),
    Planted(
        "columns beyond the head stored", "primitives.py", INSIDE, INSIDE.replace("(col < COLS)", "(col >= 0)"), "fwd",
        (("write race", "out"), ("out of bounds store", "out"), ("conflicting lanes", "out")),
    ),
    Planted(
        "key tail loaded unmasked", "flash_fwd.py", "CHECK: tl.constexpr = MASKED and not EVEN",
        "CHECK: tl.constexpr = False", "fwd", (("out of bounds load", "k"), ("out of bounds load", "v")),
    ),
    Planted(
        "lse read out of bounds", "flash_bwd.py", "tl.load(lse_at, mask=row < q_len, other=0.0)", "tl.load(lse_at)",
        "bwd", (("out of bounds load", "lse"),),
    ),
    Planted(
        "lse of the next head", "flash_bwd.py", "lse + batch * stride_lse_batch + head * stride_lse_head + row",
        "lse + batch * stride_lse_batch + (head + 1) * stride_lse_head + row", "bwd", (("out of bounds load", "lse"),),
    ),
    Planted(
        "two programs add to dq with plain stores", "flash_bwd.py", DQ_STORE,
        "store_tile(dq_sum + tl.load(dq_base), dq_base, start_m * 0, q_len,", "bwd",
        # Rows that only pad the second program's block add nothing, so some of what it stores is there already.
        (("read of foreign write", "dq"), ("write race", "dq"), ("write after foreign read", "dq"), ("double write", "dq")),
        zeroed="dq",
    ),
    Planted(
        "two programs write the same rows of dq", "flash_bwd.py",
        "    start_m = position * BLOCK_M\n    query = start_m", "    start_m = (position // 2) * BLOCK_M\n    query = start_m",
        "bwd",
        (("double write", "dq"), ("never written", "dq")),
    ),
    Planted(
        "last keys of dk never written", "flash_bwd.py", "store_tile(dk_sum, dk_base, start_n, kv_len,",
        "store_tile(dk_sum, dk_base, start_n, kv_len - 3,", "bwd", (("never written", "dk"),),
    ),
    Planted(
        "delta of the last rows never written", "flash_bwd.py",
        "tl.store(delta_at, total.to(delta.dtype.element_ty), mask=row < q_len)",
        "tl.store(delta_at, total.to(delta.dtype.element_ty), mask=row < q_len - 5)", "bwd",
        (("uninitialised read", "delta"),),
    ),
    Planted(
        "dq written to q", "flash_bwd.py", "dq_base = dq + batch * stride_dq_batch", "dq_base = q + batch * stride_dq_batch",
        "bwd", (("input written", "q"), ("never written", "dq")),
    ),
    Planted(
        "offsets of 32 bits", "primitives.py", "    return any(\n        (block_rows - 1)",
        "    return block_rows < 0 and any(\n        (block_rows - 1)", "fwd", (("int32 overflow", ""),), problem=FAR,
    ),
)  # fmt: skip


def tensors_of(
    kernel: Any, problem: Problem, config: Mapping[str, Any], placements: Mapping[str, Placement]
) -> tuple[dict[str, Guarded], dict[str, str]]:
    operation, wanted = operation_for(problem), shapes(problem)
    values = inputs.draw(problem, seed=1)
    made: dict[str, Guarded] = {}
    roles = dict.fromkeys(operation.inputs, "input") | dict.fromkeys(operation.outputs, "output")
    for name, (shape, dtype) in wanted.items():
        placement = placements.get(name, placement_for(problem.layout, len(shape)))
        if name in operation.inputs:
            value = values.get(name, torch.zeros(shape, dtype=DTYPES[dtype]))
            made[name] = inputs.place(name, value, placement)
        else:
            made[name] = inputs.unwritten(name, shape, DTYPES[dtype], placement)
    scratch = workspaces_of(kernel, {name: made[name].view for name in operation.inputs}, config)
    for name, (shape, dtype) in scratch.items():
        made[name] = inputs.unwritten(name, shape, dtype, Placement(order=tuple(range(len(shape)))))
        roles[name] = "workspace"
    return made, roles


def launch(
    kernel: Any, case: Case, pass_: str, *, watched: bool, zeroed: str = ""
) -> tuple[list[dict[str, Any]], dict[str, Guarded]]:
    text = case.problem.removesuffix(" far")
    problem = parse_problem(f"{text} {pass_}")
    config = DECODE if kernel.__name__.endswith("flash_decode") else FORWARD if pass_ == "fwd" else BACKWARD
    chosen = {**config, **{name: value for name, value in case.config.items() if name in config}}
    made, roles = tensors_of(kernel, problem, chosen, case.placements)
    views = {name: guarded.view for name, guarded in made.items()}
    if text != case.problem:
        for name in ("q", "k", "v", "out"):
            views[name] = views[name].as_strided(views[name].shape, (1 << 30, 1 << 30, 1 << 30, 1))
    found = kernel.launches(**views, **problem_keywords(problem), **chosen)
    if not watched:
        for one in found:
            one.run()
        return [], made
    with shadow(views, roles) as watch:
        if zeroed:
            views[zeroed].zero_()
            watch.host_wrote(zeroed)
        for one in found:
            one.run()
    every = [dataclasses.asdict(finding) | {"text": str(finding)} for finding in (*watch.findings, *watch.unwritten())]
    return every, made


def clean() -> None:
    for number, case in enumerate(CLEAN):
        decoding = (("flash_decode", "fwd"),) if number % 2 else ()
        for stem, pass_ in (("flash_fwd", "fwd"), ("flash_bwd", "bwd"), *decoding):
            kernel = importlib.import_module(f"kernels.{stem}")
            findings, made = launch(kernel, case, pass_, watched=True)
            _, alone = launch(kernel, case, pass_, watched=False)
            same = all(torch.equal(made[name].storage, alone[name].storage) for name in made)
            say(case=f"{case.problem} {stem}", findings=findings, same=same)
    findings, _ = launch(importlib.import_module("kernels.flash_fwd"), Case(FAR), "fwd", watched=True)
    say(case="strides of 2^30 fwd", findings=findings, same=True)


def planted(kernels: str, scratch: str, *names: str) -> None:
    sys.path.insert(0, scratch)
    for bug in PLANTED:
        if names and bug.name not in names:
            continue
        package = "shadowed_" + "".join(letter if letter.isalnum() else "_" for letter in bug.name)
        shutil.copytree(kernels, Path(scratch) / package, ignore=shutil.ignore_patterns("__pycache__"))
        path = Path(scratch) / package / bug.file
        source = path.read_text()
        if source.count(bug.anchor) != 1:
            raise SystemExit(f"`{bug.name}`: `{bug.anchor}` occurs {source.count(bug.anchor)} times")
        path.write_text(source.replace(bug.anchor, bug.change))
        kernel = importlib.import_module(f"{package}.flash_{bug.pass_}")
        findings, made = launch(kernel, Case(bug.problem), bug.pass_, watched=True, zeroed=bug.zeroed)
        strays = [name for name, guarded in made.items() if guarded.stray_write() is not None]
        say(bug=bug.name, findings=findings, strays=strays, wanted=bug.kinds)


def say(**line: Any) -> None:
    sys.stdout.write(json.dumps(line) + "\n")


def main(mode: str, *arguments: str) -> None:
    quicken()
    torch.set_num_threads(1)
    {"clean": clean, "planted": planted}[mode](*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
