"""The configurations of all kernels: chosen offline (benchmarks/tune.py), by time on a GPU, by the issue model without one.

There is no tuning at run time: the first call of a shape would take seconds, and two runs could differ in their bits.
"""
import triton


def norm_forward_config(C):
    """(rows of a program, options). One warp holds up to 1024 columns: 32 elements a thread, four 16-byte loads in
    flight of each tensor, and sums that never leave the warp."""
    block = triton.next_power_of_2(C)
    return max(1, 1024 // block), {"num_warps": min(16, max(1, block // 1024))}


def norm_backward_config(C):
    """(rows of a program's step, programs per multiprocessor, options). 16 elements a thread: their sums for dweight and
    dbias stay in registers beside them, which spill from 32 on. As few programs as keep 16 warps
    on a multiprocessor, since each writes partial sums: 8 % of what GPT-2's norm moves."""
    block = triton.next_power_of_2(C)
    warps = min(16, max(1, block // 256))
    return max(1, 512 * warps // block), max(1, 16 // warps), {"num_warps": warps}


# The widest rows that a program holds in registers: at 16 warps 32 elements a thread forward, 16 backward.
WIDEST_NORM_FORWARD, WIDEST_NORM_BACKWARD = 16384, 8192
# Wider rows go in blocks of columns: (columns, options), 16 elements a thread.
NORM_WIDE = 4096, {"num_warps": 8}
# Their dweight and dbias: (rows of a step, columns of a program, programs per multiprocessor, options).
NORM_COLUMNS = 2, 1024, 4, {"num_warps": 4}

GELU_BLOCK = 2048  # elements of a program's step: two 16-byte loads a thread of each tensor in bfloat16
GELU_WARPS = 4
GELU_PROGRAMS = 8  # per multiprocessor, when the sum for dbias is wanted


# Attention, 16-bit types: (kernel, architecture) -> {width of a head's tile: (BLOCK_M, BLOCK_N, num_warps, num_stages)}.
# Chosen by predicted efficiency among the configurations without spilled registers (README.md has the figures).
# sm_80, forward: 128 queries on 4 warps, so that keys read from shared memory serve 32 rows a warp; two stages, since a third
#   costs the registers that keep two blocks on a processor. At 128 wide that spills: 8 warps of 16 rows, and a busier port.
# sm_90, forward: 64 queries a warp group, the least that wgmma takes: at 128 registers four blocks fit, and one block's
#   softmax hides behind another's products.
# Backward: dk and dv are two accumulators, so that their tiles are the smaller ones.
# sm_100 takes sm_90's but for dk and dv, whose tensor memory is read through registers, and for a spill at 256 wide.
ATTENTION = {
    ("forward", 80): {16: (128, 64, 4, 2), 32: (128, 64, 4, 2), 64: (128, 64, 4, 2), 128: (128, 64, 8, 3), 256: (64, 64, 8, 1)},
    ("forward", 90): {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 4, 2)},
    ("forward", 100): {256: (64, 32, 4, 1)},
    ("dq", 80): {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (128, 32, 4, 2), 128: (64, 64, 4, 2), 256: (32, 32, 4, 1)},
    ("dq", 90): {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (64, 32, 4, 3), 256: (64, 32, 8, 2)},
    ("dk_dv", 80): {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (64, 64, 8, 3), 256: (32, 32, 8, 2)},
    ("dk_dv", 90): {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (32, 128, 8, 3), 256: (32, 32, 8, 2)},
    ("dk_dv", 100): {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (32, 64, 4, 2)},
    # 99 KB of shared memory a block, where sm_80 has 163
    ("dk_dv", 86): {128: (64, 64, 8, 2)},
}
# Where an architecture has no row of its own. sm_120 has sm_86's tensor instructions and shared memory, not sm_100's.
PARENT = {86: 80, 100: 90, 120: 86}
# Where a class of calls takes registers of its own: dropout's hash and a window's third loop, a key mask's bias.
ATTENTION_BUSY = {
    ("forward", 80): {16: (128, 64, 8, 3), 32: (128, 64, 8, 3), 64: (128, 64, 8, 3), 128: (128, 32, 8, 3)},
    ("dq", 80): {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (64, 32, 4, 3)},
    ("dk_dv", 80): {16: (32, 64, 8, 3), 32: (32, 64, 8, 3), 64: (32, 64, 8, 3), 128: (32, 64, 8, 3)},
    ("dk_dv", 90): {16: (32, 64, 4, 3), 32: (32, 64, 4, 3), 64: (32, 64, 4, 3), 128: (16, 128, 8, 3), 256: (16, 32, 8, 1)},
    ("dk_dv", 100): {16: (32, 64, 4, 3), 32: (32, 64, 4, 3), 64: (32, 64, 4, 3), 128: (32, 64, 8, 3)},
}
ATTENTION_KEY_MASK = {
    ("forward", 80): {64: (128, 64, 8, 3)},
    ("dq", 80): {128: (64, 32, 4, 3)},
    ("dk_dv", 100): {64: (32, 64, 4, 3)},
}
# float32: three TF32 products for each, whose parts fill the registers, so that tiles are small. Above 128 wide the rows
# that a loop multiplies again and again do not fit at all: they come in chunks (tiles.chunk), and the sums have the registers.
ATTENTION_FLOAT32 = {
    ("forward", 80): {16: (32, 32, 4, 1), 32: (32, 32, 4, 1), 64: (32, 32, 4, 1), 128: (32, 32, 4, 1), 256: (64, 16, 8, 1)},
    ("forward", 90): {16: (64, 32, 4, 1), 32: (64, 32, 4, 1), 64: (64, 32, 4, 1), 128: (16, 32, 4, 1), 256: (32, 32, 8, 1)},
    ("dq", 80): {16: (32, 32, 4, 1), 32: (32, 32, 4, 1), 64: (32, 32, 4, 1), 128: (16, 32, 4, 1), 256: (32, 32, 8, 1)},
    ("dq", 90): {16: (64, 32, 4, 1), 32: (64, 32, 4, 1), 64: (64, 32, 4, 1), 128: (16, 32, 4, 1), 256: (32, 32, 8, 1)},
    ("dk_dv", 80): {16: (32, 32, 4, 1), 32: (32, 32, 4, 1), 64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
    ("dk_dv", 90): {16: (32, 32, 4, 1), 32: (32, 32, 4, 1), 64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 32, 8, 1)},
}
# The same with dropout, a window, a key mask or, in the backward, grouped heads; with all of them at once, still no spills.
ATTENTION_FLOAT32_BUSY = {
    ("forward", 80): {128: (16, 32, 4, 1)},
    ("dk_dv", 80): {64: (32, 16, 4, 1), 128: (16, 16, 8, 1)},
    ("dk_dv", 90): {64: (32, 16, 4, 1), 128: (16, 16, 8, 1)},
}


def attention_config(kernel, arch, dtype, width, busy, key_mask):
    """(BLOCK_M, BLOCK_N, options) of "forward", "dq" or "dk_dv" for heads whose tiles are `width` wide. busy: with dropout or
    a window, and in float32's backward grouped heads."""
    if dtype.itemsize == 4:
        tables = [*[ATTENTION_FLOAT32_BUSY] * (busy or key_mask), ATTENTION_FLOAT32]
    else:
        tables = [*([ATTENTION_BUSY] if busy else [ATTENTION_KEY_MASK] if key_mask else []), ATTENTION]
    return _first(((table, kernel) for table in tables), arch, width)


def _first(places, arch, width):
    """(BLOCK_M, BLOCK_N, options) from the first of the places (table, name) that has this width for the architecture or
    one that it descends from."""
    for table, name in places:
        known = arch
        while known:
            if width in table.get((name, known), {}):
                block_m, block_n, num_warps, num_stages = table[name, known][width]
                return block_m, block_n, {"num_warps": num_warps, "num_stages": num_stages}
            known = PARENT.get(known)


# Prefill over a paged cache: (kind of call, architecture) -> {width: (BLOCK_M, BLOCK_N, num_warps, num_stages)}. A third stage on
# sm_80 pays here, where the loop with masks copies nothing ahead and leaves its registers.
# Quantised on sm_80: every warp converts all keys, so that fewer at a time spare registers.
PREFILL = {
    ("plain", 80): {16: (128, 64, 4, 3), 32: (128, 64, 4, 3), 64: (128, 64, 4, 3), 128: (128, 64, 8, 3), 256: (64, 64, 8, 1)},
    ("plain", 90): {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (64, 64, 4, 3), 256: (64, 32, 4, 2)},
    ("window", 80): {16: (64, 64, 4, 3), 32: (64, 64, 4, 3), 64: (64, 64, 4, 3), 128: (128, 32, 8, 3)},
    ("quantised", 80): {16: (128, 32, 4, 2), 32: (128, 32, 4, 2), 64: (128, 32, 4, 2), 128: (128, 32, 8, 2)},
    ("float32", 80): {16: (32, 32, 4, 2), 32: (32, 32, 4, 2), 64: (32, 32, 4, 2), 128: (16, 32, 4, 1), 256: (32, 16, 8, 1)},
    ("float32", 90): {16: (64, 32, 4, 1), 32: (64, 32, 4, 1), 64: (64, 32, 4, 1), 128: (16, 32, 4, 1), 256: (32, 16, 8, 1)},
}


def prefill_config(arch, dtype, width, window, quantised):
    """(BLOCK_M, BLOCK_N, options) for heads whose tiles are `width` wide. The same for all lengths and page sizes, on which a
    row's bits must not depend."""
    kinds = ["float32"] if dtype.itemsize == 4 else ["quantised"] * quantised + ["window"] * window + ["plain"]
    return _first(((PREFILL, kind) for kind in kinds), arch, width)


# The weights of attention: (BLOCK_M, BLOCK_N, columns of q and k at a time, options). A tile has one product for each of its
# results, so that memory is the limit: 32 results a thread leave room for several blocks a processor, and rows of 64 keys
# are whole lines of 128 bytes. float32: in three TF32 parts, of which fewer columns fit.
def attention_weights_config(dtype):
    return (64, 64, 32, {"num_warps": 4}) if dtype.itemsize == 4 else (64, 64, 64, {"num_warps": 4})


CROSS_ENTROPY_BLOCK, CROSS_ENTROPY_WARPS = 4096, 8  # 16 elements a thread: two 16-byte loads of a 16-bit dtype
CROSS_ENTROPY_CHUNK = 256e6  # bytes of logits: 2,500 rows of GPT-2's, enough for the products to be at their peak
