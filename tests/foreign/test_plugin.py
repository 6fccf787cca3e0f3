"""The pytest plugin, as a library uses it."""

import json
import sys
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

HERE = Path(__file__).parent

HEAD = f"import sys\nsys.path.insert(0, {str(HERE)!r})\nfrom implementations import sdpa, top_left_flash\n"


@pytest.fixture
def library(pytester, monkeypatch):
    """A library's folder of tests, run in a process of its own: torch cannot be imported twice, as pytester would have it."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    pytester.makeini("[pytest]\naddopts = -p no:cacheprovider\n")

    def run(text: str, *options: str):
        pytester.makepyfile(test_library=HEAD + text)
        return pytester.runpytest_subprocess(*options)

    return run


def test_three_lines_prove_a_right_function(library, pytester):
    result = library(
        "def test_attention(flashtune):\n"
        "    proof = flashtune.prove(sdpa, signature='sdpa', supports='fwd bwd causal fp16', cases=20)\n"
        "    assert proof.judges['bound'] >= 20 and set(proof.largest) == {'out', 'dq', 'dk', 'dv'}\n"
    )
    result.assert_outcomes(passed=1)
    assert not (pytester.path / "flashtune-corpus").exists()


def test_a_wrong_function_fails_with_a_shrunk_case_that_is_kept_and_asked_first(library, pytester):
    text = "def test_attention(flashtune):\n    flashtune.prove(top_left_flash, 'flash', 'fwd causal fp32 unequal-lengths')\n"
    result = library(text)
    result.assert_outcomes(failed=1)
    (path,) = (pytester.path / "flashtune-corpus").glob("*/*.json")
    assert path.parent.name == "implementations-top_left_flash"
    result.stdout.fnmatch_lines(
        [
            "implementations:top_left_flash does not compute attention",
            "*problem   b1 h1 q* k* d16 fp32 causal fwd",
            "*inputs    recipe normal, seed 0",
            "*judge     *",
            "*found     out[[]*",
            f"*replay    flashtune replay {path}",
        ]
    )
    # No stack of the plugin's own functions.
    assert "in_process.py" not in result.stdout.str()
    kept = json.loads(path.read_text())
    assert kept["case"]["foreign"] == {
        "target": "implementations:top_left_flash", "signature": "flash",
        "supports": ["fwd", "causal", "fp32", "unequal-lengths"],
    }  # fmt: skip
    # The profile `repro` asks the corpus only.
    again = library(text, "--flashtune-profile", "repro")
    again.assert_outcomes(failed=1)
    again.stdout.fnmatch_lines(["*cases     1 were asked*"])
    path.unlink()
    library(text, "--flashtune-profile", "repro").assert_outcomes(passed=1)


@pytest.mark.slow
def test_a_corpus_file_can_be_replayed_by_name(library, pytester):
    library(
        "def test_attention(flashtune):\n    flashtune.prove(top_left_flash, 'flash', 'fwd causal fp32 unequal-lengths')\n"
    )
    (path,) = (pytester.path / "flashtune-corpus").glob("*/*.json")
    result = library(
        f"def test_wrong(flashtune):\n    flashtune.replay({str(path)!r}, top_left_flash, 'flash')\n"
        f"def test_right(flashtune):\n    flashtune.replay({str(path)!r}, 'implementations:flash', 'flash')\n"
    )
    result.assert_outcomes(failed=1, passed=1)


def test_the_same_seed_asks_the_same_cases_and_another_others(library):
    result = library(
        "def asked(flashtune, seed):\n"
        "    seen = []\n"
        "    def spy(q, k, v, **keywords):\n"
        "        seen.append((tuple(q.shape), float(q.double().sum())))\n"
        "        return sdpa(q, k, v, **keywords)\n"
        "    flashtune.prove(spy, 'sdpa', 'fwd fp32', cases=10, seed=seed)\n"
        "    return seen\n"
        "def test_seed(flashtune):\n"
        "    assert asked(flashtune, 3) == asked(flashtune, 3) != asked(flashtune, 4)\n"
    )
    result.assert_outcomes(passed=1)


def test_nothing_judged_is_not_a_pass(library):
    result = library(
        "def attention(q, k, v, **keywords):\n    raise NotImplementedError('no')\n"
        "def test_attention(flashtune):\n    flashtune.prove(attention, 'sdpa', cases=10)\n"
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["cannot tell whether *attention computes attention: no case of 10 could be judged*"])


def test_an_exception_of_the_function_is_a_finding(library):
    result = library(
        "def attention(q, k, v, **keywords):\n    raise LookupError('gone')\n"
        "def test_attention(flashtune):\n    flashtune.prove(attention, 'sdpa')\n"
    )
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*judge     exception", "*found     LookupError: gone in `*"])


def test_cases_and_judges_serve_a_test_of_ones_own(library):
    result = library(
        "import hypothesis\n"
        "def test_attention(flashtune):\n"
        "    words = ('sdpa', 'fwd fp32 causal')\n"
        "    @hypothesis.settings(max_examples=5, deadline=None, database=None)\n"
        "    @hypothesis.given(flashtune.cases(sdpa, *words))\n"
        "    def holds(case):\n"
        "        assert flashtune.judge(case, sdpa, *words) is None\n"
        "    holds()\n"
    )
    result.assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("flashtune.prove(sdpa, 'sdp')", "*there is no signature `sdp`*"),
        ("flashtune.prove(sdpa, 'sdpa', 'gqaa')", "*`gqaa` is nothing that an implementation can support*"),
        ("flashtune.prove('nowhere:f', 'sdpa')", "*there is no module `nowhere`*"),
    ],
)
def test_misuse_is_an_error_with_a_hint(library, call, said):
    result = library(f"def test_attention(flashtune):\n    {call}\n")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([said, "*hint: *"])


def test_an_unknown_profile_is_an_error(library):
    text = "def test_attention(flashtune):\n    flashtune.prove(sdpa, 'sdpa')\n"
    result = library(text, "--flashtune-profile", "nightlyy")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*there is no profile `nightlyy`*"])


def test_the_plugin_alone_imports_nothing_heavy(pytester):
    pytester.makepyfile(
        "import sys\ndef test_light():\n    assert not {'torch', 'triton', 'hypothesis', 'numpy'} & set(sys.modules)\n"
    )
    result = pytester.runpytest_subprocess("-p", "no:hypothesispytest")
    result.assert_outcomes(passed=1)
