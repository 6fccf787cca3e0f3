"""FlexAttention: `kernel_options` by problem, as JSON and as a Python module that imports nothing.

Keys carry the prefix of their pass, for one without it would go to both. The rules that PyTorch's lowering does not check (up to
2.13 it looks at its own default tiles instead of the caller's, in the backward pass) are held against each config once more. The
side of a block of the BlockMask belongs to the key: with another one the same options may be refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.export.base import Checked, Chosen, Consumer, Made, Request, Target, as_json, made_by
from harness.export_documents import ExportedDocument
from harness.problem import Problem

FAMILY = "flex_attention"
JSON_NAME = "flex_kernel_options.json"
LOADER_NAME = "flex_kernel_options.py"
# PyTorch that knows all these keys.
LEAST_TORCH = "2.9"
# Of lengths that this divides, the code does not look whether a tile ends behind them.
_CHECKED = 128

# The tunables of `kernels/flex_attention.py` and `kernels/flex_attention_bwd.py` by option, in this order.
_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "fwd": {
        "BLOCK_M": "block_m", "BLOCK_N": "block_n", "num_warps": "num_warps", "num_stages": "num_stages", "USE_TMA": "use_tma",
    },
    "bwd": {
        "BLOCK_M1": "block_m1", "BLOCK_N1": "block_n1", "BLOCK_M2": "block_m2", "BLOCK_N2": "block_n2",
        "num_warps": "num_warps", "num_stages": "num_stages",
    },
}  # fmt: skip
# What two passes of one attention share; what else a problem says is in its features.
_SHAPE = ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "v_head_dim", "dtype")


def options_of(problem: Problem, config: Mapping[str, Any]) -> dict[str, int | bool] | str:
    """The `kernel_options` of a config, with the prefix of its pass; or why it is none of FlexAttention's."""
    names = _OPTIONS[problem.pass_]
    missing = [name for name in (*names.values(), "sparse") if name not in config]
    if missing:
        return f"its config has no `{missing[0]}`, so it is none of FlexAttention's"
    return {f"{problem.pass_}_{option}": config[name] for option, name in names.items()}


def broken_rule(problem: Problem, options: Mapping[str, Any], sparse: int) -> str:
    """Which rule of FlexAttention these options break for blocks of `sparse` queries and keys (0: no mask); empty if none."""
    tiles = {name: value for name, value in options.items() if "BLOCK" in name}
    for name, value in tiles.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 16 or value & (value - 1):
            return f"{name} is {value}, and a tile is a power of two of at least 16"
        if sparse and sparse % value:
            return f"{name} is {value}, which does not divide blocks of {sparse} of the BlockMask"
    if min(problem.head_dim, problem.v_head_dim) < 16:
        return f"head dims are {problem.head_dim} and {problem.v_head_dim}, and FlexAttention needs at least 16"
    if problem.pass_ == "bwd":
        m1, n1, m2, n2 = (tiles[f"bwd_BLOCK_{side}"] for side in ("M1", "N1", "M2", "N2"))
        if n1 % m1:
            return f"BLOCK_N1 of {n1} is no multiple of BLOCK_M1, {m1}"
        return f"BLOCK_M2 of {m2} is no multiple of BLOCK_N2, {n2}" if m2 % n2 else ""
    if problem.q_len < _CHECKED:
        return f"with {problem.q_len} queries FlexAttention takes its kernel for decoding, whose options are others"
    ends = {"fwd_BLOCK_M": problem.q_len, "fwd_BLOCK_N": problem.kv_len}
    if all(length % _CHECKED == 0 for length in ends.values()):
        for name, length in ends.items():
            if length % tiles[name]:
                return f"{name} of {tiles[name]} does not divide {length}, where FlexAttention checks no ends"
    return ""


def features_of(problem: Problem) -> tuple[str, ...]:
    """What of a problem is no size: the words of its notation for masks, scores and layout."""
    bare = problem.replace(
        causal=False, window_left=None, window_right=None, top_left=False, layout="bhsd", scale=None
    ).bare
    plain = set(str(bare).split())
    return tuple(word for word in str(problem).split() if word not in plain)


def _make(request: Request) -> Made:
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    exported: list[ExportedDocument] = []
    skipped = []
    for one in request.champions:
        options, sparse = options_of(one.problem, one.champion.config), one.champion.config.get("sparse", 0)
        reason = options if isinstance(options, str) else broken_rule(one.problem, options, int(sparse))
        if isinstance(options, str) or reason:
            skipped.append(one.skipped(reason))
            continue
        match = _match(one, int(sparse))
        entry = entries.setdefault(
            tuple(map(str, match.values())), {"match": match, "kernel_options": {}, "provenance": {}}
        )
        entry["kernel_options"] |= options
        entry["provenance"][one.problem.pass_] = one.provenance()
        exported.append(one.document(JSON_NAME, LOADER_NAME))
    ordered = [entries[key] for key in sorted(entries)]
    return Made(
        files=_files(ordered), exported=tuple(exported), skipped=tuple(skipped), notes=_notes(exported),
        use=_USE if ordered else (),
    )  # fmt: skip


def _match(one: Chosen, sparse: int) -> dict[str, Any]:
    """What a caller's attention has to agree in."""
    problem = one.problem
    return {
        "device": one.file.device.name, "arch": one.file.device.arch,
        **{name: getattr(problem, name) for name in _SHAPE},
        "features": list(features_of(problem)), "block_size": [sparse, sparse] if sparse else None,
    }  # fmt: skip


_USE = (
    "import flex_kernel_options as tuned",
    'options = tuned.kernel_options(device="h200", dtype="bf16", q_heads=32, kv_heads=8, q_len=8192, kv_len=8192, head_dim=128,',
    '    features=("causal",), block_size=block_mask.BLOCK_SIZE)',
    "torch.compile(flex_attention)(q, k, v, block_mask=block_mask, enable_gqa=True, kernel_options=options)",
)


def _notes(exported: Sequence[ExportedDocument]) -> tuple[str, ...]:
    if not exported:
        return ()
    estimated = sum(one.kind != "measured" for one in exported)
    told = ("PyTorch promises nothing about these options from one release to the next",)
    return (*told, f"{estimated} of {len(exported)} numbers are estimates and no times") if estimated else told


def _files(entries: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    if not entries:
        return {}
    document = {**made_by("flex-attention"), "torch": f">={LEAST_TORCH}", "entries": list(entries)}
    slim = [{"match": one["match"], "kernel_options": one["kernel_options"]} for one in entries]
    return {JSON_NAME: as_json(document), LOADER_NAME: _LOADER.format(entries=_literal(slim)).encode()}


def _literal(entries: Iterable[Mapping[str, Any]]) -> str:
    lines = ["["]
    for one in entries:
        lines += ["    {"]
        for name, part in one.items():
            lines.append(f"        {name!r}: {{")
            lines += [
                f"            {key!r}: {tuple(value) if isinstance(value, list) else value!r},"
                for key, value in part.items()
            ]
            lines.append("        },")
        lines.append("    },")
    return "\n".join([*lines, "]"])


_LOADER = '''"""kernel_options of PyTorch's FlexAttention, as `flashtune export --to flex-attention` found them. Imports nothing.

`flex_kernel_options.json` beside this file says where each comes from. Options are those of FlexAttention's own Triton templates
and valid for nothing else.
"""

ENTRIES = {entries}

_ALIKE = ("device", "dtype", "q_heads", "kv_heads", "head_dim", "v_head_dim", "features", "block_size")


def kernel_options(*, device, dtype, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim=None, features=(), block_size=None,
                   exact=False):
    """The options for a call, or an empty dictionary, with which PyTorch chooses itself.

    `device` is a model ("h200"), `dtype` "bf16", "fp16" or "fp32", `features` words such as "causal"; `block_size` is the
    BLOCK_SIZE of the BlockMask, None without one. Of lengths the nearest are taken, unless `exact`, but only options that are
    safe for these.
    """
    asked = {{
        "device": device, "dtype": dtype, "q_heads": q_heads, "kv_heads": kv_heads, "head_dim": head_dim,
        "v_head_dim": head_dim if v_head_dim is None else v_head_dim, "features": tuple(features),
        "block_size": (block_size, block_size) if isinstance(block_size, int) else block_size and tuple(block_size),
    }}
    best, least = {{}}, None
    for entry in ENTRIES:
        match = entry["match"]
        if any(match[name] != asked[name] for name in _ALIKE):
            continue
        far = _times(match["q_len"], q_len) * _times(match["kv_len"], kv_len)
        options = entry["kernel_options"]
        if (exact and far != 1) or (far != 1 and not _safe(options, q_len, kv_len)):
            continue
        if least is None or far < least:
            best, least = options, far
    return dict(best)


def _times(one, other):
    return max(one, other) / min(one, other)


def _safe(options, q_len, kv_len):
    """Whether a forward tile never ends behind the last query or key where FlexAttention does not look."""
    if q_len < 128:
        return False
    if q_len % 128 or kv_len % 128:
        return True
    return q_len % options.get("fwd_BLOCK_M", 128) == 0 and kv_len % options.get("fwd_BLOCK_N", 128) == 0
'''


def ask_pytorch(folder: Path, request: Request, made: Made, what: str) -> Checked:
    """Let PyTorch lower what was exported, where its lowering is known. `what` is "options" or "choices"."""
    if find_spec("torch") is None:
        return "the package `torch` is not installed here"
    from harness.inductor import complaint  # PyTorch takes seconds to import

    if unknown := complaint():
        return unknown
    asked = [{"problem": one.problem, "kernel": one.kernel, "device": one.device} for one in made.exported]
    script = Consumer("check_flex.py", "torch", ours=True)
    return script.ask(folder, {"root": str(request.workspace.root), "champions": asked, "what": what})


def _check(folder: Path, request: Request, made: Made) -> Checked:
    return ask_pytorch(folder, request, made, "options")


TARGET = Target(
    name="flex-attention", consumer="PyTorch's FlexAttention", families=frozenset({FAMILY}), make=_make, check=_check
)
