"""What a report says, as values: every number traced back to the made-up evidence it was made of."""

import json
from pathlib import Path

import pytest

from harness.errors import HarnessError, MachineError, UsageError
from harness.evidence import Evidence, Trial, Trials, gather
from harness.finders import find, heat_maps, problem_order
from harness.findings import Findings
from harness.outcome import value_ms
from harness.problem import parse_problem
from harness.store import read_journal
from harness.tables import NOT_MEASURED, tables
from tests import fake_champions
from tests.fake_runner import fake_time_ms
from tests.report import made_up
from tests.report.made_up import BACKWARD, FORWARD


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    return find(gather([made_up.everything(tmp_path_factory.mktemp("made-up") / "results")]))


def test_a_speed_up_is_the_ratio_turned_over_with_its_interval(found: Findings) -> None:
    backward, forward = found.champions
    assert (forward.champion.problem, backward.champion.problem) == (FORWARD, BACKWARD)
    assert forward.speedup == pytest.approx(1 / 0.8)
    assert forward.speedup_interval == pytest.approx((1 / 0.82, 1 / 0.78))
    assert forward.tflops == pytest.approx(parse_problem(FORWARD).flops / 0.1 / 1e9)
    assert forward.changed == (("block_m", 32, 64),) and not forward.draft


def test_an_estimate_has_no_interval_and_is_called_one_everywhere(found: Findings) -> None:
    backward = found.champions[0]
    assert backward.kind == "estimated" and backward.draft
    assert backward.speedup == pytest.approx(1.5) and backward.speedup_interval is None
    cells = [cell for several in tables(found).values() for table in several for row in table.rows for cell in row]
    estimates = [cell for cell in cells if cell.tone == "estimate"]
    assert estimates and all("estimate" in cell.note for cell in estimates)
    times = [cell for cell in cells if cell.tone == "time" and cell.text.endswith("ms")]
    assert times and all("measured" in cell.note for cell in times)


def test_the_best_so_far_never_rises_and_ends_at_the_best(found: Findings) -> None:
    assert len(found.convergence) == 2
    for one in found.convergence:
        assert len(one.values) == len(one.best) == 75
        known = [value for value in one.values if value is not None]
        best = [value for value in one.best if value is not None]
        assert best == sorted(best, reverse=True) and best[-1] == min(known)
        assert one.best[: one.values.index(known[0])] == (None,) * one.values.index(known[0])


def test_a_trial_that_was_made_again_counts_once_with_its_last_word(tmp_path: Path) -> None:
    path = made_up.journal(tmp_path)
    identity, records = read_journal(path)
    lost = next(one for one in records if one.outcome.kind == "timed_out")
    line = json.loads(path.read_text().splitlines()[2])
    line["config"], line["trial"] = dict(lost.config), lost.trial
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")
    (trials,) = gather([path]).trials
    assert len(trials.trials) == 75 and not [one for one in trials.trials if one.outcome == "timed_out"]


def test_a_cell_holds_the_least_of_its_configs(found: Findings) -> None:
    forward = next(one for one in found.heat_maps if one.problem == FORWARD)
    assert (forward.x, forward.y, forward.xs) == ("block_n", "block_m", (16, 32, 64, 128, 256))
    cell = forward.cells[64, 128]
    problem = parse_problem(FORWARD)
    several = [fake_time_ms(problem, {"block_m": 128, "block_n": 64, "num_warps": warps}) for warps in (4, 8)]
    assert (cell.best_ms, cell.tried, cell.failed) == (pytest.approx(min(several)), 3, 1)
    assert forward.cells[256, 256].best_ms is None and forward.cells[256, 256].failed == 3
    assert forward.best_ms == min(one.best_ms for one in forward.cells.values() if one.best_ms)


def test_block_sizes_that_belong_together_make_a_map_each() -> None:
    configs = [{f"{part}_block_{side}": 16 << place for part in ("dq", "dkdv") for side in "mn"} for place in range(3)]
    trials = tuple(Trial(config=config, value_ms=1.0, outcome="measured") for config in configs)
    maps = list(heat_maps(Trials(kernel="k", device="d", problem="p", kind="measured", path="x", trials=trials)))
    assert [(one.x, one.y) for one in maps] == [("dq_block_n", "dq_block_m"), ("dkdv_block_n", "dkdv_block_m")]


def test_failures_are_counted_by_reason_and_pruned_ones_by_rule(found: Findings) -> None:
    counted = {(one.kernel, one.outcome, one.reason): one.count for one in found.failures}
    _, records = read_journal(Path(next(one.path for one in found.evidence.journals if "fwd" in one.path)))
    spills = [one for one in records if getattr(one.outcome, "rule", "") == "spills"]
    assert counted["flash_fwd", "pruned", "spills"] == len(spills) > 1
    assert counted["flash_fwd", "compile_failed", "ptxas gave up"] == 1
    assert sum(one.count for one in found.failures if one.kernel == "flash_fwd") == sum(
        value_ms(one.outcome) is None for one in records
    )
    assert [one.count for one in found.failures] == sorted((one.count for one in found.failures), reverse=True)


def test_peers_are_there_with_intervals_or_with_the_reason_why_not(found: Findings) -> None:
    peers = {one.peer: one for one in found.peers}
    assert peers["sdpa:flash"].speedup == 1.3 and peers["sdpa:flash"].interval == (1.27, 1.33)
    assert peers["fa3"].speedup is None and "cannot be imported" in peers["fa3"].not_measured
    (champions,) = tables(found)["champions"]
    column = champions.columns.index("Over best peer")
    said = {row[0].text: row[column] for row in champions.rows}
    assert said[FORWARD].text == "0.950×" and "sdpa:cudnn" in said[FORWARD].note
    assert said[BACKWARD].text == NOT_MEASURED


def test_what_another_config_of_ours_did_beside_a_peer_is_not_the_champions(tmp_path: Path) -> None:
    made_up.champions(tmp_path)
    made_up.campaign(tmp_path, config={"block_m": 16})
    (table,) = tables(find(gather([tmp_path])))["champions"]
    cells = {row[0].text: row[table.columns.index("Over best peer")] for row in table.rows}
    assert (cells[FORWARD].text, cells[FORWARD].note) == (NOT_MEASURED, "only another config of ours")


def test_a_bench_is_read_like_a_campaign(tmp_path: Path) -> None:
    path = made_up.bench(tmp_path / "bench.json", name="fa3", ratio=None, not_measured="it is not installed")
    rows = {one.peer: one for one in find(gather([path])).peers}
    assert set(rows) == {"flex", "fa3"}
    assert (rows["flex"].speedup, rows["flex"].peer_ms, rows["flex"].interval) == (3.0, 0.3, (2.9, 3.1))
    assert (rows["fa3"].speedup, rows["fa3"].not_measured) == (None, "it is not installed")


def test_what_is_no_number_in_a_ledger_is_not_measured(tmp_path: Path) -> None:
    """`json` reads NaN and Infinity, and so does the ledger."""
    broken = {"rival_ms": -1, "ours_ms": "fast", "ratio": float("nan"), "interval": [1, "two"]}
    path = made_up.campaign(tmp_path, worst=broken, rude=7, infinite={"ratio": float("inf"), "interval": None})
    rows = {one.peer: one for one in find(gather([path])).peers}
    assert "rude" not in rows
    for peer in ("worst", "infinite"):
        assert (rows[peer].speedup, rows[peer].ours_ms, rows[peer].peer_ms, rows[peer].interval) == (None,) * 4


def test_a_roofline_has_published_and_measured_roofs_and_every_kernel(found: Findings) -> None:
    (one,) = found.rooflines
    assert [(roof.rate, roof.kind) for roof in one.memory] == [(4.8, "published"), (4.1, "measured")]
    assert ("bf16", 700.0, "measured") in [(roof.name, roof.rate, roof.kind) for roof in one.compute]
    forward = next(mark for mark in one.marks if mark.problem == FORWARD and mark.role == "champion")
    problem = parse_problem(FORWARD)
    assert forward.intensity == pytest.approx(problem.flops / problem.least_bytes)
    assert {(mark.kernel, mark.role) for mark in one.marks} == {
        (kernel, role) for kernel in ("flash_fwd", "flash_bwd") for role in ("champion", "default")
    }
    assert {mark.kind for mark in one.marks if mark.kernel == "flash_bwd"} == {"estimated"}


def test_error_budgets_are_those_of_the_certificates(found: Findings) -> None:
    assert {(one.output, one.gate, one.suite, one.bound) for one in found.budgets} == {("out", 0.5, 0.5, 2e-3)}
    assert len(found.budgets) == 2


def test_what_is_missing_is_said_with_the_command_that_gets_it(found: Findings) -> None:
    nothing = find(Evidence())
    assert {one.section for one in nothing.missing} == {
        "champions", "peers", "search", "landscape", "pruning", "roofline", "budgets",
    }  # fmt: skip
    assert all(one.command.startswith("flashtune ") for one in nothing.missing)
    assert {one.section for one in found.missing} == {"pruning"}


def test_problems_stand_in_the_order_of_their_sizes() -> None:
    texts = ["b1 h8 s4096 d64 fp16 fwd", "b1 h8 s512 d64 fp16 fwd", "no problem", "b1 h8 s512 d128 fp16 fwd"]
    ordered = sorted(texts, key=lambda text: problem_order("k", text))
    assert ordered == [texts[1], texts[0], texts[3], texts[2]]


def test_what_this_repository_keeps_is_read_without_complaint() -> None:
    results = Path(__file__).parents[2] / "results"
    found = gather([results / name for name in ("replays", "studies", "mutants", "corpus")])
    assert not found.unread and {Path(name).name for name, _ in found.searches} == {
        "benchmark-hub.json",
        "ensemble.json",
    }


def test_a_damaged_file_in_a_folder_is_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    made_up.everything(tmp_path)
    (tmp_path / "best" / "h200" / "broken.json").write_text('{"format": "flashtune champions", "version": 7}')
    (tmp_path / "runs" / "broken.jsonl").write_text('{"schema": 1, "journal": "flashtune", "identity": {}}\n{}\n')
    (tmp_path / "runs" / "other.json").write_text('{"it is": "something else"}')
    evidence = gather([tmp_path])
    assert [Path(path).name for path in evidence.unread] == ["broken.json", "broken.jsonl"]
    assert len(evidence.champions) == 2 and len(evidence.trials) == 2


@pytest.mark.parametrize(
    ("content", "error"),
    [(b"{}", UsageError), (b"\xff\xfe", UsageError), (b"[" * 100_000, HarnessError), (b"", HarnessError)],
)
def test_a_file_that_was_named_must_be_one_of_ours(tmp_path: Path, content: bytes, error: type[HarnessError]) -> None:
    path = tmp_path / "named.json"
    path.write_bytes(content)
    with pytest.raises(error):
        gather([path])
    with pytest.raises(MachineError, match="there is no file"):
        gather([tmp_path / "nowhere"])


def test_two_files_of_one_problem_are_two_rows(tmp_path: Path) -> None:
    for name, torch in (("flash_fwd", "2.13.0"), ("flash_fwd-0badcafe", "2.14.0")):
        file = fake_champions.champion_file(fake_champions.champion(FORWARD, number=made_up.number()), torch=torch)
        fake_champions.keep(tmp_path, file, name=name)
    assert len(find(gather([tmp_path])).champions) == 2
