"""Configs by problem, read from the JSON files beside this one. Needs nothing but Python.

A row answers for one kind of problem (pass, dtype, head dims, band, variants, page) whose queries, keys, and batch times heads
are at most its limits (null: any number). The first row that fits answers; where none does, the kernel takes its own safe config.
"""

import json
import re
from pathlib import Path
from typing import Any

_DTYPES = {"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32"}


class Table:
    """The files of a folder. `find` answers what `attention` asks, for a device as its driver calls it."""

    def __init__(self, folder: Path) -> None:
        self.files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]

    def find(self, question: Any, device: str) -> dict[str, Any] | None:
        """`config` and `provenance` of the row that fits, or None."""
        kind = kind_of(question)
        sizes = (question.q_len, question.kv_len, question.batch * question.q_heads)
        for file in self.files:
            if device_name(device) not in file["device_names"]:
                continue
            for row in file["rows"]:
                fits = all(most is None or size <= most for size, most in zip(sizes, row["most"], strict=True))
                if fits and _tuples(row["kind"]) == kind:
                    config: dict[str, Any] = file["configs"][row["config"]]
                    return config
        return None


def device_name(name: str) -> str:
    """A device in the letters that files name it by: `NVIDIA H200` is `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def kind_of(question: Any) -> tuple[Any, ...]:
    """What a row must equal: all that the code depends on, exact head dims too."""
    left, right = question.window_left, question.window_right
    causal = right == 0
    placed = question.top_left and question.q_len != question.kv_len and (left is not None or right is not None)
    dims = (question.head_dim, question.v_head_dim)
    padded = tuple(max(16, 1 << (dim - 1).bit_length()) for dim in dims)
    band = (causal, left is None, causal or right is None, placed)
    return (question.pass_, _DTYPES.get(str(question.dtype)), padded, band, tuple(question.variants), None, *dims)


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
