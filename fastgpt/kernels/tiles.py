"""What the attention kernels share: a head's place in memory, tiles of rows, which keys a query sees."""
import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@triton.jit
def program_place(length, heads, BLOCK: tl.constexpr):
    """(batch, head, block, blocks of a head) of this program: programs of one head are neighbours, whose keys share the L2."""
    blocks = tl.cdiv(length, BLOCK)
    head = tl.program_id(0) // blocks
    return head // heads, head % heads, tl.program_id(0) % blocks, blocks


@triton.jit
def sequence(STARTS, b, batch_stride, row_stride, length, PACKED: tl.constexpr):
    """(offset of sequence b's first row, its length). PACKED: its rows lie behind the other sequences', from STARTS[b] on."""
    if PACKED:
        first = tl.load(STARTS + b)
        return tl.cast(first, tl.int64) * row_stride, tl.load(STARTS + b + 1) - first
    else:
        return b.to(tl.int64) * batch_stride, length


@triton.jit
def load_rows(X, first, row_stride, length, CHECKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
              BLOCK: tl.constexpr):
    """(BLOCK, BLOCK_D) of the rows from `first` on; zeros beyond `length` rows (if CHECKED) and beyond D."""
    i, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at = X + tl.cast(first, tl.int64) * row_stride + i[:, None] * row_stride + d[None, :]
    if CHECKED and D < BLOCK_D:
        return tl.load(at, mask=(first + i < length)[:, None] & (d < D)[None, :], other=0.0)
    elif CHECKED:
        return tl.load(at, mask=(first + i < length)[:, None], other=0.0)
    elif D < BLOCK_D:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def load_operand(X, first, row_stride, length, NEGATIVE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                 CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """What `multiply_chunks` takes first: (BLOCK, BLOCK_D) of the rows from `first` on, or, with a CHUNK, where their first CHUNK
    columns are: rows that are too wide for the registers are loaded again in every product."""
    if CHUNK:
        i, d = tl.arange(0, BLOCK), tl.arange(0, CHUNK)
        return X + tl.cast(first, tl.int64) * row_stride + i[:, None] * row_stride + d[None, :]
    else:
        x = load_rows(X, first, row_stride, length, True, D, BLOCK_D, BLOCK)
        return -x if NEGATIVE else x


@triton.jit
def multiply_chunks(x, exists, Y, first, row_stride, length, NEGATIVE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
                    PRECISION: tl.constexpr):
    """x's rows times the rows from `first` on of Y, transposed: x is what `load_operand` gives with a CHUNK; of its rows those
    count that exist."""
    CHUNK: tl.constexpr = x.shape[1]
    i, d = tl.arange(0, BLOCK), tl.arange(0, CHUNK)
    at = Y + tl.cast(first, tl.int64) * row_stride + i[None, :] * row_stride + d[:, None]
    products = tl.zeros([x.shape[0], BLOCK], tl.float32)
    for start in tl.range(0, D, CHUNK, num_stages=1):
        inside = start + d < D
        a = tl.load(x + start, mask=exists[:, None] & inside[None, :], other=0.0)
        b = tl.load(at + start, mask=(first + i < length)[None, :] & inside[:, None], other=0.0)
        products = tl.dot(a, b, products, input_precision=PRECISION)
    return -products if NEGATIVE else products


@triton.jit
def store_rows(X, values, first, row_stride, length, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load_rows`, rounding to X's dtype."""
    i, d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at = X + tl.cast(first, tl.int64) * row_stride + i[:, None] * row_stride + d[None, :]
    tl.store(at, values.to(X.dtype.element_ty), mask=(first + i < length)[:, None] & (d < D)[None, :])


@triton.jit
def load_bias(KEY_BIAS, keys, S, CHECKED: tl.constexpr):
    """What a key mask adds to the scores of some keys."""
    return tl.load(KEY_BIAS + keys, mask=keys < S, other=0.0) if CHECKED else tl.load(KEY_BIAS + keys)


@triton.jit
def load_lse(LSE, rows, T, HAS_KEY_BIAS: tl.constexpr):
    """Of some rows, times log2(e), for 2**(score - lse): infinite for rows beyond T, and for those that a key mask
    leaves no key: -inf - -inf would be NaN. Without one, `visible` has hidden all of such a row."""
    lse = tl.load(LSE + rows, mask=rows < T, other=float("inf")) * 1.4426950408889634
    return tl.where(lse == float("-inf"), float("inf"), lse) if HAS_KEY_BIAS else lse


@triton.jit
def visible(rows, keys, S, shift, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which keys the rows see by their places; rows and keys are blocks of int32 that broadcast against each other.

    Row i sees the keys up to i + shift, of those the last `window`, and only those below S.
    """
    seen = keys < S
    if CAUSAL:
        seen = seen & (keys <= rows + shift)
    if WINDOW:
        seen = seen & (keys > rows + shift - window)
    return seen


@triton.jit
def key_ranges(first_row, S, shift, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Multiples a <= b <= c of BLOCK_N and an end: of the keys that the rows from first_row on see, a..b and c..end need
    masks, and every row sees all of b..c."""
    end, c = S, S // BLOCK_N * BLOCK_N
    if CAUSAL:
        end = tl.maximum(tl.minimum(S, first_row + BLOCK_M + shift), 0)
        c = tl.maximum(tl.minimum(S, first_row + shift + 1), 0) // BLOCK_N * BLOCK_N
    a = 0
    b = 0
    if WINDOW:
        a = tl.minimum(tl.maximum(first_row + shift - window + 1, 0), end) // BLOCK_N * BLOCK_N
        b = tl.cdiv(tl.maximum(first_row + BLOCK_M + shift - window, 0), BLOCK_N) * BLOCK_N
        b = tl.maximum(tl.minimum(b, tl.cdiv(end, BLOCK_N) * BLOCK_N), a)
        c = tl.maximum(b, c)
    return a, b, c, end


@triton.jit
def row_ranges(first_key, T, S, shift, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Multiples a <= b <= c of BLOCK_M and an end: of the rows that see the keys from first_key on, a..b and c..end need
    masks, and all of b..c see every key. Keys beyond S need none: what they give is not stored."""
    a, b, c, end = 0, 0, tl.cdiv(T, BLOCK_M) * BLOCK_M, T
    if CAUSAL:
        a = tl.minimum(tl.maximum(first_key - shift, 0), T) // BLOCK_M * BLOCK_M
        b = tl.cdiv(tl.maximum(first_key + BLOCK_N - 1 - shift, 0), BLOCK_M) * BLOCK_M
        b = tl.minimum(b, c)
    if WINDOW:
        end = tl.minimum(T, tl.maximum(first_key + BLOCK_N - 1 - shift + window, 0))
        c = tl.maximum(tl.minimum(T, first_key - shift + window), 0) // BLOCK_M * BLOCK_M
        b = tl.minimum(b, tl.cdiv(end, BLOCK_M) * BLOCK_M)
        c = tl.maximum(b, c)
    return a, b, c, end


def unit_stride(*tensors):
    """Tensors (B, H, T, D) whose heads' rows are contiguous and near enough for offsets of 32 bits within a tile."""
    return tuple(x if x.stride(3) == 1 and x.stride(2) < 2 ** 23 else x.contiguous() for x in tensors)


def head_strides(x):
    """(batch, head, row): of a tensor (B, H, T, D) whose last stride is 1."""
    return x.stride()[:3]


def longest(starts):
    """The rows of the longest packed sequence; waits for the GPU to know."""
    return max(starts.diff().tolist(), default=0)


def hide_keys(key_mask, *keys):
    """A mask (B, S) as what it adds to scores, 0 or -inf, and of tensors (B, G, S, D) the rows that it hides as zeros: they may
    hold NaN, and 0 * NaN is NaN. A pass over them here costs less than masked loads in the kernels' loops."""
    if key_mask is None:
        return None, *keys
    bias = torch.zeros(key_mask.shape, dtype=torch.float32, device=key_mask.device).masked_fill(~key_mask, float("-inf"))
    return bias, *(x.where(key_mask[:, None, :, None], 0) for x in keys)


def block_d(D):
    """A tile's width for heads of D: a power of two, at least what tensor cores multiply."""
    return max(16, triton.next_power_of_2(D))


def chunk(dtype, D):
    """How many columns of a product's operands are loaded at a time, 0 for all: float32 rows of more than 128 numbers, in parts
    for TF32, take more than all registers."""
    return 32 if dtype == torch.float32 and D > 128 else 0


def precision(dtype):
    """How products of float32 are made: three in TF32 for each, which lose two of its bits (plain FMAs would spill hundreds
    of registers here), or one where the user lets PyTorch do so. Others have no choice."""
    if dtype != torch.float32:
        return "ieee"
    chosen = getattr(torch.backends.cuda.matmul, "fp32_precision", None)  # since torch 2.9, which refuses to mix both ways
    if chosen is None:
        chosen = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return "tf32" if chosen == "tf32" else "tf32x3"


def positive_scale(scale):
    """The scale for exponents of 2, without its sign, which goes into q or k: a maximum of unscaled scores is then one of
    the scaled as well. Not quite 0, for which a hidden score would be NaN."""
    return max(abs(scale), 1e-30) * LOG2E
