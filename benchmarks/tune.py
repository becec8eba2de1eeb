"""Chooses the configurations of the attention kernels that fastgpt/kernels/tuning.py holds:

  python -m benchmarks.tune [--arch 80,90] [--kernel forward,dq,dk_dv] [--width 64,128] [--dtype float16] [--call busy]

With a GPU by time on it, whose architecture is then the only one; without one by the issue model of the machine code.
A candidate that spills or does not fit is listed with the reason and never chosen. Causal, at GPT-2 124M's sizes: 8
sequences of 1024 tokens, 12 heads. --call: a class of calls that tuning.py has a table for.
"""
import argparse
import itertools
import sys
from dataclasses import replace
from functools import partial

import torch

from benchmarks.results import RESULTS
from fastgpt import kernels

BLOCKS, WARPS, STAGES = (16, 32, 64, 128), (4, 8), (1, 2, 3)
KERNELS = {"forward": "attention_forward_kernel", "dq": "attention_dq_kernel", "dk_dv": "attention_dk_dv_kernel"}
CALLS = {"plain": {}, "busy": {"dropout_p": 0.1, "seed": 7}, "key_mask": {}}
MODELLED = (80, 90)  # by the issue model
GPU = "cuda"
LINE = "{:>16} {:>10} {:>9} {:>6}  {}"


def grid():
    """(BLOCK_M, BLOCK_N, num_warps, num_stages) of all candidates."""
    return list(itertools.product(BLOCKS, BLOCKS, WARPS, STAGES))


def _inputs(width, masked, dtype, device, gpt2):
    """q, k and v as GPT-2 has them: views of one tensor."""
    qkv = torch.randn(8, 1024, 3, 12, width, dtype=dtype, device=device)
    others = {"key_mask": torch.rand(8, 1024, device=device) > 0.3} if masked else {}
    return {name: x.transpose(1, 2) for name, x in zip("qkv", qkv.unbind(2))}, others


def recorded(kernel, arch, width, dtype, call):
    """(spec, its launch that is tuned, without data)."""
    from prediction import record

    from fastgpt.kernels.spec import Spec
    spec = Spec("tuned", "attention", partial(_inputs, width, call == "key_mask"), CALLS[call])
    return spec, next(launch for launch in record(spec, arch, dtype) if launch.name == KERNELS[kernel])


def configuration(launch):
    """As `grid` has them."""
    return *(launch.constants[name] for name in ("BLOCK_M", "BLOCK_N")), *launch.options.values()


def changed(launch, candidate):
    """The launch with a candidate's configuration. All lengths are multiples of all blocks."""
    sizes = dict(zip(("BLOCK_M", "BLOCK_N"), candidate))
    owned = "BLOCK_N" if launch.name == KERNELS["dk_dv"] else "BLOCK_M"
    options = dict(zip(("num_warps", "num_stages"), candidate[2:]))
    return replace(launch, programs=launch.programs * launch.constants[owned] // sizes[owned],
                   constants={**launch.constants, **sizes}, options=options)


def predicted(spec, launch, arch):
    """{"score": larger is better, or None, "text", "registers", "reason": why it can't be chosen, or ""}."""
    import prediction
    row = prediction.row(spec, launch, arch)
    wrong = f"{row['spills']} spills" if row["spills"] else "" if row["blocks"] else "does not fit"
    share = row["efficiency"]
    text = "-" if share is None else f"{share:.1%}"
    return {"score": share, "text": text, "registers": row["registers"], "reason": wrong}


def timed(spec, launch, arch):
    """As `predicted`, on the GPU: arguments of the recorded shapes and strides, filled with random numbers."""
    import triton.testing

    from fastgpt.kernels.launch import OnDevice
    arguments = [_filled(a) if isinstance(a, torch.Tensor) else a for a in launch.arguments.values()]
    call = partial(OnDevice.run, launch.kernel, launch.programs, arguments, launch.constants, launch.options)
    milliseconds = triton.testing.do_bench(call, return_mode="median")
    return {"score": -milliseconds, "text": f"{milliseconds * 1e3:.1f} us", "registers": "-", "reason": ""}


def _filled(meta):
    extent = 1 + sum((size - 1) * stride for size, stride in zip(meta.shape, meta.stride()))
    return torch.randn(extent, device=GPU).to(meta.dtype).as_strided(meta.shape, meta.stride())


def sweep(spec, launch, arch, judge):
    """(candidate, judge's row) of all candidates, best first, those that can't be chosen last."""
    from triton.errors import TritonError
    found = []
    for candidate in grid():
        try:
            row = judge(spec, changed(launch, candidate), arch)
        except (TritonError, RuntimeError) as error:  # too much shared memory, or a pass of the compiler that fails
            text = str(error).partition("\n")[0]
            row = {"score": None, "text": "-", "registers": "-", "reason": f"{type(error).__name__}: {text}"}
        found.append((candidate, row))
    return sorted(found, key=lambda pair: (bool(pair[1]["reason"]), -(pair[1]["score"] or float("-inf"))))


def chosen(found):
    """The first that can be chosen, or None."""
    return next((candidate for candidate, row in found if not row["reason"] and row["score"] is not None), None)


def tune(kernel, arch, dtype, widths, judge, call="plain"):
    """Prints a table for each width, and the line for tuning.py with what was chosen, None where nothing can be."""
    current, best = {}, {}
    for width in widths:
        spec, launch = recorded(kernel, arch, width, dtype, call)
        found = sweep(spec, launch, arch, judge)
        print(f"{kernel}, sm_{arch}, {width} wide, {str(dtype)[6:]}, {call}")
        for candidate, row in found:
            print(LINE.format("x".join(map(str, candidate[:2])), "w{}s{}".format(*candidate[2:]), row["text"],
                              row["registers"], row["reason"]))
        current[width] = configuration(launch)
        best[width] = chosen(found)
    verdict = "as tuning.py has it" if best == current else f"tuning.py has {current}"
    print(f'("{kernel}", {arch}): {best},  # {verdict}', flush=True)
    return best


def _numbers(text):
    return [int(number) for number in text.split(",")]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=_numbers, help="80, 90 or both; without a GPU")
    parser.add_argument("--kernel", type=lambda text: text.split(","), default=list(KERNELS))
    parser.add_argument("--width", type=_numbers, default=[64, 128])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--call", choices=CALLS, default="plain")
    options = parser.parse_args(argv)
    sys.path.append(str(RESULTS.parents[1] / "tests" / "gpusim"))
    judge, archs = predicted, list(MODELLED)
    if kernels.missing(None) is None:
        from fastgpt.kernels.launch import architecture
        judge, archs = timed, [architecture(torch.device(GPU, 0))]
    refused = sorted(set(options.arch or archs) - set(archs)) + [k for k in options.kernel if k not in KERNELS]
    if refused:
        parser.error(f"{', '.join(map(str, refused))}: expected of {archs} and {list(KERNELS)}")
    print("by time on the GPU" if judge is timed else f"by the issue model: {kernels.missing(None)}")
    for arch, kernel in itertools.product(options.arch or archs, options.kernel):
        tune(kernel, arch, getattr(torch, options.dtype), options.width, judge, options.call)


if __name__ == "__main__":
    main()
