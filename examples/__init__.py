"""Worked examples: score and mask functions of one's own, which no kernel file knows.

Each runs attention forward and backward, compares it with plain PyTorch in fp64, and prints one sentence. From the root of a
checkout, without a GPU: TRITON_INTERPRET=1 python -m examples.tanh_softcap
"""
