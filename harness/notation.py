"""The words of a problem's notation: which there are, and what each of them says.

Refuses to say whether words go together: `harness.problem` does.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal

from harness.errors import ProblemError, did_you_mean

Dtype = Literal["fp16", "bf16", "fp32", "fp8e4m3", "fp8e5m2"]
Pass = Literal["fwd", "bwd"]
Layout = Literal["bhsd", "bshd", "sbhd"]

# The axes of a tensor of pairs, (batch, heads, queries, keys); a letter that is missing is an axis with one element for all.
PAIR_AXES = "bhqk"

DTYPE_BYTES: Mapping[str, int] = {"fp16": 2, "bf16": 2, "fp32": 4, "fp8e4m3": 1, "fp8e5m2": 1}
# Types whose numbers mean something only beside a scale.
EIGHT_BITS: tuple[Dtype, ...] = ("fp8e4m3", "fp8e5m2")
LAYOUTS: tuple[Layout, ...] = ("bhsd", "bshd", "sbhd")
PASSES: tuple[Pass, ...] = ("fwd", "bwd")

# Fields of a problem that are switched on by their name alone; those that take a number.
_FLAGS = ("alibi", "sinks", "prefix", "documents", "lse_grad", "nondeterministic")
_NUMBERS: Mapping[str, type[int] | type[float]] = {
    "scale": float,
    "softcap": float,
    "dropout": float,
    "chunk": int,
    "packed": int,
    "paged": int,
}


def read_word(word: str, text: str) -> dict[str, Any]:
    """The fields of a problem that one word of its notation `text` says. Raises `ProblemError` if it says nothing."""
    pair = re.fullmatch(r"([hd])(\d+)(?:/(\d+))?", word)
    if pair:
        first, second = int(pair[2]), int(pair[3] or pair[2])
        names = ("q_heads", "kv_heads") if pair[1] == "h" else ("head_dim", "v_head_dim")
        return dict(zip(names, (first, second), strict=True))
    length = re.fullmatch(r"([bsqk])(\d+)", word)
    if length:
        named: Mapping[str, tuple[str, ...]] = {
            "b": ("batch",),
            "s": ("q_len", "kv_len"),
            "q": ("q_len",),
            "k": ("kv_len",),
        }
        return dict.fromkeys(named[length[1]], int(length[2]))
    if word in DTYPE_BYTES:
        return {"dtype": word}
    if word in LAYOUTS:
        return {"layout": word}
    if word in PASSES:
        return {"pass_": word}
    if word.replace("-", "_") in ("causal", "top_left", *_FLAGS):
        return {word.replace("-", "_"): True}
    if word.startswith("window="):
        return _read_window(word, text)
    name, _, value = word.partition("=")
    if value and name in _NUMBERS:
        try:
            return {name: _NUMBERS[name](value)}
        except ValueError:
            raise ProblemError(f"problem `{text}` has a {name} that is no number: `{word}`") from None
    if value and name in ("bias", "mask"):
        return {name: "" if value == "1" else value}
    known = [*DTYPE_BYTES, *LAYOUTS, *PASSES, "causal", "top-left", "window=L:R"]
    known += [*(f"{name}=X" for name in _NUMBERS), *(flag.replace("_", "-") for flag in _FLAGS), "bias=bhqk", "mask=bk"]
    raise ProblemError(
        f"problem `{text}` has a word that means nothing: `{word}`",
        hint=did_you_mean(word, known) + "; write for example `b4 h32/8 s4096 d128 bf16 causal bwd`",
    )


def _read_window(word: str, text: str) -> dict[str, Any]:
    match = re.fullmatch(r"window=(inf|-?\d+)(?::(inf|-?\d+))?", word)
    if not match:
        raise ProblemError(
            f"problem `{text}` has a window that cannot be read: `{word}`",
            hint="write `window=LEFT:RIGHT` with whole numbers or `inf`, or `window=LEFT` beside `causal`",
        )
    sides = [None if side in (None, "inf") else int(side) for side in match.groups()]
    return {"window_left": sides[0], "window_right": sides[1]}
