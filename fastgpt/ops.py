"""The one seam between the model and its kernels: argument checks, the choice of an implementation, the override.

Nothing else chooses. An implementation is a module with functions of the same names and signatures as
`fastgpt.reference`, plus `why_not(op, device, *tensors)`: None when it takes the call, else the reason as text.
"""
import contextlib
import os

import torch

from fastgpt import cpu, paged, reference

OPS = ("layer_norm", "add_layer_norm", "gelu", "bias_gelu", "linear", "attention", "cross_entropy")
INFERENCE_OPS = ("store_kv", "paged_attention")  # without a backward
ACTIVATIONS = (None, "gelu", "gelu_tanh", "relu")
IMPLEMENTATIONS = {"reference": reference, "cpp": cpu}
# What is tried for a device, best first; the reference takes everything.
PREFERENCE = {"cpu": ("cpp", "reference")}


def _known_backend(name, source):
    if name != "auto" and name not in IMPLEMENTATIONS:
        raise ValueError(f"{source}={name!r}: expected one of auto, {', '.join(IMPLEMENTATIONS)}")
    return name


_forced = _known_backend(os.environ.get("FASTGPT_BACKEND", "auto"), "FASTGPT_BACKEND")


@contextlib.contextmanager
def backend(name):
    """Within this context every op runs on the implementation `name` ("reference", "cpp" or "auto"), or raises."""
    global _forced
    before, _forced = _forced, _known_backend(name, "backend")
    try:
        yield
    finally:
        _forced = before


def resolve(op, *tensors, device=None):
    """What answers `op` for these tensors, or for `device` alone: (implementation's name, the reason as text)."""
    device = device or tensors[0].device.type
    if _forced != "auto":
        reason = _why_not(_forced, op, device, tensors)
        if reason:
            raise RuntimeError(f"fastgpt.ops.{op}: the backend {_forced!r} was asked for, but {reason}")
        return _forced, "asked for by FASTGPT_BACKEND or ops.backend()"
    refusals = []
    for name in PREFERENCE.get(device, ("reference",)):
        reason = _why_not(name, op, device, tensors)
        if reason is None:
            return name, "; ".join(refusals) or f"the first choice on {device}"
        refusals.append(f"not {name}: {reason}")


def _why_not(name, op, device, tensors):
    return None if name == "reference" else IMPLEMENTATIONS[name].why_not(op, device, *tensors)


def _implementation(op, *tensors):
    name, _ = resolve(op, *(t for t in tensors if t is not None))
    return getattr(IMPLEMENTATIONS[name], op)


def _check(condition, message):
    """message: a function that makes the text: formatting shapes costs more than a small kernel."""
    if not condition:
        raise ValueError(message())


def _check_tensor(op, name, tensor):
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {getattr(tensor, 'layout', type(tensor).__name__)}")


def _check_floating(op, name, tensor):
    _check_tensor(op, name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must have a floating dtype, got {tensor.dtype}")


def _check_vector(op, name, vector, size, like):
    _check_floating(op, name, vector)
    _check(vector.shape == (size,), lambda: f"{op}: {name} must have shape ({size},), got {tuple(vector.shape)}")
    _check_same_device(op, name, vector, like)


def _check_same_device(op, name, tensor, like):
    _check(tensor.device == like.device,
           lambda: f"{op}: {name} is on {tensor.device}, the first argument on {like.device}")


def _check_same_dtype(op, **tensors):
    """Of the tensors that are not None; the first sets the dtype."""
    (first, like), *others = tensors.items()
    for name, tensor in others:
        if tensor is not None and tensor.dtype != like.dtype:
            raise ValueError(f"{op}: {first} is {like.dtype}, {name} {tensor.dtype}; give them one dtype, or use "
                             "autocast")


def _check_number(op, name, value, low, high=float("inf")):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
        raise ValueError(f"{op}: {name} must be a number in [{low}, {high}), got {value!r}")


def layer_norm(x, weight, bias=None, eps=1e-5):
    """Layer normalisation over the last dimension, statistics in float32 (Ba et al. 2016, arXiv:1607.06450).

    x (..., C), weight (C,), bias (C,) or None -> (..., C) in x's dtype. The dtypes may differ.
    """
    _check_norm("layer_norm", x, weight, bias, eps)
    return _implementation("layer_norm", x, weight, bias)(x, weight, bias, eps)


def add_layer_norm(x, residual, weight, bias=None, eps=1e-5):
    """The residual add and the layer norm after it, in one pass: (layer_norm(x + residual), x + residual).

    x and residual (..., C) of one shape, weight (C,), bias (C,) or None. The wider of their dtypes is that of both
    results: under autocast a bfloat16 branch joins a float32 residual stream.
    """
    _check_norm("add_layer_norm", x, weight, bias, eps)
    _check_floating("add_layer_norm", "residual", residual)
    _check(x.shape == residual.shape,
           lambda: f"add_layer_norm: residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    _check_same_device("add_layer_norm", "residual", residual, x)
    if x.dtype != residual.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    return _implementation("add_layer_norm", x, residual, weight, bias)(x, residual, weight, bias, eps)


def _check_norm(op, x, weight, bias, eps):
    _check_floating(op, "x", x)
    _check(x.dim() >= 1 and x.shape[-1] > 0,
           lambda: f"{op}: x must have a last dimension C >= 1, got shape {tuple(x.shape)}")
    _check_vector(op, "weight", weight, x.shape[-1], x)
    if bias is not None:
        _check_vector(op, "bias", bias, x.shape[-1], x)
    _check_number(op, "eps", eps, 0.0)


def gelu(x, approximate="none"):
    """GELU (Hendrycks & Gimpel 2016, arXiv:1606.08415), exact ("none") or by tanh ("tanh"), of any shape."""
    _check_gelu("gelu", x, approximate)
    return _implementation("gelu", x)(x, approximate)


def bias_gelu(x, bias, approximate="none"):
    """gelu(x + bias) in one pass: x (..., C), bias (C,)."""
    _check_gelu("bias_gelu", x, approximate)
    _check(x.dim() >= 1, lambda: "bias_gelu: x must have at least one dimension")
    _check_vector("bias_gelu", "bias", bias, x.shape[-1], x)
    return _implementation("bias_gelu", x, bias)(x, bias, approximate)


def _check_gelu(op, x, approximate):
    _check_floating(op, "x", x)
    _check(approximate in ("none", "tanh"),
           lambda: f"{op}: approximate must be 'none' or 'tanh', got {approximate!r}")


def linear(x, weight, bias=None, *, activation=None, residual=None):
    """activation(x @ weight.T + bias) + residual, in one pass.

    x (..., K), weight (N, K), bias (N,) or None, residual (..., N) or None -> (..., N).
    activation: None, "gelu" (exact), "gelu_tanh" or "relu". Under autocast the matrices are cast to its dtype.
    """
    _check_floating("linear", "x", x)
    _check_matrix("linear", x, weight)
    _check(activation in ACTIVATIONS, lambda: f"linear: activation must be one of {ACTIVATIONS}, got {activation!r}")
    N = weight.shape[0]
    if bias is not None:
        _check_vector("linear", "bias", bias, N, x)
    if residual is not None:
        _check_floating("linear", "residual", residual)
        _check(residual.shape == (*x.shape[:-1], N),
               lambda: f"linear: residual must have shape {(*x.shape[:-1], N)}, got {tuple(residual.shape)}")
        _check_same_device("linear", "residual", residual, x)
    x, weight, bias, residual = _autocast(x, weight, bias, residual)
    _check_same_dtype("linear", x=x, weight=weight, bias=bias, residual=residual)
    function = _implementation("linear", x, weight, bias, residual)
    return function(x, weight, bias, activation=activation, residual=residual)


def _check_matrix(op, x, weight):
    _check_floating(op, "weight", weight)
    _check(weight.dim() == 2, lambda: f"{op}: weight must have shape (N, K), got {tuple(weight.shape)}")
    _check(x.dim() >= 1 and x.shape[-1] == weight.shape[1],
           lambda: f"{op}: x must have K = {weight.shape[1]} (weight's second) in its last dimension, got "
                   f"{tuple(x.shape)}")
    _check_same_device(op, "weight", weight, x)


def attention(q, k, v, *, causal=True, scale=None, dropout_p=0.0, key_mask=None, seed=None):
    """Scaled dot-product attention without the T x S matrix in memory (Dao et al. 2022, arXiv:2205.14135).

    q (B, H, T, D), k and v (B, G, S, D) with H a multiple of G -> (B, H, T, D); any strides, D at most 256 for kernels.
    causal: query i sees the keys up to i + S - T (the last query sees them all: what a KV cache needs; PyTorch's
    is_causal aligns at the first instead, which differs when T != S). A query that sees no key gives 0.
    scale: of the scores, by default D ** -0.5. key_mask (B, S) bool: True where the key takes part.
    dropout_p in [0, 1) with `seed` (an int below 2**63; None draws one from torch's generator): the mask is
    `fastgpt.reference.dropout_keep_mask`.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_floating("attention", name, tensor)
        if tensor.dim() != 4:
            raise ValueError(f"attention: {name} must have 4 dimensions (batch, heads, length, head size), "
                             f"got shape {tuple(tensor.shape)}")
        _check_same_device("attention", name, tensor, q)
    (B, H, _, D), (G, S) = q.shape, k.shape[1:3]
    _check(k.shape == v.shape,
           lambda: f"attention: k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    _check(k.shape[0] == B and k.shape[3] == D,
           lambda: f"attention: k must have batch {B} and head size {D} as q, got {tuple(k.shape)}")
    _check(G > 0 and H % G == 0, lambda: f"attention: q's {H} heads must be a multiple of k's {G}")
    _check(D > 0, lambda: "attention: q must have a head size of at least 1, got 0")
    _check_number("attention", "dropout_p", dropout_p, 0.0, 1.0)
    if scale is not None:
        _check_number("attention", "scale", scale, float("-inf"))
    if seed is not None:
        _check(isinstance(seed, int) and 0 <= seed < 2 ** 63,
               lambda: f"attention: seed must be an int in [0, 2**63), got {seed!r}")
    if key_mask is not None:
        _check_tensor("attention", "key_mask", key_mask)
        _check(key_mask.shape == (B, S) and key_mask.dtype == torch.bool,
               lambda: f"attention: key_mask must be bool of shape {(B, S)}, got {key_mask.dtype} "
                       f"{tuple(key_mask.shape)}")
        _check_same_device("attention", "key_mask", key_mask, q)
    q, k, v = _autocast(q, k, v)
    _check_same_dtype("attention", q=q, k=k, v=v)
    if dropout_p > 0.0 and seed is None:
        seed = torch.randint(2 ** 63 - 1, ())
        # A compiled graph keeps it a tensor: an int would break the graph here, and Inductor miscompiles it as a symbol.
        seed = seed if torch.compiler.is_compiling() else int(seed)
    function = _implementation("attention", q, k, v)
    return function(q, k, v, causal=causal, scale=scale, dropout_p=dropout_p, key_mask=key_mask,
                    seed=0 if seed is None else seed)


def store_kv(cache, k, v, block_tables, query_lens, context_lens):
    """Writes the keys and values of new tokens into the pages of a `fastgpt.paged.PagedCache`.

    k and v (N, G, D): the tokens of all S sequences one after another, query_lens (S,) of each (int32 or int64, on the
    CPU, as the other integers), context_lens (S,) its length with them. block_tables (S, P) int32: a sequence's pages, in
    order.
    """
    _check_paged("store_kv", cache, k, block_tables, query_lens, context_lens)
    _check(v.shape == k.shape and k.shape[1] == cache.v.shape[1],
           lambda: f"store_kv: k and v must have shape (N, {cache.v.shape[1]}, {cache.v.shape[3]}), got {tuple(k.shape)} "
                   f"and {tuple(v.shape)}")
    _implementation("store_kv", k, v)(cache, k, v, block_tables, query_lens, context_lens)


def paged_attention(q, cache, block_tables, query_lens, context_lens, *, scale=None):
    """Causal attention over a paged KV cache (Kwon et al. 2023, arXiv:2309.06180), without a backward.

    q (N, H, D): the last query_lens[s] tokens of each sequence, one sequence after another, whose keys are in the cache
    already; H a multiple of the cache's G heads. The other arguments are those of `store_kv` -> (N, H, D). scale: of the
    scores, by default D ** -0.5. A row has the same bits for any pages, page size and split of its sequence into calls.
    """
    _check_paged("paged_attention", cache, q, block_tables, query_lens, context_lens)
    G = cache.v.shape[1]
    _check(q.shape[1] % G == 0, lambda: f"paged_attention: q's {q.shape[1]} heads must be a multiple of the cache's {G}")
    if scale is not None:
        _check_number("paged_attention", "scale", scale, float("-inf"))
    return _implementation("paged_attention", q)(q, cache, block_tables, query_lens, context_lens, scale=scale)


def _check_paged(op, cache, rows, block_tables, query_lens, context_lens):
    _check_floating(op, "q" if op == "paged_attention" else "k", rows)
    _check(cache.k.dtype == cache.v.dtype and (cache.k.dtype in paged.DTYPES or cache.k.dtype == torch.float64),
           lambda: f"{op}: cache must be of one dtype, float32, bfloat16 or int8, got {cache.k.dtype} and {cache.v.dtype}")
    _check(all(t.device.type == "cpu" for t in (block_tables, query_lens, context_lens)),
           lambda: f"{op}: block_tables, query_lens and context_lens must be on the CPU")
    pages, _, page_size, D = cache.v.shape
    _check(rows.dim() == 3 and rows.shape[2] == D,
           lambda: f"{op}: tokens must have shape (N, heads, {D}), got {tuple(rows.shape)}")
    S = block_tables.shape[0]
    _check(block_tables.dim() == 2 and block_tables.dtype == torch.int32,
           lambda: f"{op}: block_tables must be (S, P) int32, got {block_tables.dtype} {tuple(block_tables.shape)}")
    for name, lens in (("query_lens", query_lens), ("context_lens", context_lens)):
        _check(lens.shape == (S,) and lens.dtype in (torch.int32, torch.int64),
               lambda name=name, lens=lens: f"{op}: {name} must be integers of shape ({S},), got {lens.dtype} "
                                            f"{tuple(lens.shape)}")
    _check(int(query_lens.sum()) == rows.shape[0] and bool((query_lens >= 0).all()),
           lambda: f"{op}: query_lens must add up to the {rows.shape[0]} tokens, got {query_lens.tolist()}")
    _check(bool((query_lens <= context_lens).all()) and
           bool((context_lens <= block_tables.shape[1] * page_size).all()),
           lambda: f"{op}: context_lens must be at least query_lens and at most {block_tables.shape[1] * page_size} (pages "
                   f"in a block table times page size), got {context_lens.tolist()}")
    for table, length in zip(block_tables.tolist(), context_lens.tolist()):
        used = table[:-(-length // page_size)]
        _check(all(0 <= page < pages for page in used),
               lambda used=used: f"{op}: block_tables must name pages in [0, {pages}), got {used}")


def cross_entropy(x, weight, targets, *, bias=None, ignore_index=-100, reduction="mean"):
    """The loss of a language-model head, cross_entropy(x @ weight.T + bias, targets), without the logits in memory.

    x (..., K), weight (V, K), bias (V,) or None, targets (...) int64 in [0, V) or ignore_index.
    reduction "mean" (over the targets not ignored; NaN when there are none, as in PyTorch) or "sum" -> float32
    scalar; "none" -> float32 (...); float64 stays. A graph kept by retain_graph=True goes on needing the gradients that
    it has handed out: do not change them in place. Method: chunks of rows (Wijmans et al. 2024, arXiv:2411.09009;
    Liger Kernel).
    """
    _check_floating("cross_entropy", "x", x)
    _check_matrix("cross_entropy", x, weight)
    if bias is not None:
        _check_vector("cross_entropy", "bias", bias, weight.shape[0], x)
    _check_tensor("cross_entropy", "targets", targets)
    _check(isinstance(ignore_index, int), lambda: f"cross_entropy: ignore_index must be an int, got {ignore_index!r}")
    shape = tuple(x.shape[:-1])
    _check(targets.shape == shape and targets.dtype == torch.int64,
           lambda: f"cross_entropy: targets must be int64 of shape {shape}, got {targets.dtype} {tuple(targets.shape)}")
    _check_same_device("cross_entropy", "targets", targets, x)
    _check(reduction in ("mean", "sum", "none"),
           lambda: f"cross_entropy: reduction must be mean, sum or none, got {reduction!r}")
    x, weight, bias = _autocast(x, weight, bias)
    _check_same_dtype("cross_entropy", x=x, weight=weight, bias=bias)
    function = _implementation("cross_entropy", x, weight, bias)
    return function(x, weight, targets, bias=bias, ignore_index=ignore_index, reduction=reduction)


def _autocast(*tensors):
    """The matrices of a product in autocast's dtype, when it is on for their device."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
