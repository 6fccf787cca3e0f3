"""One attention instance, its notation, its validity, its floating-point operations and its least bytes.

Refuses to know about kernels, devices or tensors: beside its notation, this module imports the standard library only.

Symbols: B batch, Hq query heads, Hkv key/value heads, Sq query length, Skv key length, D head dim of Q and K, Dv of V and O.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from harness.errors import ProblemError
from harness.notation import DTYPE_BYTES, EIGHT_BITS, LAYOUTS, PAIR_AXES, PASSES, Dtype, Layout, Pass, read_word

__all__ = ["DTYPE_BYTES", "LAYOUTS", "PAIR_AXES", "PASSES", "Dtype", "Layout", "Pass", "Problem", "parse_problem"]

HEAD_DIM_LIMITS = (1, 1024)

# Lengths and counts beyond this are typing errors, and would overflow 64-bit byte counts when multiplied.
_COUNT_LIMIT = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One attention problem: O = softmax(scale * Q K^T restricted to the mask) V, or its gradients.

    Q is (batch, q_heads, q_len, head_dim), K (batch, kv_heads, kv_len, head_dim), V (batch, kv_heads, kv_len, v_head_dim).
    Query head h reads key/value head h // (q_heads / kv_heads).

    Query i sees key j iff  i + offset - window_left <= j <= i + offset + right,  where `right` is 0 when `causal` and
    `window_right` otherwise, a bound of None is no bound, and `offset` is kv_len - q_len (bottom-right alignment, the
    convention of FlashAttention >= 2.1) or 0 if `top_left` (the convention of PyTorch's `is_causal`).

    `scale` None means 1/sqrt(head_dim). `layout` is the order of the axes in memory.

    Scores: `softcap` c replaces a scaled score s by c tanh(s / c); `alibi` then subtracts slope |j - i - offset| with a slope
    for each batch and query head; `bias` adds a tensor that has the axes in its letters, of `PAIR_AXES` ("" is one number for
    all). `sinks`: a logit per query head that takes part in the softmax without a value. `dropout` is the probability with
    which a weight becomes 0, after the softmax; the others are divided by 1 - dropout.

    Masks, beside the band: `prefix` makes the first keys visible to all queries, how many is said for each batch; `chunk`
    hides what is in another chunk of so many positions (i + offset, and j); `documents` gives every query and key a number,
    and hides what has another one; `mask` is a boolean tensor with the axes in its letters ("bk" is key padding).

    `packed`: so many sequences lie one behind the other in a batch of 1, and q_len and kv_len are the sums of their lengths.
    Each is a problem of its own, whose positions are counted from its beginning.

    `paged`: keys and values lie in pages of so many rows, which a table finds for each sequence of the batch. Each sequence has
    a length of its own, at most kv_len, which then stands for kv_len in its band. Forward only.

    `lse_grad`: a backward problem is also given the gradient of the log-sum-exp. `nondeterministic`: its results may have other
    bits in every run; else equal inputs must give equal bits.

    Of 8 bits, Q, K and V are what they hold times a scale for each batch (or packed sequence) and key/value head, one of each; O
    is bf16. Forward only, without pages. Raises `ProblemError` when impossible.
    """

    batch: int
    q_heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    v_head_dim: int
    dtype: Dtype = "bf16"
    causal: bool = False
    window_left: int | None = None
    window_right: int | None = None
    top_left: bool = False
    scale: float | None = None
    layout: Layout = "bhsd"
    pass_: Pass = "fwd"
    softcap: float | None = None
    alibi: bool = False
    bias: str | None = None
    sinks: bool = False
    dropout: float = 0.0
    prefix: bool = False
    chunk: int | None = None
    documents: bool = False
    mask: str | None = None
    packed: int | None = None
    paged: int | None = None
    lse_grad: bool = False
    nondeterministic: bool = False

    def __post_init__(self) -> None:
        _check_counts(self)
        _check_choices(self)
        _check_variants(self)
        if self.causal and self.window_right not in (None, 0):
            raise ProblemError(
                f"a causal problem cannot have a right window of {self.window_right}",
                hint="leave out `causal`, or write `window=LEFT` for a causal sliding window",
            )
        if self.scale is not None and not math.isfinite(self.scale):
            raise ProblemError(f"scale must be a finite number, found {self.scale}")
        # One problem has one name: where two spellings mean the same, keep the shorter one.
        if self.window_right == 0:
            object.__setattr__(self, "causal", True)
            object.__setattr__(self, "window_right", None)
        positioned = self.banded or self.alibi or self.chunk is not None
        if self.top_left and (
            (self.q_len == self.kv_len and self.packed is None and self.paged is None) or not positioned
        ):
            object.__setattr__(self, "top_left", False)

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.q_heads // self.kv_heads

    @property
    def right(self) -> int | None:
        """The right bound of the band (0 when causal), or None."""
        return 0 if self.causal else self.window_right

    @property
    def banded(self) -> bool:
        """Whether a bound of the band is set."""
        return self.causal or self.window_left is not None or self.window_right is not None

    @property
    def eight_bits(self) -> bool:
        """Whether Q, K and V are of 8 bits, and have scales."""
        return self.dtype in EIGHT_BITS

    @property
    def variants(self) -> tuple[str, ...]:
        """The names of the fields that make it more than attention inside a band."""
        return tuple(name for name, plain in _PLAIN.items() if getattr(self, name) != plain)

    @property
    def beyond(self) -> tuple[str, ...]:
        """The same names, and that of types with scales: what makes it more than a formula of Q, K and V. That bits may differ
        is no part of a formula."""
        named = (name for name in self.variants if name != "nondeterministic")
        return (*named, *(("eight_bits",) if self.eight_bits else ()))

    @property
    def bare(self) -> "Problem":
        """The same without what it adds to attention inside a band."""
        return self.replace(**{name: _PLAIN[name] for name in self.variants if name != "nondeterministic"})

    @property
    def freely_masked(self) -> bool:
        """Whether more than the band decides which pairs are visible."""
        beyond = (self.chunk, self.mask, self.packed, self.paged)
        return self.prefix or self.documents or any(part is not None for part in beyond)

    @property
    def offset(self) -> int:
        """Key position of query 0's diagonal."""
        return 0 if self.top_left else self.kv_len - self.q_len

    @property
    def softmax_scale(self) -> float:
        """The factor on Q K^T."""
        return 1.0 / math.sqrt(self.head_dim) if self.scale is None else self.scale

    @property
    def visible_pairs(self) -> int:
        """Number of (query, key) pairs of one head inside the band. What masks beyond it hide is not counted off; packed
        sequences are taken as equally long."""
        if self.packed is not None:
            lengths = {"q_len": self.q_len // self.packed, "kv_len": self.kv_len // self.packed}
            return self.packed * self.replace(packed=None, **lengths).visible_pairs
        upper = self.q_len * self.kv_len
        if self.right is not None:
            upper = _clamped_sum(self.offset + self.right + 1, self.q_len, self.kv_len)
        if self.window_left is None:
            return upper
        return upper - _clamped_sum(self.offset - self.window_left, self.q_len, self.kv_len)

    @property
    def flops(self) -> int:
        """Floating-point operations that the mathematics needs (multiply and add count one each; softmax is not counted).

        Forward: Q K^T and P V. Backward: Q K^T, dO V^T, P^T dO, dS K, dS^T Q (FlashAttention-2, section 3.1.2).
        """
        pairs = self.batch * self.q_heads * self.visible_pairs
        if self.pass_ == "fwd":
            return 2 * pairs * (self.head_dim + self.v_head_dim)
        return 2 * pairs * (3 * self.head_dim + 2 * self.v_head_dim)

    @property
    def least_bytes(self) -> int:
        """Bytes moved if each input is read once and each output written once (log-sum-exp is fp32)."""
        size = DTYPE_BYTES[self.dtype]
        q = self.batch * self.q_heads * self.q_len * self.head_dim * size
        o = self.batch * self.q_heads * self.q_len * self.v_head_dim * max(size, 2)
        k = self.batch * self.kv_heads * self.kv_len * self.head_dim * size
        v = self.batch * self.kv_heads * self.kv_len * self.v_head_dim * size
        lse = self.batch * self.q_heads * self.q_len * 4
        if self.pass_ == "fwd":
            return q + k + v + o + lse
        return (q + k + v + o + lse + o) + (q + k + v)

    @property
    def key(self) -> str:
        """The notation, which is also the stable key of the problem in every file."""
        return str(self)

    def __str__(self) -> str:
        words = [f"b{self.batch}", _pair("h", self.q_heads, self.kv_heads)]
        if self.q_len == self.kv_len:
            words.append(f"s{self.q_len}")
        else:
            words += [f"q{self.q_len}", f"k{self.kv_len}"]
        words += [_pair("d", self.head_dim, self.v_head_dim), self.dtype]
        if self.causal:
            words.append("causal")
        if self.window_left is not None or self.window_right is not None:
            left = "inf" if self.window_left is None else str(self.window_left)
            right = "inf" if self.window_right is None else str(self.window_right)
            words.append(f"window={left}" if self.causal else f"window={left}:{right}")
        if self.top_left:
            words.append("top-left")
        if self.scale is not None:
            words.append(f"scale={self.scale!r}")
        words += [_variant_word(self, name) for name in self.variants]
        if self.layout != "bhsd":
            words.append(self.layout)
        return " ".join([*words, self.pass_])

    def replace(self, **changes: Any) -> "Problem":
        """Return a copy with `changes`, validated again."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Problem(**(values | changes))


def parse_problem(text: str, *, default_pass: Pass = "fwd") -> Problem:
    """Read the notation that `str(problem)` prints, for example `b4 h32/8 s4096 d128 bf16 causal bwd`.

    Words may come in any order. `hN` means N query and N key/value heads, `sN` equal lengths (`qN kN` for unequal ones),
    `d192/128` differing head dims; `window=L:R` (or `window=L` with `causal`), `top-left`, `scale=X`, a layout and a pass
    are optional. Raises `ProblemError` naming the word that it could not read.
    """
    values: dict[str, Any] = {"pass_": default_pass}
    for word in text.split():
        read = read_word(word, text)
        twice = sorted(set(read) & (set(values) - {"pass_"}))
        if twice:
            raise ProblemError(f"problem `{text}` gives {twice[0].replace('_', ' ')} twice, again in `{word}`")
        values |= read
    missing = [name for name in ("batch", "q_heads", "q_len", "kv_len", "head_dim") if name not in values]
    if missing:
        words = {"batch": "bN", "q_heads": "hN", "q_len": "sN or qN kN", "kv_len": "sN or qN kN", "head_dim": "dN"}
        raise ProblemError(
            f"problem `{text}` does not say its {missing[0].replace('_', ' ')} (`{words[missing[0]]}`)",
            hint="write for example `b4 h32/8 s4096 d128 bf16 causal bwd`",
        )
    return Problem(**values)


# Fields beyond the band, by what they are where they are not used.
_PLAIN: Mapping[str, Any] = {
    "softcap": None, "alibi": False, "bias": None, "sinks": False, "dropout": 0.0, "prefix": False, "chunk": None,
    "documents": False, "mask": None, "packed": None, "paged": None, "lse_grad": False, "nondeterministic": False,
}  # fmt: skip


def _variant_word(problem: Problem, name: str) -> str:
    value = getattr(problem, name)
    if value is True:
        return name.replace("_", "-")
    return f"{name}={value or 1}" if name in ("bias", "mask") else f"{name}={value!r}"


def _check_variants(problem: Problem) -> None:
    if problem.softcap is not None and not (math.isfinite(problem.softcap) and problem.softcap > 0):
        raise ProblemError(f"softcap must be a positive number, found {problem.softcap}")
    if not 0 <= problem.dropout < 1:
        raise ProblemError(f"dropout must be at least 0 and below 1, found {problem.dropout}")
    for name in ("chunk", "packed", "paged"):
        count = getattr(problem, name)
        if count is not None and not 1 <= count <= _COUNT_LIMIT:
            raise ProblemError(f"{name} must be a whole number of at least 1, found {count}")
    if problem.packed is not None:
        _check_packed(problem)
    if problem.paged is not None and (problem.pass_ == "bwd" or problem.packed is not None):
        raise ProblemError("paged keys have a forward pass only, and cannot be combined with packed sequences")
    if problem.eight_bits and (problem.pass_ == "bwd" or problem.paged is not None):
        raise ProblemError(
            f"{problem.dtype} has a forward pass only, and without pages",
            hint="write `bf16` for the type of Q, K and V",
        )
    for name in ("bias", "mask"):
        letters = getattr(problem, name)
        if letters is not None and letters != "".join(letter for letter in PAIR_AXES if letter in letters):
            raise ProblemError(
                f"{name} must name axes out of `{PAIR_AXES}`, in this order, found `{letters}`",
                hint=f"`{name}=hqk` is one for all batches, `{name}=1` one number for all",
            )
    if problem.lse_grad and problem.pass_ == "fwd":
        raise ProblemError("a forward problem is given no gradient of the log-sum-exp", hint="leave out `lse-grad`")
    if problem.nondeterministic and problem.pass_ == "fwd":
        raise ProblemError("every forward pass gives equal bits in every run", hint="leave out `nondeterministic`")


def _check_packed(problem: Problem) -> None:
    if problem.batch != 1:
        raise ProblemError(
            f"packed sequences lie in a batch of 1, found {problem.batch}",
            hint="write `b1`; qN and kN are sums of lengths",
        )
    for name in ("bias", "mask"):
        if getattr(problem, name) is not None:
            raise ProblemError(
                f"packed sequences cannot be combined with a {name}",
                hint="use documents, or a batch entry per sequence",
            )


def _pair(letter: str, first: int, second: int) -> str:
    return f"{letter}{first}" if first == second else f"{letter}{first}/{second}"


def _check_counts(problem: Problem) -> None:
    least = {"batch": 0, "q_heads": 1, "kv_heads": 1, "q_len": 0, "kv_len": 0}
    for name, minimum in least.items():
        value = getattr(problem, name)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= _COUNT_LIMIT:
            raise ProblemError(f"{name.replace('_', ' ')} must be a whole number of at least {minimum}, found {value}")
    if problem.q_heads % problem.kv_heads:
        raise ProblemError(
            f"query heads ({problem.q_heads}) must be a multiple of key/value heads ({problem.kv_heads})",
            hint="grouped-query attention gives every key/value head the same number of query heads",
        )
    low, high = HEAD_DIM_LIMITS
    for name in ("head_dim", "v_head_dim"):
        value = getattr(problem, name)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ProblemError(f"{name.replace('_', ' ')} must be between {low} and {high}, found {value}")
    for name in ("window_left", "window_right"):
        value = getattr(problem, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise ProblemError(
                f"{name.replace('_', ' ')} must be a whole number of at least 0, found {value}",
                hint="write `inf` for no bound",
            )


def _check_choices(problem: Problem) -> None:
    choices = {"dtype": tuple(DTYPE_BYTES), "layout": LAYOUTS, "pass_": PASSES}
    for name, known in choices.items():
        value = cast("str", getattr(problem, name))
        if value not in known:
            raise ProblemError(f"{name.rstrip('_')} must be one of {', '.join(known)}, found {value}")


def _clamped_sum(start: int, count: int, limit: int) -> int:
    """Sum of clamp(start + i, 0, limit) for i in range(count)."""
    first_positive = min(max(-start, 0), count)
    first_full = min(max(limit - start, first_positive), count)
    rising = first_full - first_positive
    total = rising * (2 * start + first_positive + first_full - 1) // 2
    return total + (count - first_full) * limit
