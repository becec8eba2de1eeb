"""GPT-2 124M's decoding step of 8 sequences of 1024 tokens, as calls of the CUDA kernels: what their machine code is
predicted for. The tensors hold nothing: the launches are only recorded."""
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastgpt.cuda import paged, sampling, weight_only
from fastgpt.paged import PagedCache

BATCH, CONTEXT, HEADS, D, PAGE, VOCABULARY = 8, 1024, 12, 64, 64, 50257
WIDTH = HEADS * D
CACHES = [torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
# (name, N, K, activation)
LINEARS = [("mlp in", 4 * WIDTH, WIDTH, "gelu_tanh"), ("mlp out", WIDTH, 4 * WIDTH, None), ("head", VOCABULARY, WIDTH, None)]


@dataclass(frozen=True)
class Case:
    """bytes: kernel -> what it must bring from memory, of those whose time that is. useful: of the widest loads in its loop,
    the share that brings them; the others find what the caches have."""
    name: str
    run: Callable
    bytes: dict
    useful: float = 1.0


def of_cache(dtype):
    """The KV cache's cases for a cache's dtype."""
    activations = torch.float16 if dtype == torch.float16 else torch.bfloat16
    pages, name = BATCH * CONTEXT // PAGE, str(dtype).removeprefix("torch.")
    row = D * dtype.itemsize + (4 if dtype.itemsize == 1 else 0)

    def cache():
        return PagedCache.empty(pages, HEADS, PAGE, D, dtype, lanes=1)

    def attend():
        tables = torch.arange(pages, dtype=torch.int32).view(BATCH, -1)
        lens = torch.ones(BATCH, dtype=torch.int64)
        sequences = paged.Sequences.of(tables, lens, lens * CONTEXT, torch.device("cpu"))
        paged.attend(torch.empty(BATCH, HEADS, D, dtype=activations), cache(), sequences)

    def store():
        k = torch.empty(BATCH, HEADS, D, dtype=activations)
        paged.write(cache(), k, k.clone(), torch.arange(BATCH) * CONTEXT)

    kernel = "paged_attention_bytes_kernel" if dtype.itemsize == 1 else "paged_attention_kernel"
    moved = {kernel: 2 * BATCH * HEADS * CONTEXT * row}
    return [Case(f"paged attention, {name} cache", attend, moved), Case(f"store_kv, {name} cache", store, {})]


def of_weights(format, dtype, name, N, K, activation):
    bits = int(format[3:])
    scales = 4 * N if bits == 8 else N * K // weight_only.GROUP * 2

    def multiply():
        tiles = -(-N // weight_only.OUTPUTS) * weight_only.OUTPUTS
        data = torch.empty(tiles * K * bits // 8, dtype=torch.uint8)
        scale = torch.empty(tiles) if bits == 8 else torch.empty(tiles * K // weight_only.GROUP, dtype=torch.bfloat16)
        packed = weight_only.WeightOnly(format, data, scale, torch.empty(N), N, K)
        weight_only.weight_only_linear(torch.empty(BATCH, K, dtype=dtype), packed, activation)

    # Beside a tile of 16 outputs the loop loads the tokens, 16 bits a number: the same ones for every block.
    useful = 16 * bits / (16 * bits + BATCH * 16)
    return Case(f"weight_only_linear, {format}, {name}", multiply, {"weight_only_kernel": N * K * bits // 8 + scales}, useful)


def of_sampling(name, **params):
    def draw():
        logits = torch.empty(BATCH, VOCABULARY, dtype=torch.bfloat16)
        rows = [sampling.Row(sampling.SamplingParams(**params), 1, 0, 5)] * BATCH
        sampling.sample(logits, sampling.draws_of(rows, logits.device))

    return Case(f"sample, {name}", draw, {})


def cases(arch):
    activations = torch.float16 if arch < 80 else torch.bfloat16  # sm_75 has no products of bfloat16
    return [*(case for dtype in CACHES for case in of_cache(dtype)),
            *(of_weights(format, activations, *linear) for format in ("int8", "int4") for linear in LINEARS),
            of_sampling("top 50", temperature=0.8, top_k=50)]
