"""The GPT: GPT-2's math on the ops of `fastgpt.ops`, with nanoGPT's interface. It never asks which device it is on.

Shapes: B batch, T tokens, C = n_embd channels, H heads, D = C / H head size, V vocabulary. A block hands on the
residual stream x and the last branch's output delta apart, so that its dropout, x + delta and the norm after it are one
pass over memory. Paper: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

from fastgpt import ops, pooled
from fastgpt.config import GPTConfig, check_int

A100_BF16_FLOPS = 312e12  # per second: the peak that nanoGPT's figures are a share of
DECAY_MIN_DIM = 2  # matrices and embeddings decay; biases and norms do not


class LayerNorm(nn.Module):
    """Norms x (..., C), after adding to it the branch output delta, behind dropout, if there is one: -> (normed, sum)."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None
        self.eps = config.layer_norm_epsilon
        self.dropout = config.rate("resid")

    def forward(self, x, delta=None):
        if delta is None:
            return ops.layer_norm(x, self.weight, self.bias, self.eps), x
        dropout_p = self.dropout if self.training else 0.0
        return ops.add_layer_norm(delta, x, self.weight, self.bias, self.eps, dropout_p=dropout_p)


class Linear(nn.Linear):
    """x (..., K) -> activation(x @ weight.T + bias), (..., N): torch's parameters and initialisation, our kernel."""

    def __init__(self, n_in, n_out, bias, activation=None):
        super().__init__(n_in, n_out, bias=bias)
        self.activation = activation

    def forward(self, x):
        return ops.linear(x, self.weight, self.bias, activation=self.activation)


class Embedding(nn.Embedding):
    """ids (...) -> rows of the weight (..., C): torch's module, our gradient."""

    def forward(self, ids):
        return pooled.embedding(ids, self.weight)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, self.n_head, self.layer = config.n_embd, config.n_head, layer
        self.c_attn = Linear(C, 3 * C, config.bias)  # q, k and v of all heads in one product
        self.c_proj = Linear(C, C, config.bias)
        self.dropout = config.rate("attn")
        self.scale = config.attention_scale(layer)

    def forward(self, x, key_mask=None, cache=None):
        B, T, C = x.shape
        q, k, v = pooled.split_heads(self.c_attn(x), self.n_head)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, S, D): all keys so far, of which the last T are new
        dropout_p = self.dropout if self.training else 0.0
        y = ops.attention(q, k, v, scale=self.scale, dropout_p=dropout_p, key_mask=key_mask)  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.inner_width, config.bias, config.activation)
        self.c_proj = Linear(config.inner_width, config.n_embd, config.bias)

    def forward(self, x):
        return self.c_proj(self.c_fc(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = LayerNorm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config)
        self.mlp = MLP(config)

    def forward(self, x, delta=None, key_mask=None, cache=None):
        h, x = self.ln_1(x, delta)
        h, x = self.ln_2(x, self.attn(h, key_mask, cache))
        return x, self.mlp(h)


class GPT(nn.Module):
    """A GPT-2 with nanoGPT's interface and parameter names. The weights are drawn from torch's generator."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict({
            "wte": Embedding(config.vocab_size, config.n_embd),
            "wpe": Embedding(config.block_size, config.n_embd),
            "drop": nn.Dropout(config.rate("embd")),
            "h": nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            "ln_f": LayerNorm(config),
        })
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        self.init_weights()

    def tie_weights(self):
        """Makes the head and the token embedding one parameter, if the config says so."""
        if self.config.tie_word_embeddings:
            self.transformer.wte.weight = self.lm_head.weight

    def init_weights(self):
        """Draws all weights anew, as GPT-2 and nanoGPT do (a seed gives nanoGPT's own); norms are left as they are."""
        std = self.config.initializer_range
        self.apply(lambda module: _init_module(module, std))
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 * n_layer branches add up in the residual stream
                nn.init.normal_(p, std=std / math.sqrt(2 * self.config.n_layer))

    def _apply(self, fn, recurse=True):
        """What moves or converts a module: the engine of `generate` does not keep what was here."""
        from fastgpt.engine import in_model
        super()._apply(fn, recurse)
        in_model.forget_moved(self)
        return self

    def forward(self, idx, targets=None, *, return_logits=True):
        """idx (B, T) token ids -> (logits, loss).

        Without targets: the last position's logits (B, 1, V), and None. With targets (B, T) int64, where -1 is ignored:
        all logits (B, T, V) and the mean cross entropy in nats. return_logits=False gives None in place of the
        logits, which are then never whole in memory. Ids outside the vocabulary raise an IndexError (on a GPU
        they end in a device-side assert), other wrong input a ValueError or TypeError.
        """
        if targets is None:
            return self.lm_head(self.hidden_states(idx, last=True)), None
        _check_targets(idx, targets)
        h = self.hidden_states(idx)
        if not return_logits:
            return None, ops.cross_entropy(h, self.lm_head.weight, targets, ignore_index=-1)
        logits = self.lm_head(h)
        precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits, F.cross_entropy(precise.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def hidden_states(self, idx, *, last=False, positions=None, key_mask=None, cache=None):
        """What the head takes: idx (B, T) -> the final norm's output (B, T, C), or (B, 1, C) of the `last`.

        cache: a `fastgpt.generation.KVCache`; idx then continues what it holds.
        positions (B, T) or (T,): each token's place in its sequence, by default counted from the start.
        key_mask (B, S) bool: which of the S keys, cached ones included, take part; False hides a batch's padding.
        """
        x, delta = self._embed(idx, positions, 0 if cache is None else cache.length), None
        for block in self.transformer.h:
            if self.config.gradient_checkpointing and torch.is_grad_enabled():
                x, delta = recompute(block, x, delta, key_mask, cache, use_reentrant=False)
            else:
                x, delta = block(x, delta, key_mask, cache)
        if cache is not None:
            cache.length += idx.shape[1]
        if last:
            x, delta = x[:, -1:], delta[:, -1:]
        return self.transformer.ln_f(x, delta)[0]

    def _embed(self, idx, positions, past):
        _check_ids(idx)
        T = idx.shape[1]
        if past + T > self.config.block_size:
            raise ValueError(f"idx: a sequence of {past + T} tokens is longer than block_size = "
                             f"{self.config.block_size}")
        if positions is None:
            positions = torch.arange(past, past + T, device=idx.device)
        try:
            tokens = self.transformer.wte(idx)
        except IndexError as error:
            raise IndexError(f"idx: a token id is outside [0, {self.config.vocab_size})") from error
        return self.transformer.drop(tokens + self.transformer.wpe(positions))  # (B, T, C)

    def generate(self, idx, max_new_tokens=None, temperature=1.0, top_k=None, *, params=None, tokenizer=None,
                 streamer=None, **sampling):
        """Continues the prompts idx, as nanoGPT does and with more ways to say how. Call `eval()` first.

        idx: a (B, T) tensor of token ids -> a (B * n, T + new) tensor; or a list of lists of ids, of any lengths -> as
        many lists. The results begin with their prompts, and the n samples of one prompt are neighbours.
        max_new_tokens, temperature (0 is greedy), top_k and `sampling` make up a `fastgpt.SamplingParams`, which
        names them all; `params` gives one ready-made instead. `seed` may be a list, one for each prompt.
        tokenizer: its `decode` is needed for stop strings, its `eos_token_id` ends a sequence unless ignore_eos, and ids
        that it does not know are not drawn.
        streamer(row, token_id) is called for each new token, `row` counting the result's rows.

        Where rows of a tensor end early, they are filled up with the token they ended on. Past block_size the
        context is the last block_size tokens, recomputed for every token: nanoGPT's policy, and no longer fast.
        """
        from fastgpt import generation
        from fastgpt.sampling import SamplingParams
        if params is None:
            params = SamplingParams.from_arguments(max_new_tokens, temperature=temperature, top_k=top_k, **sampling)
        elif (max_new_tokens, temperature, top_k) != (None, 1.0, None) or sampling:
            raise ValueError("generate: give either params or its fields one by one, not both")
        return generation.generate(self, idx, params, tokenizer=tokenizer, streamer=streamer)

    def attention_weights(self, idx, *, layers=None, heads=None, rows=None):
        """What the tokens of idx (B, T) attend to: {layer: (B, heads, rows, T)}. See `fastgpt.inspection.attention_weights`."""
        from fastgpt import inspection
        return inspection.attention_weights(self, idx, layers, (heads, rows))

    @classmethod
    def from_pretrained(cls, model_type, override_args=None):
        """A model from a file, a directory or the Hugging Face hub, in eval mode: see `fastgpt.checkpoint.load`."""
        from fastgpt import checkpoint
        return checkpoint.load(model_type, override_args, model_class=cls)

    def save_pretrained(self, directory):
        """Writes config.json and model.safetensors, which transformers reads too: see `fastgpt.checkpoint.save`."""
        from fastgpt import checkpoint
        checkpoint.save(self, directory)

    def get_num_params(self, non_embedding=True):
        """The number of parameters, by default without the embeddings, save a token embedding that is the head too."""
        n = sum(p.numel() for p in self.parameters())
        if non_embedding:
            n -= self.transformer.wpe.weight.numel()
            n -= 0 if self.config.tie_word_embeddings else self.transformer.wte.weight.numel()
        return n

    def crop_block_size(self, block_size):
        """Shortens the longest context to block_size, at most what it is, by dropping the last positions."""
        block_size, wpe = check_int("block_size", block_size, 1, self.config.block_size), self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight.detach()[:block_size].clone())
        wpe.num_embeddings = self.config.block_size = block_size

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        """AdamW (fused where torch has it) with weight decay on the matrices and embeddings alone."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.dim() >= DECAY_MIN_DIM], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < DECAY_MIN_DIM], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cpu", "cuda"))

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=A100_BF16_FLOPS):
        """The share of `peak_flops` (per second) that fwdbwd_per_iter sequences of block_size in dt seconds come to.

        FLOPs a token: 6 * parameters + 12 * n_layer * n_embd * block_size (Chowdhery et al. 2022, arXiv:2204.02311).
        """
        T = self.config.block_size
        flops_per_token = 6 * self.get_num_params() + 12 * self.config.n_layer * self.config.n_embd * T
        return flops_per_token * T * fwdbwd_per_iter / dt / peak_flops


def _init_module(module, std):
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def _check_ids(idx):
    if not isinstance(idx, torch.Tensor):
        raise TypeError(f"idx must be a (B, T) tensor of token ids, got {type(idx).__name__}")
    if idx.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"idx must hold token ids as int64 or int32, got {idx.dtype}")
    if idx.dim() != 2:
        raise ValueError(f"idx must have shape (B, T), got {tuple(idx.shape)}")
    if idx.shape[1] == 0:
        raise ValueError("idx has no tokens: a sequence needs at least one")


def _check_targets(idx, targets):
    _check_ids(idx)
    if not isinstance(targets, torch.Tensor):
        raise TypeError(f"targets must be a tensor of idx's shape, got {type(targets).__name__}")
    if targets.dtype != torch.int64:
        raise TypeError(f"targets must be int64, got {targets.dtype}")
    if targets.shape != idx.shape:
        raise ValueError(f"targets must have idx's shape {tuple(idx.shape)}, got {tuple(targets.shape)}")
