"""Predicts, without a GPU, how near the Triton kernels and their rivals come to a GPU's limits, from their machine code:

    pip install -e '.[test]' 'liger-kernel'; python -m benchmarks.predict_gpu --save gpu_predicted

Needs neither a GPU nor a driver: triton brings its own assembler. tests/gpusim/README.md says what such a prediction can tell
and what not. The test of the checked-in figures is tests/gpusim/test_predicted.py.
"""
import argparse
import sys

import triton

from benchmarks import gpu_rivals, results

sys.path.append(str(results.RESULTS.parents[1] / "tests" / "gpusim"))

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
    save = parser.parse_args().save
    rows = [{"source": "fastgpt", **row} for row in prediction.rows()]
    rows += [rival_row(row) for arch in RIVALS_ARCHS for row in gpu_rivals.rows(arch)]
    settings = {"triton": triton.__version__, "devices": prediction.DEVICES}
    results.finish(results.document("gpu_predicted", settings, [], rows), save)


if __name__ == "__main__":
    main()
