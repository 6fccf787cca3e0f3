"""What a person reads of lookups and tables. Refuses to decide anything, as `harness.report` does."""

from collections import defaultdict
from collections.abc import Mapping
from statistics import median

from harness.champion_documents import AnswerDocument, LookupDocument, PassedOverDocument, TableDocument
from harness.report import plural, three_digits, wrapped

_SHOWN = 3


def lookup_lines(found: LookupDocument) -> list[str]:
    """Every kernel's answer, why it is that, and who was passed over."""
    lines = [f"{found.problem} on {found.device}"]
    for answer in found.answers:
        lines += ["", *_answer_lines(answer)]
    return lines


def _answer_lines(answer: AnswerDocument) -> list[str]:
    config = " ".join(f"{name}={value}" for name, value in answer.config.items())
    lines = [f"{answer.kernel}: {_match(answer)}", wrapped(config, first="    ").rstrip()]
    source = answer.provenance
    if source is not None:
        value = f"{three_digits(source.value_ms)} ms {source.kind}"
        lines.append(
            f"    of `{source.problem}` on {source.device}: {value}, proved by the {source.where}; {source.path}"
        )
    lines += [wrapped(f"note: {warning}", first="    ").rstrip() for warning in answer.warnings]
    if answer.cached_us is not None:
        lines.append(f"    asked again: {three_digits(answer.cached_us)} µs")
    return [*lines, *_passed_lines(answer.passed_over)]


def _match(answer: AnswerDocument) -> str:
    if answer.match == "exact":
        return "its own champion"
    if answer.match == "default":
        return "no champion answers, so the safe default"
    kind = "a champion of the same bucket" if answer.match == "bucket" else "the nearest champion"
    return f"{kind}, {three_digits(answer.distance or 0.0)} doublings away"


def _passed_lines(passed_over: tuple[PassedOverDocument, ...]) -> list[str]:
    """Champions that did not answer, by reason."""
    by_reason: dict[str, list[PassedOverDocument]] = defaultdict(list)
    for one in passed_over:
        by_reason[one.reason].append(one)
    lines = [f"    passed over: {plural(len(passed_over), 'champion')}"] if passed_over else []
    for reason, several in by_reason.items():
        lines.append(wrapped(f"{len(several)} × {reason}", first="      ").rstrip())
        lines += [f"        `{one.problem}` on {one.device}" for one in several[:_SHOWN]]
        if len(several) > _SHOWN:
            lines.append(f"        and {len(several) - _SHOWN} more")
    return lines


def table_lines(found: TableDocument) -> list[str]:
    """How small the table is, and what it was worth where it had not looked."""
    made = f"{plural(found.rows, 'row')} from {plural(found.champions, 'champion')}"
    lines = [
        f"{made} of {found.kernel} on {found.device}: {found.out}",
        f"  held out: {found.held_out}, answered {found.answered}, legal {found.legal}, the champion's own config {found.same}",
    ]
    for name, regrets in (("the table", found.regrets), ("the default", found.default_regrets)):
        lines.append(f"  regret of {name} against the champion, held out: {_regrets(regrets)}")
    answered = f"{found.shapes_answered} of {plural(found.shapes, 'shape')} of workloads"
    return [
        *lines,
        f"  beyond the champions: a row for {answered}, legal for {found.shapes_legal}; the rest get the fallback",
    ]


def _regrets(regrets: Mapping[str, float]) -> str:
    if not regrets:
        return "no number is recorded"
    percents = [100 * regret for regret in regrets.values()]
    return f"median {median(percents):.1f} %, worst {max(percents):.1f} % ({plural(len(percents), 'problem')} with a number)"
