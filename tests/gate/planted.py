"""Run in the interpreter by `test_planted.py`: the gate on copies of the kernels with one planted bug each; JSON on stdout.

usage: planted.py KERNELS_FOLDER SCRATCH_FOLDER MUTANT ...
"""

import importlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from harness import verify
from harness.problem import parse_problem
from harness.quicken import quicken

FORWARD_CONFIGS = (
    {"block_m": 32, "block_n": 32, "loops": "split", "head_order": "outer"},
    {"block_m": 32, "block_n": 16, "loops": "single", "head_order": "inner", "lag": 8},
)
FORWARD_REST = {
    "num_warps": 4, "num_stages": 1, "load": "pointer", "masked_stages": 1, "warp_specialize": False, "waves_per_eu": 0,
}  # fmt: skip
BACKWARD_CONFIGS = (
    {"dkdv_block_m": 32, "dkdv_block_n": 32, "dq_block_m": 32, "dq_block_n": 32},
    {"dkdv_block_m": 32, "dkdv_block_n": 16, "dq_block_m": 16, "dq_block_n": 32},
)
BACKWARD_REST = {
    "dkdv_warps": 4, "dkdv_stages": 1, "dkdv_load": "pointer", "dq_warps": 4, "dq_stages": 1, "dq_load": "pointer",
    "waves_per_eu": 0,
}  # fmt: skip

CAUSAL = "b4 h16/8 s4096 d16/40 fp16 causal"
WINDOW = "b2 h4/2 s2000 d32 bf16 causal window=64"
FULL = "b2 h8/4 q1000 k3001 d24 fp16"
TOP_LEFT = "b2 h8/4 q512 k1024 d32 fp16 causal top-left"
EVERY = (WINDOW, FULL)


@dataclass(frozen=True)
class Mutant:
    """A planted bug: in `file`, `anchor` becomes `planted`, `times` times; wrong for all `problems` under all configs.

    `quick` ones are asked in every test run, the others with the slow tests.
    """

    name: str
    file: str
    anchor: str
    planted: str
    passes: tuple[str, ...]
    problems: tuple[str, ...]
    times: int = 1
    quick: bool = False


HEAD_MAP = ("(head // group).to(tl.int64)", "(head % (q_heads // group)).to(tl.int64)")
MUTANTS = (
    Mutant("none", "primitives.py", "", "", ("fwd", "bwd"), (WINDOW, FULL), times=0, quick=True),
    Mutant("none, other masks", "primitives.py", "", "", ("fwd", "bwd"), (CAUSAL, TOP_LEFT), times=0),
    Mutant("wrong key head in forward", "flash_fwd.py", *HEAD_MAP, ("fwd",), (WINDOW,), quick=True),
    Mutant("wrong key head in dq", "flash_bwd.py", *HEAD_MAP, ("bwd",), (WINDOW,), quick=True),
    Mutant("causal off by one", "primitives.py", "col <= row + (offset + right)", "col < row + (offset + right)",
           ("fwd", "bwd"), (WINDOW,), quick=True),
    Mutant("causal off by one, top left", "primitives.py", "col <= row + (offset + right)",
           "col < row + (offset + right)", ("fwd", "bwd"), (TOP_LEFT,)),
    Mutant("window off by one", "primitives.py", "col >= row + (offset - left)", "col > row + (offset - left)",
           ("fwd", "bwd"), (WINDOW,), times=2),
    Mutant("tail mask missing", "primitives.py", "seen = col < columns", "seen = col >= 0", ("fwd",), (FULL,), quick=True),
    Mutant("one block too few", "primitives.py", "last = tl.cdiv(columns, BLOCK)", "last = columns // BLOCK",
           ("fwd", "bwd"), (FULL,)),
    Mutant("accumulator not rescaled", "flash_fwd.py", "shrink[:, None]", "1.0", ("fwd",), EVERY, times=4, quick=True),
    Mutant("sum not rescaled", "flash_fwd.py", "z * shrink + tl.sum(p, 1)", "z + tl.sum(p, 1)", ("fwd",), EVERY),
    Mutant("lse in log2", "primitives.py", "* _LOG_2, float", ", float", ("fwd",), (WINDOW,), quick=True),
    Mutant("empty rows divide by zero", "flash_fwd.py", "tl.where(z > 0, z, 1.0)[:, None]", "z[:, None]", ("fwd",),
           (CAUSAL,)),
    Mutant("rows beyond the end written", "primitives.py", "inside = (start + row < length)[:, None] &",
           "inside = (row >= 0)[:, None] &", ("fwd", "bwd"), (FULL,)),
    Mutant("dk and dv of the wrong head", "flash_bwd.py", "head = kv_head * group", "head = kv_head",
           ("bwd",), (WINDOW,), quick=True),
    Mutant("dk and dv of one head of the group", "flash_bwd.py", "return member, index",
           "return member * 0, index", ("bwd",), EVERY),
    Mutant("dq unscaled", "flash_bwd.py", "dq_sum = dq_sum * natural_scale", "dq_sum = dq_sum", ("bwd",), (WINDOW,),
           quick=True),
    Mutant("dk unscaled", "flash_bwd.py", "dk_sum = dk_sum * natural_scale", "dk_sum = dk_sum", ("bwd",), EVERY),
    Mutant("delta zero", "flash_bwd.py", "total = tl.sum(widened(o, ACC) * widened(do, ACC), 1)",
           "total = tl.sum(widened(o, ACC) * widened(do, ACC), 1) * 0.0", ("bwd",), (WINDOW,), quick=True),
    Mutant("p of an unnormalised row", "flash_bwd.py", "    s = s - lse[:, None]\n", "", ("bwd",), EVERY),
    # What only one of the questions sees: values far below 0 in two batches, lengths at which a bound hides one key, strides
    # of their own, shadow memory, the same lengths with another window.
    Mutant("keys of the first batch", "flash_fwd.py", "k_base = k + batch * stride_k_batch + kv_head",
           "k_base = k + kv_head", ("fwd",), EVERY, quick=True),
    Mutant("maximum begins at zero", "flash_fwd.py", 'm = tl.full([BLOCK_M], float("-inf"), dtype=ACC)',
           "m = tl.zeros([BLOCK_M], dtype=ACC)", ("fwd",), (WINDOW, FULL, TOP_LEFT), quick=True),
    Mutant("two causal queries not masked", "primitives.py", "offset + right >= kv_len - 1", "offset + right >= kv_len - 2",
           ("fwd", "bwd"), (CAUSAL,)),
    Mutant("last block one key short", "primitives.py", "tl.cdiv(tl.maximum(last_row + offset + right + 1, 0), BLOCK)",
           "tl.cdiv(tl.maximum(last_row + offset + right, 0), BLOCK)", ("fwd", "bwd"), (CAUSAL,)),
    Mutant("window hiding one key dropped", "primitives.py", "q_len - 1 + offset - left <= 0",
           "q_len - 1 + offset - left <= 1", ("fwd", "bwd"), (WINDOW,)),
    Mutant("last stride taken for one in loads", "primitives.py",
           "at_zero = base + row[:, None] * stride_row + col[None, :] * stride_col",
           "at_zero = base + row[:, None] * stride_row + col[None, :]", ("fwd", "bwd"), EVERY),
    Mutant("last stride taken for one in stores", "primitives.py",
           "* stride_row + row[:, None] * stride_row + col[None, :] * stride_col",
           "* stride_row + row[:, None] * stride_row + col[None, :]", ("fwd", "bwd"), EVERY),
    Mutant("values with the strides of keys", "flash_fwd.py", "v_base = v + batch * stride_v_batch + kv_head * stride_v_head",
           "v_base = v + batch * stride_k_batch + kv_head * stride_k_head", ("fwd",), EVERY),
    Mutant("dO with the strides of O", "flash_bwd.py", "primitives.strides(out=out, dout=dout,",
           "primitives.strides(out=out, dout=out,", ("bwd",), (WINDOW,), quick=True),
    Mutant("dk laid out as k", "flash_bwd.py", "store_tile(dk_sum, dk_base, start_n, kv_len, stride_dk_row, stride_dk_col,",
           "store_tile(dk_sum, dk_base, start_n, kv_len, stride_k_row, stride_k_col,", ("bwd",), EVERY),
    Mutant("dO of a member with the stride of q", "flash_bwd.py", "do_at, member, start, q_len, stride_dout_head,",
           "do_at, member, start, q_len, stride_q_head,", ("bwd",), EVERY),
    Mutant("keys read beyond the end", "flash_fwd.py", "HEAD_DIM, BLOCK_N, BLOCK_D, CHECK, TMA, KEEP)",
           "HEAD_DIM, BLOCK_N, BLOCK_D, False, TMA, KEEP)", ("fwd",), (FULL,), quick=True),
    Mutant("log-sum-exp read beyond the end", "flash_bwd.py",
           ' lse = tl.load(lse_at, mask=query < q_len, other=float("inf"))', " lse = tl.load(lse_at)", ("bwd",), (FULL,),
           quick=True),
    Mutant("columns beyond the head read", "primitives.py", "elif COLS != BLOCK_COLS:", "elif COLS > BLOCK_COLS:",
           ("bwd",), (FULL,)),
    Mutant("window of the first call remembered", "primitives.py", "left, right = window_left, window_right",
           'left, right = band_of.__dict__.setdefault("sides", {}).setdefault((q_len, kv_len), (window_left, window_right))',
           ("fwd", "bwd"), (WINDOW,)),
)  # fmt: skip


def plant(mutant: Mutant, kernels: Path, scratch: Path) -> str:
    """Copy the kernels, plant the bug, and return the name of the copy's package. Fails if the anchor is gone."""
    package = "planted_" + "".join(letter if letter.isalnum() else "_" for letter in mutant.name)
    target = scratch / package
    shutil.copytree(kernels, target, ignore=shutil.ignore_patterns("__pycache__"))
    if mutant.times:
        source = (target / mutant.file).read_text()
        if source.count(mutant.anchor) != mutant.times:
            raise SystemExit(f"mutant `{mutant.name}`: `{mutant.anchor}` occurs {source.count(mutant.anchor)} times")
        (target / mutant.file).write_text(source.replace(mutant.anchor, mutant.planted))
    return package


def judge(mutant: Mutant, package: str) -> list[dict[str, str]]:
    """The verdicts on one mutant, for all its problems and configs."""
    found = []
    for pass_ in mutant.passes:
        kernel = importlib.import_module(f"{package}.flash_{pass_}")
        configs, rest = (FORWARD_CONFIGS, FORWARD_REST) if pass_ == "fwd" else (BACKWARD_CONFIGS, BACKWARD_REST)
        for text in mutant.problems:
            for config in configs:
                problem = parse_problem(f"{text} {pass_}")
                verdict = verify.gate(kernel, problem, {**config, **rest}, seed=0, where="interpreter")
                found.append({
                    "mutant": mutant.name, "problem": str(problem), "config": str(config), "status": verdict.status,
                    "detail": verdict.detail,
                })  # fmt: skip
    return found


def main(kernels: str, scratch: str, *names: str) -> None:
    quicken()
    torch.set_num_threads(1)
    sys.path.insert(0, scratch)
    for mutant in MUTANTS:
        if mutant.name in names:
            for line in judge(mutant, plant(mutant, Path(kernels), Path(scratch))):
                sys.stdout.write(json.dumps(line) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
