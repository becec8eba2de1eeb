"""Planted bugs that the checks without a GPU must see: python tests/gpusim/mutations.py [name ...]

Each is a change of one place in a copy of the package, of csrc or of the executors, and the tests that must fail then. Ends
with 1 when one survives.
"""
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PTX = 'compiled.asm["ptx"]'


@dataclass(frozen=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str
    tests: str  # pytest's -k
    files: tuple = ("tests/gpusim/test_kernels.py", "tests/test_attention.py")


def kernel(name, module, old, new, tests):
    return Mutation(name, f"fastgpt/kernels/{module}.py", old, new, tests)


def machine_code(name, pattern, replacement, tests, count=1):
    edit = f"__import__('re').sub({pattern!r}, {replacement!r}, {PTX}, count={count})"
    return Mutation(name, "tests/gpusim/executors.py", PTX, edit, tests)


def cuda(name, source, old, new, tests, file="paged"):
    return Mutation(name, f"csrc/cuda/{source}", old, new, tests, (f"tests/gpusim/test_cuda_{file}.py",))


def prefill(name, old, new, tests):
    return Mutation(name, "fastgpt/kernels/paged_attention.py", old, new, tests, ("tests/gpusim/test_paged_prefill.py",))


def weights(name, old, new, tests):
    files = ("tests/gpusim/test_attention_weights_kernel.py", "tests/test_attention_weights.py")
    return Mutation(name, "fastgpt/kernels/attention_weights.py", old, new, tests, files)


INTERPRETED, COMPILED = "interpreted and ", "test_compiled and "
MUTATIONS = [
    kernel("the sum is not rescaled", "attention", "weight_sum * rescale + tl.sum", "weight_sum + tl.sum",
           INTERPRETED + "all and bfloat16"),
    kernel("the output is not rescaled", "attention", "acc * rescale[:, None]", "acc", INTERPRETED + "all and bfloat16"),
    kernel("causal by one too few", "tiles", "keys <= rows + shift", "keys < rows + shift", INTERPRETED + "GQA and float32"),
    kernel("keys beyond the last", "tiles", "seen = keys < S", "seen = keys < S + 1", INTERPRETED + "all and float32"),
    kernel("a window by one too wide", "tiles", "keys > rows + shift - window", "keys >= rows + shift - window",
           INTERPRETED + "window and float32"),
    kernel("undefined lanes of a masked load", "tiles", "& (d < D)[None, :], other=0.0)\n    elif CHECKED",
           "& (d < D)[None, :])\n    elif CHECKED", INTERPRETED + "GQA and float16"),
    kernel("the loop without masks is too long", "tiles", "first_row + shift + 1)", "first_row + shift + 1 + BLOCK_N)",
           INTERPRETED + "GQA and bfloat16"),
    kernel("garbage behind the key mask", "tiles", "*(x.where(key_mask[:, None, :, None], 0) for x in keys)", "*keys", "garbage"),
    kernel("rows beyond the last are stored", "tiles", "mask=(first + i < length)[:, None] & (d < D)[None, :])\n\n\n@triton.jit\ndef load_bias",
           "mask=(i >= 0)[:, None] & (d < D)[None, :])\n\n\n@triton.jit\ndef load_bias", INTERPRETED + "GQA and float32"),
    kernel("a stale log-sum-exp", "attention", "(top * scale + tl.log2(weight_sum))", "(top * scale)",
           INTERPRETED + "GQA and float32"),
    kernel("dropout forgotten in dq", "attention_backward", "dweights = tl.where(keep, dweights * keep_scale, 0.0)\n        dscores",
           "dscores", INTERPRETED + "dropout and attention and float32"),
    kernel("dropout not scaled in dv", "attention_backward", "tl.where(keep, weights * keep_scale, 0.0)",
           "tl.where(keep, weights, 0.0)", INTERPRETED + "dropout and attention and float32"),
    kernel("delta forgotten", "attention_backward", "weights * (dweights - delta[None, :])", "weights * dweights",
           INTERPRETED + "GQA and float16"),
    kernel("dk starts too late", "tiles", "tl.maximum(first_key - shift, 0)", "tl.maximum(first_key - shift + BLOCK_M, 0)",
           INTERPRETED + "GQA and float32"),
    kernel("another head's keys", "attention", "g = (h // GROUP)", "g = (h % (H // GROUP))", INTERPRETED + "GQA and float32"),
    kernel("the sign of a negative scale", "tiles", "return -x if NEGATIVE else x", "return x", INTERPRETED + "all and float32"),
    kernel("products added up in float16", "attention",
           "acc = tl.dot(weights.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)",
           "acc = acc * rescale[:, None] + tl.dot(weights.to(v.dtype), v, out_dtype=tl.float16).to(tl.float32)",
           INTERPRETED + "all and float32"),
    kernel("another hash", "dropout", "(x ^ (x >> 15))", "(x ^ (x >> 14))", INTERPRETED + "dropout and float32"),
    kernel("offsets of 32 bits", "attention", "K += k_offset + g * k_head", "K += k_offset + (h // GROUP) * k_head",
           "offsets"),
    kernel("a variance over the tile", "layer_norm", "tl.sum(centred * centred, axis=1) / C",
           "tl.sum(centred * centred, axis=1) / BLOCK_C",
           INTERPRETED + "layer_norm and float32"),
    kernel("a variance with the tile's empty columns", "layer_norm", "tl.where(inside[None, :], x - mean[:, None], 0.0)",
           "x - mean[:, None]", INTERPRETED + "layer_norm and float32"),
    kernel("the mean in place of the deviation", "layer_norm", "rstd = tl.load(STATISTICS + N + rows",
           "rstd = tl.load(STATISTICS + rows", INTERPRETED + "layer_norm and float32"),
    kernel("the last rows have no gradient", "layer_norm", "range(program * BLOCK_ROWS, N, programs",
           "range(program * BLOCK_ROWS, N - BLOCK_ROWS, programs", INTERPRETED + "layer_norm and float32"),
    kernel("all programs write one partial sum", "layer_norm", "partial = PARTIAL + program.to(tl.int64) * 2 * C",
           "partial = PARTIAL", INTERPRETED + "layer_norm and float32"),
    kernel("a block's squares alone", "layer_norm", "squares += centred * centred", "squares = centred * centred",
           INTERPRETED + "add_layer_norm and wide and float32"),
    kernel("a block's part of the gradient alone", "layer_norm", "alongs += normed * dnormed", "alongs = normed * dnormed",
           INTERPRETED + "wide and float32"),
    kernel("the residual is not in a wide row", "layer_norm", "        X = TOTAL\n", "        X = X\n",
           INTERPRETED + "wide and float32"),
    Mutation("a wide row's mean without its first blocks", "fastgpt/kernels/layer_norm.py", "sums += _total(", "sums = _total(",
             "large_mean and triton", ("tests/test_layer_norm.py",)),
    kernel("the columns of every second step", "layer_norm", "range(group * BLOCK_ROWS, N, groups * BLOCK_ROWS)",
           "range(group * BLOCK_ROWS, N, 2 * groups * BLOCK_ROWS)", INTERPRETED + "wide and float32"),
    kernel("a chunk's product alone", "tiles", "tl.dot(a, b, products, input_precision=PRECISION)",
           "tl.dot(a, b, input_precision=PRECISION)", INTERPRETED + "256 and float32"),
    kernel("the sign of a negative scale in chunks", "tiles", "return -products if NEGATIVE else products", "return products",
           INTERPRETED + "256 and window and float32"),
    kernel("queries beyond the last in chunks", "tiles", "a = tl.load(x + start, mask=exists[:, None] & inside",
           "a = tl.load(x + start, mask=inside", INTERPRETED + "256 and float32"),
    kernel("a digit of the cubic's factor", "gelu", "0.044715", "0.04715", INTERPRETED + "tanh and float32"),
    kernel("the cubic's derivative", "gelu", "3 * CUBIC", "2 * CUBIC", INTERPRETED + "tanh and float32"),
    kernel("the bias's gradient of the first rows alone", "gelu", "dbias += dx", "dbias = dx",
           INTERPRETED + "bias_gelu and float32"),
    kernel("ignored targets count", "cross_entropy", "if target == ignore_index:", "if target == ignore_index - 1:",
           INTERPRETED + "cross_entropy and float32"),
    kernel("columns beyond the vocabulary", "cross_entropy", 'x = tl.where(inside, x, float("-inf"))', "x = x",
           INTERPRETED + "cross_entropy and float32"),
    kernel("smoothing's share of the others", "cross_entropy", "gradient -= others", "gradient += others",
           INTERPRETED + "smoothed and float32"),
    kernel("the square's derivative", "cross_entropy", "2 * z_loss * lse)", "z_loss * lse)",
           INTERPRETED + "smoothed and float32"),
    kernel("a partial sum twice", "reduce", "range(0, rows, BLOCK_ROWS)", "range(0, rows, BLOCK_ROWS // 8)",
           INTERPRETED + "layer_norm and float32"),
    machine_code("a barrier removed, sm_80", r"bar\.sync[^;]*;", "", COMPILED + "attention-bfloat16-80"),
    machine_code("a barrier removed, sm_90", r"bar\.sync[^;]*;", "", COMPILED + "attention-bfloat16-90"),
    machine_code("copies waited for too late", r"(cp\.async\.wait_group\s+)0;", r"\g<1>3;",
                 COMPILED + "attention-bfloat16-80", 0),
    machine_code("a sum across the wrong lanes", r"(shfl\.sync\.bfly\.b32[^;]*), 2, 31", r"\1, 4, 31",
                 COMPILED + "add_layer_norm-bfloat16-80", 0),
    machine_code("a product not waited for, sm_90", r"wgmma\.wait_group\.sync\.aligned\s+0;", "",
                 COMPILED + "attention-bfloat16-90", 0),
    prefill("pages at offsets of 32 bits", "X += page.to(tl.int64) * PAGE_STRIDE", "X += page * PAGE_STRIDE", "32_bits"),
    prefill("pages that do not exist", "outer = tl.where(_largest_page(TABLE, inner, outer, PAGE_SIZE) >= pages, inner, outer)",
            "outer = outer", "does_not_exist and not compiled"),
    prefill("pages that do not exist, in chunks", "k = tl.where(exists[:, None], _converted(k, FLOAT8, x.dtype), OTHER)",
            "k = _converted(k, FLOAT8, x.dtype)", "in_chunks"),
    prefill("weights too small for float16", "            base -= WEIGHT_BITS\n", "            base -= 0\n",
            "interpreted and float16 and int8"),
    prefill("the page of the tile before", "_load_page(TABLE, start + BLOCK_N, S,", "_load_page(TABLE, start, S,", "interpreted"),
    prefill("a row behind the table", "- T < capacity, factor", "- T <= capacity, factor", "behind_the_table"),
    weights("a place among the chosen rows for the row", "load_lse(LSE + (b * H + h) * T, own,", "load_lse(LSE + (b * H + h) * T, places,",
            "compiled and bfloat16-80"),
    weights("a tile that some row does not see", "tl.max(tl.max(seen.to(tl.int32), 1), 0)", "tl.min(tl.max(seen.to(tl.int32), 1), 0)",
            "interpreted"),
    weights("chosen rows at offsets of 32 bits", "own.to(tl.int64)[:, None] * q_row", "own[:, None] * q_row", "kernel and offsets"),
    cuda("a key's place in its page", "store_kv.cu", "+ slot % cache.page_size;", "+ (slot + 1) % cache.page_size;", "stores"),
    cuda("a scale of a part of the row", "store_kv.cu", "d < D; d += 32", "d < D; d += 33", "stores"),
    cuda("keys in the place of values", "store_kv.cu", "(const S*)a.v + n", "(const S*)a.k + n", "stores"),
    cuda("rounding towards zero in float8", "numbers.cuh", "magnitude + 0x7FFFF + (magnitude >> 20 & 1)", "magnitude", "stores"),
    cuda("half a page is copied", "store_kv.cu", "i < page_bytes / (int64_t)sizeof(W)", "i < page_bytes / (int64_t)sizeof(W) / 2",
         "copies"),
    cuda("the sums are not rescaled", "paged_attention.cu", "sum[r][i] *= rescale;", ";", "equals and 64 and float32"),
    cuda("the weights are not rescaled", "paged_attention.cu", "fmaf(weight[r], rescale, added)", "weight[r] + added",
         "equals and 64 and float32"),
    cuda("causal by one too few keys", "paged_attention.cu", "key <= last[r]", "key < last[r]", "equals and 64 and bfloat16"),
    cuda("a window in CUDA by one too wide", "paged_attention.cuh", "position - (int)window + 1", "position - (int)window", "window"),
    cuda("copies in CUDA waited for too late", "paged_attention.cuh", "dev::cp_wait<kStages - 2>();", "dev::cp_wait<kStages - 1>();",
         "equals and fifo and bfloat16"),
    cuda("a copy over keys that are still needed", "paged_attention.cu",
         "buffer + stage % kStages * S::kStageBytes + (value", "buffer + stage % (kStages - 1) * S::kStageBytes + (value",
         "equals and bfloat16"),
    cuda("bytes that another lane has not copied yet", "paged_attention.cuh", "__syncwarp();  // what all lanes", "// what all lanes",
         "equals and int8"),
    cuda("no barrier before the warps' sums are read", "paged_attention.cuh",
         "* kPitch);\n    __syncthreads();", "* kPitch);", "equals and 64 and bfloat16"),
    cuda("no barrier before they are written over", "paged_attention.cuh", "__syncthreads();  // the sums", "// the sums",
         "thread", "sanitizers"),
    cuda("the keys of other lanes", "paged_attention.cu", "o < 32; o *= 2)", "o < 16; o *= 2)", "equals and 64 and bfloat16"),
    cuda("another group's head", "paged_attention.cuh", "return g * group + (row + r) % group;", "return (row + r) % group;",
         "groups"),
    cuda("the last chunk is left out", "paged_attention.cu", "last - first + 1)", "max(1, last - first))",
         "equals and 64 and bfloat16"),
    cuda("the scales of the values", "paged_attention_bytes.cu", "exponential * scale[tile][j] * units", "exponential * units",
         "equals and int8"),
    cuda("weights without their low parts", "paged_attention_bytes.cu", "dev::mma_m16n8k16<__half>(sum[i], low, v);", "",
         "any_scale"),
    cuda("queries without their low parts", "paged_attention_bytes.cu", "(d[j] + d[j + 2])", "d[j]", "any_scale"),
    cuda("the scale of a key that a row does not see", "paged_attention_bytes.cu",
         "seen ? *keys.scale(stage, 1, tile, key) : 0.0f", "*keys.scale(stage, 1, tile, key)", "later_token"),
    cuda("weights that float16 has no room for", "paged_attention_bytes.cu", "fmaxf(fmaxf(highest - base, lower + power), kLeastPower)",
         "0.0f", "any_scale"),
    cuda("sums in another chunk's units", "paged_attention_bytes.cu", "lower + (power - new_power)", "lower", "any_scale"),
    cuda("pieces that are not mixed as they were", "paged_attention_bytes.cu", "tile, key_of(row()), step + quarter())",
         "tile, row(), step + quarter())", "equals and int8"),
    cuda("shared memory that is not asked for", "platform.cuh", "kSharedUnasked = 32 * 1024", "kSharedUnasked = 48 * 1024",
         "equals and 64 and bfloat16"),
    cuda("a page behind the last", "paged_attention.cuh", "(unsigned)page < (unsigned)a", "(unsigned)page <= (unsigned)a", "not_there"),
    cuda("keys behind the last", "paged_attention.cuh", "return there && near == k;", "return there;", "read_once"),
    Mutation("a penalty without the token that is on its way", "fastgpt/engine/gpu_runner.py",
             "found.history[rows, last] = drawn[numbers]", "found.history[rows, last] = -1", "penalties_do_not",
             ("tests/gpusim/test_gpu_engine.py",)),
    cuda("a row is stored too far", "store_kv.cu", "c < chunks; c += 32", "c <= chunks; c += 32", "address", "sanitizers"),
    cuda("chunks that depend on the walk", "paged_attention.cuh", "if ((stage + 1) % (kChunk / S::kBlockKeys) != 0 && ", "if (",
         "any_company"),
    cuda("tokens beyond the last", "weight_only.cu", "min(token0 + 8 * n + lane / 4, a.M - 1)", "(token0 + 8 * n + lane / 4)",
         "machine_code", "weight_only"),
    cuda("a tile beyond the last", "weight_only.cu", "if (t + warps < a.tiles) next", "if (t < a.tiles) next", "machine_code",
         "weight_only"),
    cuda("inputs beyond the last", "weight_only.cu", "j * kGroup < left ?", "true ?", "equals_the_reference", "weight_only"),
    cuda("another group's scale", "weight_only.cu", "tile.scale(c / 2, j)", "tile.scale(0, j)", "equals_the_reference and int4",
         "weight_only"),
    cuda("a sum that depends on the tokens beside it", "weight_only.cu", "32 * (unsigned)weight_only_warps(kBits, a.weight.K)",
         "32 * (unsigned)(a.M > 8 ? 1 : weight_only_warps(kBits, a.weight.K))", "same_bits", "weight_only"),
    cuda("no barrier before the products' sums are read", "weight_only.cu",
         "[lane / 4 + c / 2 * 8] = sums[n][c];\n  __syncthreads();", "[lane / 4 + c / 2 * 8] = sums[n][c];", "equals_the_reference",
         "weight_only"),
    cuda("a warp's part of the distribution", "sampling.cu", " + (before + part < before)", "", "equals_the_engine and 1000",
         "sampling"),
    cuda("an equal one too many", "sampling.cu", "key == cut_key && id > last", "key == cut_key && id >= last",
         "equals_the_engine and 33", "sampling"),
    cuda("counts that stay", "sampling.cu", "atomicExch(counts + id, 0) : 0", "counts[id] : 0", "equals_the_engine", "sampling"),
    cuda("0 and -0", "sampling.cu", "order_key(a + 0.0f)", "order_key(a)", "both_signs", "sampling"),
    cuda("another generator", "sampling.cu", "state ^= state >> 31;", "", "equals_the_engine", "sampling"),
    cuda("no barrier behind a bin", "sampling.cu", "at = shared.bin(bin);\n    __syncthreads();", "at = shared.bin(bin);",
         "machine_code", "sampling"),
    cuda("no barrier behind the biases", "sampling.cu", "if (id < (unsigned)V) x[id] += draws.bias[i];\n  }\n  __syncthreads();",
         "if (id < (unsigned)V) x[id] += draws.bias[i];\n  }", "every_id_may_have_a_bias", "sampling"),
    cuda("the goal itself", "sampling.cu", "before + running > goal", "before + running >= goal", "equals_the_engine", "sampling"),
]


def survives(mutation):
    """Whether the tests pass all the same."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("fastgpt", "tests", "csrc"):
            shutil.copytree(ROOT / part, Path(folder, part), ignore=shutil.ignore_patterns("__pycache__", "assets"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        path = Path(folder, mutation.file)
        text = path.read_text()
        if mutation.old not in text:
            raise ValueError(f"{mutation.name}: {mutation.file} has no {mutation.old!r}")
        path.write_text(text.replace(mutation.old, mutation.new, 1))
        command = [sys.executable, "-m", "pytest", "-x", "-q", *mutation.files, "-k", mutation.tests]
        result = subprocess.run(command, cwd=folder, env={**os.environ, "PYTHONPATH": folder}, capture_output=True, text=True,
                                check=False)
    if result.returncode not in (0, 1):
        raise RuntimeError(f"{mutation.name}: pytest ended with {result.returncode}\n{result.stdout}{result.stderr}")
    return result.returncode == 0


def main(names):
    chosen = [m for m in MUTATIONS if not names or m.name in names]
    survivors = []
    for mutation in chosen:
        survived = survives(mutation)
        survivors += [mutation.name] * survived
        print(f"{'SURVIVED' if survived else 'caught':<10}{mutation.name}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught")
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
