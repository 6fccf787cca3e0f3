"""PyTorch's Inductor: an `InductorChoices` that answers what FlexAttention's lowering asks it for, from the champions.

Its question names head dim, type and device, and neither lengths nor masks. So one config is served for each such triple, that of
the largest problem, and only configs that are legal with any mask of PyTorch's default block size. Refuses to serve what
`FlexConfig` cannot say (descriptors).
"""

from collections.abc import Mapping
from pathlib import Path
from pprint import pformat
from typing import Any

from harness.device import find_target
from harness.errors import UsageError
from harness.export.base import Checked, Chosen, Made, Request, Target, as_json, made_by
from harness.export.flex_attention import FAMILY, ask_pytorch, broken_rule, options_of
from harness.export_documents import ExportedDocument
from harness.sealed import digest_of

MODULE_NAME = "flashtune_choices.py"
PROVENANCE_NAME = "flashtune_choices.provenance.json"
# Releases of PyTorch whose question is known, and the side of a block of a BlockMask that nobody has chosen.
KNOWN = ("2.10", "2.11", "2.12", "2.13")
_BLOCK = 128

_FIELDS: Mapping[str, tuple[str, ...]] = {
    "fwd": ("block_m", "block_n", "num_stages", "num_warps"),
    "bwd": ("block_m1", "block_n1", "block_m2", "block_n2", "num_stages", "num_warps"),
}


def _make(request: Request) -> Made:
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    sources: dict[str, Any] = {}
    exported: list[ExportedDocument] = []
    skipped = []
    # The first of a key is what is served; the others only where Inductor is asked to try several.
    for one in sorted(request.champions, key=lambda each: (-each.problem.flops, each.problem.key)):
        if reason := _refusal(one):
            skipped.append(one.skipped(reason))
            continue
        key = (one.problem.pass_, _capability(one), one.file.device.product, one.problem.head_dim, one.problem.dtype)
        config = {name: one.champion.config[name] for name in _FIELDS[one.problem.pass_]}
        known = rows.setdefault(key, [])
        if config not in known:
            known.append(config)
        sources[f"{one.file.device.name} {one.problem.key}"] = one.provenance()
        exported.append(one.document(MODULE_NAME))
    table = {key: rows[key] for key in sorted(rows, key=str)}
    files = {}
    if table:
        digest = digest_of({"table": [[list(map(str, key)), found] for key, found in table.items()], "from": sources})
        files = {
            MODULE_NAME: _MODULE.format(
                known=KNOWN, digest=digest, table=pformat(table, width=116, sort_dicts=False)
            ).encode(),
            PROVENANCE_NAME: as_json({**made_by("inductor-choices"), "digest": digest, "champions": sources}),
        }
    return Made(
        files=files, exported=tuple(exported), skipped=tuple(skipped), use=_USE if files else (), notes=_notes(exported)
    )


_USE = (
    "import flashtune_choices",
    "flashtune_choices.install()  # before torch.compile; raises RuntimeError for a PyTorch that it was not written for",
)


def _notes(exported: list[ExportedDocument]) -> tuple[str, ...]:
    if not exported:
        return ()
    return (
        "Inductor asks by head dim and type alone: the config of the largest problem is served for all lengths and masks",
        "it serves masks with blocks of 128, or multiples of that; for others use `--to flex-attention`",
    )


def _refusal(one: Chosen) -> str:
    config, problem = one.champion.config, one.problem
    options = options_of(problem, config)
    if isinstance(options, str):
        return options
    if config.get("use_tma"):
        return "it loads through descriptors, which Inductor's FlexConfig has no word for"
    if problem.head_dim != problem.v_head_dim:
        return "its heads of values are of another width, which Inductor does not ask about"
    if _capability(one) is None:
        return f"nothing is known of the compute capability of {one.file.device.arch}"
    # Any length may come, also one whose ends nobody checks: tiles must divide the blocks that are checked by.
    return broken_rule(problem, options, _BLOCK)


def _capability(one: Chosen) -> tuple[int, int] | None:
    try:
        found = divmod(find_target(one.file.device.name).compute_capability, 10)
    except UsageError:
        return None
    return found if one.file.device.arch.startswith("sm_") else None


_MODULE = '''"""Configs of FlexAttention for PyTorch's Inductor, as `flashtune export --to inductor-choices` found them.

Needs PyTorch and nothing else. `install()` makes Inductor ask here; what is not in the table is left to PyTorch.
"""

import torch

KNOWN = {known}
DIGEST = {digest!r}

# By pass, compute capability, name of the device (None: any of that capability), head dim and type: configs, the best first.
TABLE = {table}

_DTYPES = {{torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}}


def complaint(version=torch.__version__):
    """Why this PyTorch is not served; empty if it is."""
    if ".".join(version.split(".")[:2]) in KNOWN:
        return ""
    known = ", ".join(KNOWN)
    return f"flashtune_choices was written for PyTorch {{known}}; found {{version}}: export again, or use kernel_options"


if complaint():
    raise RuntimeError(complaint())

from torch._inductor import config as _config  # noqa: E402
from torch._inductor.choices import InductorChoices  # noqa: E402
from torch._inductor.template_heuristics.triton import FlexBwDConfig, FlexConfig  # noqa: E402
from torch._inductor.virtualized import V  # noqa: E402


class FlashtuneChoices(InductorChoices):
    """PyTorch's choices, but for what was tuned."""

    def get_flex_attention_fwd_configs(self, head_dim, dtype, device_type="cuda"):
        stock = super().get_flex_attention_fwd_configs
        return _tuned("fwd", FlexConfig, head_dim, dtype, device_type) or stock(head_dim, dtype, device_type)

    def get_flex_attention_bwd_configs(self, head_dim, dtype, device_type="cuda"):
        stock = super().get_flex_attention_bwd_configs
        return _tuned("bwd", FlexBwDConfig, head_dim, dtype, device_type) or stock(head_dim, dtype, device_type)

    def uuid(self):
        """Part of the key of Inductor's caches: what was compiled with other configs is not taken for this."""
        return "flashtune " + DIGEST


def _tuned(pass_, kind, head_dim, dtype, device_type):
    if device_type != "cuda" or torch.version.hip is not None:
        return []
    capability = tuple(torch.cuda.get_device_capability())
    name = torch.cuda.get_device_properties(torch.cuda.current_device() if torch.cuda.is_available() else 0).name
    for device in (name, None):
        found = TABLE.get((pass_, capability, device, head_dim, _DTYPES.get(dtype)))
        if found:
            several = found if _config.max_autotune else found[:1]
            return [kind(**one) for one in several]
    return []


def install():
    """Have Inductor ask these choices, in this thread at once and in every new one. Gives them."""
    choices = FlashtuneChoices()
    _config.inductor_choices_class = FlashtuneChoices
    V.set_choices_handler(choices)
    return choices
'''


def _check(folder: Path, request: Request, made: Made) -> Checked:
    return ask_pytorch(folder, request, made, "choices")


TARGET = Target(
    name="inductor-choices", consumer="PyTorch's Inductor", families=frozenset({FAMILY}), make=_make, check=_check
)
