"""A package that Hugging Face's `kernels` loads, and a tiny Llama of transformers that computes with it. Triton interprets."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from harness.export.rows import Table
from tests.export.real import champion_of, keep

CHILD = Path(__file__).with_name("llama_child.py")


def require(*packages: str) -> None:
    """Skip without them. Not by importing: `kernels` is the name of a folder here, too."""
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"the package {package} is not installed (extra `consumers`)")


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    small = champion_of("b2 h4/2 s12 d16 fp32 causal", block_m=16, num_warps=2)
    large = champion_of("b1 h32/8 s2048 d128 bf16 causal", kind="estimated", num_stages=3)
    backward = champion_of("b2 h4/2 s12 d16 fp32 causal bwd", kernel="flash_bwd")
    decode = champion_of("b1 h4/2 q1 k64 d64 fp16", kernel="flash_decode")
    return [
        keep(tmp_path, small, large), keep(tmp_path, backward, kernel="flash_bwd"),
        keep(tmp_path, decode, kernel="flash_decode"),
    ]  # fmt: skip


def test_kernels_loads_it_and_a_llama_computes_with_it(export, sources) -> None:
    require("kernels")
    out, document = export("hf-kernel", *sources)
    by = document["verified_by"]
    assert (by["package"], by["version"]) == ("kernels", importlib.metadata.version("kernels"))
    assert [one["reason"] for one in document["skipped"]] == [
        "a package hands out `attention`, which asks no config of `flash_decode`"
    ]
    require("transformers")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, "-I", "-B", str(CHILD), str(out), "h200"], capture_output=True, text=True, env=environment,
        cwd=out.parent, timeout=300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    said = json.loads(ended.stdout.strip().splitlines()[-1])
    for seen in ("whole", "padded"):
        for which in ("logits", "gradients"):
            errors = {name: said[f"{seen} {name}"][which] for name in ("ours 64", "ours 32", "eager 32", "eager 16")}
            # In fp64 it is nearer to plain attention in fp64 than eager attention in fp32 is, and in fp32 nearer than in bf16:
            # what is wrong by more than rounding is wrong in both.
            assert errors["ours 64"] < errors["eager 32"], (seen, which, errors)
            assert errors["ours 32"] < errors["eager 16"], (seen, which, errors)
    assert said["compiled"] and said["packed"]
    # Both passes took the champions' configs, in the type and band that they are of.
    configs = [one for one in said["configs"] if one is not None]
    assert sum("block_m" in one for one in configs) >= 1 and sum("dq_block_m" in one for one in configs) == 1


def test_its_files_say_where_configs_come_from_and_that_an_estimate_is_one(export, sources) -> None:
    out, _ = export("hf-kernel", *sources, check=False)
    for variant in ("torch-cpu", "torch-cuda"):
        configs = out / "build" / variant / "configs"
        assert sorted(path.name for path in configs.iterdir()) == [
            "kernel=flash_bwd,device_name=NVIDIA_H200.json", "kernel=flash_fwd,device_name=NVIDIA_H200.json",
        ]  # fmt: skip
        forward = json.loads((configs / "kernel=flash_fwd,device_name=NVIDIA_H200.json").read_text())
        numbers = {one["number"]: one for config in forward["configs"] for one in config["provenance"]}
        assert numbers["estimated"]["note"] == "an estimate from the compiled binary, not a time"
        assert "measured_ms" not in numbers["estimated"] and numbers["measured"]["measured_ms"] == 1.0
    assert "1 of 3 configs were chosen by an estimate" in (out / "README.md").read_text()


def test_its_lookup_answers_for_the_device_and_the_kind_of_problem(export, sources) -> None:
    out, _ = export("hf-kernel", *sources, check=False)
    table = Table(out / "build/torch-cuda/configs")
    question = {
        "pass_": "fwd", "batch": 1, "q_heads": 32, "kv_heads": 8, "q_len": 2048, "kv_len": 2048, "head_dim": 128,
        "v_head_dim": 128, "dtype": "torch.bfloat16", "window_left": None, "window_right": 0, "top_left": False,
        "deterministic": True, "variants": (),
    }  # fmt: skip
    ask = lambda device="NVIDIA H200", **changes: table.find(SimpleNamespace(**question | changes), device)  # noqa: E731
    assert ask()["config"]["num_stages"] == 3 and ask()["provenance"][0]["number"] == "estimated"
    assert ask("h200") == ask()
    assert ask("NVIDIA H100 80GB HBM3") is None
    for changes in (
        {"dtype": "torch.float16"}, {"window_right": None}, {"variants": ("softcap",)}, {"head_dim": 120},
        {"pass_": "bwd"},
    ):  # fmt: skip
        assert ask(**changes) is None
