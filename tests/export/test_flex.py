"""FlexAttention's options and Inductor's choices: PyTorch's own lowering takes what is exported, and we refuse what it would."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from harness.cli import main
from harness.export.flex_attention import broken_rule, features_of, options_of
from harness.keeping import write_champions
from harness.problem import parse_problem
from tests.export.flex_champions import BWD, CAUSAL, FWD, ROOT, flex_champion, flex_file, kept

PLAIN = "b2 h8 s2048 d128 fp16 fwd"
RAGGED = "b1 h4 q1000 k900 d64 bf16 causal softcap=30.0 fwd"


def export(to: str, source: Path, out: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    command = ["export", "--to", to, "--from", str(source), "--out", str(out), "--workspace", str(ROOT), "--json"]
    assert main([*command, *more]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lowerings() -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("lowered_flex.py"))], capture_output=True, text=True, timeout=200,
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout.strip().splitlines()[-1])
    return found


def test_options_are_taken_by_pytorchs_own_lowering_forward_and_backward(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = kept(tmp_path / "champions", f"{CAUSAL} fwd", f"{CAUSAL} bwd", RAGGED)
    document = export("flex-attention", source, tmp_path / "out", capsys)
    assert document["verified_by"]["package"] == "torch" and "3 times" in document["verified_by"]["check"]
    tuned = loaded(tmp_path / "out" / "flex_kernel_options.py")
    asked = {
        "device": "h200", "dtype": "bf16", "q_heads": 8, "kv_heads": 4, "head_dim": 64, "features": ("causal",),
        "block_size": 128,
    }  # fmt: skip
    found = tuned.kernel_options(q_len=1024, kv_len=1024, **asked)
    assert found == {
        "fwd_BLOCK_M": 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 8, "fwd_num_stages": 2, "fwd_USE_TMA": False,
        "bwd_BLOCK_M1": 32, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": 32, "bwd_num_warps": 4,
        "bwd_num_stages": 3,
    }  # fmt: skip
    assert tuned.kernel_options(q_len=4096, kv_len=4096, **asked) == found
    assert tuned.kernel_options(q_len=4096, kv_len=4096, exact=True, **asked) == {}
    assert tuned.kernel_options(q_len=64, kv_len=1024, **asked) == {}, "those of decoding are others"
    for name, value in (
        ("block_size", 64),
        ("block_size", None),
        ("features", ()),
        ("dtype", "fp16"),
        ("device", "a100"),
    ):
        assert tuned.kernel_options(q_len=1024, kv_len=1024, **{**asked, name: value}) == {}
    assert not [
        line for line in (tmp_path / "out" / "flex_kernel_options.py").read_text().splitlines() if "import" in line[:8]
    ]


def test_a_file_that_says_something_else_than_pytorch_is_given_is_not_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from harness.export import flex_attention

    source = kept(tmp_path / "champions", f"{CAUSAL} fwd")
    monkeypatch.setattr(
        flex_attention, "options_of", lambda problem, config: {"fwd_BLOCK_M": 64, "fwd_BLOCK_N": 64, "num_stages": 2}
    )  # fmt: skip
    command = [
        "export",
        "--to",
        "flex-attention",
        "--from",
        str(source),
        "--out",
        str(tmp_path / "out"),
        "--workspace",
        str(ROOT),
    ]
    assert main(command) != 0
    assert "an option is unknown" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "changes", "why"), [
    (f"{CAUSAL} fwd", {}, ""), (f"{CAUSAL} bwd", {}, ""), (RAGGED, {}, ""),
    (f"{CAUSAL} fwd", {"block_m": 256}, "does not divide blocks of 128"),
    (f"{CAUSAL} fwd", {"block_n": 256}, "does not divide blocks of 128"),
    (f"{CAUSAL} fwd", {"block_m": 48}, "power of two"), (f"{CAUSAL} fwd", {"block_n": 8}, "power of two"),
    ("b2 h8 s1152 d64 bf16 causal fwd", {"block_m": 256, "sparse": 256}, "does not divide 1152"),
    (f"{CAUSAL} bwd", {"block_m1": 128}, "no multiple of BLOCK_M1"),
    (f"{CAUSAL} bwd", {"block_n2": 128}, "no multiple of BLOCK_N2"),
    ("b2 h8 s1024 d8 bf16 causal fwd", {}, "at least 16"), ("b2 h8 q1 k1024 d64 bf16 fwd", {"sparse": 0}, "decoding"),
])  # fmt: skip
def test_rules_that_pytorch_does_not_check_are_checked(text: str, changes: dict[str, Any], why: str) -> None:
    problem = parse_problem(text)
    config = {**(FWD if problem.pass_ == "fwd" else BWD), **changes}
    options = options_of(problem, config)
    assert isinstance(options, dict)
    found = broken_rule(problem, options, config["sparse"])
    assert (why in found) if why else not found


def test_a_config_of_another_kernel_is_none_of_these_options() -> None:
    assert "has no `block_m1`" in options_of(parse_problem(f"{CAUSAL} bwd"), FWD)


def test_features_are_what_is_no_size() -> None:
    assert features_of(parse_problem(RAGGED)) == ("causal", "softcap=30.0")
    assert features_of(parse_problem("b1 h2 s64 d16 fp16 window=3:5 scale=0.5 bshd bwd")) == (
        "window=3:5",
        "scale=0.5",
        "bshd",
    )


def test_what_the_lowering_does_is_what_the_rules_say(lowerings: dict[str, Any]) -> None:
    for name in ("256 queries", "256 keys"):
        assert "Q and KV block size must be divisible" in lowerings[name]
    wide = lowerings["256 queries in blocks of 256"]["flex_attention"]
    assert (wide["BLOCK_M"], wide["SPARSE_Q_BLOCK_SIZE"]) == (256, 256)
    both = lowerings["both passes"]
    assert (both["flex_attention"]["num_warps"], both["flex_attention_backward"]["num_warps"]) == (2, 8)
    assert not [
        name for name in (*both["flex_attention"], *both["flex_attention_backward"]) if name[:4] in ("fwd_", "bwd_")
    ]
    alike = lowerings["no prefix"]
    assert alike["flex_attention"]["num_warps"] == alike["flex_attention_backward"]["num_warps"] == 2
    # PyTorch 2.13 takes tiles that its own template cannot have: without our rule they would be exported.
    assert lowerings["tiles that do not fit"]["flex_attention_backward"]["BLOCK_M1"] == 128
    assert "no template left" in lowerings["blocks of 64"]
    assert "OUTPUT_LOGSUMEXP must not be in kernel_options" in lowerings["forbidden"]


def test_champions_of_other_kernels_and_illegal_ones_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_champions(tmp_path / "ours.json", flex_file("fwd", flex_champion(f"{CAUSAL} fwd"), family="flashtune"))
    write_champions(tmp_path / "wide.json", flex_file("fwd", flex_champion(f"{CAUSAL} fwd", block_m=256)))
    for target in ("flex-attention", "inductor-choices"):
        document = export(target, tmp_path, tmp_path / target, capsys)
        reasons = " ".join(one["reason"] for one in document["skipped"])
        assert document["files"] == {} and document["exported"] == [] and document["verified_by"] is None
        assert "of the family `flashtune`" in reasons and "sparse_blocks" in reasons


def test_choices_are_served_by_inductor(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = kept(tmp_path / "champions", f"{CAUSAL} fwd", f"{CAUSAL} bwd", RAGGED)
    write_champions(
        source / "tma.json", flex_file("fwd", flex_champion("b1 h4 s4096 d128 bf16 causal fwd", use_tma=True))
    )
    document = export("inductor-choices", source, tmp_path / "out", capsys)
    assert "3 times" in document["verified_by"]["check"]
    assert [one["reason"] for one in document["skipped"] if "descriptors" in one["reason"]]
    module = loaded(tmp_path / "out" / "flashtune_choices.py")
    from torch._inductor import config
    from torch._inductor.virtualized import V

    from harness import inductor
    from harness.device import TARGETS

    choices = module.FlashtuneChoices()
    with inductor._pretended(TARGETS["h200"]), V.set_choices_handler(choices):
        (fwd,) = V.choices.get_flex_attention_fwd_configs(64, torch.bfloat16, "cuda")
        (bwd,) = V.choices.get_flex_attention_bwd_configs(64, torch.bfloat16, "cuda")
        stock = V.choices.get_flex_attention_fwd_configs(256, torch.float32, "cuda")
        with config.patch(max_autotune=True):
            assert len(V.choices.get_flex_attention_fwd_configs(64, torch.bfloat16, "cuda")) == 1
    assert (fwd.block_m, fwd.block_n, fwd.num_stages, fwd.num_warps) == (128, 64, 2, 8)
    assert (bwd.block_m1, bwd.block_n1, bwd.block_m2, bwd.block_n2, bwd.num_stages, bwd.num_warps) == (
        32,
        64,
        64,
        32,
        3,
        4,
    )
    assert stock and (stock[0].block_m, stock[0].block_n) != (128, 64)
    with inductor._pretended(TARGETS["a100"]), V.set_choices_handler(choices):
        (other,) = V.choices.get_flex_attention_bwd_configs(64, torch.bfloat16, "cuda")
    assert (other.block_m1, other.num_stages) != (32, 3) or other.block_n2 != 32
    with config.patch(inductor_choices_class=None), V.set_choices_handler(V.choices):
        made = module.install()
        assert V.choices is made and config.inductor_choices_class is module.FlashtuneChoices
    assert V.choices is not made
    assert choices.uuid() == f"flashtune {module.DIGEST}" and module.DIGEST.startswith("sha256:")
    assert not module.complaint("2.11.0+cu128") and "found 2.20.0" in module.complaint("2.20.0")
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    with pytest.raises(RuntimeError, match=r"written for PyTorch 2\.10.*found 2\.99\.0"):
        loaded(tmp_path / "out" / "flashtune_choices.py")
