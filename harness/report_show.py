"""What a person reads of champions, failures and the machine. Refuses to decide anything, as `harness.report` does."""

import json

from harness.champion_documents import DiffDocument, RenewedDocument, ValidateDocument
from harness.champions import Champion, ChampionFile
from harness.documents import DoctorDocument, FailureDocument, ShowDocument
from harness.report import plural, three_digits, times, wrapped
from harness.sealed import tame
from harness.trust import Standing


def failure_lines(failure: FailureDocument) -> list[str]:
    config = " ".join(f"{name}={value}" for name, value in failure.config.items())
    reason = wrapped(f"{failure.count} × {failure.reason}", first="").rstrip()
    return [reason, f"    for example {failure.problem}", wrapped(config, first="    ").rstrip()]


def doctor_lines(found: DoctorDocument) -> list[str]:
    """What is here, in a screen; the findings last, because they are what to act on."""
    machine = found.machine
    rows = [("python", f"{machine.python} on {machine.platform}")]
    for name, package in (("torch", machine.torch), ("triton", machine.triton), ("numpy", machine.numpy)):
        rows.append((name, package.version or f"missing: {package.reason}"))
    memory = f", {machine.memory_bytes / 2**30:.1f} GiB" if machine.memory_bytes else ""
    rows.append(("cores", f"{machine.cores}{memory}"))
    for gpu in machine.gpus:
        clock = f", {gpu.clock_mhz} of {gpu.clock_max_mhz} MHz" if gpu.clock_mhz else ""
        rows.append(
            (
                "gpu",
                (
                    f"{gpu.index}: {gpu.name} ({gpu.arch}), {gpu.multiprocessors} multiprocessors, "
                    f"{gpu.memory_bytes / 2**30:.0f} GiB{clock}"
                ),
            )
        )
    if not machine.gpus:
        rows.append(("gpu", f"none: {machine.no_gpu}"))
    rows.append(("driver", machine.driver or "none"))
    rows.append(("workspace", found.workspace or "none here"))
    rows.append(("kernels", ", ".join(found.kernels) or "none"))
    lines = [f"  {label:<11}{value}" for label, value in rows]
    for finding in found.findings:
        lines += ["", f"{finding.severity}: {finding.message}", *([f"  hint: {finding.hint}"] if finding.hint else [])]
    answer = "yes" if found.trustworthy else "no"
    return [*lines, "", f"Can a time measured here be trusted?  {answer}"]


def champion_lines(champion: Champion, standing: Standing | None) -> list[str]:
    """A champion of a file: its problem, its number, its config, and what speaks against it."""
    number = champion.number
    value = f"{three_digits(number.value_ms)} ms {number.kind}"
    against = ""
    if number.ratio is not None and number.ratio_interval is not None:
        low, high = sorted(1 / side for side in number.ratio_interval)
        against = f", {times(1 / number.ratio)} the default's speed ({three_digits(low)} … {three_digits(high)})"
    elif number.default_ms is not None:
        against = f", default {three_digits(number.default_ms)} ms {number.kind}"
    config = " ".join(f"{name}={value}" for name, value in champion.config.items())
    lines = [f"  {champion.problem}", f"    {value}{against}", wrapped(config, first="    ").rstrip()]
    if standing is not None and standing.status != "current":
        hint = "; `flashtune verify` proves it again" if standing.status == "stale" else ""
        lines.append(wrapped(f"{standing.status}: {standing.reason}{hint}", first="    ").rstrip())
    if standing is not None:
        lines += [wrapped(f"note: {warning}", first="    ").rstrip() for warning in standing.warnings]
    return lines


def show_lines(found: ShowDocument, *, failed: bool) -> list[str]:
    """Champions file by file, or failures by reason."""
    if failed:
        lines = [line for failure in found.failures for line in failure_lines(failure)]
        return lines or ["no failures in the journals"]
    lines = []
    for shown in found.champions:
        draft = " (draft, not reviewed)" if shown.path.endswith(".draft.json") else ""
        lines += [f"{shown.file}{draft}      {tame(shown.path, 400)}", f"  {_environment(shown.file)}"]
        for champion in shown.file.champions:
            lines += champion_lines(champion, (shown.standings or {}).get(champion.problem))
        lines.append("")
    return lines[:-1] or ["no champions yet: `flashtune tune KERNEL` finds some"]


def _environment(file: ChampionFile) -> str:
    then = file.environment
    named = [then.toolchain, then.torch and f"torch {then.torch}", then.driver and f"driver {then.driver}"]
    return ", ".join(each for each in named if each) or "no versions are known"


def validate_lines(found: ValidateDocument) -> list[str]:
    """A line a file."""
    return [
        f"{one.path}: {plural(one.champions, 'champion')} of {one.detail}" if one.valid else f"not valid: {one.detail}"
        for one in found.files
    ]


def diff_lines(found: DiffDocument, old: str, new: str) -> list[str]:
    """What differs, problem by problem."""
    lines = [f"- {old}", f"+ {new}"]
    before = None
    for one in found.differences:
        if one.problem != before:
            lines.append(f"  {one.problem or 'the files'}")
            before = one.problem
        lines.append(f"    {tame(one.what)}: {tame(json.dumps(one.old))} -> {tame(json.dumps(one.new))}")
    return [*lines, f"{plural(found.same, 'problem')} with the same champion"]


def verify_lines(found: RenewedDocument) -> list[str]:
    """What became of one champion."""
    lines = [f"{found.became:<10}{found.problem}      {found.path}"]
    return [*lines, wrapped(tame(found.detail, 400), first="          ").rstrip()] if found.detail else lines
