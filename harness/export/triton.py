"""Triton: `triton.Config` lists as Python, and a module that seeds and reads the autotuner's files with them.

A config holds every compile-time argument of a launch and those run-time arguments that tunables decide, so that no two halves of
different configs can meet. Refuses to list a config that no proof stands behind: the champion and the default have one.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from harness.errors import MachineError
from harness.export.base import ESTIMATE, Checked, Chosen, Consumer, Made, Request, Target, made_by
from harness.export_documents import ExportedDocument
from harness.space import Config

_OF_CONFIG = ("num_warps", "num_stages", "num_ctas", "maxnreg")
_PLAIN = (int, str, bool, float, type(None))
_SEEDING = "seeding.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listed:
    """The configs of one kernel on one problem, the champion's first: arguments, options and grid of each."""

    kernel: str
    kwargs: tuple[Mapping[str, Any], ...]
    options: tuple[Mapping[str, Any], ...]
    sizes: Mapping[str, int]
    grids: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    one: Chosen
    tunables: tuple[Mapping[str, Any], ...]
    listed: tuple[_Listed, ...]


def _make(request: Request) -> Made:
    if request.champions and (find_spec("torch") is None or find_spec("triton") is None):
        raise MachineError(
            "Triton's configs are asked of the kernels, which need torch and triton", hint="run `make setup`"
        )
    entries: dict[str, list[_Entry]] = {}
    skipped, exported = [], []
    for one in request.champions:
        path = f"{_identifier(one.file.kernel.name)}_{_identifier(one.file.device.name)}.py"
        found = _entry(one, request)
        if isinstance(found, str):
            skipped.append(one.skipped(found))
        else:
            entries.setdefault(path, []).append(found)
            exported.append(one.document(path))
    files = {path: _module(several).encode() for path, several in entries.items()}
    if files:
        files[_SEEDING] = Path(__file__).with_name(_SEEDING).read_bytes()
    return Made(
        files=files, exported=tuple(exported), skipped=tuple(skipped), notes=_notes(exported),
        use=tuple(f"import seeding, {path.removesuffix('.py')} as tuned" for path in sorted(entries)) + _USE * bool(files),
    )  # fmt: skip


_USE = (
    "for launch in KERNEL.launches(..., **tuned.TUNABLES[problem][0]):  # KERNEL: the file of kernels/ that was tuned",
    "    tuner = seeding.autotuned(launch, tuned, problem)",
    "    seeding.seed(tuner, launch, tuned, problem)  # left out, Triton times champion and default on this machine",
    "    seeding.run(tuner, launch)",
)


def _notes(exported: Sequence[ExportedDocument]) -> tuple[str, ...]:
    if all(one.kind == "measured" for one in exported):
        return ()
    said = "estimates (from the compiled binary, not times) stand in comments only: `seed(..., disk=True)` refuses them"
    return (f"{said}, and where nothing is seeded, Triton times",)


def _entry(one: Chosen, request: Request) -> _Entry | str:
    """What is written of a champion, or why nothing is."""
    from harness.compile import meta_launches

    kernel, device = request.workspace.load_kernel(one.file.kernel.name), request.facts(one)
    if device is None:
        return f"nothing is known of the device {one.file.device.name}, which is not here"
    tunables = [dict(one.champion.config)]
    if dict(one.champion.default) != tunables[0]:
        tunables.append(dict(one.champion.default))
    several = [meta_launches(kernel, one.problem, Config(each), device) for each in tunables]
    if len(several) > 1 and not _alike(several):
        several, tunables = several[:1], tunables[:1]
    listed = [_listed([launches[place] for launches in several]) for place in range(len(several[0]))]
    for each in listed:
        if isinstance(each, str):
            return each
    names = [launch.name for launch in several[0]]
    if len(set(names)) < len(names):
        return f"it launches `{max(names, key=names.count)}` more than once, which one list of configs cannot say"
    return _Entry(one=one, tunables=tuple(tunables), listed=tuple(each for each in listed if isinstance(each, _Listed)))


def _alike(several: Sequence[Sequence[Any]]) -> bool:
    """Whether champion and default launch the same kernels, and a launch of theirs can be told apart by its arguments."""
    champion, default = several
    if [launch.name for launch in champion] != [launch.name for launch in default]:
        return False
    for mine, theirs in zip(champion, default, strict=True):
        arguments = [{**launch.constants, **_plain(launch.args)} for launch in (mine, theirs)]
        if arguments[0] == arguments[1] and mine.grid != theirs.grid:
            return False
    return True


def _listed(launches: Sequence[Any]) -> _Listed | str:
    """One kernel's configs. What is equal in all of them and no number stays with the launch."""
    decided = {
        name
        for launch in launches
        for name, value in launch.args.items()
        if isinstance(value, _PLAIN) and value != launches[0].args[name]
    }
    for launch in launches:
        for name, value in launch.args.items():
            if not isinstance(value, _PLAIN) and not hasattr(value, "dtype") and value != launches[0].args[name]:
                return f"its tunables change `{name}`, which is no number and no word"
    kwargs = [
        {**_plain(launch.constants), **{name: launch.args[name] for name in sorted(decided)}, **_others(launch.options)}
        for launch in launches
    ]
    options = [{name: launch.options[name] for name in _OF_CONFIG if name in launch.options} for launch in launches]
    sizes = {name: value for name, value in launches[0].args.items() if type(value) is int and name not in decided}
    return _Listed(
        kernel=launches[0].name, kwargs=tuple(kwargs), options=tuple(options),
        sizes={name: value for name, value in sizes.items() if not name.startswith("stride_")},
        grids=tuple(one.grid for one in launches),
    )  # fmt: skip


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if isinstance(value, _PLAIN)}


def _others(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that `triton.Config` has no place of its own for, such as AMD's."""
    return {name: value for name, value in options.items() if name not in _OF_CONFIG}


def _identifier(name: str) -> str:
    """A name of the file that can be imported."""
    return re.sub(r"[^A-Za-z0-9]+", "_", name)


# ---------------------------------------------------------------------------------------------------------------------
# As Python
# ---------------------------------------------------------------------------------------------------------------------

_MODULE = '''"""Configs of {kernel} on {device} ({arch}), by `flashtune export --to triton`. Needs Triton and nothing else.

Of the kernel with the digest {digest}, and valid for no other. A list begins with the champion, and ends with the default.
{kinds}
"""

import triton

PROVENANCE = {provenance}

# What the kernel's `launches` takes, by problem: of the champion, then of the default.
TUNABLES = {tunables}

# By problem and kernel function, in the same order. A config decides all that it names: leave it out of the call.
CONFIGS = {{
{configs}}}

# The grid of each config.
GRIDS = {grids}

# What the arguments of a call have to be for its configs.
SIZES = {sizes}

# The time of each config in milliseconds (None: not timed); None where all that is known is an estimate.
TIMES_MS = {times}
'''


def _module(entries: Sequence[_Entry]) -> str:
    """One kernel's configs on one device. What stands in champion files has few letters to say it in."""
    first = entries[0].one
    estimated = [each.one for each in entries if each.one.estimated]
    kinds = f"Of {len(entries)} numbers {len(estimated)} are estimates: {ESTIMATE}."
    provenance = {**made_by("triton"), "champions": [each.one.provenance() for each in entries]}
    return _MODULE.format(
        kernel=first.file.kernel.name, device=first.file.device.name, arch=first.file.device.arch,
        digest=first.champion.certificate.kernel_digest, kinds=kinds, provenance=_literal(provenance),
        tunables=_literal({each.one.champion.problem: list(each.tunables) for each in entries}),
        configs="".join(_configs(each) for each in entries),
        grids=_literal({
            each.one.champion.problem: {listed.kernel: list(map(tuple, listed.grids)) for listed in each.listed}
            for each in entries
        }),
        sizes=_literal({
            each.one.champion.problem: {listed.kernel: dict(listed.sizes) for listed in each.listed} for each in entries
        }),
        times=_literal({each.one.champion.problem: _times(each) for each in entries}),
    )  # fmt: skip


def _times(entry: _Entry) -> list[float | None] | None:
    number = entry.one.champion.number
    return None if entry.one.estimated else [number.value_ms, number.default_ms][: len(entry.tunables)]


def _configs(entry: _Entry) -> str:
    number = entry.one.champion.number
    said = f"{number.value_ms:.6g} ms measured" if not entry.one.estimated else f"{number.value_ms:.6g} ms: {ESTIMATE}"
    lines = [f"    # {said}", f"    {entry.one.champion.problem!r}: {{"]
    for listed in entry.listed:
        lines.append(f"        {listed.kernel!r}: [")
        for kwargs, options in zip(listed.kwargs, listed.options, strict=True):
            given = "".join(f", {name}={value!r}" for name, value in options.items())
            lines += ["            triton.Config(", f"                {_literal(kwargs, 20)}{given}", "            ),"]
        lines.append("        ],")
    return "\n".join([*lines, "    },", ""])


def _literal(value: Any, indent: int = 0) -> str:
    """A value as Python, in lines that a person reads."""
    from pprint import pformat

    text = pformat(value, width=118 - indent, sort_dicts=False, compact=True)
    return text.replace("\n", "\n" + " " * (indent - 4 if indent else 0))


def _check(folder: Path, request: Request, made: Made) -> Checked:
    asked = [
        {"module": one.into[0], "problem": one.problem, "kernel": one.kernel, "device": one.device}
        for one in made.exported
    ]
    script = Consumer("check_triton.py", "triton", ours=True)
    return script.ask(folder, {"root": str(request.workspace.root), "champions": asked})


TARGET = Target(
    name="triton", consumer="Triton's autotuner", families=frozenset({"flashtune"}), make=_make, check=_check
)
