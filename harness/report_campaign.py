"""What a person reads of a campaign: one line a part while it goes on, and a table at its end, at most 100 columns wide.

Shows what the ledger holds. A number stands beside its unit; what was not measured is said with its reason. Refuses to decide
anything.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.campaign import Book, Entry, Part
from harness.campaign_plan import PAPER, RIVAL_NAMES, SHARES, TUNED_FLEX, anchors, compared, sweep, traffic_name
from harness.documents import CampaignDocument, CampaignStep
from harness.problem import Problem, parse_problem
from harness.report import plural, three_digits, wrapped
from harness.stats import median

_WIDTH = 100
_MOST_FILES = 8
_MOST_BYTES = 16 << 20
_SHOWN = 6
_NAME = 52
_CELL = 7


def part_line(name: str, entry: Entry, left: float) -> str:
    """One line: what is left of the time, the part, what became of it."""
    minutes, seconds = divmod(max(int(left), 0), 60)
    said = entry.status if entry.status != "done" else _in_short(entry.data)
    line = f"{minutes:3}:{seconds:02} left  {_cut_to(name, _NAME):<{_NAME}}  {said}"
    reason = f": {entry.reason}" if entry.reason else ""
    return _cut(line + reason)


def _cut(line: str) -> str:
    return line if len(line) <= _WIDTH else line[: _WIDTH - 1] + "…"


def _in_short(data: Mapping[str, Any]) -> str:
    """What a part that is done gave, in a few words."""
    if "candidates" in data:
        worst = f", worst {three_digits(data['worst'])} of its bound" if data.get("worst") is not None else ""
        return f"{data['right']} of {len(data['candidates'])} right{worst}"
    if "tried" in data:
        return f"best {_number(data['best_ms'])} ms of {plural(data['measured'], 'config')}"
    if "rivals" in data:
        return " ".join(f"{RIVAL_NAMES[name]} {_ratio(one)}" for name, one in data["rivals"].items())
    if "cases" in data:
        return f"{data['cases']} cases, {plural(len(data['counterexamples']), 'counterexample')}"
    if "false_alarms" in data:
        return f"called faster or slower {data['false_alarms']} of {data['of']} times"
    if "correlation" in data:
        return f"rank correlation {data['correlation']:.2f} over {data['configs']} configs"
    if "ceilings" in data:
        return ", ".join(f"{three_digits(one['rate'])} {one['what'].split()[-1]}" for one in data["ceilings"])
    return "done"


def document(folder: Path, book: Book, parts: Sequence[Part]) -> CampaignDocument:
    """The campaign as its document: what is done of the plan, what is wrong, what the folder holds. `book` has no entries of
    other versions."""
    entries = {part.name: book.parts.get(part.name) for part in parts}
    steps = {}
    for step in SHARES:
        mine = [entries[part.name] for part in parts if part.step == step]
        counted = Counter(entry.status for entry in mine if entry is not None)
        steps[step] = CampaignStep(
            parts=len(mine), done=counted["done"], partial=counted["partial"], failed=counted["failed"] + counted["lost"],
            skipped=counted["skipped"], seconds=round(sum(entry.seconds for entry in mine if entry is not None), 1),
        )  # fmt: skip
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return CampaignDocument(
        folder=str(folder), device=book.device, arch=book.arch, runs=len(book.runs),
        seconds=round(sum(run.seconds for run in book.runs), 1), ended=book.runs[-1].ended if book.runs else "",
        steps=steps, wrong=tuple(_wrong(book)),
        files={str(path.relative_to(folder)): path.stat().st_size for path in files},
    )  # fmt: skip


def _wrong(book: Book) -> Iterator[str]:
    """What speaks against a kernel, in words."""
    for name, entry in book.parts.items():
        for one in entry.data.get("candidates", ()):
            if one["status"] in ("wrong", "crashed"):
                config = " ".join(f"{key}={value}" for key, value in one["config"].items())
                yield f"{name}: {one['status']}: {one['detail']} ({config})"
        for one in entry.data.get("counterexamples", ()):
            yield f"{name}: {one['judge']}: {one['detail']} (`{one['case']['problem']}`)"


def campaign_lines(found: CampaignDocument, book: Book) -> list[str]:
    """The table at the end."""
    lines = [
        f"Campaign on {found.device} ({found.arch}) · {plural(found.runs, 'run')}, {found.seconds / 60:.1f} min · {found.ended}",
        "",
        f"  {'step':<11}{'done':>12}  {'open':>5}  {'failed':>6}  {'skipped':>7}  {'minutes':>7}",
    ]
    for name, step in found.steps.items():
        open_ = step.parts - step.done - step.failed - step.skipped
        done = f"{step.done} of {step.parts}"
        row = f"  {name:<11}{done:>12}  {open_:>5}  {step.failed:>6}  {step.skipped:>7}  {step.seconds / 60:>7.1f}"
        lines.append(row)
    sections = (_truth_lines, _space_lines, _champion_lines, _beside_lines, _traffic_lines, _judging_lines)
    for section in sections:
        said = list(section(book))
        lines += ["", *said] if said else []
    lines += ["", *_reasons(book), *_wrong_lines(found), *_file_lines(found)]
    return [*(_cut(line) for line in lines), f"  {found.folder}"]


def _of(book: Book, step: str, kind: str = "") -> list[tuple[str, Entry]]:
    return [
        (name, entry) for name, entry in book.parts.items() if entry.step == step and name.startswith(f"{step}/{kind}")
    ]


def _truth_lines(book: Book) -> Iterator[str]:
    candidates = [one for _, entry in _of(book, "truth") for one in entry.data.get("candidates", ())]
    if candidates:
        counted = Counter(one["status"] for one in candidates)
        said = " · ".join(f"{count} {status}" for status, count in counted.most_common())
        worst = max((one["worst"] for one in candidates if one.get("worst") is not None), default=None)
        compared = sum(one.get("interpreter") == "compared" for one in candidates)
        yield f"Truth  {plural(len(candidates), 'candidate')}: {said}"
        told = "not judged" if worst is None else f"worst error {three_digits(worst)} of its bound"
        yield f"  {told}, {compared} compared with the interpreter, each run {_runs(candidates)} bit for bit"
    for name, entry in _of(book, "truth", "fuzz") + _of(book, "truth", "memcheck"):
        if "cases" in entry.data:
            found = plural(len(entry.data["counterexamples"]), "counterexample")
            yield f"  {name.removeprefix('truth/')}: {entry.data['cases']} cases in {entry.data['seconds']:.0f} s, {found}"
    for one in _ceilings(book):
        low, high = one["interval"]
        unit = one["what"].split()[-1]
        rate = f"{three_digits(one['rate'])} {unit} ({three_digits(low)} … {three_digits(high)})"
        yield f"  ceiling, {one['what'].removesuffix(unit).strip()} of {one['size']}: {rate}"


def _runs(candidates: Sequence[Mapping[str, Any]]) -> str:
    runs = {one["runs"] for one in candidates if "runs" in one}
    return f"{min(runs)} times" if runs else "never"


def _ceilings(book: Book) -> Sequence[Mapping[str, Any]]:
    entry = book.parts.get("truth/ceilings")
    found: Sequence[Mapping[str, Any]] = entry.data.get("ceilings", ()) if entry else ()
    return found


def best_product(book: Book) -> float | None:
    """The highest bf16 matrix rate that was measured, in TFLOP/s."""
    return max((one["rate"] for one in _ceilings(book) if one["what"].startswith("bf16")), default=None)


def _space_lines(book: Book) -> Iterator[str]:
    entries = _of(book, "spaces")
    if entries:
        yield f"{'Spaces':<52}{'tried of legal':>16}{'best ms':>10}{'default':>10}"
    for name, entry in entries:
        data = entry.data
        if "legal" in data:
            tried = f"{data['tried']:,} of {data['legal']:,}"
            best, default = (_number(data.get(key)) for key in ("best_ms", "default_ms"))
            yield f"  {_cut_to(name.removeprefix('spaces/'), 50):<50}{tried:>16}{best:>10}{default:>10}"


def _champion_lines(book: Book) -> Iterator[str]:
    done = [entry for _, entry in _of(book, "champions") if entry.status == "done"]
    found = [entry.data["champion"] for entry in done if entry.data.get("champion")]
    if not done:
        return
    gains = [1 / one["number"]["ratio"] for one in found if one["number"].get("ratio")]
    stays = sum(one["config"] == one["default"] for one in found)
    line = f"Champions  {plural(len(found), 'problem')}: the default stays in {stays}"
    if gains:
        line += (
            f", {len(gains)} faster ({three_digits(median(gains))}× in the median, up to {three_digits(max(gains))}×)"
        )
    yield line
    yield f"  {three_digits(median([entry.seconds for entry in done]))} s a problem in the median"
    without = len(done) - len(found)
    if without:
        yield f"  {plural(without, 'problem')} without a champion: no candidate passed"


def _beside_lines(book: Book) -> Iterator[str]:
    """Our rate, its share of the ceiling, and how many times as long each rival takes: of what is most telling and of the anchors
    of the sweep; of the whole sweep the geometric means."""
    found = {problem: rivals for problem in compared() if (rivals := _rivals(book, problem))}
    if not found:
        return
    ceiling = best_product(book)
    yield "Side by side: a rival's time over ours, above 1 ours is faster (~: cannot tell)"
    heads = "".join(f"{short:>{_CELL}}" for short in RIVAL_NAMES.values())
    yield f"  {'':<25}{'TFLOP/s':>7}{'of peak':>8}{heads}"
    shown = [problem for problem in compared() if problem not in sweep() or problem in anchors()]
    for problem in (one for one in shown if one in found):
        ours = next((one["ours_ms"] for one in found[problem].values() if "ours_ms" in one), None)
        rate = problem.flops / ours / 1e9 if ours else None
        share = f"{100 * rate / ceiling:.0f} %" if rate and ceiling else "-"
        cells = "".join(f"{_ratio(found[problem].get(name)):>{_CELL}}" for name in RIVAL_NAMES)
        yield f"  {_label(problem):<25}{_number(rate):>7}{share:>8}{cells}"
    yield from _mean_lines([(problem, rivals) for problem, rivals in found.items() if problem in sweep()])
    yield from _paper_lines(found)


def _traffic_lines(book: Book) -> Iterator[str]:
    """What GPT-2 medium moves, pass by pass, and what it would at least."""
    for pass_ in ("fwd", "bwd"):
        problem = parse_problem(f"{PAPER} {pass_}")
        entry = book.parts.get(traffic_name(problem))
        if entry is None or "traffic" not in entry.data:
            continue
        said = []
        for name, one in entry.data["traffic"].items():
            moved = one.get("dram_bytes")
            told = f"not measured ({one.get('not_measured')})" if moved is None else f"{three_digits(moved / 1e9)} GB"
            said.append(f"{name} {told}")
        least = f"{three_digits(entry.data['least_bytes'] / 1e9)} GB at least"
        yield f"  GPT-2 medium {pass_}, bytes moved by ncu: {', '.join(said)}; {least}"


def _rivals(book: Book, problem: Problem) -> dict[str, Mapping[str, Any]]:
    """What was found out of all rivals, in whichever part."""
    entries = (book.parts.get(f"beside/{problem}{suffix}") for suffix in ("", " flex", f" {TUNED_FLEX}"))
    return {name: one for entry in entries if entry for name, one in entry.data.get("rivals", {}).items()}


def _label(problem: Problem) -> str:
    if problem.q_len == 1:
        return f"decode d{problem.head_dim} b{problem.batch} k{problem.kv_len}"
    mask = "causal" if problem.causal else "full"
    return f"{problem.pass_} d{problem.head_dim:<3} {mask:<6} {problem.q_len}"


def _mean_lines(rows: Sequence[tuple[Problem, Mapping[str, Mapping[str, Any]]]]) -> Iterator[str]:
    """Geometric means of ratios, for each rival over the problems in which it could be timed, which are counted."""
    for pass_ in ("fwd", "bwd"):
        cells = []
        for name in RIVAL_NAMES:
            ratios = [
                rivals[name]["ratio"] for problem, rivals in rows if problem.pass_ == pass_ and _timed(rivals, name)
            ]
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
            cells.append(f"{'-' if mean is None else f'{three_digits(mean)}/{len(ratios)}':>{_CELL}}")
        if any(cell.strip() != "-" for cell in cells):
            yield f"  {f'{pass_} sweep, mean/problems':<40}{''.join(cells)}"


def _timed(rivals: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    return rivals.get(name, {}).get("ratio") is not None


def _paper_lines(found: Mapping[Problem, Mapping[str, Mapping[str, Any]]]) -> Iterator[str]:
    """The paper's comparison: both passes of GPT-2 medium by standard attention and by ours."""
    passes = [found.get(parse_problem(f"{PAPER} {pass_}"), {}).get("sdpa:math", {}) for pass_ in ("fwd", "bwd")]
    if not all("ours_ms" in one for one in passes):
        return
    standard, ours = (sum(one[key] for one in passes) for key in ("rival_ms", "ours_ms"))
    yield (f"  GPT-2 medium (`{PAPER}`), forward and backward: standard attention {three_digits(standard)} ms,")
    gibibytes = [max(one[key] for one in passes) / 2**30 for key in ("rival_bytes", "ours_bytes")]
    yield (
        f"    ours {three_digits(ours)} ms, {three_digits(standard / ours)} times as fast; "
        f"memory beside inputs {three_digits(gibibytes[0])} and {three_digits(gibibytes[1])} GiB"
    )


def _ratio(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    if found.get("ratio") is None:
        return "n/a"
    return ("~" if found["verdict"] == "cannot tell" else "") + three_digits(found["ratio"])


def _judging_lines(book: Book) -> Iterator[str]:
    same = [entry.data for _, entry in _of(book, "judging", "same") if "of" in entry.data]
    estimates = [(name, entry.data) for name, entry in _of(book, "judging", "estimate") if "correlation" in entry.data]
    if same or estimates:
        yield "Judging ourselves"
    if same:
        alarms, of = sum(one["false_alarms"] for one in same), sum(one["of"] for one in same)
        yield f"  the default beside itself: called faster or slower {alarms} of {of} times"
    for name, data in estimates:
        regrets = ", ".join(f"first {count} {100 * one:.1f} %" for count, one in data["regret"].items())
        chance = ", ".join(f"{100 * one:.0f}" for one in data["random_regret"].values())
        yield f"  {name.removeprefix('judging/estimate ')}"
        yield (
            f"    estimate: rank correlation {data['correlation']:.2f} over {data['configs']} configs; "
            f"slower than the best: {regrets}"
        )
        replayed = [one for one in data.get("search", {}).get("regrets", ()) if one is not None]
        if replayed:
            yield (
                f"    search, replayed: {100 * median(replayed):.1f} % slower than the best after {data['search']['trials']} "
                f"trials ({100 * replayed[-1]:.1f} % at worst of {len(replayed)} seeds)"
            )
        rest = "" if data["default_regret"] is None else f"; the default {100 * data['default_regret']:.1f} %"
        yield f"    by chance {chance} %{rest}; {100 * data['near']:.1f} % of the configs are within 5 % of the best"


def _reasons(book: Book) -> Iterator[str]:
    """Why things were not measured, most frequent first."""
    counted: Counter[str] = Counter()
    for entry in book.parts.values():
        if entry.status in ("failed", "skipped", "lost"):
            counted[f"{entry.step} {entry.status}: {entry.reason}"] += 1
        for name, one in entry.data.get("rivals", {}).items():
            if "not_measured" in one:
                counted[f"{name} not measured: {one['not_measured']}"] += 1
        for one in entry.data.get("candidates", ())[:1]:
            if one.get("interpreter", "compared") != "compared":
                counted[f"not compared: {one['interpreter']}"] += 1
    for reason, count in counted.most_common(_SHOWN):
        yield _cut(f"  {count} × {reason}")
    if len(counted) > _SHOWN:
        yield f"  and {len(counted) - _SHOWN} other reasons in the ledger"


def _wrong_lines(found: CampaignDocument) -> list[str]:
    if not found.wrong:
        return []
    lines = [f"WRONG  {plural(len(found.wrong), 'finding')} against our kernels:"]
    for one in found.wrong[:_SHOWN]:
        lines += wrapped(one, first="  ").rstrip().splitlines()
    if len(found.wrong) > _SHOWN:
        lines.append(f"  and {len(found.wrong) - _SHOWN} more in the ledger")
    return lines


def _file_lines(found: CampaignDocument) -> list[str]:
    size = sum(found.files.values())
    lines = [f"{plural(len(found.files), 'file')}, {size / 2**20:.1f} MiB; the same command goes on"]
    large = [name for name, bytes_ in found.files.items() if bytes_ > _MOST_BYTES]
    if len(found.files) > _MOST_FILES or large:
        lines.append(
            f"warning: more than {_MOST_FILES} files, or one of more than {_MOST_BYTES >> 20} MiB: {', '.join(large)}"
        )
    return lines


def _number(value: float | None) -> str:
    return "-" if value is None else three_digits(value)


def _cut_to(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
