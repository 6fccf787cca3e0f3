"""What the kernels take, beside what other libraries take: docs/support.md, which `python -m harness.support` writes.

Every cell of ours is the answer of a kernel's own `launches` to a problem, on tensors that hold nothing; where it is no, the
kernel's reason is printed too. Refuses to launch or to compile anything: that a kernel takes something says nothing of its
numbers, which the tests, the gate and the suite judge.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from harness.compile import meta_launches
from harness.device import TARGETS
from harness.errors import ProblemError
from harness.notation import EIGHT_BITS
from harness.operation import lacks
from harness.problem import DTYPE_BYTES, PASSES, Pass, parse_problem
from harness.workspace import Workspace, find_workspace

YES, NO = "yes", "-"

# One query, so that a kernel for decoding is asked nothing that it is not made for.
_BASE = parse_problem("b1 h2 q1 k64 d64 bf16")
_DEVICE = TARGETS["h200"]
# Those that are asked wherever a row names none.
_TYPES = [dtype for dtype in DTYPE_BYTES if dtype not in EIGHT_BITS]

OTHERS = ("FlashAttention-2", "FlashAttention-3", "FlexAttention", "AOTriton")
_SOURCE = (
    "The columns of other libraries were read in their sources in August 2026: flash-attention and AOTriton as of that month,",
    "FlexAttention of PyTorch 2.11. There, an empty cell was not looked up.",
)


@dataclass(frozen=True, slots=True)
class Row:
    """A feature. `changes` are fields of a problem that has it, None where the notation has no word for it; `passes` those that
    it concerns; `keyword` a parameter of `launches` that it needs; `kernel` the only kernel that it is about. `others` are the
    cells of `OTHERS`, in their order."""

    feature: str
    changes: Mapping[str, Any] | None
    others: tuple[str, str, str, str]
    passes: tuple[Pass, ...] = field(default=PASSES, kw_only=True)
    keyword: str | None = field(default=None, kw_only=True)
    kernel: str | None = field(default=None, kw_only=True)


ROWS = (
    Row("attention without a mask", {}, (YES, YES, YES, YES)),
    Row("fp32", {"dtype": "fp32"}, (NO, NO, YES, YES)),
    Row("fp8 (e4m3) with scales for each head", {"dtype": "fp8e4m3"}, (NO, "forward", NO, NO)),
    Row("fp8 (e5m2) with scales for each head", {"dtype": "fp8e5m2"}, (NO, "", NO, "")),
    Row("grouped and shared heads", {"q_heads": 4}, (YES, YES, YES, YES)),
    Row("values of another width", {"v_head_dim": 32}, (NO, "192/128, 64/256, 64/512", YES, YES)),
    Row("other widths than powers of two", {"head_dim": 80, "v_head_dim": 80},
        ("multiples of 8 up to 256", "64, 96, 128, 192, 256", "from 16 on, padded", "16 to 512, also 48, 80, 96, 160, 192, 224")),
    Row("no keys at all", {"kv_len": 0}, ("partly", "partly", NO, YES)),
    Row("causal, ends aligned (bottom right)", {"causal": True}, (YES, YES, "mask function", YES)),
    Row("causal, beginnings aligned (top left)", {"causal": True, "top_left": True}, (NO, NO, "mask function", YES)),
    Row("sliding window, both sides", {"window_left": 16, "window_right": 4}, (YES, YES, "mask function", YES)),
    Row("chunks of positions", {"chunk": 16}, (NO, YES, "mask function", NO)),
    Row("prefix that all queries see", {"prefix": True}, (NO, NO, "mask function", NO)),
    Row("documents in one sequence", {"documents": True}, ("packed sequences", "packed sequences", "mask function", NO)),
    Row("key padding", {"mask": "bk"}, ("packed sequences", "lengths used", "mask function", "packed sequences")),
    Row("any mask", {"mask": "bhqk"}, ("", "", "mask function", "")),
    Row("softcap", {"softcap": 30.0}, (YES, YES, "score function", NO)),
    Row("ALiBi slopes", {"alibi": True}, (YES, NO, "score function", "as a bias")),
    Row("additive bias; backward: with its gradient", {"bias": "bhqk"},
        (NO, NO, "score function; gradient by atomic additions", YES)),
    Row("bias, one for all batches and queries", {"bias": "hk"}, (NO, NO, "score function", "")),
    Row("sinks; backward: with their gradient", {"sinks": True}, (NO, NO, "by its log-sum-exp", NO)),
    Row("dropout", {"dropout": 0.1}, (YES, NO, NO, YES)),
    Row("gradient of the log-sum-exp", {"lse_grad": True}, ("", "", YES, ""), passes=("bwd",)),
    Row("dq by atomic additions, with other bits in every run", {"nondeterministic": True}, (YES, YES, NO, ""), passes=("bwd",)),
    Row("score and mask functions of the caller", {}, (NO, NO, YES, NO), keyword="functions"),
    Row("packed sequences (cumulated lengths)", {"packed": 1}, (YES, YES, "mask function", YES)),
    Row("paged keys and values", {"paged": 16}, ("pages of 256", YES, "partly", NO), passes=("fwd",)),
    Row("few queries, keys shared out among programs", {}, (YES, YES, YES, NO), kernel="flash_decode"),
    Row("query heads of a group as rows of one tile", {"kv_heads": 1}, (YES, YES, "", ""), kernel="flash_decode"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Answer:
    """A cell: in words, and why it is not yes for all types."""

    cell: str
    why: str = ""


def document(workspace: Workspace) -> str:
    """The whole text of docs/support.md. Imports the kernels."""
    kernels = sorted(workspace.stems, key=lambda stem: (PASSES.index(workspace.kernel_pass(stem)), stem))
    answers = {(row.feature, stem): answer(workspace, stem, row) for row in ROWS for stem in kernels}
    named = [f"{stem} ({workspace.kernel_pass(stem)})" for stem in kernels]
    lines = [_cells(("", "in a problem", *named, *OTHERS)), _cells(["---"] * (2 + len(kernels) + len(OTHERS)))]
    lines += [
        _cells((row.feature, _notation(row), *(answers[row.feature, stem].cell for stem in kernels), *row.others))
        for row in ROWS
    ]
    reasons = [
        f"- {stem}, {row.feature}: {answers[row.feature, stem].why}"
        for stem in kernels for row in ROWS if answers[row.feature, stem].why
    ]  # fmt: skip
    told = ["", "Why not, in the words of the kernels:", "", *reasons] if reasons else []
    return "\n".join([*_HEAD, *lines, *told]) + "\n"


_HEAD = (
    "# What is supported",
    "",
    "Written by `python -m harness.support`, which asks every kernel about every row and type; do not edit.",
    "",
    f"`{YES}`: in {', '.join(_TYPES)}, or the type that the row names; `{NO}`: not at all; else the types it is taken in;",
    "empty: the row does not concern the kernel. The second column is what a problem says (`flashtune tune --problem`).",
    "`kernels.attention.attention` takes what flash_fwd and flash_bwd take, `attention_paged` what flash_decode takes in pages.",
    "",
    *_SOURCE,
    "",
)


def answer(workspace: Workspace, stem: str, row: Row) -> Answer:
    """What a kernel says about a row."""
    pass_ = workspace.kernel_pass(stem)
    if pass_ not in row.passes or (row.kernel in workspace.stems and row.kernel != stem):
        return Answer("")
    if row.changes is None or row.kernel not in (None, stem):
        return Answer(NO)
    if row.keyword is not None and row.keyword not in workspace.kernel_parameters(stem):
        return Answer(NO, f"has no {row.keyword}")
    dtypes = [row.changes["dtype"]] if "dtype" in row.changes else _TYPES
    changes = {dtype: {"dtype": dtype, "pass_": pass_, **row.changes} for dtype in dtypes}
    kernel = workspace.load_kernel(stem)
    refusals = {dtype: _refusal(workspace, stem, kernel, changed) for dtype, changed in changes.items()}
    taken = [dtype for dtype, refusal in refusals.items() if refusal is None]
    why = "; ".join(dict.fromkeys(refusal for refusal in refusals.values() if refusal is not None))
    return Answer(YES if taken == dtypes else " ".join(taken) or NO, why)


def _refusal(workspace: Workspace, stem: str, kernel: ModuleType, changes: Mapping[str, Any]) -> str | None:
    """Why a kernel does not take the problem with these changes, None if it does."""
    try:
        problem = _BASE.replace(**changes)
    except ProblemError as refusal:
        return str(refusal).partition("\n")[0]
    lacking = lacks(kernel.launches, problem)
    if lacking is not None:
        return lacking
    try:
        meta_launches(kernel, problem, workspace.load_space(stem).default(problem, _DEVICE))
    except (ValueError, NotImplementedError) as refusal:
        return str(refusal)
    return None


def _notation(row: Row) -> str:
    """What the row adds to the notation of a problem."""
    if row.changes is None:
        return ""
    pass_ = "fwd" if row.changes.get("dtype") in EIGHT_BITS else row.passes[-1]
    fields = {"pass_": pass_, **row.changes}
    plain = str(_BASE.replace(pass_=pass_)).split()
    return " ".join(f"`{word}`" for word in str(_BASE.replace(**fields)).split() if word not in plain)


def _cells(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def main(arguments: list[str]) -> None:
    """Write the document to the file that is named, or to docs/support.md of the workspace."""
    workspace = find_workspace()
    path = Path(arguments[0]) if arguments else workspace.root / "docs" / "support.md"
    path.write_text(document(workspace), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
