"""What a person reads of fuzzing: tallies, counterexamples, replays. Refuses to decide anything, as `harness.report` does."""

from collections.abc import Mapping, Sequence

from harness.documents import FuzzDocument, ReplayDocument
from harness.report import plural, three_digits, wrapped


def fuzz_lines(
    kernel: str, found: FuzzDocument, examples: Sequence[tuple[Mapping[str, object], str, str]]
) -> list[str]:
    """What a fuzzing campaign found, and who judged how much."""
    per_second = found.cases / max(found.seconds, 0.1)
    lines = [f"{kernel}: {plural(found.cases, 'case')} in {found.seconds:.0f} s ({per_second:.1f} a second)"]
    lines += [
        wrapped(", ".join(f"{count} {name}" for name, count in found.verdicts.items()), first="  verdicts  ").rstrip()
    ]
    judged = ", ".join(f"{name} {count}" for name, count in sorted(found.oracles.items(), key=lambda one: -one[1]))
    lines += [wrapped(judged, first="  judges    ").rstrip()]
    largest = ", ".join(f"{name} {three_digits(ratio)}" for name, ratio in found.largest.items())
    lines += [f"  largest   error over bound: {largest}"] if largest else []
    for (case, judge, detail), path in zip(examples, found.counterexamples, strict=True):
        # An id is enough where the corpus is that of a workspace.
        again = path.rpartition("/")[2].removesuffix(".json") if "results/corpus" in path else path
        lines += ["", "Falsified", *case_lines(case), wrapped(f"{judge}: {detail}", first="  judge     ").rstrip()]
        lines += [f"  saved     {path}", "", f"hint: reproduce with `flashtune replay {again}`"]
    if not examples:
        lines.append("  no counterexample")
    return lines


def case_lines(case: Mapping[str, object]) -> list[str]:
    """A case as a person reads it; tensors that lie as the problem says and absent patches are left out."""
    config = case["config"]
    assert isinstance(config, Mapping)
    lines = [f"  problem   {case['problem']}", f"  inputs    recipe={case['recipe']} seed={case['seed']}"]
    lines.append(wrapped(" ".join(f"{name}={value}" for name, value in config.items()), first="  config    ").rstrip())
    return lines + [
        wrapped(str(case[name]), first=f"  {name:<10}").rstrip() for name in ("lies", "patches") if case[name]
    ]


def replay_lines(found: ReplayDocument, case: Mapping[str, object], then: str) -> list[str]:
    """What every judge says of a case now, beside what was said when it was found."""
    lines = [*case_lines(case), wrapped(then, first="  found as  ").rstrip(), ""]
    for answer in found.judges:
        worst = "" if answer.worst is None else f", worst error {three_digits(answer.worst)} of its bound"
        word = "wrong" if answer.detail else ("passed" if answer.checks else "nothing to compare")
        lines.append(wrapped(answer.detail or f"{word}{worst}", first=f"  {answer.judge:<22}").rstrip())
    return lines
