"""What the ops ask of their arguments: a wrong one is an error that names the op, the argument, and what it got."""
import torch

from fastgpt import paged


def check(condition, message):
    """message: a function that makes the text: formatting shapes costs more than a small kernel."""
    if not condition:
        raise ValueError(message())


def check_tensor(op, name, tensor):
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
        raise TypeError(f"{op}: {name} must be a dense tensor, got {getattr(tensor, 'layout', type(tensor).__name__)}")


def check_floating(op, name, tensor):
    check_tensor(op, name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must have a floating dtype, got {tensor.dtype}")


def check_vector(op, name, vector, size, like):
    check_floating(op, name, vector)
    check(vector.shape == (size,), lambda: f"{op}: {name} must have shape ({size},), got {tuple(vector.shape)}")
    check_same_device(op, name, vector, like)


def check_same_device(op, name, tensor, like):
    check(tensor.device == like.device,
           lambda: f"{op}: {name} is on {tensor.device}, the first argument on {like.device}")


def check_same_dtype(op, **tensors):
    """Of the tensors that are not None; the first sets the dtype."""
    (first, like), *others = tensors.items()
    for name, tensor in others:
        if tensor is not None and tensor.dtype != like.dtype:
            raise ValueError(f"{op}: {first} is {like.dtype}, {name} {tensor.dtype}; give them one dtype, or use "
                             "autocast")


def check_number(op, name, value, low, high=float("inf")):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
        raise ValueError(f"{op}: {name} must be a number in [{low}, {high}), got {value!r}")


def dropout_seed(op, dropout_p, seed):
    """The seed of a checked call's mask: drawn from torch's generator where it is None; 0 without dropout."""
    check_number(op, "dropout_p", dropout_p, 0.0, 1.0)
    check(seed is None or isinstance(seed, int) and not isinstance(seed, bool) and 0 <= seed < 2 ** 63,
           lambda: f"{op}: seed must be an int in [0, 2**63), got {seed!r}")
    if dropout_p == 0.0:
        return 0
    if seed is not None:
        return seed
    seed = torch.randint(2 ** 63 - 1, (), device="cpu")
    # A compiled graph keeps it a tensor: an int would break the graph here, and Inductor miscompiles it as a symbol.
    return seed if torch.compiler.is_compiling() else int(seed)


def check_norm(op, x, weight, bias, eps):
    check_floating(op, "x", x)
    check(x.dim() >= 1 and x.shape[-1] > 0,
           lambda: f"{op}: x must have a last dimension C >= 1, got shape {tuple(x.shape)}")
    check_vector(op, "weight", weight, x.shape[-1], x)
    if bias is not None:
        check_vector(op, "bias", bias, x.shape[-1], x)
    check_number(op, "eps", eps, 0.0)


def check_gelu(op, x, approximate):
    check_floating(op, "x", x)
    check(approximate in ("none", "tanh"),
           lambda: f"{op}: approximate must be 'none' or 'tanh', got {approximate!r}")


def check_matrix(op, x, weight):
    check_floating(op, "weight", weight)
    check(weight.dim() == 2, lambda: f"{op}: weight must have shape (N, K), got {tuple(weight.shape)}")
    check(x.dim() >= 1 and x.shape[-1] == weight.shape[1],
           lambda: f"{op}: x must have K = {weight.shape[1]} (weight's second) in its last dimension, got "
                   f"{tuple(x.shape)}")
    check_same_device(op, "weight", weight, x)


def chosen(op, name, numbers, count):
    """Numbers below count as a list: of one, a sequence, a tensor or a numpy array of them, or for None all."""
    if numbers is None:
        return list(range(count))
    numbers = numbers.tolist() if hasattr(numbers, "tolist") else numbers
    numbers = [numbers] if isinstance(numbers, int) else list(numbers)
    wrong = [n for n in numbers if type(n) is not int or not 0 <= n < count]
    check(not wrong, lambda: f"{op}: {name} must be ints in [0, {count}), got {wrong[0]!r}")
    return numbers


def check_attended(op, q, k, v, key_mask):
    check_dimensions(op, "batch, heads, length, head size", q=q, k=k, v=v)
    (B, H, _, D), (G, S) = q.shape, k.shape[1:3]
    check_heads(op, q, k, v, H, G, D)
    check(k.shape[0] == B, lambda: f"{op}: k must have batch {B} and head size {D} as q, got {tuple(k.shape)}")
    if key_mask is not None:
        check_tensor(op, "key_mask", key_mask)
        check(key_mask.shape == (B, S) and key_mask.dtype == torch.bool,
               lambda: f"{op}: key_mask must be bool of shape {(B, S)}, got {key_mask.dtype} {tuple(key_mask.shape)}")
        check_same_device(op, "key_mask", key_mask, q)


def check_dimensions(op, wanted, **tensors):
    dimensions = wanted.count(",") + 1
    for name, tensor in tensors.items():
        check_floating(op, name, tensor)
        if tensor.dim() != dimensions:
            raise ValueError(f"{op}: {name} must have {dimensions} dimensions ({wanted}), got shape {tuple(tensor.shape)}")


def check_heads(op, q, k, v, H, G, D):
    """Query heads H, key heads G, head size D of q."""
    for name, tensor in (("k", k), ("v", v)):
        check_same_device(op, name, tensor, q)
    check(k.shape == v.shape, lambda: f"{op}: k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    check(k.shape[-1] == D, lambda: f"{op}: k must have head size {D} as q, got {tuple(k.shape)}")
    check(G > 0 and H % G == 0, lambda: f"{op}: q's {H} heads must be a multiple of k's {G}")
    check(D > 0, lambda: f"{op}: q must have a head size of at least 1, got 0")


def check_scores(op, scale, causal, window):
    if scale is not None:
        check_number(op, "scale", scale, float("-inf"))
    if window is not None:
        check(isinstance(window, int) and not isinstance(window, bool) and window >= 1,
               lambda: f"{op}: window must be an int of at least 1, got {window!r}")
        check(causal, lambda: f"{op}: a window needs causal=True")


def check_starts(name, starts, rows):
    check_tensor("packed_attention", name, starts)
    check_same_device("packed_attention", name, starts, rows)
    check(starts.dim() == 1 and len(starts) >= 1 and starts.dtype == torch.int32,
           lambda: f"packed_attention: {name} must be int32 of shape (sequences + 1,), got {starts.dtype} "
                   f"{tuple(starts.shape)}")
    if torch.compiler.is_compiling():
        return
    values = starts.tolist()
    check(values[0] == 0 and values[-1] == len(rows) and values == sorted(values),
           lambda: f"packed_attention: {name} must rise from 0 to the {len(rows)} rows, got {values}")


def check_paged(op, cache, rows, block_tables, query_lens, context_lens):
    check_floating(op, "q" if op == "paged_attention" else "k", rows)
    check(cache.k.dtype == cache.v.dtype and (cache.k.dtype in paged.DTYPES or cache.k.dtype == torch.float64),
           lambda: f"{op}: cache must be of one dtype, a paged.DTYPES, got {cache.k.dtype} and {cache.v.dtype}")
    for name in ("k", "v", "k_scale", "v_scale"):
        if getattr(cache, name) is not None:
            check_same_device(op, f"cache.{name}", getattr(cache, name), rows)
    check(all(t.device.type == "cpu" for t in (block_tables, query_lens, context_lens)),
           lambda: f"{op}: block_tables, query_lens and context_lens must be on the CPU")
    pages, _, page_size, D = cache.v.shape
    check(rows.dim() == 3 and rows.shape[2] == D,
           lambda: f"{op}: tokens must have shape (N, heads, {D}), got {tuple(rows.shape)}")
    S = block_tables.shape[0]
    check(block_tables.dim() == 2 and block_tables.dtype == torch.int32,
           lambda: f"{op}: block_tables must be (S, P) int32, got {block_tables.dtype} {tuple(block_tables.shape)}")
    for name, lens in (("query_lens", query_lens), ("context_lens", context_lens)):
        check(lens.shape == (S,) and lens.dtype in (torch.int32, torch.int64),
               lambda name=name, lens=lens: f"{op}: {name} must be integers of shape ({S},), got {lens.dtype} "
                                            f"{tuple(lens.shape)}")
    check(int(query_lens.sum()) == rows.shape[0] and bool((query_lens >= 0).all()),
           lambda: f"{op}: query_lens must add up to the {rows.shape[0]} tokens, got {query_lens.tolist()}")
    check(bool((query_lens <= context_lens).all()) and
           bool((context_lens <= block_tables.shape[1] * page_size).all()),
           lambda: f"{op}: context_lens must be at least query_lens and at most {block_tables.shape[1] * page_size} (pages "
                   f"in a block table times page size), got {context_lens.tolist()}")
    for table, length in zip(block_tables.tolist(), context_lens.tolist()):
        used = table[:-(-length // page_size)]
        check(all(0 <= page < pages for page in used),
               lambda used=used: f"{op}: block_tables must name pages in [0, {pages}), got {used}")
