"""Predicts, without a GPU, how near the Triton and CUDA kernels and the rivals come to a GPU's limits, from their machine code:

    pip install -e '.[test]' 'liger-kernel'; python -m benchmarks.predict_gpu --save gpu_predicted

Needs neither a GPU nor a driver: triton brings its own assembler, and nvcc compiles the CUDA kernels. tests/gpusim/README.md says
what such a prediction can tell and what not. The tests of the checked-in figures are test_predicted.py and test_cuda_predicted.py
there.
"""
import argparse
import sys

import triton

from benchmarks import gpu_rivals, results

sys.path.append(str(results.RESULTS.parents[1] / "tests" / "gpusim"))

import cuda_prediction
import nvcc
import prediction
from efficiency import predicted_efficiency

RIVALS_ARCHS = (80, 90)


def rival_row(row):
    """As prediction.rows() has them."""
    share = predicted_efficiency(row, row["arch"], row.get("useful_bytes_per_program") or 0,
                                 row.get("moved_bytes_per_program") or 0)
    return {"spec": row["name"], "kernel": row["kernel"], "arch": row["arch"], "source": row["source"],
            "config": row["config"], "efficiency": prediction.rounded(share), **prediction.facts(row)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", metavar="NAME", help="also write benchmarks/results/NAME.json")
    parser.add_argument("--cuda", action="store_true", help="renew the rows of the CUDA kernels, and keep the saved others")
    options = parser.parse_args()
    if nvcc.MISSING:
        sys.exit(nvcc.MISSING)
    if options.cuda:
        saved = results.load_all()["gpu_predicted"]["rows"]
        rows = [row for row in saved if row["source"] != cuda_prediction.SOURCE]
    else:
        rows = [{"source": "fastgpt", **row} for row in prediction.rows()]
        rows += [rival_row(row) for arch in RIVALS_ARCHS for row in gpu_rivals.rows(arch)]
    rows += cuda_prediction.rows()
    settings = {"triton": triton.__version__, "nvcc": nvcc.version(), "devices": prediction.DEVICES}
    results.finish(results.document("gpu_predicted", settings, [], rows), options.save)


if __name__ == "__main__":
    main()
