"""gpt-fast's method (PyTorch's blog of November 2023, "Accelerating Generative AI with PyTorch II") for GPT-2: a plain model
with a static KV cache, whose step for one token torch.compile makes a CUDA graph of.

int8: a scale for each output, the numbers made the activations' dtype within the product, which the compiler fuses.
"""
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers import gpt2

MULTIPLE = 8  # of the cache's length
APPROXIMATION = {"gelu_new": "tanh", "gelu": "none"}


def make(source, folder, precision):
    """Nothing: the weights are read as they are."""


class Norm(nn.Module):
    def __init__(self, weight, bias, eps):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Linear(nn.Module):
    """weight (N, K), bias (N,) or None."""

    def __init__(self, weight, bias, int8):
        super().__init__()
        weight = weight.contiguous()
        scale = weight.float().abs().amax(1, keepdim=True) / 127 if int8 else None
        self.register_buffer("weight", (weight / scale).round().to(torch.int8) if int8 else weight)
        self.register_buffer("scale", scale[:, 0].to(weight.dtype) if int8 else None)
        self.register_buffer("bias", bias)

    def forward(self, x):
        if self.scale is None:
            return F.linear(x, self.weight, self.bias)
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


class Layer(nn.Module):
    def __init__(self, config, parts, int8):
        super().__init__()
        self.heads, self.approximate = config["n_head"], APPROXIMATION[config["activation_function"]]
        for name in ("ln_1", "ln_2"):
            setattr(self, name, Norm(parts[f"{name}.weight"], parts[f"{name}.bias"], config["layer_norm_epsilon"]))
        for name, part in (("qkv", "attn.c_attn"), ("proj", "attn.c_proj"), ("fc", "mlp.c_fc"), ("out", "mlp.c_proj")):
            setattr(self, name, Linear(parts[f"{part}.weight"].t(), parts[f"{part}.bias"], int8))

    def make_room(self, shape):
        """shape (B, H, S, D) of the keys, and of the values."""
        for name in ("k", "v"):
            self.register_buffer(name, torch.zeros(shape, dtype=self.ln_1.weight.dtype, device=self.ln_1.weight.device))

    def forward(self, x, positions, mask):
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.ln_1(x)).chunk(3, dim=2))
        self.k[:, :, positions], self.v[:, :, positions] = k, v
        heads = F.scaled_dot_product_attention(q, self.k, self.v, attn_mask=mask)
        x = x + self.proj(heads.transpose(1, 2).flatten(2))
        return x + self.out(F.gelu(self.fc(self.ln_2(x)), approximate=self.approximate))


def _of(prefix, weights):
    return {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}


class Model(nn.Module):
    """forward(tokens (B, T), positions (T,)) -> the likeliest next tokens (B,)."""

    def __init__(self, config, weights, int8):
        super().__init__()
        self.config = config
        for name, weight in (("tokens", weights["wte.weight"]), ("places", weights["wpe.weight"])):
            self.register_buffer(name, weight)
        self.layers = nn.ModuleList(Layer(config, _of(f"h.{i}.", weights), int8) for i in range(config["n_layer"]))
        self.ln_f = Norm(weights["ln_f.weight"], weights["ln_f.bias"], config["layer_norm_epsilon"])
        self.head = Linear(self.tokens, None, int8)
        self.room = 0, 0

    def make_room(self, batch, length):
        """For so many sequences of so many tokens. A longer cache is kept, so that nothing is compiled twice."""
        if batch == self.room[0] and length <= self.room[1]:
            return
        self.room = batch, -(-length // MULTIPLE) * MULTIPLE
        shape = batch, self.config["n_head"], self.room[1], self.config["n_embd"] // self.config["n_head"]
        for layer in self.layers:
            layer.make_room(shape)
        self.register_buffer("causal", torch.ones(2 * [self.room[1]], dtype=torch.bool, device=self.tokens.device).tril())

    def forward(self, tokens, positions):
        x, mask = self.tokens[tokens] + self.places[positions], self.causal[positions]
        for layer in self.layers:
            x = layer(x, positions, mask)
        return self.head(self.ln_f(x[:, -1])).argmax(1)


def prefill(model, tokens, positions):
    return model(tokens, positions)


def decode(model, token, position):
    return model(token, position)


class Engine:
    version = f"torch {torch.__version__}"

    def __init__(self, source, folder, precision, threads):
        self.device = torch.device("cuda" if threads == "cuda" else "cpu")
        if threads == "cuda":
            from torch._inductor import config
            config.coordinate_descent_tuning = True  # as gpt-fast has it
        dtype = torch.bfloat16 if precision == "int8" else getattr(torch, precision)
        weights = {name: torch.from_numpy(w).to(self.device, dtype) for name, w in gpt2.weights(source).items()}
        self.model = Model(gpt2.config(source), weights, precision == "int8")
        self.weight_bytes = sum(module.weight.nbytes for module in self.model.modules() if isinstance(module, Linear))
        self.prefill = torch.compile(prefill, fullgraph=True, dynamic=False)
        self.decode = torch.compile(decode, mode="reduce-overhead", fullgraph=True, dynamic=False)

    @torch.no_grad()
    def generate(self, prompts, new):
        x = torch.tensor(prompts, device=self.device)
        B, T = x.shape
        self.model.make_room(B, T + new)
        token = self.prefill(self.model, x, torch.arange(T, device=self.device))
        position = torch.tensor([T], device=self.device)
        found, _ = [token], token.cpu()  # known now
        first = time.perf_counter()
        with sdpa_kernel(SDPBackend.MATH):  # as gpt-fast: attention of one token is code that the compiler makes
            for _ in range(new - 1):
                token = self.decode(self.model, token[:, None], position).clone()  # the next replay overwrites it
                position = position + 1
                found.append(token)
        ids = torch.stack(found, 1).tolist()
        return ids, [[first] + [time.perf_counter()] * (new - 1)] * B
