"""A look into a model at work, without a change to it."""
from functools import partial

import torch

from fastgpt import ops, pooled
from fastgpt.checks import chosen


@torch.no_grad()
def attention_weights(model, idx, layers=None, queries=(None, None)):
    """The attention weights of a `GPT` in eval mode for idx (B, T): {layer: (B, heads, rows, T)}, in the model's dtype.

    layers: a sequence of ints, queries: (heads, rows), two more; None for all. They are what transformers calls
    output_attentions, but where a kernel answers nothing else of size T x T is in memory: for all heads and the last token, a
    row of T numbers for each. The attention of these layers runs twice.
    """
    blocks = model.transformer.h
    layers, found = chosen("attention_weights", "layers", layers, len(blocks)), {}
    hooks = [blocks[layer].attn.c_attn.register_forward_hook(partial(_note, found, blocks[layer].attn, queries))
             for layer in layers]
    try:
        model.hidden_states(idx)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _note(found, attn, queries, module, inputs, qkv):
    """A hook of the product that makes q, k and v (B, T, 3 * C)."""
    q, k, v = pooled.split_heads(qkv, attn.n_head)
    _, lse = ops.attention(q, k, v, scale=attn.scale, return_lse=True)
    found[attn.layer] = ops.attention_weights(q, k, lse, queries=queries, scale=attn.scale)
