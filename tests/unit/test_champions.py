import json
import multiprocessing
from pathlib import Path

import jsonschema
import pydantic
import pytest

from harness.champions import ChampionFile, champion_schema, champions_from, read_champions
from harness.errors import ChampionError, MachineError
from harness.judges import JUDGES
from harness.keeping import champion_path, champion_paths, merge, put, save_champions, write_champions
from harness.sealed import digest_of, locked, sealed
from tests.fake_champions import champion, champion_file, keep

SCHEMA = Path(__file__).parents[2] / "harness" / "schemas" / "champions.json"


def test_champions_come_back_as_they_were_in_a_stable_order(tmp_path: Path) -> None:
    path = champion_path(tmp_path, "h200", "flash_fwd", draft=False)
    assert path == tmp_path / "best" / "h200" / "flash_fwd.json"
    second, first = champion("b2 h8 s64 d32 fp16"), champion("b1 h8 s64 d32 fp16")
    assert save_champions(tmp_path, champion_file(second), draft=False) == path
    save_champions(tmp_path, champion_file(first), draft=False)
    assert read_champions(path).champions == (first, second)
    before = path.read_bytes()
    save_champions(tmp_path, champion_file(second, first), draft=False)
    assert path.read_bytes() == before
    # A value a line, so that a change of one is a change of one line.
    save_champions(tmp_path, champion_file(champion(value_ms=0.5)), draft=False)
    changed = [
        one
        for one, other in zip(path.read_text().splitlines(), before.decode().splitlines(), strict=True)
        if one != other
    ]
    assert [line.split(":")[0].strip() for line in changed] == ['"value_ms"', '"digest"']


def test_the_schema_is_that_of_the_code_and_holds_what_is_written(tmp_path: Path) -> None:
    schema = json.loads(SCHEMA.read_text())
    assert schema == champion_schema()
    assert schema["$schema"].endswith("2020-12/schema") and schema["$id"].endswith(":1.0.0")
    jsonschema.Draft202012Validator.check_schema(schema)
    tree = json.loads(keep(tmp_path, champion_file(champion())).read_text())
    jsonschema.validate(tree, schema)
    jsonschema.validate(tree | {"x-note": 1}, schema)
    for wrong in ({"note": 1}, {"device": tree["device"] | {"name": "../h200"}}, {"champions": [{}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(tree | wrong, schema)


def test_an_estimate_never_replaces_a_time() -> None:
    measured, estimated = champion(kind="measured", value_ms=2.0), champion(kind="estimated", value_ms=1.0)
    assert put(champion_file(measured), [estimated]).champions == (measured,)
    assert put(champion_file(estimated), [measured]).champions == (measured,)


def test_a_slower_time_replaces_a_faster_one_of_another_kernel_only() -> None:
    fast, slow = champion(value_ms=1.0), champion(value_ms=2.0)
    assert put(champion_file(fast), [slow]).champions == (fast,)
    assert put(champion_file(slow), [fast]).champions == (fast,)
    changed = champion(value_ms=2.0, source_digest="k2", kernel_digest="k2")
    assert put(champion_file(fast), [changed]).champions == (changed,)


def test_another_environment_gets_a_file_of_its_own_and_finds_it_again(tmp_path: Path) -> None:
    first = save_champions(tmp_path, champion_file(champion()), draft=False)
    before = first.read_bytes()
    other = champion_file(champion(value_ms=0.5), driver="590.0")
    second = save_champions(tmp_path, other, draft=False)
    assert second.name == f"flash_fwd-{other.environment.digest}.json" and first.read_bytes() == before
    # Names mean nothing: a file that was renamed is still that of its environment.
    renamed = second.rename(second.with_name("flash_fwd-new.json"))
    assert (
        save_champions(tmp_path, champion_file(champion("b9 h8 s64 d32 fp16"), driver="590.0"), draft=False) == renamed
    )
    assert len(read_champions(renamed).champions) == 2 and first.read_bytes() == before
    assert champion_paths(first.parent, "flash_fwd", draft=False) == [first, renamed]
    assert champion_paths(first.parent, "flash_fwd", draft=True) == []


def test_drafts_are_kept_apart(tmp_path: Path) -> None:
    save_champions(tmp_path, champion_file(champion()), draft=False)
    path = save_champions(tmp_path, champion_file(champion(kind="estimated")), draft=True)
    assert path.name == "flash_fwd.draft.json" and read_champions(path).champions[0].number.kind == "estimated"


@pytest.mark.parametrize("other", [{"device": "a100"}, {"kernel": "flash_bwd"}])
def test_devices_and_kernels_do_not_mix(tmp_path: Path, other: dict[str, str]) -> None:
    problem = "b1 h8 s64 d32 fp16 bwd" if other.get("kernel") else "b1 h8 s64 d32 fp16"
    mine, theirs = champion_file(champion()), champion_file(champion(problem), **other)
    with pytest.raises(ChampionError, match="do not mix"):
        merge([("a", mine), ("b", theirs)])
    path = champion_path(tmp_path, mine.device.name, mine.kernel.name, draft=False)
    write_champions(path, theirs)
    with pytest.raises(ChampionError, match="move the file to the folder of its own device"):
        save_champions(tmp_path, mine, draft=False)


def test_files_merge_in_any_order_unless_their_numbers_cannot_be_compared(tmp_path: Path) -> None:
    def read(name: str, file: ChampionFile) -> tuple[str, ChampionFile]:
        return name, read_champions(keep(tmp_path, file, name=name))

    one = read("one", champion_file(champion(value_ms=1.0), champion("b2 h8 s64 d32 fp16")))
    other = read("other", champion_file(champion(value_ms=0.5), champion("b3 h8 s64 d32 fp16")))
    merged = merge([one, other])
    assert merged == merge([other, one])
    assert [each.number.value_ms for each in merged.champions] == [0.5, 1.0, 1.0]
    # Of the same champion the one that was proved again stays.
    renewed = read("renewed", champion_file(champion(kernel_digest="k2")))
    plain = read("plain", champion_file(champion()))
    for pair in ([plain, renewed], [renewed, plain]):
        assert merge(pair).champions[0].certificate.kernel_digest == "k2"
    with pytest.raises(ChampionError, match=r"of two environments: driver 5.0.. and 5.0.."):
        merge([one, read("third", champion_file(champion(), driver="590.0"))])
    with pytest.raises(ChampionError, match="another version of the kernel"):
        merge([one, read("fourth", champion_file(champion(source_digest="k2")))])


def _tree(tmp_path: Path) -> dict:
    return json.loads(keep(tmp_path, champion_file(champion())).read_text())


def test_what_others_have_added_is_kept_on_rewrite(tmp_path: Path) -> None:
    tree = _tree(tmp_path)
    tree["x-reviewed"] = {"by": "a person", "on": [1, None]}
    tree["champions"][0]["number"]["x-clock"] = 1755
    path = champion_path(tmp_path, "h200", "flash_fwd", draft=False)
    path.write_bytes(sealed(tree))
    save_champions(tmp_path, champion_file(champion("b2 h8 s64 d32 fp16")), draft=False)
    found = json.loads(path.read_text())
    assert found["x-reviewed"] == tree["x-reviewed"] and found["champions"][0]["number"]["x-clock"] == 1755
    assert len(found["champions"]) == 2


def test_newer_minors_are_read_and_kept_and_other_majors_are_refused(tmp_path: Path) -> None:
    tree = _tree(tmp_path)
    newer = tree | {"version": "1.7.0", "$schema": "urn:flashtune:schema:champions:1.7.0", "weather": "fine"}
    path = champion_path(tmp_path, "h200", "flash_fwd", draft=False)
    path.write_bytes(sealed(newer))
    save_champions(tmp_path, champion_file(champion("b2 h8 s64 d32 fp16")), draft=False)
    found = json.loads(path.read_text())
    assert (found["version"], found["weather"], len(found["champions"])) == ("1.7.0", "fine", 2)
    for version in ("2.0.0", "0.9.0"):
        with pytest.raises(ChampionError, match=rf"has version {version} of the format, this flashtune reads 1\.x"):
            champions_from(sealed(tree | {"version": version}), "it")
    for version in ("1.0", "one", 1, None, "1.0.0.0"):
        with pytest.raises(ChampionError, match="its `version` is no version"):
            champions_from(sealed(tree | {"version": version}), "it")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[: len(text) // 2], "is no JSON"),
        (lambda text: text.replace('"value_ms": 1.0', '"value_ms": NaN'), "`NaN` is no finite number"),
        (lambda text: text.replace('"value_ms": 1.0', '"value_ms": 1e999'), "`1e999` is no finite number"),
        (lambda text: text.replace('"value_ms": 1.0', '"value_ms": "1.0"'), "valid number at champions.0.number.value_ms"),
        (lambda text: text.replace('"value_ms": 1.0', '"value_ms": 1.5'), "digest is not that of its content"),
        (lambda text: text.replace('"h200"', '"../../h200"'), "should match pattern .* at device.name"),
        (lambda text: text.replace('"device",', '"moon",'), "at champions.0.certificate.where"),
        (lambda text: text.replace('"version"', '"device"'), "stands twice"),
        (lambda text: text.replace('"champions": [', '"champion": ['), "the key `champion` means nothing; begin it with `x-`"),
        (lambda text: text.replace("b1 h8 s64", "h8 b1 s64"), "is not written as `b1 h8 s64 d32 fp16 fwd`"),
        (lambda text: text.replace("fp16 fwd", "fp16 bwd"), "is no problem of a kernel that computes the fwd pass"),
        (lambda text: text.replace('"bound": 12', '"bound": 0'), "compared nothing"),
        (lambda text: text.replace('"ratio": 0.5', '"ratio": 1.5'), "less than or equal to 1"),
        (lambda text: "[]", "holds no JSON object"),
        (lambda text: "[" * 100_000, "is nested deeper"),
        (lambda text: '{"x-a":' * 40 + "1" + "}" * 40, "is nested deeper"),
        (lambda text: '{"x-a": ' + "9" * 5000 + "}", "is no JSON that we read"),
        (lambda text: "", "is no JSON"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_with_its_place(tmp_path: Path, change, message: str) -> None:
    path = keep(tmp_path, champion_file(champion()))
    changed = change(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    with pytest.raises(ChampionError, match=message):
        read_champions(path)


def test_what_is_no_file_or_too_large_is_not_opened(tmp_path: Path) -> None:
    import os

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(17 << 20)
    binary = tmp_path / "binary"
    binary.write_bytes(b'{"format": "\xff"}')
    cases = {pipe: "is no file", tmp_path: "is no file", Path("/dev/zero"): "is no file", huge: "more than 16 MiB"}
    cases |= {binary: "is no UTF-8 at byte 12", tmp_path / "none": "cannot read", Path("a\0b"): "cannot read"}
    for path, message in cases.items():
        with pytest.raises(ChampionError, match=message):
            read_champions(path)


def test_a_certificate_that_proves_nothing_cannot_be_built() -> None:
    good = champion().certificate.model_dump()
    for change in (
        {"judges": {"repeat": 3}},
        {"errors": {}},
        {"gate_cases": ()},
        {"cases": 0},
        {"worst": {"out": 1.01}},
    ):
        with pytest.raises(pydantic.ValidationError):
            type(champion().certificate)(**(good | change))


def test_every_judge_can_be_named_in_a_certificate() -> None:
    good = champion().certificate
    judges = dict.fromkeys(JUDGES, 1)
    assert type(good)(**(good.model_dump() | {"judges": judges})).judges == judges


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_champions(tmp_path, champion_file(champion()), draft=False)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MachineError, match="cannot write the champions to .*No space left on device"):
        save_champions(tmp_path, champion_file(champion("b2 h8 s64 d32 fp16")), draft=False)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in path.parent.iterdir()) == [".flash_fwd.lock", "flash_fwd.json"]


def _save_some(results: Path, batches: list[int]) -> None:
    for batch in batches:
        save_champions(results, champion_file(champion(f"b{batch} h8 s64 d32 fp16")), draft=False)


def test_tunes_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_save_some, args=(tmp_path, list(range(1 + i, 25, 3)))) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = read_champions(champion_path(tmp_path, "h200", "flash_fwd", draft=False))
    assert {one.read().batch for one in found.champions} == set(range(1, 25))


def test_a_lock_that_is_kept_too_long_is_said(tmp_path: Path) -> None:
    with (
        locked(tmp_path / ".lock"),
        pytest.raises(MachineError, match="another process has held .*lock"),
        locked(tmp_path / ".lock", patience_s=0.05),
    ):
        pass


def test_the_digest_is_of_the_content_and_not_of_its_layout() -> None:
    assert (
        digest_of({"b": 1.0, "a": ["ü"]})
        == digest_of({"a": ["ü"], "b": 1.0, "digest": "x"})
        != digest_of({"a": ["ü"], "b": 2})
    )
