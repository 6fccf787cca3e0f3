"""Side by side: our kernel and another implementation of the same attention, timed in turns on the same tensors.

Runs in the one worker that owns the GPU. Refuses to judge: our config has passed its gate before it comes here, and what a
library computes is the library's matter.
"""

import importlib
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch._functorch.config as _functorch_config
from torch import Tensor

from harness import measure, timing
from harness.adapters import signature_for
from harness.errors import RefusedError
from harness.libraries import sdpa
from harness.problem import Problem
from harness.space import Value
from harness.workspace import Workspace

# Other implementations by name.
RIVALS = ("sdpa:flash", "sdpa:cudnn", "sdpa:efficient", "sdpa:math", "fa3", "flex")
# Score matrices of the whole problem that standard attention holds at a time, in fp32.
_SCORE_MATRICES = 4

# However slow a rival is, it is sampled as long as there is time.
_POLICY = measure.Policy(target=0.005, min_samples=20, max_samples=100, budget_ms=1000, hopeless=math.inf)

Method = Literal["graph", "event"]


@dataclass(frozen=True, slots=True)
class Other:
    """Another kernel of the workspace at `root`, under a config that has passed its gate."""

    root: Path
    stem: str
    config: Mapping[str, Value]


Rival = str | Mapping[str, Value] | Other


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Times in milliseconds of a rival and of our config, taken in turns. `method` names the timer, `throttled` says that the
    clock was lowered meanwhile; `rival_bytes` and `ours_bytes` are the most device memory that each held beside the inputs."""

    rival_ms: tuple[float, ...]
    ours_ms: tuple[float, ...]
    method: str
    throttled: bool
    rival_bytes: int = 0
    ours_bytes: int = 0


def pair(
    kernel: Any,
    problem: Problem,
    config: Mapping[str, Value],
    rival: Rival,
    method: Method,
    seed: int,
) -> Pair:
    """Time `rival` (one of `RIVALS`, another config of ours, or another kernel) in turns with our `config`.

    A "graph" has no host in it; by "event" the host's launching counts where it takes longer than the flush before it.
    Raises `RefusedError` for what the rival cannot do, and what else it raises.
    """
    tensors = timing.tensors_on_device(problem, seed)

    ours, ours_bytes = _prepared(lambda: run_of(kernel, problem, tensors, config))
    theirs, rival_bytes = _prepared(lambda: run_of(kernel, problem, tensors, rival))
    rng = np.random.default_rng(seed)
    policy = replace(_POLICY, method=method)
    found = measure.measure(theirs, timer=timing.timer(), policy=policy, rng=rng, incumbent=ours)
    return Pair(
        rival_ms=found.times_ms, ours_ms=found.incumbent_ms, method=found.method, throttled=found.throttled,
        rival_bytes=rival_bytes, ours_bytes=ours_bytes,
    )  # fmt: skip


def run_of(kernel: Any, problem: Problem, tensors: Mapping[str, Tensor], one: Rival) -> Callable[[], None]:
    """What runs a rival, or our `kernel` under a config."""
    if isinstance(one, str):
        return _library(one, problem, tensors)
    if isinstance(one, Other):
        return timing.runner(Workspace(one.root).load_kernel(one.stem), problem, tensors, one.config)
    return timing.runner(kernel, problem, tensors, one)


def _prepared(make: Callable[[], Callable[[], None]]) -> tuple[Callable[[], None], int]:
    """What `make` gives, run once so that it is compiled, and the memory that it keeps and a second run takes, at most."""
    before = timing.begin_peak()
    run = make()
    run()
    # The first run may have compiled something, which takes memory that no other run does.
    timing.begin_peak()
    run()
    return run, timing.peak_bytes() - before


def _library(rival: str, problem: Problem, tensors: Mapping[str, Tensor]) -> Callable[[], None]:
    """What runs a library's forward pass, or its backward pass on what its forward pass left."""
    unsaid = _cannot_say(problem)
    if unsaid:
        raise RefusedError(f"`{rival}` is asked plain and causal attention only, not {unsaid}")
    if rival == "sdpa:math":
        _require_memory(problem)
    function = (
        _flex(problem) if rival == "flex" else _flash_attention_3(problem) if rival == "fa3" else _sdpa(rival, problem)
    )
    q, k, v = (tensors[name] for name in ("q", "k", "v"))
    if problem.pass_ == "fwd":

        def forward() -> None:
            with torch.no_grad():
                function(q, k, v)

        return forward
    # Operations of a backward pass run on the stream that their forward ones ran on, and a graph is captured on one stream.
    # What is compiled may not write over what its forward pass left: it is timed more than once.
    with timing.capture_stream(), _functorch_config.patch(donated_buffer=False):
        leaves = [one.detach().requires_grad_() for one in (q, k, v)]
        out = function(*leaves)
    dout = tensors["dout"]

    def backward() -> None:
        torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return backward


def _cannot_say(problem: Problem) -> str:
    if problem.beyond:
        return ", ".join(problem.beyond)
    if problem.window_left is not None or problem.window_right is not None:
        return "windows"
    return "another alignment" if problem.causal and problem.q_len != problem.kv_len else ""


def _require_memory(problem: Problem) -> None:
    need = _SCORE_MATRICES * 4 * problem.batch * problem.q_heads * problem.q_len * problem.kv_len
    free = timing.free_bytes()
    if need > free:
        raise RefusedError(f"standard attention would hold {need / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")


def _sdpa(rival: str, problem: Problem) -> Callable[..., Tensor]:
    attention = sdpa(rival.removeprefix("sdpa:"))

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = attention(q, k, v, is_causal=problem.causal, scale=problem.scale, enable_gqa=problem.group > 1)
        return found

    return function


def _flash_attention_3(problem: Problem) -> Callable[..., Tensor]:
    """FlashAttention 3 from its own package, where somebody installed that."""
    try:
        flash_attn_func = importlib.import_module("flash_attn_interface").flash_attn_func
    except ImportError as missing:
        raise RefusedError(f"FlashAttention 3 is not installed here: {missing}") from missing
    call = signature_for("flash").call

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # Its axes are batch, length, head, dim; some versions give the log-sum-exp as well.
        found = call(flash_attn_func, problem, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), False)
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out.transpose(1, 2)

    return function


def _flex(problem: Problem) -> Callable[..., Tensor]:
    """Compiled for just this shape, as its documentation advises for speed."""
    compiled = _compiled_flex()
    keywords: dict[str, Any] = {"scale": problem.scale, "enable_gqa": problem.group > 1}
    if problem.causal:
        keywords["block_mask"] = _causal_mask(problem.q_len, problem.kv_len)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found: Tensor = compiled(q, k, v, **keywords)
        return found

    return function


def _compiled_flex() -> Callable[..., Any]:
    import torch._dynamo
    import torch._inductor.config
    from torch.nn.attention.flex_attention import flex_attention

    # A worker of ours has no children of its own. What was compiled for other shapes counts against a limit, and is not used.
    torch._inductor.config.compile_threads = 1
    torch._dynamo.reset()
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _causal_mask(q_len: int, kv_len: int) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    return create_block_mask(causal, None, None, q_len, kv_len, device=timing.DEVICE)
