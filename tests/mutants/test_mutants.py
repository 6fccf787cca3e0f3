"""The mutants: every one still applies, the table's mistakes are named, and a sample is killed for real.

Kernels run in children, because Triton decides between interpreter and compiler when it is imported.
"""

import ast
import dataclasses
import shutil
from pathlib import Path

import pytest

from harness import mutate
from harness.cases import Case
from harness.errors import UsageError
from harness.workspace import Workspace

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
STEMS = ("flash_fwd", "flash_bwd", "flash_decode")
PASSES = {stem: Workspace(ROOT).kernel_pass(stem) for stem in STEMS}
MUTANTS = [mutant for stem in STEMS for mutant in mutate.load_mutants(KERNELS, stem)]
EQUIVALENT = [mutant for mutant in MUTANTS if mutant.equivalent]

CONFIGS = {
    "flash_fwd": {
        "block_m": 32, "block_n": 16, "loops": "split", "head_order": "outer", "num_warps": 4, "num_stages": 1,
        "load": "pointer", "masked_stages": 1, "warp_specialize": False, "waves_per_eu": 0,
    },
    "flash_bwd": {
        "dkdv_block_m": 16, "dkdv_block_n": 32, "dq_block_m": 32, "dq_block_n": 16, "dkdv_warps": 4, "dkdv_stages": 1,
        "dkdv_load": "pointer", "dq_warps": 4, "dq_stages": 1, "dq_load": "pointer", "waves_per_eu": 0,
    },
    "flash_decode": {
        "block_m": 16, "block_n": 16, "num_splits": 3, "num_warps": 4, "num_stages": 1, "load": "pointer", "loops": "split",
        "waves_per_eu": 0,
    },
}  # fmt: skip
PROBLEM = "b1 h4/2 s48 d16 fp16 causal"


def named(stem: str, name: str) -> mutate.Mutant:
    return next(mutant for mutant in MUTANTS if (mutant.kernel, mutant.name) == (stem, name))


def case(stem: str, problem: str = PROBLEM) -> Case:
    return Case(
        kernel=stem, problem=f"{problem} {PASSES[stem]}", config=CONFIGS[stem], recipe="normal", seed=0, lies={}
    )


@pytest.mark.parametrize("stem", STEMS)
def test_every_mutant_still_applies(stem):
    for mutant in mutate.load_mutants(KERNELS, stem):
        assert mutate.planted(mutant, KERNELS) != (KERNELS / mutant.file).read_text()


@pytest.mark.parametrize("mutant", MUTANTS[::40], ids=lambda mutant: f"{mutant.kernel}: {mutant.name}")
def test_a_planted_bug_changes_its_file_only(mutant, tmp_path):
    package = mutate.plant(mutant, KERNELS, tmp_path)
    for path in KERNELS.glob("*.py"):
        changed = ast.dump(ast.parse(path.read_text())) != ast.dump(
            ast.parse((tmp_path / package / path.name).read_text())
        )
        assert changed == (path.name == mutant.file)


def test_the_tables_are_large_and_every_class_is_planted():
    assert len(MUTANTS) - len(EQUIVALENT) >= 60
    assert {mutant.class_ for mutant in MUTANTS} == set(mutate.CLASSES)
    assert all(PASSES[stem] in mutant.passes for stem in STEMS for mutant in mutate.load_mutants(KERNELS, stem))


def test_an_equivalent_mutant_carries_an_argument_and_there_are_few():
    assert len(EQUIVALENT) * 10 <= len(MUTANTS)
    assert all(len(mutant.equivalent) > 100 for mutant in EQUIVALENT)


def test_mutants_differ_in_what_they_plant():
    planted = [(mutant.kernel, mutant.file, mutant.anchor, mutant.replacement) for mutant in MUTANTS]
    assert len(set(planted)) == len(planted)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes in a table
# ---------------------------------------------------------------------------------------------------------------------

ENTRY = """
[[mutant]]
name = "one"
class = "scale"
file = "small.py"
anchor = "a * 2"
replacement = "a * 3"
why = "three is not two"
passes = ["fwd"]
"""


@pytest.fixture
def folder(tmp_path):
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    (kernels / "small.py").write_text("def double(a):\n    return a * 2\n")
    (kernels / "small.mutants.toml").write_text(ENTRY)
    (tmp_path / "scratch").mkdir()
    return kernels


def test_a_small_table_loads_and_plants(folder, tmp_path):
    (mutant,) = mutate.load_mutants(folder, "small")
    assert (mutant.kernel, mutant.class_, mutant.count, mutant.equivalent) == ("small", "scale", 1, "")
    package = mutate.plant(mutant, folder, tmp_path / "scratch")
    assert (tmp_path / "scratch" / package / "small.py").read_text() == "def double(a):\n    return a * 3\n"
    assert (folder / "small.py").read_text() == "def double(a):\n    return a * 2\n"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('class = "scale"', 'class = "scales"', "there is no class `scales`"),
        ('file = "small.py"', 'file = "large.py"', "there is no file `large.py`"),
        ('file = "small.py"', 'file = "../kernels/small.py"', "there is no file"),
        ('why = "three is not two"', 'why = " "', "needs a reason"),
        ('passes = ["fwd"]', 'passes = ["sideways"]', "at `passes.0`"),
        ('passes = ["fwd"]', "passes = []", "needs a reason and a pass"),
        ('replacement = "a * 3"', 'replacement = "a * 2"', "another replacement"),
        ('replacement = "a * 3"\n', "", "replacement"),
        ("[[mutant]]", "[[mutant]]\nspeed = 3", "speed"),
        ("[[mutant]]", "title = 1\n[[mutant]]", "nothing else"),
        ("[[mutant]]", "[[mutants]]", "`[[mutant]]` entries"),
        ('name = "one"', "name = one", "is not TOML"),
        (ENTRY, ENTRY + ENTRY, "two mutants named `one`"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_table_is_named(folder, old, new, words):
    (folder / "small.mutants.toml").write_text(ENTRY.replace(old, new))
    with pytest.raises(UsageError) as raised:
        mutate.load_mutants(folder, "small")
    assert words in str(raised.value) and "small.mutants.toml" in str(raised.value)


def test_a_kernel_without_a_table_is_named(folder):
    with pytest.raises(UsageError, match="the kernel `other` has no mutants"):
        mutate.load_mutants(folder, "other")


@pytest.mark.parametrize(
    ("source", "changes", "words"),
    [
        ("return a + 2", {}, "occurs 0 times"),
        ("return a * 2 + a * 2", {}, "occurs 2 times"),
        ("return a * 2", {"replacement": "a * )"}, "is not Python"),
        ("return a * 2", {"replacement": "(a * 2)"}, "not the program"),
        ("return a * 2 + a * 2", {"count": 3}, "occurs 2 times"),
    ],
)
def test_what_cannot_be_planted_fails_loudly(folder, tmp_path, source, changes, words):
    (mutant,) = mutate.load_mutants(folder, "small")
    (folder / "small.py").write_text(f"def double(a):\n    {source}\n")
    with pytest.raises(UsageError, match=words):
        mutate.plant(dataclasses.replace(mutant, **changes), folder, tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Kills
# ---------------------------------------------------------------------------------------------------------------------

SAMPLE = (
    ("flash_fwd", "right edge exclusive"),
    ("flash_fwd", "sum not rescaled"),
    ("flash_fwd", "key head by remainder"),
    ("flash_bwd", "delta zero"),
    ("flash_bwd", "dk scaled to base 2"),
    ("flash_bwd", "delta made after it is read"),
    ("flash_decode", "shares overlap"),
    ("flash_decode", "parts not rescaled"),
    ("flash_decode", "mask by packed row"),
)


@pytest.fixture(scope="module")
def sampled():
    mutants = [named(*who) for who in SAMPLE]
    return mutate.measure(mutants, KERNELS, {stem: {"gate": [case(stem)]} for stem in STEMS}, jobs=1)


def test_the_gate_kills_a_sample(sampled):
    assert [(result.kernel, result.name) for result in sampled] == list(SAMPLE)
    assert [result.killed_by for result in sampled] == [("gate",)] * len(SAMPLE)
    assert {result.cases for result in sampled} == {1}
    assert all(trial.detail and trial.alarms == 1 for result in sampled for trial in result.trials)


@pytest.mark.parametrize("stem", STEMS)
def test_the_kernels_themselves_raise_no_alarm(stem):
    small = "b1 h2/1 q20 k24 d16 fp16 causal"
    asked = {
        judge: [case(stem, small)] for judge in ("bound", "fp64", "agreement", "shadow", "far", "suite", "PyTorch SDPA")
    }
    trials = mutate.measure_alarms(stem, KERNELS, asked, jobs=1)
    assert [(trial.judge, trial.how, trial.cases, trial.alarms, trial.detail) for trial in trials] == [
        (judge, "", 1, 0, "") for judge in asked
    ]


@pytest.fixture
def breakable(tmp_path):
    """The forward kernel, and mutants that end the process in different ways."""
    kernels = tmp_path / "kernels"
    shutil.copytree(KERNELS, kernels, ignore=shutil.ignore_patterns("__pycache__"))

    def mutant(name: str, code: str) -> mutate.Mutant:
        return mutate.Mutant(
            name=name, kernel="flash_fwd", class_="store", file="flash_fwd.py", anchor="    return [launch]",
            replacement=f"    import ctypes, os, time\n    {code}\n    return [launch]", why="-", passes=("fwd",),
        )  # fmt: skip

    return kernels, mutant


@pytest.mark.parametrize(
    ("name", "code", "killed_by", "words"),
    [
        ("raises", "raise RuntimeError('no launch today')", "exception", "no launch today"),
        ("segfaults", "ctypes.string_at(0)", "crash", "SIGSEGV"),
        ("aborts", "os.abort()", "crash", "SIGABRT"),
        ("hangs", "time.sleep(1000)", "timeout", "no answer within"),
    ],
)
def test_a_kernel_that_ends_its_process_is_killed_and_the_next_one_is_measured(breakable, name, code, killed_by, words):
    kernels, mutant = breakable
    bad, quiet = mutant(name, code), mutant("harmless", "pass")
    hang_s = 8.0
    asked = {"flash_fwd": {"bound": [case("flash_fwd", "b1 h1 s16 d16 fp16")]}}
    first, second = mutate.measure([bad, quiet], kernels, asked, jobs=1, hang_s=hang_s)
    assert first.killed_by == (killed_by,) and first.cases == 1
    assert words in first.trials[0].detail
    assert second.killed_by == () and second.cases is None and second.trials[0].cases == 1


@pytest.mark.slow
def test_no_equivalent_mutant_is_killed_by_the_gate():
    asked = {stem: {"gate": [case(stem), case(stem, "b1 h2/1 q40 k29 d16 fp16 window=9:3")]} for stem in STEMS}
    assert [result.name for result in mutate.measure(EQUIVALENT, KERNELS, asked) if result.killed_by] == []
