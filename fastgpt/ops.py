"""The one seam between the model and its kernels: the arguments' check, the choice of an implementation, the override.

Nothing else chooses. An implementation is a dictionary of functions of the same names and signatures as
`fastgpt.reference`, and `why_not(op, device, *tensors, **options)`: None when it takes the call, else the reason as text.
"""
import contextlib
import os

import torch

from fastgpt import cpu, cuda, kernels, reference
from fastgpt.checks import (
    check,
    check_attended,
    check_dimensions,
    check_floating,
    check_gelu,
    check_heads,
    check_matrix,
    check_norm,
    check_number,
    check_paged,
    check_same_device,
    check_same_dtype,
    check_scores,
    check_starts,
    check_tensor,
    check_vector,
    chosen,
    dropout_seed,
)
from fastgpt.pooled import autocast

OPS = ("layer_norm", "add_layer_norm", "gelu", "bias_gelu", "linear", "attention", "packed_attention", "cross_entropy")
CACHE_OPS = ("store_kv", "paged_attention")
INFERENCE_OPS = (*CACHE_OPS, "attention_weights")  # without a backward
ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu")
IMPLEMENTATIONS = {"reference": vars(reference), "cpp": cpu.KERNELS, "triton": kernels.KERNELS, "cuda": cuda.KERNELS}
REFUSALS = {"reference": lambda *call, **options: None, "cpp": cpu.why_not, "triton": kernels.why_not,
            "cuda": cuda.why_not}
# What is tried for a device, best first; the reference takes everything.
PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")}
CACHE_PREFERENCE = {**PREFERENCE, "cuda": ("cuda", "reference")}  # of CACHE_OPS


def _known_backend(name, source):
    if name != "auto" and name not in IMPLEMENTATIONS:
        raise ValueError(f"{source}={name!r}: expected one of auto, {', '.join(IMPLEMENTATIONS)}")
    return name


_forced = _known_backend(os.environ.get("FASTGPT_BACKEND", "auto"), "FASTGPT_BACKEND")


@contextlib.contextmanager
def backend(name):
    """Within this context every op runs on the implementation `name` ("reference", "cpp", "triton", "cuda" or "auto"), or raises."""
    global _forced
    before, _forced = _forced, _known_backend(name, "backend")
    try:
        yield
    finally:
        _forced = before


def forced():
    """The implementation that was asked for, or "auto"."""
    return _forced


def resolve(op, *tensors, device=None, **options):
    """What answers `op` for these tensors, or for `device` alone: (implementation's name, the reason as text).

    options: those arguments of the op that not every implementation knows, where they are asked for.
    """
    device = device or tensors[0].device.type
    if _forced != "auto":
        reason = REFUSALS[_forced](op, device, *tensors, **options)
        if reason:
            raise RuntimeError(f"fastgpt.ops.{op}: the backend {_forced!r} was asked for, but {reason}")
        return _forced, "asked for by FASTGPT_BACKEND or ops.backend()"
    refusals = []
    for name in (CACHE_PREFERENCE if op in CACHE_OPS else PREFERENCE).get(device, ("reference",)):
        reason = REFUSALS[name](op, device, *tensors, **options)
        if reason is None:
            return name, "; ".join(refusals) or f"the first choice on {device}"
        refusals.append(f"not {name}: {reason}")


def _implementation(op, *tensors, **options):
    name, _ = resolve(op, *(t for t in tensors if t is not None), **options)
    return IMPLEMENTATIONS[name][op]


def layer_norm(x, weight, bias=None, eps=1e-5):
    """Layer normalisation over the last dimension, statistics in float32 (Ba et al. 2016, arXiv:1607.06450).

    x (..., C), weight (C,), bias (C,) or None -> (..., C) in x's dtype. The dtypes may differ.
    """
    check_norm("layer_norm", x, weight, bias, eps)
    return _implementation("layer_norm", x, weight, bias)(x, weight, bias, eps)


def add_layer_norm(x, residual, weight, bias=None, eps=1e-5, *, dropout_p=0.0, seed=None):
    """Dropout, the residual add and the layer norm after it, in one pass: (layer_norm(total), total = dropout(x) + residual).

    x and residual (..., C) of one shape, weight (C,), bias (C,) or None. The wider of their dtypes is that of both
    results: under autocast a bfloat16 branch joins a float32 residual stream. dropout_p in [0, 1), seed: as `attention`
    has them; the mask is `fastgpt.reference.dropout_keep_mask` for one batch, one head and all the rows.
    """
    check_norm("add_layer_norm", x, weight, bias, eps)
    check_floating("add_layer_norm", "residual", residual)
    check(x.shape == residual.shape,
           lambda: f"add_layer_norm: residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    check_same_device("add_layer_norm", "residual", residual, x)
    seed = dropout_seed("add_layer_norm", dropout_p, seed)
    if x.dtype != residual.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    function = _implementation("add_layer_norm", x, residual, weight, bias)
    return function(x, residual, weight, bias, eps, dropout_p=dropout_p, seed=seed)


def gelu(x, approximate="none"):
    """GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415), exact ("none") or by tanh ("tanh"), of any shape."""
    check_gelu("gelu", x, approximate)
    return _implementation("gelu", x)(x, approximate)


def bias_gelu(x, bias, approximate="none"):
    """gelu(x + bias) in one pass: x (..., C), bias (C,)."""
    check_gelu("bias_gelu", x, approximate)
    check(x.dim() >= 1, lambda: "bias_gelu: x must have at least one dimension")
    check_vector("bias_gelu", "bias", bias, x.shape[-1], x)
    return _implementation("bias_gelu", x, bias)(x, bias, approximate)


def linear(x, weight, bias=None, *, activation=None, residual=None):
    """activation(x @ weight.T + bias) + residual, in one pass on the CPU.

    x (..., K), weight (N, K), bias (N,) or None, residual (..., N) or None -> (..., N).
    activation: None, "gelu" (exact), "gelu_tanh" or "relu". Under autocast the matrices are cast to its dtype.
    """
    check_floating("linear", "x", x)
    check_matrix("linear", x, weight)
    check(activation in ACTIVATIONS, lambda: f"linear: activation must be one of {ACTIVATIONS}, got {activation!r}")
    N = weight.shape[0]
    if bias is not None:
        check_vector("linear", "bias", bias, N, x)
    if residual is not None:
        check_floating("linear", "residual", residual)
        check(residual.shape == (*x.shape[:-1], N),
               lambda: f"linear: residual must have shape {(*x.shape[:-1], N)}, got {tuple(residual.shape)}")
        check_same_device("linear", "residual", residual, x)
    x, weight, bias, residual = autocast(x, weight, bias, residual)
    check_same_dtype("linear", x=x, weight=weight, bias=bias, residual=residual)
    function = _implementation("linear", x, weight, bias, residual)
    return function(x, weight, bias, activation=activation, residual=residual)


def attention(q, k, v, *, causal=True, scale=None, dropout_p=0.0, key_mask=None, seed=None, window=None,
              return_lse=False):
    """Scaled dot-product attention without the T x S matrix in memory (Dao et al. 2022, arXiv:2205.14135).

    q (B, H, T, D), k and v (B, G, S, D) with H a multiple of G -> (B, H, T, D); any strides, D at most 256 for kernels.
    causal: query i sees the keys up to i + S - T (the last query sees them all: what a KV cache needs; PyTorch's
    is_causal aligns at the first instead, which differs when T != S). A query that sees no key gives 0.
    scale: of the scores, by default D ** -0.5. key_mask (B, S) bool: True where the key takes part.
    dropout_p in [0, 1) with `seed` (an int below 2**63; None draws one from torch's generator): the mask is
    `fastgpt.reference.dropout_keep_mask`. window: how many keys a query sees at most, its own and those before it.
    return_lse: also each row's log of the sum of e**score, (B, H, T) float32, -inf for a row that sees no key; it has no
    gradient.
    """
    check_attended("attention", q, k, v, key_mask)
    check_scores("attention", scale, causal, window)
    q, k, v = autocast(q, k, v)
    check_same_dtype("attention", q=q, k=k, v=v)
    seed = dropout_seed("attention", dropout_p, seed)
    function = _implementation("attention", q, k, v, window=window)
    return function(q, k, v, causal=causal, scale=scale, dropout_p=dropout_p, key_mask=key_mask, seed=seed,
                    window=window, return_lse=return_lse)


def attention_weights(q, k, lse, *, queries=(None, None), causal=True, scale=None, key_mask=None, window=None):
    """The weights with which `attention` adds up the values, before dropout, of chosen queries alone; without a backward.

    q (B, H, T, D), k (B, G, S, D), lse (B, H, T): what `attention` took and, with return_lse, gave, under the same options.
    queries: (heads, rows) of q, each a sequence of ints, a tensor of them (a GPU is waited for, a compiled graph broken), or
    None for all -> (B, heads, rows, S) in q's dtype, as attention multiplies them; 0 where a key is not seen. What the last
    token attends to, in all heads:

        out, lse = ops.attention(q, k, v, return_lse=True)
        weights = ops.attention_weights(q, k, lse, queries=(None, [q.shape[2] - 1]))
    """
    check_attended("attention_weights", q, k, k, key_mask)
    check_scores("attention_weights", scale, causal, window)
    check_tensor("attention_weights", "lse", lse)
    dtype = torch.promote_types(q.dtype, torch.float32)
    check(lse.shape == q.shape[:3] and lse.dtype == dtype, lambda: f"attention_weights: lse must be {dtype} of shape "
           f"{tuple(q.shape[:3])}, got {lse.dtype} {tuple(lse.shape)}")
    check_same_device("attention_weights", "lse", lse, q)
    check(isinstance(queries, (tuple, list)) and len(queries) == 2,
           lambda: f"attention_weights: queries must be (heads, rows), got {queries!r}")
    queries = tuple(torch.tensor(chosen("attention_weights", *which), dtype=torch.int64, device=q.device)
                    for which in zip(("heads", "rows"), queries, q.shape[1:3]))
    q, k, lse = (t.detach() for t in (*autocast(q, k), lse))
    check_same_dtype("attention_weights", q=q, k=k)
    function = _implementation("attention_weights", q, k)
    return function(q, k, lse, queries=queries, causal=causal, scale=scale, key_mask=key_mask, window=window)


def packed_attention(q, k, v, q_starts, k_starts, *, causal=True, scale=None, dropout_p=0.0, seed=None, window=None):
    """`attention` within each of B sequences that lie one behind another, without padding.

    q (N, H, D), k and v (M, G, D) -> (N, H, D). Sequence b's queries are the rows q_starts[b] .. q_starts[b + 1] - 1, its
    keys those of k_starts; both (B + 1,) int32, from 0 to N and to M, on q's device (where that is a GPU, the call
    waits for it to read them). The other arguments are those of `attention`.
    """
    check_dimensions("packed_attention", "rows, heads, head size", q=q, k=k, v=v)
    check_heads("packed_attention", q, k, v, q.shape[1], k.shape[1], q.shape[2])
    check_scores("packed_attention", scale, causal, window)
    check(q_starts.shape == k_starts.shape,
           lambda: f"packed_attention: q_starts and k_starts must have one shape, got {tuple(q_starts.shape)} and "
                   f"{tuple(k_starts.shape)}")
    check_starts("q_starts", q_starts, q)
    check_starts("k_starts", k_starts, k)
    q, k, v = autocast(q, k, v)
    check_same_dtype("packed_attention", q=q, k=k, v=v)
    seed = dropout_seed("packed_attention", dropout_p, seed)
    function = _implementation("packed_attention", q, k, v, window=window, dropout_p=dropout_p)
    return function(q, k, v, q_starts, k_starts, causal=causal, scale=scale, dropout_p=dropout_p, seed=seed,
                    window=window)


def store_kv(cache, k, v, block_tables, query_lens, context_lens):
    """Writes the keys and values of new tokens into the pages of a `fastgpt.paged.PagedCache`.

    k and v (N, G, D): the tokens of all S sequences one after another, query_lens (S,) of each (int32 or int64, on the
    CPU, as the other integers), context_lens (S,) its length with them. block_tables (S, P) int32: a sequence's pages, in
    order.
    """
    check_paged("store_kv", cache, k, block_tables, query_lens, context_lens)
    check_floating("store_kv", "v", v)
    check_same_device("store_kv", "v", v, k)
    check(v.shape == k.shape and k.shape[1] == cache.v.shape[1],
           lambda: f"store_kv: k and v must have shape (N, {cache.v.shape[1]}, {cache.v.shape[3]}), got {tuple(k.shape)} "
                   f"and {tuple(v.shape)}")
    _implementation("store_kv", k, v, cache=cache)(cache, k, v, block_tables, query_lens, context_lens)


def paged_attention(q, cache, block_tables, query_lens, context_lens, *, scale=None, window=None):
    """Causal attention over a paged KV cache (Kwon et al. 2023, arXiv:2309.06180), without a backward.

    q (N, H, D): the last query_lens[s] tokens of each sequence, one sequence after another, whose keys are in the cache
    already; H a multiple of the cache's G heads. The other arguments are those of `store_kv` -> (N, H, D). scale: of the
    scores, by default D ** -0.5. window: how many keys a query sees at most, its own and those before it. On the CPU
    a row has the same bits for any pages, page size and split of its sequence into calls.
    """
    check_paged("paged_attention", cache, q, block_tables, query_lens, context_lens)
    G = cache.v.shape[1]
    check(q.shape[1] % G == 0, lambda: f"paged_attention: q's {q.shape[1]} heads must be a multiple of the cache's {G}")
    check_scores("paged_attention", scale, True, window)
    function = _implementation("paged_attention", q, cache=cache, window=window)
    return function(q, cache, block_tables, query_lens, context_lens, scale=scale, window=window)


def cross_entropy(x, weight, targets, *, bias=None, ignore_index=-100, reduction="mean", label_smoothing=0.0,
                  z_loss=0.0):
    """The loss of a language-model head, cross_entropy(x @ weight.T + bias, targets), without the logits in memory.

    x (..., K), weight (V, K), bias (V,) or None, targets (...) int64 in [0, V) or ignore_index; another target raises on the
    CPU and makes the loss NaN in the Triton kernels. label_smoothing in [0, 1): the share of the target that all classes have alike.
    z_loss: adds z_loss * log(sum of e**logit)**2 to each loss, which keeps the logits from drifting (Chowdhery et al. 2022,
    arXiv:2204.02311). reduction "mean" (over the targets not ignored; NaN when there are none, as in PyTorch) or "sum" -> float32
    scalar; "none" -> float32 (...); float64 stays. A graph kept by retain_graph=True goes on needing the gradients that
    it has handed out: do not change them in place. Method: chunks of rows (Wijmans et al. 2024, arXiv:2411.09009;
    Liger Kernel).
    """
    check_floating("cross_entropy", "x", x)
    check_matrix("cross_entropy", x, weight)
    if bias is not None:
        check_vector("cross_entropy", "bias", bias, weight.shape[0], x)
    check_tensor("cross_entropy", "targets", targets)
    check(isinstance(ignore_index, int), lambda: f"cross_entropy: ignore_index must be an int, got {ignore_index!r}")
    shape = tuple(x.shape[:-1])
    check(targets.shape == shape and targets.dtype == torch.int64,
           lambda: f"cross_entropy: targets must be int64 of shape {shape}, got {targets.dtype} {tuple(targets.shape)}")
    check_same_device("cross_entropy", "targets", targets, x)
    check(reduction in ("mean", "sum", "none"),
           lambda: f"cross_entropy: reduction must be mean, sum or none, got {reduction!r}")
    check_number("cross_entropy", "label_smoothing", label_smoothing, 0.0, 1.0)
    check_number("cross_entropy", "z_loss", z_loss, 0.0)
    x, weight, bias = autocast(x, weight, bias)
    check_same_dtype("cross_entropy", x=x, weight=weight, bias=bias)
    function = _implementation("cross_entropy", x, weight, bias)
    return function(x, weight, targets, bias=bias, ignore_index=ignore_index, reduction=reduction,
                    label_smoothing=label_smoothing, z_loss=z_loss)
