"""How anybody's attention is called, and what it may be asked: words and signatures.

What an implementation cannot do is refused with a reason, so that it counts neither as wrong nor as tested. Refuses to
import and to run anything, and to know single libraries (`harness.libraries` does).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness import oracle
from harness.errors import UsageError, did_you_mean
from harness.operation import problem_keywords
from harness.problem import Layout, Problem

Function = Callable[..., Any]


# ---------------------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ability:
    """Something a problem may need. `avoid` gives the nearest problem that does not need it; None where there is none."""

    why: str
    needs: Callable[[Problem], bool]
    avoid: Callable[[Problem], Problem] | None = None


def _dead(problem: Problem) -> bool:
    """Whether a query sees no key although there are some."""
    if 0 in (problem.q_len, problem.kv_len) or not problem.banded:
        return False
    return not bool(oracle.visible_keys(problem, slice(0, problem.q_len)).any(1).all())


def _is_common(head_dim: int) -> bool:
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0


def _common(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())


def _windowed(problem: Problem) -> bool:
    return problem.window_left is not None or problem.window_right is not None


def _crooked(problem: Problem) -> bool:
    """Whether it makes a difference where the diagonal begins."""
    return problem.banded and problem.q_len != problem.kv_len


ABILITIES: Mapping[str, Ability] = {
    "fwd": Ability("the forward pass", lambda p: p.pass_ == "fwd"),
    "bwd": Ability("the backward pass, by torch.autograd", lambda p: p.pass_ == "bwd"),
    "fp16": Ability("fp16 tensors", lambda p: p.dtype == "fp16"),
    "bf16": Ability("bf16 tensors", lambda p: p.dtype == "bf16"),
    "fp32": Ability("fp32 tensors", lambda p: p.dtype == "fp32"),
    "window": Ability(
        "windows of keys", _windowed, lambda p: p.replace(window_left=None, window_right=None)
    ),
    "causal": Ability(
        "a causal mask", lambda p: p.causal, lambda p: p.replace(causal=False)
    ),
    "empty": Ability(
        "tensors without elements", lambda p: 0 in (p.batch, p.q_len, p.kv_len),
        lambda p: p.replace(batch=max(p.batch, 1), q_len=max(p.q_len, 1), kv_len=max(p.kv_len, 1)),
    ),
    "unequal-lengths": Ability(
        "more keys than queries, or fewer", lambda p: p.q_len != p.kv_len, lambda p: p.replace(kv_len=p.q_len)
    ),
    "top-left": Ability(
        "a band that begins at the first key", lambda p: _crooked(p) and p.top_left, lambda p: p.replace(top_left=False)
    ),
    "bottom-right": Ability(
        "a band that ends at the last key", lambda p: _crooked(p) and not p.top_left, lambda p: p.replace(top_left=True)
    ),
    "dead-rows": Ability("queries that see no key", _dead, lambda p: p.replace(kv_len=p.q_len)),
    "gqa": Ability(
        "fewer key/value heads than query heads", lambda p: p.group > 1, lambda p: p.replace(q_heads=p.kv_heads)
    ),
    "unequal-dims": Ability(
        "a head dim of V that differs from that of Q and K", lambda p: p.v_head_dim != p.head_dim,
        lambda p: p.replace(v_head_dim=p.head_dim),
    ),
    "any-dim": Ability(
        "head dims beside 16, 32, 64, 128 ...", lambda p: not (_is_common(p.head_dim) and _is_common(p.v_head_dim)),
        lambda p: p.replace(head_dim=_common(p.head_dim), v_head_dim=_common(p.v_head_dim)),
    ),
    "scale": Ability(
        "a scale beside 1/sqrt(head dim)", lambda p: p.scale is not None, lambda p: p.replace(scale=None)
    ),
    "negative-scale": Ability(
        "a scale of 0 or below", lambda p: p.softmax_scale <= 0, lambda p: p.replace(scale=abs(p.softmax_scale) or None)
    ),
    # No problem needs these.
    "strides": Ability("tensors with strides of their own; without it they are made contiguous", lambda p: False),
    "transposed": Ability("rows whose elements lie apart; without it such tensors are made contiguous", lambda p: False),
}  # fmt: skip

# At least one of each group is always meant: who names none names all.
_GROUPS = (("fwd", "bwd"), ("fp16", "bf16", "fp32"), ("top-left", "bottom-right"))

CLAIMS: Mapping[str, str] = {
    "lse": "returns (out, log-sum-exp, ...)",
    "triton": "launches a Triton kernel in every call; falling back to anything else is a fault",
    "bitwise": "equal numbers give equal bits wherever they lie: in another head, batch or stride",
    "casts": "16-bit tensors: P and dS are rounded to 16 bits and sums are fp32, so that probes have exact answers",
    "tf32": "products of fp32 tensors may be computed in tf32",
    "known-bugs": "a stock adapter is asked also what it is known to get wrong",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """What an implementation says of itself. `dims` are its head dims (empty: any); `stated`: somebody said so."""

    abilities: frozenset[str]
    claims: frozenset[str] = frozenset()
    dims: tuple[int, ...] = ()
    stated: bool = False

    def lacks(self, problem: Problem) -> str | None:
        """What `problem` needs and is not supported, in words."""
        if problem.beyond:
            return f"no signature has a word for {', '.join(problem.beyond)}"
        for name, ability in ABILITIES.items():
            if name not in self.abilities and ability.needs(problem):
                return f"does not support `{name}`: {ability.why}"
        if self.dims and not {problem.head_dim, problem.v_head_dim} <= {*self.dims}:
            return f"supports head dims {', '.join(map(str, self.dims))} only"
        return None

    def nearest(self, problem: Problem) -> Problem:
        """A problem like `problem` that needs nothing unsupported, as far as there is one; the pass stays."""
        dtypes = [name for name in _GROUPS[1] if name in self.abilities]
        if problem.dtype not in dtypes and dtypes:
            problem = problem.replace(dtype=dtypes[0])
        if self.dims:
            near = [
                min(self.dims, key=lambda dim: (abs(dim - old), dim)) for old in (problem.head_dim, problem.v_head_dim)
            ]
            problem = problem.replace(head_dim=near[0], v_head_dim=near[1])
        for name, ability in ABILITIES.items():
            if name not in self.abilities and ability.avoid is not None and ability.needs(problem):
                problem = ability.avoid(problem)
        return problem


def read_support(words: Sequence[str]) -> Support:
    """Read the words of `--supports`.

    Abilities that are named are all there is; of pass, dtype and alignment all are meant where none is named. `no-ABILITY`
    takes one away from everything; `d64` names a head dim. Nothing but claims: everything. Raises `UsageError` for a word
    that means nothing.
    """
    named, without, claims, dims = set(), set(), set(), set()
    for word in words:
        if word in ABILITIES:
            named.add(word)
        elif word in CLAIMS:
            claims.add(word)
        elif re.fullmatch(r"d[1-9]\d*", word):
            dims.add(int(word[1:]))
        elif word.removeprefix("no-") in ABILITIES:
            without.add(word.removeprefix("no-"))
        else:
            known = [*ABILITIES, *CLAIMS, "no-ABILITY", "dNUMBER"]
            near = did_you_mean(word, known)
            raise UsageError(
                f"`{word}` is nothing that an implementation can support",
                hint=near if near.startswith("known") else f"{near} known: {', '.join(known)}",
            )
    if not named:
        named = set(ABILITIES)
    for group in _GROUPS:
        if not named & set(group):
            named |= set(group)
    return Support(
        abilities=frozenset(named - without),
        claims=frozenset(claims),
        dims=tuple(sorted(dims)),
        stated=bool(words),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Signatures
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """How a function is called. `shows` is that in short; `given` and `made` are the order of axes of q, k, v and of out;
    `call` passes (function, problem, q, k, v, whether a log-sum-exp is wanted) on; `cannot` says what cannot be expressed.
    `pairs`: what is returned beside out is the log-sum-exp, also where nobody claimed one."""

    shows: str
    given: Layout
    made: Layout
    call: Callable[[Function, Problem, Tensor, Tensor, Tensor, bool], Any]
    cannot: Callable[[Problem], str | None] = lambda problem: None
    pairs: bool = True


def band(problem: Problem, device: torch.device) -> Tensor:
    """The mask (q_len, kv_len), true where a query sees a key."""
    return oracle.visible_keys(problem, slice(0, problem.q_len), device=device)


def _explicit_scale(problem: Problem, name: str = "scale") -> dict[str, float]:
    return {} if problem.scale is None else {name: problem.scale}


def _call_sdpa(function: Function, problem: Problem, q: Tensor, k: Tensor, v: Tensor, lse: bool) -> Any:
    """`is_causal` is top-left aligned (torch's documentation); whatever else hides keys is a bool mask."""
    keywords: dict[str, Any] = _explicit_scale(problem)
    if problem.causal and not _windowed(problem) and (problem.top_left or problem.q_len == problem.kv_len):
        keywords["is_causal"] = True
    elif problem.banded:
        keywords["attn_mask"] = band(problem, q.device)
    if problem.group > 1:
        keywords["enable_gqa"] = True
    return function(q, k, v, **keywords)


def _call_flash(function: Function, problem: Problem, q: Tensor, k: Tensor, v: Tensor, lse: bool) -> Any:
    """Windows count keys on either side of the bottom-right diagonal; -1 is no bound."""
    keywords: dict[str, Any] = _explicit_scale(problem, "softmax_scale")
    if problem.causal:
        keywords["causal"] = True
    if _windowed(problem):
        sides = (problem.window_left, problem.right)
        keywords["window_size"] = tuple(-1 if side is None else side for side in sides)
    return function(q, k, v, **keywords)


def _call_flex(function: Function, problem: Problem, q: Tensor, k: Tensor, v: Tensor, lse: bool) -> Any:
    keywords: dict[str, Any] = _explicit_scale(problem)
    if problem.banded:
        keywords["block_mask"] = block_mask(problem, q.device)
    if problem.group > 1:
        keywords["enable_gqa"] = True
    if lse:
        keywords["return_lse"] = True
    return function(q, k, v, **keywords)


def block_mask(problem: Problem, device: torch.device) -> Any:
    """FlexAttention's form of the band. Its bounds are tensors, so that one compiled mask serves all of them."""
    from torch.nn.attention.flex_attention import create_block_mask

    far = problem.q_len + problem.kv_len
    left = far if problem.window_left is None else problem.window_left
    right = far if problem.right is None else problem.right
    offset, left_edge, right_edge = (torch.tensor(bound, device=device) for bound in (problem.offset, left, right))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= query + offset - left_edge) & (key <= query + offset + right_edge)

    return create_block_mask(visible, None, None, problem.q_len, problem.kv_len, device=str(device))


def _call_ours(function: Function, problem: Problem, q: Tensor, k: Tensor, v: Tensor, lse: bool) -> Any:
    return function(q, k, v, **problem_keywords(problem))


def _bottom_right_only(problem: Problem) -> str | None:
    return "the signature `flash` has no word for a top-left band" if _crooked(problem) and problem.top_left else None


def _no_empty_masks(problem: Problem) -> str | None:
    """`create_block_mask` needs a query and a key."""
    empty = problem.banded and 0 in (problem.q_len, problem.kv_len)
    return "FlexAttention has no block mask without elements" if empty else None


SIGNATURES: Mapping[str, Signature] = {
    "sdpa": Signature(
        shows="f(q, k, v, attn_mask=None, is_causal=False, scale=None, enable_gqa=False), axes batch, head, length, dim",
        given="bhsd", made="bhsd", call=_call_sdpa, pairs=False,
    ),
    "flash": Signature(
        shows="f(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1)), axes batch, length, head, dim",
        given="bshd", made="bshd", call=_call_flash, cannot=_bottom_right_only,
    ),
    "flex": Signature(
        shows="f(q, k, v, score_mod=None, block_mask=None, scale=None, enable_gqa=False, return_lse=False)",
        given="bhsd", made="bhsd", call=_call_flex, cannot=_no_empty_masks,
    ),
    "ours": Signature(
        shows="f(q, k, v, *, scale, window_left, window_right, top_left), axes batch, head, length, dim",
        given="bhsd", made="bhsd", call=_call_ours,
    ),
}  # fmt: skip


def signature_for(name: str) -> Signature:
    """The signature of that name. Raises `UsageError` that shows all of them."""
    if name not in SIGNATURES:
        shown = "; ".join(f"`{known}` is {found.shows}" for known, found in SIGNATURES.items())
        asked = f"there is no signature `{name}`" if name else "a function needs a signature: how is it called?"
        raise UsageError(asked, hint=shown)
    return SIGNATURES[name]
