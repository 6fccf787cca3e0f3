"""What a person reads of `bench` and `compare`, at most 100 columns wide. Refuses to decide anything, as `harness.report`."""

from collections.abc import Iterator

from harness.bench_documents import BenchDocument, BenchedDocument, ComparedDocument, CompareDocument, PeerDocument
from harness.report import plural, three_digits, wrapped


def bench_lines(found: BenchDocument) -> Iterator[str]:
    """Every problem with its peers: times, rates, and the peer's time over ours."""
    yield f"{found.kernel} on {found.device} ({found.arch}), torch {found.torch}, triton {found.triton}"
    yield "A ratio is the peer's time over ours: above 1 ours is faster. ~ cannot tell."
    for one in found.problems:
        yield ""
        yield from _benched_lines(one)


def _benched_lines(one: BenchedDocument) -> Iterator[str]:
    yield one.problem
    if one.reason:
        yield wrapped(one.reason, first="  not timed: ").rstrip()
        return
    config = " ".join(f"{name}={value}" for name, value in one.config.items())
    yield wrapped(f"{one.config_of}: {config}", first="  ").rstrip()
    timed = [peer for peer in one.peers if peer.ratio is not None]
    if timed:
        yield f"  {'peer':<16}{'ms':>9}{'TFLOP/s':>9}{'ours ms':>10}{'TFLOP/s':>9}{'ratio':>8}  95 %"
    yield from (_peer_line(peer) for peer in timed)
    for peer in one.peers:
        if peer.not_measured:
            yield wrapped(f"{peer.name}: not measured: {peer.not_measured}", first="  ").rstrip()


def _peer_line(peer: PeerDocument) -> str:
    cells = [
        three_digits(value) if value is not None else "-"
        for value in (peer.peer_ms, peer.peer_tflops, peer.ours_ms, peer.ours_tflops, peer.ratio)
    ]
    sign = "~" if peer.verdict == "cannot tell" else ""
    span = "" if peer.interval is None else f"{peer.interval[0]:.3f} … {peer.interval[1]:.3f}"
    slowed = " throttled" if peer.throttled else ""
    return f"  {peer.name:<16}{cells[0]:>9}{cells[1]:>9}{cells[2]:>10}{cells[3]:>9}{sign + cells[4]:>8}  {span}{slowed}"


def compare_lines(found: CompareDocument) -> Iterator[str]:
    """What became slower first, then faster, then what cannot be told or is in one of them only."""
    counted = {verdict: sum(one.verdict == verdict for one in found.problems) for verdict in _ORDER}
    said = " · ".join(f"{count} {verdict}" for verdict, count in counted.items() if count)
    yield f"{found.old} → {found.new}: {said or 'nothing in common'}"
    for note in found.notes:
        yield wrapped(f"note: {note}", first="  ").rstrip()
    for verdict in _ORDER:
        for one in found.problems:
            if one.verdict == verdict:
                yield from _compared_lines(one)
    if found.regressions:
        yield f"{plural(found.regressions, 'problem')} became slower"


_ORDER = ("slower", "faster", "same", "cannot tell", "gone", "new")


def _compared_lines(one: ComparedDocument) -> Iterator[str]:
    yield f"  {one.verdict}: {one.kernel} {one.problem}"
    if one.old_ms is not None and one.new_ms is not None:
        kind = "estimated" if one.kind == "estimated" else "measured"
        span = "" if one.interval is None else f" ({one.interval[0]:.3f} … {one.interval[1]:.3f})"
        ratio = "" if one.speedup is None else f", {one.speedup:.3f} times as fast{span}"
        config = ", another config" if one.config_changed else ""
        yield f"    {three_digits(one.old_ms)} → {three_digits(one.new_ms)} ms {kind}{ratio}{config}"
    if one.reason:
        yield wrapped(one.reason, first="    ").rstrip()
