"""aiter, and the AMD backend of flash-attention in it: `ARCH-MHA-DEFAULT.json`, one config for each named kind of problem.

Nothing here lets aiter read what was written (it is on no package index), so an export never says that it was verified. Refuses
whatever was not tuned with aiter's own kernel. Facts: ROCm/aiter e4048607, 2026-08-22.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from harness.export.base import Checked, Chosen, Made, Request, Target, as_json, made_by
from harness.export_documents import ExportedDocument, SkippedDocument
from harness.problem import Problem

FAMILY = "aiter"
_UNREAD = "schema only: aiter can be installed from no package index, so that none of its code reads what is written"
_PARTIAL = (
    "a file holds only the kinds that were tuned: give its configs to calls, do not put it in the place of aiter's"
)
_Positive = Annotated[int, Field(ge=1)]
_CLOSED = ConfigDict(extra="forbid", strict=True, frozen=True)


class Forward(BaseModel):
    """The config of aiter's forward kernel."""

    model_config = _CLOSED

    BLOCK_M: _Positive
    BLOCK_N: _Positive
    PRELOAD_V: bool
    waves_per_eu: Annotated[int, Field(ge=0)]
    num_warps: _Positive
    num_ctas: _Positive
    num_stages: _Positive


class OneKernel(BaseModel):
    """The config of aiter's backward pass in one kernel."""

    model_config = _CLOSED

    BLOCK_M1: _Positive
    BLOCK_N1: _Positive
    BLOCK_M2: _Positive
    BLOCK_N2: _Positive
    BLK_SLICE_FACTOR: _Positive
    waves_per_eu: Annotated[int, Field(ge=0)]
    matrix_instr_nonkdim: Annotated[int, Field(ge=0)]
    num_warps: _Positive
    num_ctas: _Positive
    num_stages: _Positive


class Mha(BaseModel):
    """`ARCH-MHA-DEFAULT.json`, as far as we write it: configs by kind of problem. Where a kind is missing, aiter's own stays."""

    model_config = _CLOSED

    fwd: Mapping[str, Forward] = {}
    bkwd_onekernel: Mapping[str, OneKernel] = {}


MHA = TypeAdapter(Mha)


def kind_of(problem: Problem) -> str:
    """aiter's name for a kind of problem; dims beyond those of the values are positional ("pe")."""
    if problem.pass_ == "bwd":
        return "onekernel_pe" if problem.head_dim > problem.v_head_dim else "onekernel"
    named = ["pe"] if problem.head_dim > problem.v_head_dim else []
    named += ["dropout_or_fp32"] if problem.dropout or problem.dtype == "fp32" else []
    return "_".join(named) or ("small_head" if 16 < problem.v_head_dim <= 64 else "default")


def _make(request: Request) -> Made:
    exported: list[ExportedDocument] = []
    skipped: list[SkippedDocument] = []
    trees: dict[str, dict[str, Any]] = {}
    sources: dict[str, dict[str, Any]] = {}
    # Of one kind there is one config: that of the largest problem, of equals the first.
    for one in sorted(request.champions, key=lambda each: (-each.problem.flops, each.problem.key)):
        arch, section = one.file.device.arch, "fwd" if one.problem.pass_ == "fwd" else "bkwd_onekernel"
        kind, leaf = kind_of(one.problem), dict(one.champion.config)
        path = f"{arch}-MHA-DEFAULT.json"
        if reason := _refusal(one, trees.get(path, {}).get(section, {}), kind):
            skipped.append(one.skipped(reason))
            continue
        trees.setdefault(path, {}).setdefault(section, {})[kind] = leaf
        sources.setdefault(path, {})[f"{section}.{kind}"] = one.provenance()
        exported.append(one.document(path))
    files = {path: as_json(tree) for path, tree in trees.items()}
    # aiter reads every key of its file, so that where it comes from stands beside it.
    files |= {
        path.replace(".json", ".provenance.json"): as_json({**made_by("aiter"), "configs": found})
        for path, found in sources.items()
    }
    return Made(
        files=files, exported=tuple(exported), skipped=tuple(skipped), use=tuple(_use(trees)),
        notes=(_UNREAD, _PARTIAL) if trees else (_UNREAD,),
    )  # fmt: skip


def _refusal(one: Chosen, there: Mapping[str, Any], kind: str) -> str:
    if not one.file.device.arch.startswith("gfx"):
        return f"aiter runs on AMD, and this is of {one.file.device.arch}"
    if kind in there:
        return f"aiter has one config for the kind `{kind}`, and a larger problem's is taken"
    model = Forward if one.problem.pass_ == "fwd" else OneKernel
    try:
        model.model_validate(dict(one.champion.config))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return f"its config is none of aiter's: {first['msg']} at {'.'.join(map(str, first['loc']))}"
    return ""


def _use(trees: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    for path, tree in sorted(trees.items()):
        for kind, leaf in tree.get("fwd", {}).items():
            yield f'flash_attn_func(q, k, v, ..., config=json.load(open("{path}"))["fwd"]["{kind}"])'
            spelled = {("PRE_LOAD_V" if name == "PRELOAD_V" else name): value for name, value in leaf.items()}
            spelled.pop("num_ctas")
            yield f"FLASH_ATTENTION_FWD_TRITON_AMD_CONFIG_JSON='{json.dumps(spelled)}'"


def _check(folder: Path, request: Request, made: Made) -> Checked:
    for path in sorted(folder.glob("*-MHA-DEFAULT.json")):
        MHA.validate_json(path.read_bytes())
    return "aiter can be installed from no package index; files are held against our own schema of them only"


TARGET = Target(
    name="aiter", consumer="aiter and the AMD backend of flash-attention", families=frozenset({FAMILY}), make=_make,
    check=_check,
)  # fmt: skip


def write_schema(folder: Path) -> None:
    """Write the schema, as it is in the repository."""
    title = "aiter ARCH-MHA-DEFAULT.json, as flashtune writes it"
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **MHA.json_schema(), "title": title}
    (folder / "aiter-mha.json").write_bytes(as_json(schema))


if __name__ == "__main__":
    write_schema(Path(__file__).parents[1] / "schemas")
