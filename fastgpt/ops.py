"""The one seam between the model and its kernels: argument checks, the choice of an implementation, the override.

Nothing else chooses. An implementation is a dictionary of functions of the same names and signatures as
`fastgpt.reference`, and `why_not(op, device, *tensors, **options)`: None when it takes the call, else the reason as text.
"""
import contextlib
import os

import torch

from fastgpt import cpu, cuda, kernels, paged, reference
from fastgpt.autograd.cast import autocast

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


def add_layer_norm(x, residual, weight, bias=None, eps=1e-5, *, dropout_p=0.0, seed=None):
    """Dropout, the residual add and the layer norm after it, in one pass: (layer_norm(total), total = dropout(x) + residual).

    x and residual (..., C) of one shape, weight (C,), bias (C,) or None. The wider of their dtypes is that of both
    results: under autocast a bfloat16 branch joins a float32 residual stream. dropout_p in [0, 1), seed: as `attention`
    has them; the mask is `fastgpt.reference.dropout_keep_mask` for one batch, one head and all the rows.
    """
    _check_norm("add_layer_norm", x, weight, bias, eps)
    _check_floating("add_layer_norm", "residual", residual)
    _check(x.shape == residual.shape,
           lambda: f"add_layer_norm: residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    _check_same_device("add_layer_norm", "residual", residual, x)
    seed = _dropout_seed("add_layer_norm", dropout_p, seed)
    if x.dtype != residual.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    function = _implementation("add_layer_norm", x, residual, weight, bias)
    return function(x, residual, weight, bias, eps, dropout_p=dropout_p, seed=seed)


def _dropout_seed(op, dropout_p, seed):
    """The seed of a checked call's mask: drawn from torch's generator where it is None; 0 without dropout."""
    _check_number(op, "dropout_p", dropout_p, 0.0, 1.0)
    _check(seed is None or isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2 ** 63,
           lambda: f"{op}: seed must be an int in [0, 2**63), got {seed!r}")
    if dropout_p == 0.0:
        return 0
    if seed is not None:
        return seed
    seed = torch.randint(2 ** 63 - 1, (), device="cpu")
    # A compiled graph keeps it a tensor: an int would break the graph here, and Inductor miscompiles it as a symbol.
    return seed if torch.compiler.is_compiling() else int(seed)


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


def linear(x, weight, bias=None, *, activation=None, residual=None, input_activation=None):
    """activation(input_activation(x) @ weight.T + bias) + residual, on the CPU in one pass behind the input's activation.

    x (..., K), weight (N, K), bias (N,) or None, residual (..., N) or None -> (..., N).
    activations: None, "gelu" (exact), "gelu_tanh" or "relu"; on the CPU backward keeps x and not input_activation(x). Under
    autocast the matrices are cast to its dtype.
    """
    _check_floating("linear", "x", x)
    _check_matrix("linear", x, weight)
    for name, value in (("activation", activation), ("input_activation", input_activation)):
        _check(value in ACTIVATIONS,
               lambda name=name, value=value: f"linear: {name} must be one of {ACTIVATIONS}, got {value!r}")
    N = weight.shape[0]
    if bias is not None:
        _check_vector("linear", "bias", bias, N, x)
    if residual is not None:
        _check_floating("linear", "residual", residual)
        _check(residual.shape == (*x.shape[:-1], N),
               lambda: f"linear: residual must have shape {(*x.shape[:-1], N)}, got {tuple(residual.shape)}")
        _check_same_device("linear", "residual", residual, x)
    x, weight, bias, residual = autocast(x, weight, bias, residual)
    _check_same_dtype("linear", x=x, weight=weight, bias=bias, residual=residual)
    function = _implementation("linear", x, weight, bias, residual)
    return function(x, weight, bias, activation=activation, residual=residual, input_activation=input_activation)


def _check_matrix(op, x, weight):
    _check_floating(op, "weight", weight)
    _check(weight.dim() == 2, lambda: f"{op}: weight must have shape (N, K), got {tuple(weight.shape)}")
    _check(x.dim() >= 1 and x.shape[-1] == weight.shape[1],
           lambda: f"{op}: x must have K = {weight.shape[1]} (weight's second) in its last dimension, got "
                   f"{tuple(x.shape)}")
    _check_same_device(op, "weight", weight, x)


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
    _check_attended("attention", q, k, v, key_mask)
    _check_scores("attention", scale, causal, window)
    q, k, v = autocast(q, k, v)
    _check_same_dtype("attention", q=q, k=k, v=v)
    seed = _dropout_seed("attention", dropout_p, seed)
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
    _check_attended("attention_weights", q, k, k, key_mask)
    _check_scores("attention_weights", scale, causal, window)
    _check_tensor("attention_weights", "lse", lse)
    dtype = torch.promote_types(q.dtype, torch.float32)
    _check(lse.shape == q.shape[:3] and lse.dtype == dtype, lambda: f"attention_weights: lse must be {dtype} of shape "
           f"{tuple(q.shape[:3])}, got {lse.dtype} {tuple(lse.shape)}")
    _check_same_device("attention_weights", "lse", lse, q)
    _check(isinstance(queries, (tuple, list)) and len(queries) == 2,
           lambda: f"attention_weights: queries must be (heads, rows), got {queries!r}")
    queries = tuple(_chosen(*which, q.device) for which in zip(("heads", "rows"), queries, q.shape[1:3]))
    q, k, lse = (t.detach() for t in (*autocast(q, k), lse))
    _check_same_dtype("attention_weights", q=q, k=k)
    function = _implementation("attention_weights", q, k)
    return function(q, k, lse, queries=queries, causal=causal, scale=scale, key_mask=key_mask, window=window)


def _chosen(name, numbers, count, device):
    """Some of the numbers below count, or for None all, as an int64 tensor."""
    if numbers is None:
        return torch.arange(count, device=device)
    numbers = numbers.tolist() if isinstance(numbers, torch.Tensor) else numbers
    numbers = [numbers] if isinstance(numbers, int) else list(numbers)
    wrong = [n for n in numbers if type(n) is not int or not 0 <= n < count]
    _check(not wrong, lambda: f"attention_weights: {name} must be ints in [0, {count}), got {wrong[0]!r}")
    return torch.tensor(numbers, dtype=torch.int64, device=device)


def _check_attended(op, q, k, v, key_mask):
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_floating(op, name, tensor)
        _check(tensor.dim() == 4, lambda name=name, tensor=tensor: f"{op}: {name} must have 4 dimensions (batch, heads, "
                                                                   f"length, head size), got shape {tuple(tensor.shape)}")
    (B, H, _, D), (G, S) = q.shape, k.shape[1:3]
    _check_heads(op, q, k, v, H, G, D)
    _check(k.shape[0] == B, lambda: f"{op}: k must have batch {B} and head size {D} as q, got {tuple(k.shape)}")
    if key_mask is not None:
        _check_tensor(op, "key_mask", key_mask)
        _check(key_mask.shape == (B, S) and key_mask.dtype == torch.bool,
               lambda: f"{op}: key_mask must be bool of shape {(B, S)}, got {key_mask.dtype} {tuple(key_mask.shape)}")
        _check_same_device(op, "key_mask", key_mask, q)


def _check_heads(op, q, k, v, H, G, D):
    """Query heads H, key heads G, head size D of q."""
    for name, tensor in (("k", k), ("v", v)):
        _check_same_device(op, name, tensor, q)
    _check(k.shape == v.shape, lambda: f"{op}: k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    _check(k.shape[-1] == D, lambda: f"{op}: k must have head size {D} as q, got {tuple(k.shape)}")
    _check(G > 0 and H % G == 0, lambda: f"{op}: q's {H} heads must be a multiple of k's {G}")
    _check(D > 0, lambda: f"{op}: q must have a head size of at least 1, got 0")


def _check_scores(op, scale, causal, window):
    if scale is not None:
        _check_number(op, "scale", scale, float("-inf"))
    if window is not None:
        _check(isinstance(window, int) and not isinstance(window, bool) and window >= 1,
               lambda: f"{op}: window must be an int of at least 1, got {window!r}")
        _check(causal, lambda: f"{op}: a window needs causal=True")


def packed_attention(q, k, v, q_starts, k_starts, *, causal=True, scale=None, dropout_p=0.0, seed=None, window=None):
    """`attention` within each of B sequences that lie one behind another, without padding.

    q (N, H, D), k and v (M, G, D) -> (N, H, D). Sequence b's queries are the rows q_starts[b] .. q_starts[b + 1] - 1, its
    keys those of k_starts; both (B + 1,) int32, from 0 to N and to M, on q's device (where that is a GPU, the call
    waits for it to read them). The other arguments are those of `attention`.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_floating("packed_attention", name, tensor)
        _check(tensor.dim() == 3, lambda name=name, tensor=tensor: f"packed_attention: {name} must have shape (rows, heads, "
                                                                   f"head size), got {tuple(tensor.shape)}")
    _check_heads("packed_attention", q, k, v, q.shape[1], k.shape[1], q.shape[2])
    _check_scores("packed_attention", scale, causal, window)
    _check(q_starts.shape == k_starts.shape,
           lambda: f"packed_attention: q_starts and k_starts must have one shape, got {tuple(q_starts.shape)} and "
                   f"{tuple(k_starts.shape)}")
    _check_starts("q_starts", q_starts, q)
    _check_starts("k_starts", k_starts, k)
    q, k, v = autocast(q, k, v)
    _check_same_dtype("packed_attention", q=q, k=k, v=v)
    seed = _dropout_seed("packed_attention", dropout_p, seed)
    function = _implementation("packed_attention", q, k, v, window=window, dropout_p=dropout_p)
    return function(q, k, v, q_starts, k_starts, causal=causal, scale=scale, dropout_p=dropout_p, seed=seed,
                    window=window)


def _check_starts(name, starts, rows):
    _check_tensor("packed_attention", name, starts)
    _check_same_device("packed_attention", name, starts, rows)
    _check(starts.dim() == 1 and len(starts) >= 1 and starts.dtype == torch.int32,
           lambda: f"packed_attention: {name} must be int32 of shape (sequences + 1,), got {starts.dtype} "
                   f"{tuple(starts.shape)}")
    if torch.compiler.is_compiling():
        return
    values = starts.tolist()
    _check(values[0] == 0 and values[-1] == len(rows) and values == sorted(values),
           lambda: f"packed_attention: {name} must rise from 0 to the {len(rows)} rows, got {values}")


def store_kv(cache, k, v, block_tables, query_lens, context_lens):
    """Writes the keys and values of new tokens into the pages of a `fastgpt.paged.PagedCache`.

    k and v (N, G, D): the tokens of all S sequences one after another, query_lens (S,) of each (int32 or int64, on the
    CPU, as the other integers), context_lens (S,) its length with them. block_tables (S, P) int32: a sequence's pages, in
    order.
    """
    _check_paged("store_kv", cache, k, block_tables, query_lens, context_lens)
    _check_floating("store_kv", "v", v)
    _check_same_device("store_kv", "v", v, k)
    _check(v.shape == k.shape and k.shape[1] == cache.v.shape[1],
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
    _check_paged("paged_attention", cache, q, block_tables, query_lens, context_lens)
    G = cache.v.shape[1]
    _check(q.shape[1] % G == 0, lambda: f"paged_attention: q's {q.shape[1]} heads must be a multiple of the cache's {G}")
    _check_scores("paged_attention", scale, True, window)
    function = _implementation("paged_attention", q, cache=cache, window=window)
    return function(q, cache, block_tables, query_lens, context_lens, scale=scale, window=window)


def _check_paged(op, cache, rows, block_tables, query_lens, context_lens):
    _check_floating(op, "q" if op == "paged_attention" else "k", rows)
    _check(cache.k.dtype == cache.v.dtype and (cache.k.dtype in paged.DTYPES or cache.k.dtype == torch.float64),
           lambda: f"{op}: cache must be of one dtype, a paged.DTYPES, got {cache.k.dtype} and {cache.v.dtype}")
    for name in ("k", "v", "k_scale", "v_scale"):
        if getattr(cache, name) is not None:
            _check_same_device(op, f"cache.{name}", getattr(cache, name), rows)
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
    _check_number("cross_entropy", "label_smoothing", label_smoothing, 0.0, 1.0)
    _check_number("cross_entropy", "z_loss", z_loss, 0.0)
    x, weight, bias = autocast(x, weight, bias)
    _check_same_dtype("cross_entropy", x=x, weight=weight, bias=bias)
    function = _implementation("cross_entropy", x, weight, bias)
    return function(x, weight, targets, bias=bias, ignore_index=ignore_index, reduction=reduction,
                    label_smoothing=label_smoothing, z_loss=z_loss)
