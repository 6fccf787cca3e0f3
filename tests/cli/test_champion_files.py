"""`show`, `validate`, `diff` and `merge` on champion files from the workspace and from anywhere."""

import json
from pathlib import Path

import pytest

from harness.champions import read_champions
from harness.keeping import write_champions
from tests.cli.desk import Desk
from tests.fake_champions import certificate, champion, champion_file, keep


def subject(*champions, **changes):
    return champion_file(*champions, kernel="subject", **changes)


def test_show_says_which_champions_are_stale_and_why(bench: Desk) -> None:
    old, now = champion(), champion("b2 h8 s64 d32 fp16", kernel_digest=bench.digest, source_digest=bench.digest)
    keep(bench.results, subject(old, now))
    code, out, _ = bench.run("show")
    assert code == 0
    assert "subject on h200 (sm_90)      results/best/h200/subject.json" in out
    assert "triton 3.6.0, ptxas 12.8, torch 2.13.0, driver 580.1" in out
    assert out.count("stale: it was proved of kernel k1") == 1
    assert f"the kernel is {bench.digest} now; `flashtune verify` proves it again" in " ".join(out.split())
    (shown,) = bench.document("show")["champions"]
    assert {problem: one["status"] for problem, one in shown["standings"].items()} == {
        old.problem: "stale", now.problem: "current",
    }  # fmt: skip
    bench.edit("return q\n", "return q + 0\n")
    (shown,) = bench.document("show", "subject")["champions"]
    assert {one["status"] for one in shown["standings"].values()} == {"stale"}


def test_line_numbers_and_comments_do_not_make_a_champion_stale_and_helpers_do(bench: Desk) -> None:
    keep(bench.results, subject(champion(kernel_digest=bench.digest, source_digest=bench.digest)))
    status = lambda: next(iter(bench.document("show")["champions"][0]["standings"].values()))["status"]  # noqa: E731
    bench.edit("def tile(q):\n", "# moved\n\n\ndef tile(q):\n    # a note\n")
    assert status() == "current"
    (bench.root / "kernels" / "helper.py").write_text("ONE = 1\n")
    bench.edit('PASS = "fwd"\n', 'PASS = "fwd"\nfrom .helper import ONE\n')
    assert status() == "stale"
    keep(bench.results, subject(champion(kernel_digest=bench.digest)))
    assert status() == "current"
    (bench.root / "kernels" / "helper.py").write_text("ONE = 2\n")
    assert status() == "stale"


def test_soft_differences_and_weaker_proofs_are_noted(bench: Desk) -> None:
    digest = bench.digest
    proved = certificate(digest, "interpreter")
    keep(bench.results, subject(champion(source_digest=digest, certificate=proved), driver="570.0", torch="1.0"))
    bench.here("h200")
    out = " ".join(bench.run("show")[1].split())
    assert "note: made with driver 570.0, here is 580.1" in out and "note: made with torch 1.0" in out
    assert "note: it was proved in the interpreter" in out and "stale" not in out
    bench.here("a100")
    assert "driver 570.0, here is" not in bench.run("show")[1]


def test_a_file_from_anywhere_is_shown_without_its_kernel(bench: Desk, tmp_path: Path) -> None:
    elsewhere = tmp_path / "mine.json"
    write_champions(elsewhere, champion_file(champion(), kernel="their_kernel"))
    code, out, _ = bench.run("show", elsewhere)
    assert code == 0 and "their_kernel on h200 (sm_90)" in out and "stale" not in out
    assert bench.document("show", elsewhere)["champions"][0]["standings"] is None
    # Another family's kernel of the same name is another kernel.
    file = subject(champion())
    write_champions(elsewhere, file.model_copy(update={"kernel": file.kernel.model_copy(update={"family": "torch"})}))
    assert bench.document("show", elsewhere)["champions"][0]["standings"] is None
    assert bench.run("show", tmp_path / "none.json")[0] == 3


def test_validate_names_what_is_wrong_with_which_file(bench: Desk) -> None:
    good = keep(bench.results, subject(champion()))
    bad = bench.root / "bad.json"
    bad.write_text(good.read_text().replace("1.0", "2.0"))
    assert bench.document("validate", good)["files"][0]["valid"]
    code, out, _ = bench.run("validate", good, bad)
    assert code == 1
    assert f"{good}: 1 champion of subject on h200 (sm_90)" in out and f"not valid: {bad} has version 2.0.0" in out
    code, out, _ = bench.run("validate", bad, bench.root / "none.json", good)
    assert code == 3 and "cannot read" in out and "1 champion of subject" in out


def test_diff_says_what_changed_leaf_by_leaf(bench: Desk) -> None:
    old = keep(bench.results, subject(champion(), champion("b2 h8 s64 d32 fp16")), name="old")
    new = keep(
        bench.results,
        subject(champion(config={"block_m": 128}, value_ms=0.5), champion("b3 h8 s64 d32 fp16"), torch="9"),
        name="new",
    )
    assert bench.document("diff", old, old) == {"same": 2, "differences": []}
    found = bench.document("diff", old, new, code=1)
    assert [(one["problem"], one["what"]) for one in found["differences"]] == [
        ("", "environment.torch"),
        ("b1 h8 s64 d32 fp16 fwd", "config.block_m"),
        ("b1 h8 s64 d32 fp16 fwd", "number.value_ms"),
        ("b2 h8 s64 d32 fp16 fwd", "champion"),
        ("b3 h8 s64 d32 fp16 fwd", "champion"),
    ]
    code, out, _ = bench.run("diff", old, new)
    assert code == 1 and "    config.block_m: 64 -> 128" in out and '    environment.torch: "2.13.0" -> "9"' in out


def test_merge_joins_files_and_keeps_what_is_there(bench: Desk) -> None:
    one = keep(bench.results, subject(champion()), name="one")
    other = keep(bench.results, subject(champion("b2 h8 s64 d32 fp16")), name="other")
    out = keep(bench.results, subject(champion("b3 h8 s64 d32 fp16")), name="out")
    document = bench.document("merge", one, other, "--out", out)
    assert document["champions"] == 3 and len(read_champions(out).champions) == 3
    assert bench.document("merge", one, other, "--out", one)["champions"] == 2

    strange = keep(bench.results, subject(champion(), driver="1"), name="strange")
    before = strange.read_bytes()
    code, _, err = bench.run("merge", one, other, "--out", strange)
    assert code == 3 and "two environments: driver" in err and "hint: keep both files" in err
    assert strange.read_bytes() == before
    code, _, err = bench.run("merge", one, keep(bench.results, subject(champion(), device="a100")), "--out", "c.json")
    assert code == 3 and "do not mix" in err and not Path("c.json").exists()
    Path("notes.json").write_text(json.dumps({"a": 1}))
    assert bench.run("merge", one, "--out", "notes.json")[0] == 3
    assert bench.run("merge", one, "--out", "notes.txt")[0] == 2


@pytest.mark.parametrize(
    "verb", [("show",), ("validate",), ("diff", "good.json"), ("merge", "good.json", "--out", "c.json")]
)
def test_a_hostile_name_or_word_cannot_steer_the_terminal(bench: Desk, verb: tuple[str, ...]) -> None:
    good = keep(bench.results, subject(champion()))
    Path("good.json").write_bytes(good.read_bytes())
    evil = Path("evil\x1b[2J.json")
    evil.write_text(good.read_text().replace('"format"', '"\\u001b[2Jformat\\ud800"'))
    code, out, err = bench.run(verb[0], evil, *verb[1:])
    assert code in (1, 3) and "\x1b" not in out + err
