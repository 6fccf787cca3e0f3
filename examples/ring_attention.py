"""Attention over a sequence that is spread over several processes: keys and values travel around a ring.

Every rank holds one slice of the sequence, of queries, keys and values. In as many steps as there are ranks, each attends with
its queries to the slice of keys that is visiting, while that slice is already on its way to the next rank, and merges what it
gets with what it had (ring attention: Liu et al. 2023). No rank ever holds all keys. Run it:

    python examples/ring_attention.py

starts two processes on this machine, in Triton's interpreter where no GPU is, and compares with the exact answer for the whole
sequence, element by element, within bounds derived from what may be rounded on the way.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if not torch.cuda.is_available():
    # Triton reads it when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from kernels.flash_fwd import flash_fwd
from kernels.merge import merge

RANKS = 2
BATCH, Q_HEADS, KV_HEADS, LOCAL, HEAD_DIM = 1, 4, 2, 40, 32
DTYPE = "bf16"


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """out and log-sum-exp of this rank's queries against the keys of all ranks.

    q is (batch, q_heads, local, head_dim), k and v (batch, kv_heads, local, head_dim): slice number `rank` of the sequence, of
    equal length on every rank. Causal, the last rank has the most to do; slices cut from both ends of the sequence would share
    that out, and need no other kernel. Raises what `torch.distributed` raises.
    """
    rank = dist.get_rank()
    out, lse = None, None
    for owner, keys, values in visitors(k, v):
        if causal and owner > rank:
            continue  # all of its keys lie in the future of all our queries
        part, part_lse = flash_fwd(q, keys, values, scale=scale, window_right=0 if causal and owner == rank else None)
        if out is None or lse is None:
            out, lse = part.float(), part_lse
        else:
            out, lse = merge((out, part.float()), (lse, part_lse))
    assert out is not None and lse is not None  # its own keys are the first to visit
    return out.to(q.dtype), lse


def visitors(k: Tensor, v: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(owner, keys, values) of every rank, beginning with our own; the next ones arrive while these are worked on."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    here = [k.contiguous(), v.contiguous()]
    for step in range(ranks):
        coming = [torch.empty_like(tensor) for tensor in here]
        pending = []
        if step + 1 < ranks:
            sent = [dist.P2POp(dist.isend, tensor, (rank + 1) % ranks) for tensor in here]
            received = [dist.P2POp(dist.irecv, tensor, (rank - 1) % ranks) for tensor in coming]
            pending = dist.batch_isend_irecv([*sent, *received])
        yield (rank - step) % ranks, here[0], here[1]
        for request in pending:
            request.wait()
        here = coming


# ---------------------------------------------------------------------------------------------------------------------
# Trying it
# ---------------------------------------------------------------------------------------------------------------------


def whole_sequence() -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of the whole sequence, equal on every rank."""
    generator = torch.Generator().manual_seed(0)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[DTYPE]
    shapes = [(BATCH, heads, RANKS * LOCAL, HEAD_DIM) for heads in (Q_HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return q, k, v


def slice_of(tensor: Tensor, rank: int) -> Tensor:
    return tensor[:, :, rank * LOCAL : (rank + 1) * LOCAL]


def attend(rank: int, folder: str) -> None:
    """One process of the ring; leaves its answers in `folder`."""
    device = (
        torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if torch.cuda.device_count() >= RANKS else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    q, k, v = (slice_of(tensor, rank).to(device) for tensor in whole_sequence())
    answers = {causal: ring_attention(q, k, v, causal=causal) for causal in (False, True)}
    torch.save({causal: (out.cpu(), lse.cpu()) for causal, (out, lse) in answers.items()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def expected(rank: int, *, causal: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The exact out and lse of a rank's queries, and how far off a correct ring may be, both in fp64.

    The bound follows the ring: that of the kernel for each visiting slice, then, for each merge, what it makes of the errors of
    its two parts (d lse = sum w d lse_i, d out = sum w (d out_i + (out_i - out) d lse_i)) and what it rounds itself. A merge is
    attention of one query to two keys, the log-sum-exps.
    """
    from harness import bounds
    from harness.noise import DEVIATIONS, SLACK, Terms
    from harness.problem import Problem

    q, k, v = whole_sequence()
    local: dict[str, Any] = {"batch": BATCH, "q_heads": Q_HEADS, "kv_heads": KV_HEADS, "q_len": LOCAL, "kv_len": LOCAL}
    pair = Problem(
        batch=BATCH * Q_HEADS * LOCAL, q_heads=1, kv_heads=1, q_len=1, kv_len=2, head_dim=1, v_head_dim=HEAD_DIM,
        dtype="fp32", scale=1.0,
    )  # fmt: skip
    contract = bounds.contract_for(DTYPE, key_block=16)
    shape = (BATCH, Q_HEADS, LOCAL)
    truth: dict[str, Tensor] = {}
    error: dict[str, Tensor] = {}
    for owner in [(rank - step) % RANKS for step in range(RANKS)]:
        if causal and owner > rank:
            continue
        problem = Problem(**local, head_dim=HEAD_DIM, v_head_dim=HEAD_DIM, dtype=DTYPE, causal=causal and owner == rank)  # type: ignore[arg-type]
        given = {"q": slice_of(q, rank), "k": slice_of(k, owner), "v": slice_of(v, owner)}
        part = bounds.expect_forward(problem, given, contract, structured=False)
        if not truth:
            truth, error = dict(part.truth), dict(part.bounds)
            continue
        keys, values = (torch.stack((truth[name], part.truth[name]), 3) for name in ("lse", "out"))
        given = {
            "q": torch.ones(pair.batch, 1, 1, 1),
            "k": keys.view(-1, 1, 2, 1),
            "v": values.view(-1, 1, 2, HEAD_DIM),
        }
        merged = bounds.expect_forward(pair, given, bounds.contract_for("fp32", key_block=1), structured=False)
        found = {"out": merged.truth["out"].view(*shape, HEAD_DIM), "lse": merged.truth["lse"].view(shape)}
        allowed = {"out": merged.bounds["out"].view(*shape, HEAD_DIM), "lse": merged.bounds["lse"].view(shape)}
        for one, off in ((truth, error), (part.truth, part.bounds)):
            weight = (one["lse"] - found["lse"]).exp()
            apart = (one["out"] - found["out"]).abs()
            allowed["lse"] += SLACK * weight * off["lse"]
            allowed["out"] += SLACK * weight[..., None] * (off["out"] + apart * off["lse"][..., None])
        truth, error = found, allowed
    return truth, {"out": Terms(contract, DEVIATIONS).stored(truth["out"], error["out"]), "lse": error["lse"]}


def largest_error(folder: Path) -> float:
    """Of all elements of all answers: error over bound; NaN counts as infinite."""
    largest = 0.0
    for rank in range(RANKS):
        for causal, found in torch.load(folder / f"{rank}.pt").items():
            truth, bound = expected(rank, causal=causal)
            for name, tensor in zip(("out", "lse"), found, strict=True):
                ratio = ((tensor.double() - truth[name]).abs() / bound[name]).nan_to_num(nan=torch.inf)
                largest = max(largest, float(ratio.max()))
    return largest


def main() -> int:
    """Run the ring and say how far it is from the exact answer; 1 if that is further than it may be."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(attend, args=(folder,), nprocs=RANKS)
        try:
            largest = largest_error(Path(folder))
        except ModuleNotFoundError as missing:
            print(f"Nothing was compared: the package `{missing.name}` is not installed.")
            return 1
    words = (
        "as near to the exact answer as it must be" if largest <= 1 else "further from the exact answer than it may be"
    )
    print(
        f"Ring attention of {RANKS} processes with {LOCAL} tokens each, full and causal, is {words}: the largest error is"
        f" {largest:.3g} of its bound."
    )
    return int(not largest <= 1)


if __name__ == "__main__":
    sys.exit(main())
