"""Lets PyTorch lower FlexAttention with what was exported: run by `harness.export.flex_attention` and `inductor_choices`.

PyTorch's own lowering runs for a pretended GPU, forward and backward; what its templates are given must be what was exported.
Each champion must also be what its module answers with. Nothing is launched.
"""

import importlib.util
import json
import sys
import typing
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn.attention import flex_attention as flex

from harness import inductor
from harness.compile import compiling_for, meta_launches
from harness.device import DeviceFacts, find_target
from harness.errors import HarnessError
from harness.export.flex_attention import features_of
from harness.problem import Problem, parse_problem
from harness.workspace import Workspace


class _RefusedError(Exception):
    """What was written is not taken; the text says how."""


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise _RefusedError(what)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _subject(workspace: Workspace, kernel: str, problem: Problem, device: DeviceFacts) -> Any:
    """What PyTorch is asked to compile, without options of ours."""
    config = workspace.load_space(kernel).default(problem, device)
    (call,) = meta_launches(workspace.load_kernel(kernel), problem, config, device)
    attention, tensors = call.subject
    return replace(attention, options=()), tensors


def _given(template: inductor.Template, names: typing.Iterable[str]) -> dict[str, Any]:
    return {name: template.given.get(name) for name in names}


def _options(workspace: Workspace, folder: Path) -> Callable[[str, Problem, DeviceFacts], None]:
    loader = _load(folder / "flex_kernel_options.py")
    entries = json.loads((folder / "flex_kernel_options.json").read_bytes())["entries"]
    _require(len(entries) == len(loader.ENTRIES), "the JSON and the module do not hold equally many entries")
    known = set(flex.FlexKernelOptions.__annotations__)

    def ask(kernel: str, problem: Problem, device: DeviceFacts) -> None:
        entry = _entry(entries, problem, device)
        options, block = entry["kernel_options"], entry["match"]["block_size"]
        found = loader.kernel_options(
            device=device.name, dtype=problem.dtype, q_heads=problem.q_heads, kv_heads=problem.kv_heads, q_len=problem.q_len,
            kv_len=problem.kv_len, head_dim=problem.head_dim, v_head_dim=problem.v_head_dim, features=features_of(problem),
            block_size=block, exact=True,
        )  # fmt: skip
        _require(found == options, f"the module answers {found} where the JSON says {options}")
        _require(
            all(name[:4] in ("fwd_", "bwd_") and name[4:] in known for name in options),
            f"an option is unknown: {options}",
        )
        attention, tensors = _subject(workspace, kernel, problem, device)
        chosen = replace(attention, options=tuple(options.items()), sparse=block[0] if block else 0)
        with compiling_for(device):
            templates = inductor.lowered((chosen, tensors), device)
        _holds(templates[-1], options, problem, block)

    return ask


def _entry(entries: typing.Sequence[Mapping[str, Any]], problem: Problem, device: DeviceFacts) -> Mapping[str, Any]:
    for entry in entries:
        of = entry["provenance"].get(problem.pass_)
        if of is not None and of["problem"] == problem.key and of["device"] == device.name:
            return entry
    raise _RefusedError(f"the JSON has no entry for `{problem}` on {device.name}")


def _holds(template: inductor.Template, options: Mapping[str, Any], problem: Problem, block: Any) -> None:
    wanted = {name[4:]: value for name, value in options.items() if name.startswith(problem.pass_)}
    if block:
        wanted |= {"SPARSE_Q_BLOCK_SIZE": block[0], "SPARSE_KV_BLOCK_SIZE": block[1]}
    found = _given(template, wanted)
    _require(found == wanted, f"PyTorch's template {template.name} was given {found}, exported was {wanted}")


def _choices(workspace: Workspace, folder: Path) -> Callable[[str, Problem, DeviceFacts], None]:
    module = _load(folder / "flashtune_choices.py")
    choices = module.FlashtuneChoices()
    _require(module.DIGEST in choices.uuid(), "uuid() does not say which configs are served")

    def ask(kernel: str, problem: Problem, device: DeviceFacts) -> None:
        subject = _subject(workspace, kernel, problem, device)
        major, minor = divmod(device.compute_capability, 10)
        rows = [
            found[0]
            for (pass_, capability, _, dim, dtype), found in module.TABLE.items()
            if (pass_, capability, dim, dtype) == (problem.pass_, (major, minor), problem.head_dim, problem.dtype)
        ]
        with compiling_for(device):
            template = inductor.lowered(subject, device, choices=choices)[-1]
        # A device that is pretended has its short name; where the driver's stands in the table, the row is only read.
        if any(name in (None, device.name) for (_, _, name, _, _) in module.TABLE):
            given = {name.lower(): value for name, value in template.given.items()}
            _require(
                any(all(given.get(name) == value for name, value in row.items()) for row in rows),
                f"PyTorch's template {template.name} was given {given}, served was {rows}",
            )

    return ask


def main() -> None:
    """Check the folder and the question that the command line names; print one JSON object."""
    folder, asked = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_bytes())
    workspace = Workspace(Path(asked["root"]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ask = (_options if asked["what"] == "options" else _choices)(workspace, folder)
            for one in asked["champions"]:
                ask(one["kernel"], parse_problem(one["problem"]), find_target(one["device"]))
    except (_RefusedError, HarnessError) as refusal:
        sys.stdout.write(json.dumps({"version": torch.__version__, "refused": str(refusal)}) + "\n")
        return
    what = "kernel_options" if asked["what"] == "options" else "choices"
    check = f"Inductor's own lowering gives its templates the exported {what} on a pretended GPU, {len(asked['champions'])} times"
    sys.stdout.write(json.dumps({"version": torch.__version__, "check": check}) + "\n")


if __name__ == "__main__":
    main()
