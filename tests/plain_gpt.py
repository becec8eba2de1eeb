"""The reference model of the whole-model tests: nanoGPT's structure and names in torch's own modules, for any dtype.

It shares no code with the package, and draws its weights in nanoGPT's order.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)
        self.heads = c.n_head
        self.divisor = (math.sqrt(c.n_embd / c.n_head) if c.scale_attn_weights else 1.0) * (
            layer + 1 if c.scale_attn_by_inverse_layer_idx else 1)

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (self.c_attn(x).reshape(B, T, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4))
        scores = q @ k.transpose(2, 3) / self.divisor
        future = torch.ones(T, T, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1).to(v.dtype)
        return self.c_proj((weights @ v).transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        width = c.n_inner or 4 * c.n_embd
        self.c_fc = nn.Linear(c.n_embd, width, bias=c.bias)
        self.c_proj = nn.Linear(width, c.n_embd, bias=c.bias)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x):
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(c.n_embd, eps=c.layer_norm_epsilon, bias=c.bias)
        self.attn = Attention(c, layer)
        self.ln_2 = nn.LayerNorm(c.n_embd, eps=c.layer_norm_epsilon, bias=c.bias)
        self.mlp = MLP(c)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class PlainGPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(c.vocab_size, c.n_embd), "wpe": nn.Embedding(c.block_size, c.n_embd),
            "h": nn.ModuleList([Block(c, layer) for layer in range(c.n_layer)]),
            "ln_f": nn.LayerNorm(c.n_embd, eps=c.layer_norm_epsilon, bias=c.bias),
        })
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        if c.tie_word_embeddings:
            self.transformer.wte.weight = self.lm_head.weight
        for module in self.modules_in_order():
            nn.init.normal_(module.weight, std=c.initializer_range)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        for name, p in self.named_parameters():
            if "c_proj.weight" in name:
                nn.init.normal_(p, std=c.initializer_range / math.sqrt(2 * c.n_layer))

    def modules_in_order(self):
        """Embeddings and linear layers as nn.Module.apply meets them: children before their parent, in order."""
        met = []
        self.apply(lambda m: met.append(m) if isinstance(m, (nn.Linear, nn.Embedding)) else None)
        return met

    def forward(self, idx, targets):
        """-> logits (B, T, V) and the mean loss over the targets that are not -1, in float32 or better."""
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[:idx.shape[1]]
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x))
        wide = logits if logits.dtype == torch.float64 else logits.float()
        log_probs = wide.log_softmax(-1).flatten(0, 1)
        kept = targets.flatten() != -1
        return logits, -log_probs[kept, targets.flatten()[kept]].mean()
