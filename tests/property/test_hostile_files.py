"""Champion files of anybody: whatever the bytes are, there is an answer in words, and what is accepted can be written again."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.champions import ChampionFile, champions_from
from harness.cli import main
from harness.errors import ChampionError
from harness.keeping import merge, put, write_champions
from harness.sealed import sealed
from tests.fake_champions import champion, champion_file

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=-(10**400), max_value=10**400)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.sampled_from(
        ["", "..", "../../etc/passwd", "\x1b[2J", "nan", "x-", "-1", "1.0.0", "b1 h8 s64 d32 fp16 fwd", "a" * 5000]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def tree() -> dict[str, Any]:
    file = champion_file(champion(), champion("b2 h8 s64 d32 fp16", kind="estimated"))
    made = file.model_dump(mode="json", by_alias=True, exclude={"digest"})
    return json.loads(sealed(made))


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a tree, the root too."""
    inside = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, value in inside for place in places(value, (*path, key)))]


TREE = tree()
PLACES = places(TREE)[1:]


@st.composite
def changed(draw: st.DrawFn) -> dict[str, Any]:
    """A champion file with a few values replaced, taken out, moved or added, under a digest that is right."""
    made = copy.deepcopy(TREE)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from(PLACES))
        try:
            inside = made
            for key in place[:-1]:
                inside = inside[key]
            match draw(st.sampled_from(["replace", "drop", "add", "copy"])):
                case "replace":
                    inside[place[-1]] = draw(VALUES)
                case "drop":
                    del inside[place[-1]]
                case "add":
                    inside[draw(st.text(max_size=6) | st.sampled_from(["x-a", "pass_", "schema_id", "digest"]))] = draw(
                        VALUES
                    )
                case "copy":
                    inside[place[-1]] = copy.deepcopy(made)
        except (KeyError, IndexError, TypeError):
            continue
    return made


def holds(whole: Any, part: Any) -> bool:
    """Whether nothing of `part` was lost or changed in `whole`, which may say more keys: those that were left out, as null."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(name in whole and holds(whole[name], part[name]) for name in part)
    if isinstance(part, list):
        return isinstance(whole, list) and len(whole) == len(part) and all(map(holds, whole, part))
    return bool(whole == part)


def answer(content: bytes) -> ChampionFile | None:
    try:
        return champions_from(content, "it")
    except ChampionError as refused:
        assert (
            refused.message
            and "\n" not in refused.message
            and len(refused.message) < 1000
            and refused.message.isprintable()
        )
        return None


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_bytes_are_answered(content: bytes) -> None:
    assert answer(content) is None


@given(VALUES)
def test_any_json_is_answered(value: Any) -> None:
    assert answer(json.dumps(value).encode()) is None


@given(st.integers(0, 4000), st.binary(max_size=3), st.integers(0, 5))
def test_a_file_that_was_cut_or_hit_is_refused_or_the_same(at: int, hit: bytes, gone: int) -> None:
    content = sealed(TREE)
    found = answer(content[:at] + hit + content[at + gone :])
    # Blanks between values may come and go: what is read is what was written.
    assert found is None or found == champions_from(content, "it")


@settings(max_examples=300)
@given(changed())
def test_a_changed_file_is_refused_or_whole(made: dict[str, Any]) -> None:
    try:
        content = sealed(made)
    except (ValueError, RecursionError):
        return
    found = answer(content)
    if found is not None:
        again = found.model_dump(mode="json", by_alias=True, exclude={"digest"})
        assert holds(again, {name: value for name, value in json.loads(content).items() if name != "digest"})
        assert put(found, found.champions) == found and merge([("a", found), ("b", found)]) == found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("files")
    write_champions(made / "good.json", champion_file(champion()))
    return made


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changed(), st.sampled_from(["show", "validate", "diff", "merge"]), st.booleans())
def test_every_verb_answers_a_changed_file(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    made: dict[str, Any],
    verb: str,
    json_: bool,
) -> None:
    try:
        (folder / "evil.json").write_bytes(sealed(made))
    except (ValueError, RecursionError):
        return
    monkeypatch.chdir(folder)
    rest = {"diff": ["good.json"], "merge": ["good.json", "--out", "out.json"]}.get(verb, [])
    (folder / "out.json").unlink(missing_ok=True)
    code = main([verb, "evil.json", *rest, *(["--json"] if json_ else [])])
    said = capsys.readouterr()
    assert code in (0, 1, 3) and "Traceback" not in said.err and "\x1b" not in said.out + said.err
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".json" and path.name != "out.json") == [
        "evil.json", "good.json",
    ]  # fmt: skip


def test_atheris_finds_nothing_either() -> None:
    pytest.importorskip("atheris", reason="atheris is not installed; hypothesis damages the same files above")
    ran = subprocess.run(
        [sys.executable, "-m", "tests.property.atheris_files", "-runs=5000"], cwd=Path(__file__).parents[2],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-2000:]
