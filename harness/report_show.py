"""What a person reads of champions, failures and the machine. Refuses to decide anything, as `harness.report` does."""

from harness.champions import Champion
from harness.documents import DoctorDocument, FailureDocument, ShowDocument
from harness.report import three_digits, times, wrapped


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


def champion_line(champion: Champion) -> list[str]:
    """A champion of a file, in three lines."""
    number = champion.number
    value = f"{three_digits(number.value_ms)} ms {number.kind}"
    against = ""
    if number.ratio is not None and number.ratio_interval is not None:
        low, high = sorted(1 / side for side in number.ratio_interval)
        against = f", {times(1 / number.ratio)} the default's speed ({three_digits(low)} … {three_digits(high)})"
    elif number.default_ms is not None:
        against = f", default {three_digits(number.default_ms)} ms {number.kind}"
    config = " ".join(f"{name}={value}" for name, value in champion.config.items())
    return [f"  {champion.problem}", f"    {value}{against}", wrapped(config, first="    ").rstrip()]


def show_lines(found: ShowDocument, *, failed: bool) -> list[str]:
    """Champions file by file, or failures by reason."""
    if failed:
        lines = [line for failure in found.failures for line in failure_lines(failure)]
        return lines or ["no failures in the journals"]
    lines = []
    for path, champions in found.champions:
        draft = " (draft, not reviewed)" if path.endswith(".draft.json") else ""
        lines.append(f"{champions.kernel} on {champions.device} ({champions.arch}){draft}      {path}")
        lines += [line for champion in champions.champions for line in champion_line(champion)] + [""]
    return lines[:-1] or ["no champions yet: `flashtune tune KERNEL` finds some"]
