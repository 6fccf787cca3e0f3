"""A tiny Llama with the attention of an exported package, beside its own eager attention: run by `test_hf_kernel.py`.

Prints errors against plain attention in fp64, as JSON: of logits and gradients, without and with padding. Triton interprets.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import sdpa_mask
from transformers.models.llama import modeling_llama

from kernels import get_local_kernel


def plain_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """Attention in the type of its inputs, which eager attention leaves for fp32: (batch, queries, heads, head_dim)."""
    group, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (each.repeat_interleave(group, dim=1) for each in (key, value))
    seen = torch.ones(length, length, dtype=torch.bool).tril() if attention_mask is None else attention_mask
    scores = (scaling * query @ key.transpose(2, 3)).masked_fill(~seen, float("-inf"))
    weights = torch.softmax(scores, dim=-1).masked_fill(~seen, 0.0)
    return (weights @ value).transpose(1, 2).contiguous(), None


def plain_norm(self, hidden):
    """Its own is in fp32 whatever it is given."""
    return self.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.variance_epsilon)


def answers(model, name, tokens, seen):
    """Logits of the tokens that are there, and the gradient of every weight, in fp64."""
    model.set_attn_implementation(name)
    # What padding predicts counts for nothing: of a query that sees no key everybody thinks something else.
    before = torch.cat([torch.zeros_like(seen[:, :1]), seen[:, :-1]], dim=1)
    labels = tokens.masked_fill(seen * before == 0, -100)
    found = model(input_ids=tokens, attention_mask=seen, labels=labels)
    found.loss.backward()
    return {
        "logits": found.logits[seen == 1].double().detach(),
        **{name: weight.grad.double().clone() for name, weight in model.named_parameters()},
    }


def worst(found, wanted):
    """The largest error of logits, and of gradients, each over the largest value of its tensor."""
    errors = {name: ((found[name] - wanted[name]).abs().max() / wanted[name].abs().max()).item() for name in wanted}
    return {"logits": errors.pop("logits"), "gradients": max(errors.values())}


def as_flash_attention(package):
    """Whether `torch.compile` follows it in one graph to the same bits, and packed sequences are each one of its own."""
    q, k, v = (torch.randn(2, 12, heads, 16) for heads in (4, 2, 2))
    whole = package.flash_attn_func(q, k, v, causal=True)
    compiled = torch.compile(package.flash_attn_func, backend="eager", fullgraph=True)
    starts = torch.tensor([0, 12, 24], dtype=torch.int32)
    packed = [each.flatten(0, 1) for each in (q, k, v)]
    found = package.flash_attn_varlen_func(*packed, starts, starts, 12, 12, causal=True)
    return {
        "compiled": torch.equal(compiled(q, k, v, causal=True), whole), "packed": torch.equal(found, whole.flatten(0, 1)),
    }  # fmt: skip


_KINDS = (
    ("ours 64", "tuned_attention", torch.float64), ("ours 32", "tuned_attention", torch.float32),
    ("eager 32", "eager", torch.float32), ("eager 16", "eager", torch.bfloat16),
)  # fmt: skip


def main() -> None:
    package = get_local_kernel(Path(sys.argv[1]))
    package.DEVICE, asked = sys.argv[2], []
    find = package.CONFIGS.find
    package.CONFIGS.find = lambda question, device: asked.append(find(question, device)) or asked[-1]
    package.register_transformers()
    AttentionInterface.register("plain", plain_attention)
    AttentionMaskInterface.register("plain", sdpa_mask)
    modeling_llama.LlamaRMSNorm.forward = plain_norm
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    tokens = torch.randint(64, (2, 12))
    whole, padded = torch.ones_like(tokens), torch.ones_like(tokens)
    padded[1, :5] = 0
    said = {}
    for name, seen in (("whole", whole), ("padded", padded)):
        wanted = answers(copy.deepcopy(model).double(), "plain", tokens, seen)
        for which, attention, dtype in _KINDS:
            found = answers(copy.deepcopy(model).to(dtype), attention, tokens, seen)
            said[f"{name} {which}"] = worst(found, wanted)
    said |= as_flash_attention(package)
    said["configs"] = [None if each is None else each["config"] for each in asked]
    sys.stdout.write(json.dumps(said) + "\n")


main()
