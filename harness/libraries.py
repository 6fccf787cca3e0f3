"""Stock adapters: attention of published libraries, what each can do on a CPU, and what it may round.

Every limit is stated with its reason; what is a bug of the library is listed as one, and asked only on request. Refuses to
import a library before it is asked for.
"""

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from harness.adapters import Function, Signature, signature_for
from harness.bounds import RoundingContract, library_contract
from harness.errors import UsageError
from harness.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """Something that a library gets wrong: which problems, and what happens instead. `versions` it was seen in."""

    has: Callable[[Problem], bool]
    what: str
    versions: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """An adapter of a library. `load` imports it; `supports` are words of `harness.adapters`; `cannot` says what else it does
    not do, and `contract` what it may round."""

    why: str
    signature: Signature
    load: Callable[[], Function]
    supports: tuple[str, ...] = ()
    cannot: Callable[[Problem], str | None] = lambda problem: None
    contract: Callable[[Problem], RoundingContract] = library_contract
    bugs: tuple[Bug, ...] = ()


# ---------------------------------------------------------------------------------------------------------------------
# torch: scaled_dot_product_attention
# ---------------------------------------------------------------------------------------------------------------------

# Queries that the backward pass of torch's CPU kernel takes at once, for up to 191 of them; keys 512.
_SDPA_QUERIES = 32


# PyTorch's names of its backends, by ours.
SDPA_BACKENDS: Mapping[str, str] = {
    "flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION", "math": "MATH",
}  # fmt: skip


def sdpa(backend: str | None) -> Function:
    """scaled_dot_product_attention with one of `SDPA_BACKENDS`, which it raises without; None lets it choose."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    if backend is None:
        return scaled_dot_product_attention

    def chosen(q: Tensor, k: Tensor, v: Tensor, **keywords: Any) -> Tensor:
        with sdpa_kernel(getattr(SDPBackend, SDPA_BACKENDS[backend])), warnings.catch_warnings():
            # It warns of every reason for which a backend is left out, and then raises.
            warnings.simplefilter("ignore")
            return scaled_dot_product_attention(q, k, v, **keywords)

    return chosen


def _math_contract(problem: Problem) -> RoundingContract:
    """16-bit tensors are converted to fp32, and only results are rounded; delta follows from a stored P."""
    return replace(library_contract(problem), operand=0.0, chained=False)


def _flash_contract(problem: Problem) -> RoundingContract:
    """FlashAttention-2 in blocks of 512 keys: weights are rounded before they are normalized, delta is out times dout."""
    contract = library_contract(problem)
    return replace(contract, underflow=contract.tiny, product=0.0, summed_delta=False)


def _scores_contract(problem: Problem) -> RoundingContract:
    """Scores are written out in fp32 and scaled afterwards; weights are normalized and then rounded."""
    return replace(library_contract(problem), product=0.0, chained=False)


def _coarse_gradients(problem: Problem) -> str | None:
    """Gradients of torch's CPU kernel are sums of 16-bit numbers over blocks of 32 queries and over the heads of a group."""
    if problem.pass_ == "fwd" or problem.dtype == "fp32":
        return None
    if problem.q_len > _SDPA_QUERIES:
        return f"adds up 16-bit gradients in 16 bits beyond {_SDPA_QUERIES} queries, for which no bound is derived yet"
    if problem.group > 1:
        return "adds up the 16-bit gradients of grouped heads in 16 bits, for which no bound is derived yet"
    return None


def _grouped_gradients(problem: Problem) -> str | None:
    if problem.pass_ == "bwd" and problem.dtype != "fp32" and problem.group > 1:
        return "adds up the 16-bit gradients of grouped heads in 16 bits, for which no bound is derived yet"
    return None


def _on_a_gpu(problem: Problem) -> str | None:
    return None if torch.cuda.is_available() else "runs on a GPU only, and there is none here"


def _uses_is_causal(problem: Problem) -> bool:
    return problem.causal and problem.window_left is None and (problem.top_left or problem.q_len == problem.kv_len)


_SCALED_INFINITY = Bug(
    has=lambda problem: _uses_is_causal(problem) and problem.softmax_scale <= 0,
    what="the CPU kernel hides keys with -inf before it multiplies with the scale: NaN where `is_causal` meets a scale of 0"
    " or below",
    versions="torch 2.13.0",
)

# transformers leaves any causal mask of equal lengths to `is_causal`, also a window that no key falls out of.
_SCALED_INFINITY_BEHIND = replace(
    _SCALED_INFINITY,
    has=lambda problem: problem.causal and problem.q_len == problem.kv_len and problem.softmax_scale <= 0,
    versions="transformers 5.23.0 with torch 2.13.0",
)

# ---------------------------------------------------------------------------------------------------------------------
# torch: flex_attention
# ---------------------------------------------------------------------------------------------------------------------


def _flex_eager() -> Function:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def with_lse(
        q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False, **keywords: Any
    ) -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s)flex_attention called without torch.compile")
            out, more = flex_attention(q, k, v, return_aux=AuxRequest(lse=True), **keywords)
        return out, more.lse

    return with_lse


# A variant of sizes, dtype and mask is compiled once, in seconds. Beyond this torch would run eagerly without a word.
_VARIANTS = 512


@functools.cache
def _compiled() -> Function:
    from torch import _dynamo
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Function = torch.compile(flex_attention, dynamic=True, fullgraph=True)
    settings = {"recompile_limit": _VARIANTS, "accumulated_recompile_limit": _VARIANTS, "cache_size_limit": _VARIANTS}
    known: dict[str, Any] = {name: value for name, value in settings.items() if hasattr(_dynamo.config, name)}

    def patched(*tensors: Tensor, **keywords: Any) -> Tensor:
        with _dynamo.config.patch(known), warnings.catch_warnings():
            # Compiling warns of what is torch's own.
            warnings.simplefilter("ignore")
            found: Tensor = compiled(*tensors, **keywords)
        return found

    return patched


# ---------------------------------------------------------------------------------------------------------------------
# transformers
# ---------------------------------------------------------------------------------------------------------------------


def _transformers(module: str) -> ModuleType:
    try:
        importlib.import_module("transformers")
    except ModuleNotFoundError as missing:
        if missing.name != "transformers":
            raise
        raise UsageError("transformers is not installed here", hint="pip install transformers") from missing
    return importlib.import_module(f"transformers.{module}")


def _transformers_eager() -> Function:
    # Every model has a copy of this function; Llama's is the one that they are copied from.
    function: Function = _transformers("models.llama.modeling_llama").eager_attention_forward
    return function


def _transformers_sdpa() -> Function:
    function: Function = _transformers("integrations.sdpa_attention").sdpa_attention_forward
    return function


def _mask_function(problem: Problem) -> Callable[..., Any]:
    """The library's own mask where it has one."""
    masks = _transformers("masking_utils")
    left, right = problem.window_left, problem.right
    if problem.causal and left is None:
        function: Callable[..., Any] = masks.causal_mask_function
    elif problem.causal and left is not None:
        # Its windows count the query's own key as well.
        function = masks.sliding_window_causal_mask_function(left + 1)
    elif left == right and left is not None:
        function = masks.sliding_window_bidirectional_mask_function(left)
    else:
        far = problem.q_len + problem.kv_len
        low, high = (far if side is None else side for side in (left, right))

        def function(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key >= query - low) & (key <= query + high)

    return function


def _made_mask(problem: Problem, q: Tensor, make: str) -> Tensor | None:
    """The mask that a model's forward would make, or None where the library leaves it to `is_causal` or needs none."""
    if not problem.banded:
        return None
    mask: Tensor | None = getattr(_transformers("masking_utils"), make)(
        batch_size=problem.batch,
        q_length=problem.q_len,
        kv_length=problem.kv_len,
        q_offset=problem.offset,
        mask_function=_mask_function(problem),
        local_size=None if problem.window_left is None else problem.window_left + 1,
        # Only a causal mask is left to `is_causal`, and not where a cache is longer than what it holds.
        allow_is_causal_skip=problem.causal and not problem.top_left,
        dtype=q.dtype,
        device=q.device,
    )
    return mask


def _transformers_signature(make: str) -> Signature:
    """`make` names the function of the library that makes masks for this kind of attention."""

    def call(function: Function, problem: Problem, q: Tensor, k: Tensor, v: Tensor, lse: bool) -> Tensor:
        module = SimpleNamespace(num_key_value_groups=problem.group, is_causal=problem.causal, training=False)
        mask = _made_mask(problem, q, make)
        out: Tensor = function(module, q, k, v, mask, scaling=problem.softmax_scale, dropout=0.0)[0]
        return out

    return Signature(
        shows="f(module, q, k, v, attention_mask, scaling, dropout), out with axes batch, length, head, dim",
        given="bhsd",
        made="bshd",
        call=call,
    )


def _before_the_first_key(problem: Problem) -> str | None:
    """Masks count positions of queries from 0."""
    return "has no queries before the first key" if problem.banded and problem.offset < 0 else None


def _eager_limit(problem: Problem) -> str | None:
    if problem.dtype != "fp32":
        return "rounds scores to 16 bits, for which no bound is derived yet"
    return _before_the_first_key(problem)


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------

_SDPA = signature_for("sdpa")

STOCK: Mapping[str, Stock] = {
    "sdpa": Stock(
        why="torch's scaled_dot_product_attention as it chooses its backend itself",
        signature=_SDPA, load=lambda: sdpa(None), cannot=_coarse_gradients,
        bugs=(_SCALED_INFINITY,),
    ),
    "sdpa:math": Stock(
        why="torch's scaled_dot_product_attention, backend MATH",
        signature=_SDPA, load=lambda: sdpa("math"), cannot=_grouped_gradients,
        contract=_math_contract,
    ),
    "sdpa:flash": Stock(
        why="torch's scaled_dot_product_attention, backend FLASH_ATTENTION",
        # What the kernel is chosen for.
        signature=_SDPA, load=lambda: sdpa("flash"), supports=("no-unequal-dims", "no-transposed"),
        cannot=_coarse_gradients,
        contract=_flash_contract, bugs=(_SCALED_INFINITY,),
    ),
    "sdpa:efficient": Stock(
        why="torch's scaled_dot_product_attention, backend EFFICIENT_ATTENTION: on a GPU",
        signature=_SDPA, load=lambda: sdpa("efficient"), supports=("no-transposed",), cannot=_on_a_gpu,
    ),
    "sdpa:cudnn": Stock(
        why="torch's scaled_dot_product_attention, backend CUDNN_ATTENTION: on a GPU",
        signature=_SDPA, load=lambda: sdpa("cudnn"), supports=("no-fp32", "no-transposed"), cannot=_on_a_gpu,
    ),
    "flex:eager": Stock(
        why="torch's flex_attention, not compiled: the forward pass, with log-sum-exp",
        signature=signature_for("flex"), load=_flex_eager,
        supports=("no-bwd", "no-empty"), contract=_scores_contract,
    ),
    "flex:compiled": Stock(
        why="torch's flex_attention under torch.compile: the forward pass; every scale and kind of stride would be compiled anew",
        # Compiled code without queries or keys ends the process (SIGFPE, torch 2.13.0), which no test could survive.
        signature=signature_for("flex"), load=_compiled,
        supports=("no-bwd", "no-empty", "no-scale", "no-negative-scale", "no-strides"), contract=_flash_contract,
    ),
    "transformers:eager": Stock(
        why="the attention that models of transformers write out themselves, with masks made by the library",
        signature=_transformers_signature("eager_mask"), load=_transformers_eager,
        # A row without keys is the mean of all of them: masks hold the smallest finite number, as documented.
        supports=("no-dead-rows", "no-empty"), cannot=_eager_limit, contract=_scores_contract,
    ),
    "transformers:sdpa": Stock(
        why="transformers' way to torch's scaled_dot_product_attention, with masks made by the library",
        signature=_transformers_signature("sdpa_mask"), load=_transformers_sdpa,
        supports=("no-empty",), bugs=(_SCALED_INFINITY_BEHIND,),
        cannot=lambda problem: _before_the_first_key(problem) or _coarse_gradients(problem),
    ),
}  # fmt: skip
