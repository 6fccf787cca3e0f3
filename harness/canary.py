"""The canary: a question to the device whose answer is known.

Runs in the one worker that owns the GPU, before the first candidate in it. Refuses to judge a candidate: it says whether the
device is fit to judge one on.
"""

import torch

from harness import timing

_SIDE = 256
_NUMBERS = 4096


def complaint() -> str:
    """Nothing if the device adds and multiplies as it should, else what it does instead."""
    try:
        numbers = torch.arange(_NUMBERS, dtype=torch.int64, device=timing.DEVICE)
        total = int((numbers * numbers).sum())
        ones = torch.ones(_SIDE, _SIDE, dtype=torch.float16, device=timing.DEVICE)
        product = sorted(set((ones @ ones).flatten().tolist()))
    except RuntimeError as error:
        return f"the canary failed: {str(error).strip().splitlines()[0]}"
    known = (_NUMBERS - 1) * _NUMBERS * (2 * _NUMBERS - 1) // 6
    if (total, product) != (known, [float(_SIDE)]):
        return f"the canary was answered wrongly: {total} for {known}, {product[:3]} for {_SIDE}"
    return ""
