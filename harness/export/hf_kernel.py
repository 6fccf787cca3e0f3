"""A kernel package of Hugging Face: `build/VARIANT/` with our kernels, configs of champions as JSON, and a lookup beside them.

What a package hands out is attention, forward and backward, so it takes champions of the two kernels that attention asks its
lookup for. Refuses to activate anything when it is imported.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import UsageError
from harness.export.base import ESTIMATE, Checked, Chosen, Consumer, Made, Request, Target, as_json, made_by
from harness.export.rows import device_name
from harness.export_documents import ExportedDocument, SkippedDocument
from harness.probe import products_of
from harness.problem import Problem
from harness.space import Config
from harness.table import Known, distill
from harness.workspace import with_siblings

# The file of a workspace that is handed out, and the kernels that it asks its lookup for.
_OPERATION = "attention"
_ASKED: Mapping[str, str] = {"fwd": "flash_fwd", "bwd": "flash_bwd"}
_NAME = "flashtune-attention"
_LICENSE = "Apache-2.0"

_INIT = '''"""FlashTune's attention with the configs that were tuned for it. Made by `flashtune export --to hf-kernel`.

`flash_attn_func`, `flash_attn_varlen_func`, `attention`, `lookup`, `register_transformers`.

{kinds}
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .interface import Interface
from .rows import Table
from .triton_kernels.attention import attention

CONFIGS = Table(Path(__file__).parent / "configs")
KERNEL_DIGESTS = {digests}

# What configs are looked up for, as the driver calls it; None asks the device of each call.
DEVICE = None


def found(question: Any) -> Any:
    """The row for a question of `attention`: its `config`, and its `provenance`, which says whether its number is a time."""
    device = DEVICE
    if device is None:
        if question.device.type != "cuda":
            return None
        device = torch.cuda.get_device_name(question.device)
    return CONFIGS.find(question, device)


# What of a question decides, in this order.
_SAID = (
    "pass_", "batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "v_head_dim", "dtype", "device", "window_left",
    "window_right", "top_left", "variants",
)


@torch.compiler.assume_constant_result
def _answer(*said: Any) -> Any:
    """The items of a config. `torch.compile` asks once for each graph, and keeps the answer."""
    row = found(SimpleNamespace(**dict(zip(_SAID, said, strict=True))))
    return () if row is None else tuple(row["config"].items())


def lookup(question: Any) -> Any:
    """The config for a question of `attention`, or None: then the kernel takes its own safe one."""
    items = _answer(*(getattr(question, name) for name in _SAID))
    return dict(items) if items else None


_INTERFACE = Interface(attention, lookup)
flash_attn_func = _INTERFACE.flash_attn_func
flash_attn_varlen_func = _INTERFACE.flash_attn_varlen_func
register_transformers = _INTERFACE.register_transformers
'''


def _make(request: Request) -> Made:
    folder = request.workspace.root / "kernels"
    if not (folder / f"{_OPERATION}.py").is_file():
        reason = f"this workspace has no kernels/{_OPERATION}.py, which a package hands out"
        return Made(files={}, skipped=tuple(one.skipped(reason) for one in request.champions))
    skipped: list[SkippedDocument] = []
    groups: dict[tuple[str, str], list[Chosen]] = {}
    for one in request.champions:
        stem = one.file.kernel.name
        if _ASKED.get(one.problem.pass_) != stem:
            skipped.append(one.skipped(f"a package hands out `attention`, which asks no config of `{stem}`"))
        else:
            groups.setdefault((stem, one.file.device.name), []).append(one)
    files, exported = {}, []
    for key in sorted(groups):
        path, content, documents, left = _configs(groups[key], request)
        files[f"configs/{path}"] = content
        exported += documents
        skipped += left
    digests = {
        stem: request.workspace.kernel_digest(stem) for stem in _ASKED.values() if stem in request.workspace.stems
    }
    kinds = _kinds(exported)
    files["__init__.py"] = _INIT.format(digests=repr(digests), kinds=kinds).encode()
    for name in ("interface.py", "rows.py"):
        files[name] = Path(__file__).with_name(name).read_bytes()
    files["triton_kernels/__init__.py"] = (
        b'"""Attention kernels, as they were tuned. torch, triton and sibling files only."""\n'
    )
    for source in sorted(with_siblings(folder, _OPERATION)):
        if source.name != "__init__.py":
            files[f"triton_kernels/{source.name}"] = source.read_bytes()
    whole = {
        f"build/torch-{backend}/{path}": content
        for backend in _backends(request.champions)
        for path, content in (files | {"metadata.json": _metadata(files, backend)}).items()
    }
    into = tuple(f"build/torch-{backend}" for backend in _backends(request.champions))
    whole["README.md"] = _readme(exported, kinds)
    return Made(
        files=whole, skipped=tuple(skipped), notes=(kinds,),
        exported=tuple(
            ExportedDocument(**{name: getattr(each, name) for name in each.__dataclass_fields__} | {
                "into": tuple(f"{place}/{path}" for place in into for path in each.into)
            })
            for each in exported
        ),
        use=_USE,
    )  # fmt: skip


_USE = (
    'attention = kernels.get_local_kernel(Path("DIR"))      # the package `kernels` of Hugging Face',
    "out = attention.flash_attn_func(q, k, v, causal=True)",
    "attention.register_transformers()",
    'model = transformers.AutoModelForCausalLM.from_pretrained(..., attn_implementation="tuned_attention")',
)


def _kinds(exported: Sequence[ExportedDocument]) -> str:
    estimates = sum(one.kind != "measured" for one in exported)
    if not exported:
        return "It holds no tuned config: every call gets the kernels' own safe ones."
    if not estimates:
        return "Its configs were chosen by times."
    return f"{estimates} of {len(exported)} configs were chosen by {ESTIMATE}; each says so in its `provenance`."


def _backends(champions: Sequence[Chosen]) -> list[str]:
    """`cpu` is Triton's interpreter, for tests."""
    amd = any(one.file.device.arch.startswith("gfx") for one in champions)
    return ["cpu", "cuda", *(["rocm"] if amd else [])]


def file_name(kernel: str, device: str) -> str:
    """`kernel=flash_fwd,device_name=NVIDIA_H200.json`: as Hugging Face's files are called, with the device as its driver says."""
    product = (products_of(device) or (device,))[0]
    return f"kernel={kernel},device_name={product.replace(' ', '_')}.json"


def _configs(
    champions: Sequence[Chosen], request: Request
) -> tuple[str, bytes, list[ExportedDocument], list[SkippedDocument]]:
    """The file of one kernel and device: its name, what is in it, and which champions are in a row of it or in none."""
    first = champions[0]
    known = [Known(one.problem, Config(one.champion.config), one.champion.number.value_ms) for one in champions]
    rows = distill(known, lambda problem, config: _legal(first, request, problem, config), _times(champions))
    configs = list(dict.fromkeys(row.config for row in rows))
    name = file_name(first.file.kernel.name, first.file.device.name)
    tree = {
        **made_by("hf-kernel"), "kernel": first.file.kernel.name, "device": first.file.device.name,
        "device_names": [device_name(each) for each in (*products_of(first.file.device.name), first.file.device.name)],
        "configs": [
            {
                "config": dict(config),
                "provenance": [one.provenance() for one in champions if one.champion.config == dict(config)],
            }
            for config in configs
        ],
        "rows": [
            {"kind": row.kind, "most": [row.q_len, row.kv_len, row.heads], "config": configs.index(row.config)}
            for row in rows
        ],
    }  # fmt: skip
    taken = [one for one in champions if Config(one.champion.config) in configs]
    lost = [one.skipped("another champion's config stands in its row") for one in champions if one not in taken]
    return name, as_json(tree), [one.document(f"configs/{name}") for one in taken], lost


def _legal(one: Chosen, request: Request, problem: Problem, config: Config) -> bool:
    device = request.facts(one)
    if device is None:
        return problem.key == one.champion.problem
    try:
        request.workspace.load_space(one.file.kernel.name).space(problem, device).check(config)
    except UsageError:
        return False
    return True


def _times(champions: Sequence[Chosen]) -> Any:
    """What is known of a config on a problem, from the champions themselves."""
    found: dict[tuple[str, Config], float] = {}
    for one in champions:
        number = one.champion.number
        if number.runner_up is not None:
            found[one.problem.key, Config(number.runner_up.config)] = number.runner_up.value_ms
        if number.default_ms is not None:
            found[one.problem.key, Config(one.champion.default)] = number.default_ms
    return lambda problem, config: found.get((problem.key, config))


def _metadata(files: Mapping[str, bytes], backend: str) -> bytes:
    """What `kernels` reads first. Its id names the module, and with it PyTorch's operators: another content is another id."""
    digests = {
        path: base64.b64encode(hashlib.sha256(content).digest()).decode() for path, content in sorted(files.items())
    }
    whole = hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:12]
    return as_json({
        "id": f"flashtune_attention_{backend}_{whole}", "name": _NAME, "version": 1, "license": _LICENSE,
        "python-depends": [], "backend": {"type": backend}, "digest": {"algorithm": "sha256", "files": digests},
    })  # fmt: skip


def _readme(exported: Sequence[ExportedDocument], kinds: str) -> bytes:
    said = [f"- `{one.problem}` on {one.device}: {one.kind}, proved by the {one.proved}" for one in exported]
    lines = [
        "---", f"license: {_LICENSE.lower()}", "tags: [kernels]", "---", "# Attention with configs by FlashTune", "", kinds,
        "Where no config fits, the kernels take one that compiles everywhere; `flashtune tune KERNEL --problem P` finds one.",
        "", *said, "", "```python", "from pathlib import Path", "import kernels",
        'attention = kernels.get_local_kernel(Path("."))', "out = attention.flash_attn_func(q, k, v, causal=True)", "```", "",
    ]  # fmt: skip
    return "\n".join(lines).encode()


def _check(folder: Path, request: Request, made: Made) -> Checked:
    asked = [
        {"problem": one.problem, "device": one.device, "question": _question(one.problem)} for one in made.exported
    ]
    consumer = Consumer("check_hf.py", "kernels", environment={"TRITON_INTERPRET": "1"})
    return consumer.ask(folder, {"champions": asked})


def _question(text: str) -> dict[str, Any]:
    """What `attention` would ask of a problem."""
    from harness.problem import parse_problem

    problem = parse_problem(text)
    dtypes = {"fp16": "torch.float16", "bf16": "torch.bfloat16", "fp32": "torch.float32"}
    return {
        "pass_": problem.pass_, "batch": problem.batch, "q_heads": problem.q_heads, "kv_heads": problem.kv_heads,
        "q_len": problem.q_len, "kv_len": problem.kv_len, "head_dim": problem.head_dim,
        "v_head_dim": problem.v_head_dim, "dtype": dtypes.get(problem.dtype, problem.dtype),
        "window_left": problem.window_left, "window_right": 0 if problem.causal else problem.window_right,
        "top_left": problem.top_left, "deterministic": True, "variants": list(problem.variants),
    }  # fmt: skip


TARGET = Target(
    name="hf-kernel", consumer="Hugging Face's kernels and transformers", families=frozenset({"flashtune"}), make=_make,
    check=_check,
)  # fmt: skip
