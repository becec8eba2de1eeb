"""A small model for the engine's tests, and an LLM that remembers the logits of every token it was asked for."""
import copy
import ctypes
import dataclasses

import numpy as np
import torch

from fastgpt import GPT, LLM, GPTConfig
from fastgpt.extension import _C

V = 61


def small_model(**changes):
    """Sizes that are multiples of nothing: heads of 7, 35 channels, 61 tokens."""
    torch.manual_seed(3)
    settings = {"block_size": 300, "vocab_size": V, "n_layer": 2, "n_head": 5, "n_embd": 35, "n_inner": 91,
                "initializer_range": 0.25}
    return GPT(GPTConfig(**{**settings, **changes})).eval()


class Recorder(LLM):
    """An LLM; seen: {tokens so far: the bits of the logits behind them}. Different bits for the same tokens are an error."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = {}

    def choose(self, ready, logits):
        for sequence, row in zip(ready, logits):
            tokens = tuple(sequence.ids[:sequence.length].tolist())
            known = self.seen.setdefault(tokens, row.tobytes())
            assert known == row.tobytes(), f"other bits after {len(tokens)} tokens"
        return super().choose(ready, logits)


def prompt(rng, length):
    return rng.integers(0, V, length).tolist()


def logits_of(model, tokens):
    """The model's own logits behind the last token, in float64."""
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0][0, -1].double().numpy()


def floats(row):
    return np.frombuffer(row, np.float32)


def as_packed(llm, model):
    """The model with the weights that the engine's products see: head and embedding are two, as they may be there."""
    twin = GPT(dataclasses.replace(model.config, tie_word_embeddings=False))
    twin.load_state_dict(model.state_dict())
    weights, blocks = llm._weights, twin.transformer.h
    with torch.no_grad():
        _unpack(weights.head, twin.lm_head.weight)
        _unpack(weights.embedding, twin.transformer.wte.weight)
        for (ln_1, qkv, proj, ln_2, fc, out, _), block in zip(weights.layers, blocks):
            for addresses, norm in ((ln_1, block.ln_1), (ln_2, block.ln_2)):
                for at, vector in zip(addresses, (norm.weight, norm.bias)):
                    vector.copy_(torch.frombuffer((ctypes.c_float * len(vector)).from_address(at), dtype=torch.float32))
            for packed, layer in ((qkv, block.attn.c_attn), (proj, block.attn.c_proj), (fc, block.mlp.c_fc),
                                  (out, block.mlp.c_proj)):
                _unpack(packed, layer.weight)
    return twin.eval()


def with_outliers(model, factor, channels=3):
    """The same function of ids, but some channels behind each norm are `factor` times as large and their weights as small."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for i, block in enumerate(twin.transformer.h):
            for norm, layer in ((block.ln_1, block.attn.c_attn), (block.ln_2, block.mlp.c_fc)):
                chosen = slice(i, None, model.config.n_embd // channels)
                for vector in (norm.weight, norm.bias):
                    if vector is not None:
                        vector[chosen] *= factor
                layer.weight[:, chosen] /= factor
    return twin


def _unpack(packed, weight):
    for n in range(len(weight)):
        _C.unpack_column(packed, n, weight[n].data_ptr())
