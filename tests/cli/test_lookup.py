"""`flashtune lookup` and `flashtune table` in a workspace with a small kernel."""

import json
import re
import runpy
from pathlib import Path

from harness.outcome import RECORDS, Measured, Record, Samples
from harness.problem import parse_problem
from tests.cli.desk import Desk
from tests.fake_champions import champion, champion_file, keep
from tests.fake_runner import fake_artifact, passing_verdict

ASKED = "b1 h8 s1024 d64 bf16 causal"


def keep_some(bench: Desk, *lengths: int, block_m: int = 64, **changes) -> list:
    return [
        champion(
            f"b1 h8 s{length} d64 bf16 causal", config={"block_m": block_m, "num_warps": 4},
            default={"block_m": 16, "num_warps": 4}, kernel_digest=bench.digest, source_digest=bench.digest, **changes,
        )
        for length in lengths
    ]  # fmt: skip


def test_lookup_explains_its_answer_and_what_it_passed_over(bench: Desk) -> None:
    stale = champion("b1 h8 s1024 d64 bf16 causal", config={"block_m": 16, "num_warps": 4})
    keep(bench.results, champion_file(*keep_some(bench, 2048, 65536), stale, kernel="subject"))
    code, out, _ = bench.run("lookup", ASKED, "--time")
    assert code == 0
    assert "b1 h8 s1024 d64 bf16 causal fwd on h200" in out
    assert "subject: the nearest champion, 2.00 doublings away\n    block_m=64 num_warps=4\n" in out
    assert "of `b1 h8 s2048 d64 bf16 causal fwd` on h200: 1.00 ms measured, proved by the device" in out
    assert "results/best/h200/subject.json" in out and "µs" in out and "passed over: 2 champions" in out
    assert "1 × it was proved of kernel k1" in out and "1 × it is 12.0 doublings away, more than 4" in out

    (answer,) = bench.document("lookup", ASKED, "--time")["answers"]
    assert answer["match"] == "nearest" and answer["provenance"]["value_ms"] == 1.0 and answer["cached_us"] > 0
    assert len(answer["passed_over"]) == 2


def test_a_lookup_that_misses_says_so_and_fails_only_where_one_is_required(bench: Desk) -> None:
    code, out, _ = bench.run("lookup", ASKED)
    assert code == 0 and "subject: no champion answers, so the safe default\n    block_m=16 num_warps=4" in out
    code, out, err = bench.run("lookup", ASKED, "--mode", "require")
    assert (
        code == 1
        and not out
        and "no champion of subject answers" in err
        and "`flashtune tune subject` finds one" in err
    )
    for argv, says in (
        (["--mode", "best"], "there is no mode"), (["--device", "h2000"], "h2000"), (["--kernel", "sub"], "sub"),
    ):  # fmt: skip
        code, _, err = bench.run("lookup", ASKED, *argv)
        assert code == 2 and says in err
    assert bench.run("lookup", ASKED + " bwd")[0] == 2 and bench.run("lookup", "b1")[0] == 2


def test_lookup_knows_the_device_that_is_here(bench: Desk) -> None:
    keep(bench.results, champion_file(*keep_some(bench, 1024), device="a100", kernel="subject", driver="1"))
    assert bench.document("lookup", ASKED)["answers"][0]["match"] == "default"
    bench.here("a100")
    document = bench.document("lookup", ASKED)
    assert document["device"] == "a100" and document["answers"][0]["match"] == "exact"
    assert "made with driver 1, here is 580.1" in document["answers"][0]["warnings"]
    bench.here("h200")
    assert bench.document("lookup", ASKED, "--device", "a100")["answers"][0]["match"] == "exact"


def test_a_table_is_written_tried_and_usable_without_us(bench: Desk) -> None:
    made = [*keep_some(bench, 128, 256, 512, block_m=32), *keep_some(bench, 2048, 4096, block_m=128)]
    keep(bench.results, champion_file(*made, kernel="subject"))
    # A journal knows what the long config costs on the longest of the short problems.
    problem = parse_problem("b1 h8 s512 d64 bf16 causal")
    outcome = Measured(verdict=passing_verdict(problem), samples=Samples(times_ms=(1.3,)), artifact=fake_artifact({}))
    record = Record(trial=0, problem=problem.key, config={"block_m": 128, "num_warps": 4}, outcome=outcome, seconds=1.0)
    identity = {"kernel_digest": bench.digest, "mode": "measured"}
    (bench.results / "runs").mkdir()
    header = json.dumps({"schema": 1, "journal": "flashtune", "identity": identity}).encode()
    journal = bench.results / "runs" / "subject-h200-measured-0.jsonl"
    journal.write_bytes(header + b"\n" + RECORDS.dump_json(record) + b"\n")
    document = bench.document("table", "subject", "--out", "table.py")
    assert (document["rows"], document["champions"], document["held_out"], document["answered"]) == (2, 5, 5, 5)
    assert document["legal"] == 5 and document["same"] == 4
    # Without the champion of 512 the table's boundary lies below it.
    assert document["regrets"]["b1 h8 s512 d64 bf16 causal fwd"] == 1.3 / 1.0 - 1
    assert document["default_regrets"]["b1 h8 s128 d64 bf16 causal fwd"] == 1.0
    table = runpy.run_path("table.py")
    kind = table["ROWS"][0][0]
    assert table["config"](kind=kind, q_len=300, kv_len=300, heads=8) == {"num_warps": 4, "block_m": 32}
    assert table["KERNEL_DIGEST"] == bench.digest
    code, out, _ = bench.run("table", "subject", "--out", "table.py")
    assert code == 0 and "2 rows from 5 champions of subject on h200: table.py" in out
    assert "held out: 5, answered 5, legal 5, the champion's own config 4" in out
    assert re.search(r"beyond the champions: a row for \d+ of \d+ shapes of workloads, legal for \d+", out)


def test_a_table_holds_nothing_that_is_stale(bench: Desk) -> None:
    keep(bench.results, champion_file(*keep_some(bench, 128, 256), kernel="subject"))
    bench.edit("return q\n", "return q + 0\n")
    document = bench.document("table", "subject", "--out", "table.py")
    assert document["rows"] == document["champions"] == 0
    assert runpy.run_path("table.py")["ROWS"] == ()
    assert bench.run("table", "subject", "--out", str(Path("/proc/table.py")))[0] == 3
