"""Small kernels for the tests of these tools: right ones, and ones that go wrong where a constexpr says so."""
import triton
import triton.language as tl


@triton.jit
def copy(X, Y, n, BLOCK: tl.constexpr, LOAD_MASKED: tl.constexpr = True, STORE_MASKED: tl.constexpr = True):
    """Without its masks it runs past the end."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + i, mask=i < n, other=0) if LOAD_MASKED else tl.load(X + i)
    if STORE_MASKED:
        tl.store(Y + i, x, mask=i < n)
    else:
        tl.store(Y + i, x)


@triton.jit
def copy_undefined(X, Y, n, BLOCK: tl.constexpr):
    """Stores lanes that its load leaves undefined."""
    i = tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < n))


@triton.jit
def store_chunks(Y, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """The chunks of two programs overlap when STEP is less than BLOCK."""
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(Y + i, i)


@triton.jit
def count_on(Y, DISTANCE: tl.constexpr):
    """Each program goes on from what one before it has stored."""
    p = tl.program_id(0)
    tl.store(Y + p + DISTANCE, tl.load(Y + p) + 1)


@triton.jit
def replace_first(Y, OWN: tl.constexpr):
    """Program 1 stores over what program 0 has loaded, unless each keeps to its own element."""
    p = tl.program_id(0)
    y = tl.load(Y + p) if OWN else tl.load(Y + 1)
    if OWN or p == 1:
        tl.store(Y + p, y + 1)


@triton.jit
def store_modulo(Y, MODULUS: tl.constexpr, BLOCK: tl.constexpr):
    """Lanes share an address when MODULUS is less than BLOCK."""
    i = tl.arange(0, BLOCK)
    tl.store(Y + i % MODULUS, i)


@triton.jit
def column_sums(X, Y, ATOMIC: tl.constexpr, BLOCK: tl.constexpr):
    """One row a program, added up in Y; without atomics the programs race."""
    i = tl.arange(0, BLOCK)
    x = tl.load(X + tl.program_id(0) * BLOCK + i)
    if ATOMIC:
        tl.atomic_add(Y + i, x)
    else:
        tl.store(Y + i, tl.load(Y + i) + x)


@triton.jit
def multiply_add(X, W, Y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i)
    tl.store(Y + i, x * tl.load(W + i) + x)


@triton.jit
def convert(X, Y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + i, tl.load(X + i, mask=i < n).to(Y.dtype.element_ty), mask=i < n)


@triton.jit
def row_sums(X, Y, BLOCK: tl.constexpr):
    """Reduces by shuffles in a warp, and through shared memory between warps."""
    row = tl.program_id(0)
    tl.store(Y + row, tl.sum(tl.load(X + row * BLOCK + tl.arange(0, BLOCK)), 0))


@triton.jit
def _largest(a, b):
    return tl.maximum(a, b)


@triton.jit
def reductions(X, Y, BLOCK: tl.constexpr):
    x = tl.load(X + tl.arange(0, BLOCK))
    tl.store(Y, x.sum(0))
    tl.store(Y + 1, tl.max(x, 0))
    tl.store(Y + 2, tl.min(x, 0))
    tl.store(Y + 3, tl.argmax(x, 0))
    tl.store(Y + 4, tl.max(tl.cumsum(x, 0), 0))
    tl.store(Y + 5, tl.reduce(x, 0, _largest))


@triton.jit
def product(A, B, C, columns, depth, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
            PRECISION: tl.constexpr = "ieee", SUM: tl.constexpr = tl.float32):
    """A tile of C = A B, row-major all three."""
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], SUM)
    for start in tl.range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        a = tl.load(A + m[:, None] * depth + k[None, :])
        b = tl.load(B + k[:, None] * columns + n[None, :])
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=SUM)
    tl.store(C + m[:, None] * columns + n[None, :], total)


@triton.jit
def _hash(x, seed):
    x = (x ^ seed) * 0x9E3779B1
    return x ^ (x >> 15), x


@triton.jit
def hashes(Y, seed, BLOCK: tl.constexpr):
    """A device function that returns a tuple; unsigned products that wrap around."""
    tl.static_assert(BLOCK % 32 == 0, "whole warps")
    i = tl.arange(0, BLOCK).to(tl.uint32)
    total = tl.zeros([BLOCK], tl.uint32)
    for round in tl.range(0, 3, num_stages=1):
        mixed, raw = _hash(i + round, seed)
        total += mixed ^ raw
    tl.store(Y + i, total)


@triton.jit
def softplus_scaled(X, Y, factor, BLOCK: tl.constexpr):
    """A float argument that is used as a tensor."""
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i).to(tl.float32)
    tl.store(Y + i, tl.log(1 + tl.exp(x)) * factor.to(tl.float32))
