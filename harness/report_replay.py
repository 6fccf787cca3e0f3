"""What a person reads of replayed searches. Refuses to decide anything, as `harness.report` does."""

from collections.abc import Mapping, Sequence

from harness.report import plural, wrapped
from harness.search_documents import OverallResult, SearchesDocument, SearchResult

_NAME = 37


def searches_lines(found: SearchesDocument) -> list[str]:
    """A table for each space, one over all of them, and what could not run."""
    lines: list[str] = []
    for space in dict.fromkeys(one.space for one in found.results):
        own = [one for one in found.results if one.space == space]
        lines += [f"{space}: {own[0].legal} legal configs, {plural(found.seeds, 'seed')}", _heading(own)]
        lines += [_row(one, one.fraction_at) for one in sorted(own, key=lambda one: -_last(one))]
        lines.append("")
    if found.overall and found.overall[0].spaces > 1:
        lines += [f"over all {found.overall[0].spaces} spaces", _heading(found.overall)]
        lines += [_row(one, one.fraction_at) for one in found.overall]
        lines += ["", "worst space", _heading(found.overall)]
        lines += [_row(one, one.worst_at) for one in found.overall]
        lines.append("")
    lines += [wrapped(f"{name}: {why}", first="  left out: ").rstrip() for name, why in found.left_out.items()]
    lines.append(
        wrapped(
            "Columns are trials: the best recorded time over the one found by then, mean over seeds. Of the last: the half "
            "width of its 95 % interval, and the share of runs that came within 5 % and 1 %. Then the strategy's own "
            f"milliseconds a trial. {found.seconds:.0f} s in all.",
            first="",
        ).rstrip()
    )
    return lines


def _last(found: SearchResult | OverallResult) -> float:
    return found.fraction_at[max(found.fraction_at, key=int)]


def _heading(rows: Sequence[SearchResult | OverallResult]) -> str:
    counts = "".join(f"{count:>6}" for count in rows[0].fraction_at)
    return f"  {'strategy':<{_NAME}}{counts}{'±':>7}{'>=.95':>7}{'>=.99':>7}{'ms':>7}"


def _row(found: SearchResult | OverallResult, values: Mapping[str, float]) -> str:
    last = max(found.fraction_at, key=int)
    low, high = found.fraction_interval_at[last]
    numbers = "".join(f"{value:>6.3f}"[:6] for value in values.values())
    return (
        f"  {found.strategy:<{_NAME}}{numbers}{(high - low) / 2:>7.3f}{found.share_095_at[last]:>7.2f}"
        f"{found.share_099_at[last]:>7.2f}{found.ms_per_trial:>7.1f}"
    )
