"""Planted bugs that the checks without a GPU must see: python tests/gpusim/mutations.py [name ...]

Each is a change of one place in a copy of the package or of the executors, and the tests of test_kernels.py that must fail
then. Ends with 1 when one survives.
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


def kernel(name, module, old, new, tests):
    return Mutation(name, f"fastgpt/kernels/{module}.py", old, new, tests)


def machine_code(name, pattern, replacement, tests, count=1):
    edit = f"__import__('re').sub({pattern!r}, {replacement!r}, {PTX}, count={count})"
    return Mutation(name, "tests/gpusim/executors.py", PTX, edit, tests)


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
    kernel("rows beyond the last are stored", "tiles", "mask=(first + i < length)[:, None] & (d < D)[None, :])\n\n\n@triton.jit\ndef visible",
           "mask=(i >= 0)[:, None] & (d < D)[None, :])\n\n\n@triton.jit\ndef visible", INTERPRETED + "GQA and float32"),
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
    kernel("the sign of a negative scale", "attention", "        q = -q\n", "        q = q\n", INTERPRETED + "all and float32"),
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
]


def survives(mutation):
    """Whether the tests pass all the same."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("fastgpt", "tests"):
            shutil.copytree(ROOT / part, Path(folder, part), ignore=shutil.ignore_patterns("__pycache__", "assets"))
        shutil.copy(ROOT / "pyproject.toml", folder)
        path = Path(folder, mutation.file)
        text = path.read_text()
        if mutation.old not in text:
            raise ValueError(f"{mutation.name}: {mutation.file} has no {mutation.old!r}")
        path.write_text(text.replace(mutation.old, mutation.new, 1))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "tests/gpusim/test_kernels.py", "tests/test_attention.py", "-k",
                   mutation.tests]
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
