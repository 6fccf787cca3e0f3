"""What a person reads of planted bugs: who saw which, how soon, and what nobody saw. Refuses to decide anything."""

from collections import Counter
from collections.abc import Mapping

from harness.documents import MutantDocument, MutantsDocument
from harness.mutate import Mutant
from harness.report import plural, wrapped


def mutants_lines(kernel: str, found: MutantsDocument, whys: Mapping[str, Mutant]) -> list[str]:
    """The table of judges, the survivors with what they are, and other criteria where they were asked."""
    real = [one for one in found.mutants if not one.equivalent]
    killed = [one for one in real if one.killed_by]
    score = f"{kernel}: {len(killed)} of {plural(len(real), 'mutant')} killed in {found.seconds:.0f} s"
    lines = [f"{score}, at most {plural(found.most_cases, 'case')} each"]
    if found.median_cases is not None:
        slowest = max(killed, key=lambda one: one.cases or 0)
        lines.append(f"  cases to the kill: median {found.median_cases:g}, most {slowest.cases} ({slowest.name})")
    seen = Counter(name for one in killed for name in one.killed_by)
    alone = Counter(one.killed_by[0] for one in killed if len(one.killed_by) == 1)
    lines += ["", f"  {'judge':<24}{'objected':>9}{'alone':>7}   of those asked about the case that killed"]
    lines += [f"  {name:<24}{count:>9}{alone[name]:>7}" for name, count in seen.most_common()]
    lines += _survivors(real, whys)
    lines += _equivalent([one for one in found.mutants if one.equivalent])
    if found.criteria:
        lines += ["", f"  {'beside it':<34}{'killed':>12}{'false alarms':>16}"]
        lines.append(f"  {'this suite':<34}{f'{len(killed)} of {len(real)}':>12}")
        for one in found.criteria:
            alarms = f"{one.false_alarms} of {one.cases}"
            lines.append(f"  {one.name:<34}{f'{one.killed} of {one.shown}':>12}{alarms:>16}")
    return lines


def _survivors(real: list[MutantDocument], whys: Mapping[str, Mutant]) -> list[str]:
    lines: list[str] = []
    for one in real:
        if not one.killed_by:
            mutant = whys[one.name]
            needs = f" (needs {', '.join(mutant.needs)})" if mutant.needs else ""
            lines.append(wrapped(f"{mutant.why}{needs}", first=f"  survived: {one.name}: ").rstrip())
    return ["", *lines] if lines else []


def _equivalent(found: list[MutantDocument]) -> list[str]:
    killed = [
        wrapped(one.detail, first=f"  equivalent, yet killed: {one.name}: ").rstrip() for one in found if one.killed_by
    ]
    left = len(found) - len(killed)
    return (
        [f"  {plural(left, 'equivalent mutant')} survived, as argued in the table of mutants", *killed] if found else []
    )
