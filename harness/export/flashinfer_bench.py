"""FlashInfer-Bench: a trace set. What attention is to compute (definition), our kernel with its configs (solution), the problems
(workloads), and for champions that were timed a trace.

A champion whose number is an estimate has no trace: `flashinfer-bench run` makes one. Refuses problems that q, k and v do not
say.
"""

import ast
import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.export.base import ESTIMATE, Checked, Chosen, Consumer, Made, Request, Target, as_json
from harness.export_documents import ExportedDocument, SkippedDocument
from harness.probe import products_of
from harness.problem import Problem
from harness.workspace import Workspace, with_siblings

_DTYPES: Mapping[str, str] = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
_OPERATION = "gqa_dense"
# Nobody kept when a champion was timed; the format wants a text.
_WHEN = "unknown"
_VAR = {"batch": "sequences", "q_len": "queries of a sequence", "kv_len": "keys of a sequence"}

_REFERENCE = '''import torch


def run(q, k, v):
    """softmax({scale!r} * q k^T inside the band) v in fp32; a query that sees no key gets 0."""
    group = q.shape[1] // k.shape[1]
    k, v = (each.float().repeat_interleave(group, dim=1) for each in (k, v))
    s = {scale!r} * (q.float() @ k.transpose(2, 3))
    away = torch.arange(k.shape[2], device=q.device)[None, :] - torch.arange(q.shape[2], device=q.device)[:, None]
    away = away - ({offset})
    seen = torch.ones_like(away, dtype=torch.bool)
    left, right = {left!r}, {right!r}
    if left is not None:
        seen &= away >= -left
    if right is not None:
        seen &= away <= right
    p = torch.softmax(s.masked_fill(~seen, float("-inf")), dim=-1).masked_fill(~seen, 0.0)
    return (p @ v).to(q.dtype)
'''

_MAIN = '''"""{kernel} of FlashTune on {device}, by problem; of the kernel with the digest {digest}.

{kinds}
"""

from .triton_kernels.{kernel} import {kernel}

# By (batch, q_len, kv_len). Other problems get the kernel's own safe config.
CONFIGS = {configs}


def run(q, k, v):
    config = CONFIGS.get((q.shape[0], q.shape[2], k.shape[2]))
    out, lse = {kernel}(
        q, k, v, scale={scale!r}, window_left={left!r}, window_right={right!r}, top_left={top_left!r}, config=config
    )
    return out
'''


def hardware_name(product: str) -> str:
    """A device as FlashInfer-Bench's own traces call it: `NVIDIA_H200`."""
    return product.replace(" ", "_")


def definition_name(problem: Problem) -> str:
    """All of a problem but its batch and lengths, in letters that a file may be called by."""
    band = [f"{name}{value}" for name, value in (("left", problem.window_left), ("right", problem.right)) if value]
    dims = str(problem.head_dim) + (f"_{problem.v_head_dim}" if problem.v_head_dim != problem.head_dim else "")
    words = [
        "attention", f"h{problem.q_heads}", f"kv{problem.kv_heads}", f"d{dims}", problem.dtype,
        *(["causal"] if problem.causal else []), *band, *(["top_left"] if problem.top_left else []),
        *([f"scale{problem.scale:g}"] if problem.scale is not None else []),
    ]  # fmt: skip
    return "_".join(words).replace(".", "p").replace("-", "m").replace("+", "")


def _make(request: Request) -> Made:
    groups: dict[str, dict[tuple[str, str], list[Chosen]]] = {}
    skipped: list[SkippedDocument] = []
    for one in request.champions:
        reason = _refusal(one, request.workspace)
        if reason:
            skipped.append(one.skipped(reason))
        else:
            key = (one.file.kernel.name, one.file.device.name)
            groups.setdefault(definition_name(one.problem), {}).setdefault(key, []).append(one)
    files: dict[str, bytes] = {}
    exported: list[ExportedDocument] = []
    for name, solutions in sorted(groups.items()):
        several = [one for champions in solutions.values() for one in champions]
        files[f"definitions/{_OPERATION}/{name}.json"] = as_json(_definition(name, several[0].problem))
        workloads = {one.problem.key: one.problem for one in several}
        lines = [{"definition": name, "workload": _workload(problem)} for _, problem in sorted(workloads.items())]
        files[f"workloads/{_OPERATION}/{name}.jsonl"] = _lines(lines)
        traces = []
        for (kernel, device), champions in sorted(solutions.items()):
            title = f"flashtune_{kernel}_{device.replace('-', '_')}_{name}"
            path = f"solutions/{_OPERATION}/{name}/{title}.json"
            files[path] = as_json(_solution(title, name, champions, request.workspace))
            traces += [_trace(name, title, one) for one in champions if not one.estimated]
            exported += [one.document(path) for one in champions]
        if traces:
            files[f"traces/{_OPERATION}/{name}.jsonl"] = _lines(traces)
    return Made(
        files=files, exported=tuple(exported), skipped=tuple(skipped), notes=_notes(exported), use=_USE if files else ()
    )


_USE = (
    'flashinfer_bench.TraceSet.from_path("DIR").get_best_trace(NAME, axes=..., max_rel_error=1.0)',
    "flashinfer-bench run --local DIR    # times the solutions on the GPU that is here, and adds traces",
)


def _notes(exported: Sequence[ExportedDocument]) -> tuple[str, ...]:
    estimates = sum(one.kind != "measured" for one in exported)
    notes = []
    if estimates:
        notes.append(f"{estimates} of {len(exported)} champions have no trace, because their number is {ESTIMATE}")
    if estimates < len(exported):
        notes.append(
            "in traces, `reference_latency_ms` is of the default config of the same kernel, and `max_relative_error` is relative "
            "to the derived bound of an element, so that 1 is the most that is right"
        )
    return tuple(notes)


def _refusal(one: Chosen, workspace: Workspace) -> str:
    problem = one.problem
    if problem.pass_ != "fwd":
        return "a definition is written of the forward pass only"
    if problem.variants or problem.layout != "bhsd" or problem.dtype not in _DTYPES:
        said = ", ".join(problem.variants) or (problem.layout if problem.layout != "bhsd" else problem.dtype)
        return f"a definition takes q, k and v alone, side by side, and nothing says {said}"
    if not _is_function(workspace, one.file.kernel.name):
        return f"kernels/{one.file.kernel.name}.py has no function of its own name that takes q, k, v and a config"
    return ""


def _is_function(workspace: Workspace, stem: str) -> bool:
    tree = ast.parse((workspace.root / "kernels" / f"{stem}.py").read_text(encoding="utf-8"))
    wanted = {"scale", "window_left", "window_right", "top_left", "config"}
    return any(
        isinstance(node, ast.FunctionDef)
        and node.name == stem
        and [each.arg for each in node.args.args] == ["q", "k", "v"]
        and wanted <= {each.arg for each in node.args.kwonlyargs}
        for node in tree.body
    )


def _definition(name: str, problem: Problem) -> dict[str, Any]:
    constants = {
        "q_heads": problem.q_heads, "kv_heads": problem.kv_heads, "head_dim": problem.head_dim,
        "v_head_dim": problem.v_head_dim,
    }  # fmt: skip
    dtype = _DTYPES[problem.dtype]
    tensors = {
        "q": ["batch", "q_heads", "q_len", "head_dim"], "k": ["batch", "kv_heads", "kv_len", "head_dim"],
        "v": ["batch", "kv_heads", "kv_len", "v_head_dim"],
    }  # fmt: skip
    offset = "0" if problem.top_left else "k.shape[2] - q.shape[2]"
    return {
        "name": name, "op_type": _OPERATION, "tags": ["flashtune"],
        "description": f"Attention as `{problem.key}` says it, for any batch and lengths.",
        "axes": {axis: {"type": "var", "description": said} for axis, said in _VAR.items()}
        | {axis: {"type": "const", "value": value} for axis, value in constants.items()},
        "inputs": {tensor: {"shape": shape, "dtype": dtype} for tensor, shape in tensors.items()},
        "outputs": {"out": {"shape": ["batch", "q_heads", "q_len", "v_head_dim"], "dtype": dtype}},
        "reference": _REFERENCE.format(
            scale=problem.softmax_scale, offset=offset, left=problem.window_left, right=problem.right
        ),
    }  # fmt: skip


def _axes(problem: Problem) -> dict[str, int]:
    return {name: getattr(problem, name) for name in _VAR}


def _workload(problem: Problem) -> dict[str, Any]:
    return {
        "axes": _axes(problem), "inputs": {name: {"type": "random"} for name in ("q", "k", "v")},
        "uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, f"urn:flashtune:problem:{problem.key}")),
    }  # fmt: skip


def _solution(title: str, definition: str, champions: Sequence[Chosen], workspace: Workspace) -> dict[str, Any]:
    first = champions[0]
    kernel, problem = first.file.kernel.name, first.problem
    configs = {tuple(_axes(one.problem).values()): dict(one.champion.config) for one in champions}
    estimates = sum(one.estimated for one in champions)
    main = _MAIN.format(
        kernel=kernel, device=first.file.device.name, digest=first.champion.certificate.kernel_digest,
        kinds=f"{estimates} of {len(champions)} configs were chosen by {ESTIMATE}." if estimates else "All were timed.",
        configs="{\n" + "".join(f"    {axes}: {config!r},\n" for axes, config in configs.items()) + "}",
        scale=problem.softmax_scale, left=problem.window_left, right=problem.right, top_left=problem.top_left,
    )  # fmt: skip
    sources = {
        "main.py": main,
        "triton_kernels/__init__.py": "# Kernels as they were tuned: torch, triton and siblings.\n",
    }
    for path in sorted(with_siblings(workspace.root / "kernels", kernel)):
        if path.name != "__init__.py":
            sources[f"triton_kernels/{path.name}"] = path.read_text(encoding="utf-8")
    vendor = "rocm" if first.file.device.arch.startswith("gfx") else "cuda"
    return {
        "name": title, "definition": definition, "author": "flashtune",
        "description": json.dumps([one.provenance() for one in champions]),
        "spec": {
            "language": "triton", "target_hardware": [vendor], "entry_point": "main.py::run", "dependencies": [],
            "destination_passing_style": False,
        },
        "sources": [{"path": path, "content": content} for path, content in sources.items()],
    }  # fmt: skip


def _trace(definition: str, solution: str, one: Chosen) -> dict[str, Any]:
    """A timed champion. What is not known stays at the format's own 0."""
    number, certificate, environment = one.champion.number, one.champion.certificate, one.file.environment
    performance = {"latency_ms": number.value_ms}
    if number.default_ms is not None:
        performance |= {
            "reference_latency_ms": number.default_ms, "speedup_factor": number.default_ms / number.value_ms,
        }  # fmt: skip
    worst = certificate.errors["out"]
    product = (products_of(one.file.device.name) or (one.product,))[0]
    libraries = {"triton": environment.triton, "torch": environment.torch, "driver": environment.driver}
    return {
        "definition": definition, "workload": _workload(one.problem), "solution": solution,
        "evaluation": {
            "status": "PASSED", "timestamp": _WHEN,
            "environment": {
                "hardware": hardware_name(product), "libs": {name: said for name, said in libraries.items() if said},
            },
            "log": json.dumps(one.provenance()),
            "correctness": {
                "max_absolute_error": worst.error, "max_relative_error": worst.ratio,
                "extra": {
                    "of": "the element nearest its derived bound, on the problems of the gate", "bound": worst.bound,
                    "relative_to": "the derived bound",
                },
            },
            "performance": performance,
        },
    }  # fmt: skip


def _lines(trees: Sequence[Any]) -> bytes:
    return "".join(json.dumps(tree, allow_nan=False) + "\n" for tree in trees).encode()


def _check(folder: Path, request: Request, made: Made) -> Checked:
    consumer = Consumer("check_flashinfer_bench.py", "flashinfer-bench", environment={"TRITON_INTERPRET": "1"})
    return consumer.ask(folder)


TARGET = Target(
    name="flashinfer-bench", consumer="FlashInfer-Bench's trace sets", families=frozenset({"flashtune"}), make=_make,
    check=_check,
)  # fmt: skip
