"""The verb `export`: which champions leave, why others stay, and what becomes of the folder."""

import json
from pathlib import Path

import pytest

from harness import exporting
from harness.errors import ExportError
from harness.export import TARGETS
from harness.export.base import Made, Target, as_json, find_target
from harness.export_documents import MANIFEST, VerifiedDocument
from tests.cli.desk import Desk
from tests.fake_champions import champion, champion_file, keep

OURS = frozenset({"flashtune"})


def make(request):
    return Made(
        files={"deep/configs.json": as_json([one.provenance() for one in request.champions])},
        exported=tuple(one.document("deep/configs.json") for one in request.champions), use=("read it",),
    )  # fmt: skip


def accept(folder, request, made):
    assert json.loads((folder / "deep/configs.json").read_text()) is not None
    return VerifiedDocument(package="reader", version="1.0", check="it read the file")


@pytest.fixture
def target(monkeypatch: pytest.MonkeyPatch):
    """Lets a test say what the target `fake` is."""

    def set_to(**changes):
        given = {"name": "fake", "consumer": "a reader", "families": OURS, "make": make, "check": accept}
        monkeypatch.setattr(exporting, "find_target", lambda name: Target(**(given | changes)))

    set_to()
    return set_to


def mine(desk: Desk, *problems: str, kind: str = "measured", **changes):
    given = {"kernel_digest": desk.digest, "source_digest": desk.digest} | changes
    config = {"block_m": 64, "num_warps": 4}
    return champion_file(
        *(champion(problem, kind=kind, config=config, **given) for problem in problems or ("b1 h8 s64 d32 fp16",)),
        kernel="subject",
    )  # fmt: skip


def test_what_left_says_what_it_is_and_who_read_it(desk: Desk, target) -> None:
    keep(desk.results, mine(desk, "b1 h8 s64 d32 fp16"))
    keep(desk.results, mine(desk, "b2 h8 s64 d32 fp16", kind="estimated"), draft=True)
    document = desk.document("export", "--to", "fake", "--out", "out")
    assert document["verified_by"] == {"package": "reader", "version": "1.0", "check": "it read the file"}
    kinds = {one["problem"]: (one["kind"], one["draft"], one["proved"]) for one in document["exported"]}
    assert kinds == {
        "b1 h8 s64 d32 fp16 fwd": ("measured", False, "device"),
        "b2 h8 s64 d32 fp16 fwd": ("estimated", True, "interpreter"),
    }
    timed, estimated = json.loads((desk.root / "out/deep/configs.json").read_text())
    assert timed["measured_ms"] == 1.0 and "note" not in timed
    assert "measured_ms" not in estimated and estimated["note"] == "an estimate from the compiled binary, not a time"
    assert timed["file"] == "results/best/h200/subject.json" and timed["kernel_digest"] == desk.digest
    assert json.loads((desk.root / "out" / MANIFEST).read_text()) == document | {"out": "."}
    code, out, _ = desk.run("export", "--to", "fake", "--out", "text")
    assert code == 0
    assert "`b2 h8 s64 d32 fp16 fwd` on h200: 1.00 ms estimated, proved by the interpreter, draft" in out
    assert "verified by reader 1.0: it read the file" in out


def test_times_only_leaves_estimates_behind(desk: Desk, target) -> None:
    keep(desk.results, mine(desk, "b2 h8 s64 d32 fp16", kind="estimated"), draft=True)
    document = desk.document("export", "--to", "fake", "--out", "out", "--measured")
    assert not document["exported"]
    assert document["skipped"][0]["reason"] == "its number is an estimate, and only times were asked for"


def test_a_champion_of_another_family_stays(desk: Desk, target) -> None:
    target(families=frozenset({"theirs"}))
    keep(desk.results, mine(desk))
    document = desk.document("export", "--to", "fake", "--out", "out")
    (left,) = document["skipped"]
    assert left["reason"] == "it is of a kernel of the family `flashtune`, and a reader runs kernels of `theirs`"
    assert not document["exported"] and document["verified_by"] is not None


def test_a_stale_champion_stays_and_so_does_an_illegal_one(desk: Desk, target) -> None:
    keep(desk.results, mine(desk))
    illegal = champion(
        "b4 h8 s64 d32 fp16",
        config={"block_m": 128, "num_warps": 4},
        kernel_digest=desk.digest,
        source_digest=desk.digest,
    )
    keep(desk.results, champion_file(illegal, kernel="subject"), name="subject-other")
    desk.edit("return q\n", "return q + 0\n")
    reasons = [one["reason"] for one in desk.document("export", "--to", "fake", "--out", "out")["skipped"]]
    assert all(reason.startswith("stale: it was proved of kernel") for reason in reasons) and len(reasons) == 2
    desk.edit("return q + 0\n", "return q\n")
    document = desk.document("export", "--to", "fake", "--out", "out")
    assert [one["problem"] for one in document["exported"]] == ["b1 h8 s64 d32 fp16 fwd"]
    assert document["skipped"][0]["reason"].startswith("its config is not legal")


def test_of_one_problem_the_most_trusted_leaves(desk: Desk, target) -> None:
    keep(desk.results, mine(desk, kind="estimated"), draft=True)
    keep(desk.results, mine(desk))
    document = desk.document("export", "--to", "fake", "--out", "out")
    assert [one["path"] for one in document["exported"]] == ["results/best/h200/subject.json"]
    assert document["skipped"][0]["path"] == "results/best/h200/subject.draft.json"
    assert "is trusted more" in document["skipped"][0]["reason"]


def test_no_champion_at_all_is_a_valid_empty_result(desk: Desk) -> None:
    for name in TARGETS:
        document = desk.document("export", "--to", name, "--out", f"out/{name}")
        assert document["exported"] == [] and (desk.root / "out" / name / MANIFEST).exists()


def test_champions_come_from_any_file_or_folder(desk: Desk, target, tmp_path: Path) -> None:
    path = keep(tmp_path / "away", mine(desk))
    assert desk.document("export", "--to", "fake", "--out", "one", "--from", path)["exported"]
    (path.parent / "notes.json").write_text("{}")
    found = desk.document("export", "--to", "fake", "--out", "two", "--from", tmp_path / "away")
    assert found["exported"][0]["path"] == "h200/subject.json"
    assert [one["reason"] for one in found["skipped"]] == ["it is no champion file"]
    path.write_bytes(path.read_bytes().replace(b"64", b"32"))
    for source in (path, path.parent):
        code, _, err = desk.run("export", "--to", "fake", "--out", "three", "--from", source)
        assert code == 3 and "its digest is not that of its content" in err
    code, _, err = desk.run("export", "--to", "fake", "--out", "three", "--from", "nowhere")
    assert code == 2 and "there is no nowhere" in err
    assert not (desk.root / "three").exists()


def test_a_kernel_that_is_not_here_vouches_for_nothing(desk: Desk, target) -> None:
    keep(desk.results, champion_file(champion(kernel_digest=desk.digest), kernel="elsewhere"))
    (left,) = desk.document("export", "--to", "fake", "--out", "out")["skipped"]
    assert "is not in this workspace" in left["reason"]


def test_what_others_put_in_the_folder_stays(desk: Desk, target) -> None:
    keep(desk.results, mine(desk))
    out = desk.root / "out"
    run = ("export", "--to", "fake", "--out", "out")
    assert desk.run(*run)[0] == 0
    before = (out / MANIFEST).read_bytes()
    assert desk.run(*run)[0] == 0 and (out / MANIFEST).read_bytes() == before
    (out / "deep/__pycache__").mkdir()
    (out / "deep/__pycache__/x.pyc").write_bytes(b"")
    assert desk.run(*run)[0] == 0
    (out / "notes.txt").write_text("mine")
    code, _, err = desk.run(*run)
    assert code == 2 and "out/notes.txt is not of the export there" in err and (out / "notes.txt").exists()
    (out / "notes.txt").unlink()
    (out / "deep/configs.json").write_text("[]")
    code, _, err = desk.run(*run)
    assert code == 2 and "was changed since it was exported" in err
    assert (out / "deep/configs.json").read_text() == "[]"
    (desk.root / "full").mkdir()
    (desk.root / "full/thesis.tex").write_text("all")
    code, _, err = desk.run("export", "--to", "fake", "--out", "full")
    assert code == 2 and "is not empty, and no earlier export" in err
    code, _, err = desk.run("export", "--to", "fake", "--out", ".")
    assert code == 2 and "holds the folder you are in" in err
    target(name="another")
    assert "is an export to fake, not to another" in desk.run("export", "--to", "another", "--out", "out")[2]


def test_a_consumer_that_refuses_leaves_the_old_export_as_it_was(desk: Desk, target) -> None:
    keep(desk.results, mine(desk))
    assert desk.run("export", "--to", "fake", "--out", "out")[0] == 0
    before = {path: path.read_bytes() for path in (desk.root / "out").rglob("*") if path.is_file()}

    def refuse(folder, request, made):
        raise ExportError("reader 2.0 does not take what was made")

    target(check=refuse)
    keep(desk.results, mine(desk, "b2 h8 s64 d32 fp16"))
    code, _, err = desk.run("export", "--to", "fake", "--out", "out")
    assert code == 1 and "does not take what was made" in err
    assert {path: path.read_bytes() for path in (desk.root / "out").rglob("*") if path.is_file()} == before
    assert [path.name for path in desk.root.glob(".out*")] == []


def test_what_nobody_checked_says_so(desk: Desk, target) -> None:
    keep(desk.results, mine(desk))
    document = desk.document("export", "--to", "fake", "--out", "out", "--no-check")
    assert document["verified_by"] is None and "asked not to" in document["not_verified"]
    target(check=lambda folder, request, made: "the package `reader` is not installed here")
    code, out, _ = desk.run("export", "--to", "fake", "--out", "out")
    assert code == 0 and "not verified here: the package `reader` is not installed here" in out


def test_a_target_that_is_not_known_is_guessed(desk: Desk) -> None:
    code, _, err = desk.run("export", "--to", "trition", "--out", "out")
    assert code == 2 and "did you mean `triton`?" in err


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_is_what_its_name_says(name: str) -> None:
    assert find_target(name).name == name
