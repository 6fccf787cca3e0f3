"""flash-linear-attention: a folder of configs for each GPU, which it reads in place of tuning by itself.

A champion of its kernels says under `x-fla` which of its functions was tuned, and with which key of its autotuner:
`{"kernel": NAME, "autotune_key": [...]}`. Refuses to write a `default_config`: it would be used for any problem, and a proof is
of one.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.export.base import Checked, Chosen, Consumer, Made, Request, Target, as_json, made_by
from harness.export_documents import ExportedDocument, SkippedDocument
from harness.probe import products_of

FAMILY = "fla"
_EXTENSION = "x-fla"
_OF_CONFIG = ("num_warps", "num_stages", "num_ctas", "maxnreg")


def folder_name(product: str) -> str:
    """A GPU as FLA calls its folder: whatever is no letter and no digit becomes one `_`."""
    return re.sub(r"[^0-9A-Za-z]+", "_", product).strip("_") or "unknown_gpu"


def key_hash(key: Any) -> str:
    """FLA's name for a key of its autotuner: md5 of its JSON without blanks."""
    return hashlib.md5(
        json.dumps(key, separators=(",", ":"), sort_keys=True).encode(), usedforsecurity=False
    ).hexdigest()


def _make(request: Request) -> Made:
    files: dict[str, dict[str, Any]] = {}
    exported: list[ExportedDocument] = []
    skipped: list[SkippedDocument] = []
    # Where FLA takes a key that only looks like its own (`fuzzy`), it takes the first: the one that needs least memory.
    for one in sorted(request.champions, key=lambda each: (_shared(each), each.problem.key)):
        said: Any = (one.champion.model_extra or {}).get(_EXTENSION)
        if not _is_said(said):
            skipped.append(
                one.skipped(
                    f"it does not say under `{_EXTENSION}` which kernel and which autotuner key of FLA it is of"
                )
            )
            continue
        products = products_of(one.file.device.name) or (one.product,)
        paths = [f"{folder_name(product)}/{said['kernel']}.json" for product in products]
        for path in paths:
            tree = files.setdefault(path, _file(one, said["kernel"]))
            tree["autotune_entries"][key_hash(said["autotune_key"])] = _entry(one, said["autotune_key"])
        exported.append(one.document(*paths))
    return Made(
        files={path: as_json(tree) for path, tree in files.items()}, exported=tuple(exported), skipped=tuple(skipped),
        use=tuple(
            f"FLA_CONFIG_DIR=DIR/{folder} FLA_CACHE_MODE=strict python ...   # both are read when fla is imported"
            for folder in sorted({path.split("/")[0] for path in files})
        ),
    )  # fmt: skip


def _is_said(said: Any) -> bool:
    return (
        isinstance(said, Mapping)
        and isinstance(said.get("autotune_key"), list)
        and re.fullmatch(r"[A-Za-z_]\w{0,150}", str(said.get("kernel")), re.ASCII) is not None
    )


def _shared(one: Chosen) -> int:
    return max((each.shared_bytes for each in one.champion.resources), default=0)


def _file(one: Chosen, kernel: str) -> dict[str, Any]:
    return {
        "kernel_name": kernel, "triton_version": one.file.environment.triton, "default_config": None,
        "autotune_entries": {}, "x-flashtune": {**made_by("fla"), "device": one.file.device.name},
    }  # fmt: skip


def _entry(one: Chosen, key: Any) -> dict[str, Any]:
    """A config under its key. A time is given where it is one; FLA does not read it."""
    config = dict(one.champion.config)
    options: dict[str, Any] = {"num_warps": 4, "num_stages": 3, "num_ctas": 1}
    options |= {name: config.pop(name) for name in _OF_CONFIG if name in config}
    if not options.get("maxnreg"):
        options.pop("maxnreg", None)
    time = {} if one.estimated else {"best_timing": [one.champion.number.value_ms]}
    return {"autotune_key": key, "config": {"kwargs": config, **options}, **time, "x-flashtune": one.provenance()}


def _check(folder: Path, request: Request, made: Made) -> Checked:
    consumer = Consumer("check_fla.py", "fla-core", environment={"FLA_CACHE_MODE": "strict"})
    return consumer.ask(folder)


TARGET = Target(
    name="fla",
    consumer="flash-linear-attention's config directory",
    families=frozenset({FAMILY}),
    make=_make,
    check=_check,
)
