"""What a person reads of an export. Refuses to decide anything, as `harness.report` does."""

from collections import defaultdict

from harness.export_documents import ExportDocument, ExportedDocument, SkippedDocument
from harness.report import plural, three_digits, wrapped

_SHOWN = 3


def export_lines(found: ExportDocument) -> list[str]:
    """What was written and what its numbers are, what was not and why, who has read it, and how it is used."""
    champions = plural(len(found.exported), "champion") if found.exported else "no champion"
    lines = [f"{champions} to {found.consumer}: {plural(len(found.files), 'file')} in {found.out}"]
    lines += [f"  {_exported(one)}" for one in found.exported]
    for text in dict.fromkeys(text for one in found.exported for text in one.warnings):
        lines.append(_wrapped(f"note: {text}"))
    lines += [_wrapped(f"note: {text}") for text in found.notes]
    lines += _skipped_lines(found.skipped)
    if found.verified_by is not None:
        by = found.verified_by
        lines.append(_wrapped(f"verified by {by.package} {by.version}: {by.check}"))
    else:
        lines.append(_wrapped(f"not verified here: {found.not_verified}"))
    return lines + [f"  {line}" for line in (("to use it:", *(f"  {each}" for each in found.use)) if found.use else ())]


def _exported(one: ExportedDocument) -> str:
    value = f"{three_digits(one.value_ms)} ms {one.kind}"
    draft = ", draft" if one.draft else ""
    return f"`{one.problem}` on {one.device}: {value}, proved by the {one.proved}{draft}"


def _wrapped(text: str) -> str:
    return wrapped(text, first="  ").rstrip()


def _skipped_lines(skipped: tuple[SkippedDocument, ...]) -> list[str]:
    """What was left out, by reason."""
    by_reason: dict[str, list[SkippedDocument]] = defaultdict(list)
    for one in skipped:
        by_reason[one.reason].append(one)
    lines = []
    for reason, several in by_reason.items():
        lines.append(_wrapped(f"skipped: {len(several)} × {reason}"))
        lines += [f"    {f'`{one.problem}` of ' if one.problem else ''}{one.path}" for one in several[:_SHOWN]]
        if len(several) > _SHOWN:
            lines.append(f"    and {len(several) - _SHOWN} more")
    return lines
