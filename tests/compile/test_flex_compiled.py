"""FlexAttention without a GPU: PyTorch lowers it, Triton compiles it, its binary is read; or it is said why not."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_templates_compile_and_an_unknown_pytorch_is_said() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(Path(__file__).with_name("flex_compiled.py"))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.strip().splitlines()[-1])
    causal, full, backward = found["compiled"]
    for one in found["compiled"]:
        assert one["spills"] == 0 and one["matrix"] and one["estimate"] > 0, one
    assert causal["kernel"] == "triton_flex_attention" and backward["kernel"] == "triton_flex_attention_backward"
    # Partly visible blocks and whole ones have a loop each; without a mask there is one kind.
    assert (causal["loops"], full["loops"], backward["loops"]) == (2, 1, 4)
    # 8 rows of blocks of 128: 1 + 2 + ... + 8 of them, and 8 for each tile of 128 where nothing is hidden.
    assert (causal["steps"], causal["grid"]) == (36, [8, 1, 4])
    assert full["grid"][0] * 16 == full["steps"] == 256
    assert "known are 1.0" in found["unknown"] and "measure on a device" in found["unknown"]
    # Two candidates whose code nobody could read are not taken for one.
    (first, one), (second, other) = found["unread"]
    assert first == second == 0 and one != other
