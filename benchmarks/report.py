"""The READMEs' tables and plots from benchmarks/results/*.json: python -m benchmarks.report

In README.md and fastgpt/kernels/README.md, what lies between <!-- bench:NAME --> and <!-- /bench:NAME --> is replaced by the table of
results/NAME.json; each document of measurements also becomes a plot, results/NAME.png. A marker without its document is
an error.
"""
import math
import re

from benchmarks import plots, results
from benchmarks.machine import ROOT, one_line

READMES = [ROOT / "README.md", ROOT / "fastgpt" / "kernels" / "README.md"]
SECTION = re.compile(r"(<!-- bench:(?P<name>[\w-]+) -->\n)(.*?)(<!-- /bench:(?P=name) -->)", re.DOTALL)


def fill(text, documents):
    """text with every marked section replaced by its document's table."""
    def section(match):
        if match["name"] not in documents:
            raise ValueError(f"the marker bench:{match['name']} has no benchmarks/results/{match['name']}.json")
        return match[1] + table(documents[match["name"]]) + "\n" + match[4]
    if text.count("<!-- bench:") != len(SECTION.findall(text)):
        raise ValueError("a bench marker has no end of the same name")
    return SECTION.sub(section, text)


def markers(text):
    return {match["name"] for match in SECTION.finditer(text)}


def table(found):
    """The Markdown of one document, with the line that says where and when."""
    return TABLES[found["benchmark"]](found["rows"]) + f"\n\n{one_line(found['machine'])}."


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def quartiles(ratio, digits=2):
    if ratio is None:
        return "-"
    return f"{ratio['median']:.{digits}f} ({ratio['q1']:.{digits}f} to {ratio['q3']:.{digits}f})"


def settings_of(rows):
    """The (dtype, threads) of the rows, float32 first."""
    return sorted({(row["dtype"], row["threads"]) for row in rows}, key=lambda kind: (kind[0] != "float32", kind))


def threads_label(threads):
    return f"{threads} thread" + "s" * (threads > 1)


def ops_table(rows):
    """A row for each op and pass, over all its shapes: PyTorch's time over ours, share of the ceiling, targets met."""
    kinds = settings_of(rows)
    groups = {}
    for row in rows:
        groups.setdefault((row["op"], row["what"]), []).append(row)
    header = ["op", "", "shapes", *(f"{dtype}, {threads_label(threads)}" for dtype, threads in kinds),
              "share of its ceiling", "targets met"]
    return markdown(header, [_ops_row(name, group, kinds) for name, group in groups.items()])


def _ops_row(name, rows, kinds):
    cells = [_ratios([r for r in rows if (r["dtype"], r["threads"]) == kind]) for kind in kinds]
    shares = [row["share"]["median"] for row in rows if row["share"]]
    verdicts = [verdict for row in rows for verdict in row["met"].values()]
    return [*name, len({row["shape"] for row in rows}), *cells,
            f"{min(shares):.0%} to {max(shares):.0%}" if shares else "-", f"{verdicts.count('yes')} of {len(verdicts)}"]


def _ratios(rows):
    """The geometric mean over shapes, and the range; of a single shape the quartiles; how many gave no figure."""
    if len(rows) == 1 and rows[0]["ratio"]:
        return f"**{rows[0]['ratio']['median']:.2f}** ({rows[0]['ratio']['q1']:.2f} to {rows[0]['ratio']['q3']:.2f})"
    ratios = [row["ratio"]["median"] for row in rows if row["ratio"]]
    missing = f"; {len(rows) - len(ratios)} without a figure" if len(ratios) < len(rows) else ""
    if not ratios:
        return "-"
    mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
    return f"**{mean:.2f}** ({min(ratios):.2f} to {max(ratios):.2f}{missing})"


def train_table(rows):
    header = ["", "dtype", "threads", "tokens/s", "share of its ceiling", "peak memory, MB", "fastgpt is"]
    ours = {(r["dtype"], r["threads"]): r for r in rows if r["ratios"]}
    return markdown(header, [_train_row(row, ours.get((row["dtype"], row["threads"]))) for row in rows])


def _train_row(row, ours):
    name = [row["variant"], row["dtype"], row["threads"]]
    if row["failure"]:
        return [*name, row["failure"], "-", "-", "-"]
    share = f"{row['share']['median']:.0%} of {row['ceiling']}" if row["share"] else "-"
    ratio = ours and ours["ratios"].get(row["variant"])
    faster = f"**{ratio['median']:.2f} x** ({ratio['q1']:.2f} to {ratio['q3']:.2f})" if ratio else ""
    return [*name, quartiles(row["tokens_per_second"], 0), share, f"{row['peak_mb']:.0f}", faster]


def generate_table(rows):
    """A line for each scenario, dtype and number of threads: ours, and how many times as fast it is as each rival."""
    groups = {}
    for row in rows:
        groups.setdefault((row["scenario"], row["dtype"], row["threads"]), []).append(row)
    header = ["", "batch x prompt + new", "dtype", "threads", "tokens/s", "share of its ceiling", "peak memory, MB",
              "as fast as the rivals, times", "targets"]
    versions = sorted({row["version"] for row in rows if row["version"] and row["variant"] != "fastgpt"})
    return (markdown(header, [_generate_row(name, *group) for name, group in groups.items()]) + _without_figures(rows)
            + f"\n\nRivals: {', '.join(versions) or 'none'}.")


def _generate_row(name, ours, *rivals):
    scenario, dtype, threads = name
    start = [scenario, f"{ours['batch']} x {ours['prompt']} + {ours['new']}", dtype, threads]
    targets = "; ".join(f"{target} {value:g}: {ours['verdicts'][target]}" for target, value in ours["targets"].items())
    if ours["failure"]:
        return [*start, "-", "-", "-", "-", targets or "-"]
    share = f"{ours['share']['median']:.0%} of {ours['ceiling']}" if ours["share"] else "-"
    ratios = {called(r): (ours["ratios"][r["variant"]]["median"], "**" * (r["variant"] == ours["best"]))
              for r in rivals if ours["ratios"].get(r["variant"])}
    faster = [f"{bold}{ratio:.2f}{bold} {rival}" for rival, (ratio, bold) in ratios.items()]
    memory = f"{ours['peak_mb']:.0f}" if ours["peak_mb"] else "-"
    return [*start, quartiles(plots.main_rate(ours), 0), share, memory, ", ".join(faster) or "-", targets or "-"]


def called(row):
    """A rival and its own name of the precision, once."""
    return row["variant"] if str(row["precision"]) in row["variant"] else f"{row['variant']} {row['precision']}"


def _without_figures(rows):
    """A line for each reason why an engine has no figures: where, and why."""
    places = {}
    for row in rows:
        if row["failure"]:
            where = f"{row['scenario']} {row['dtype']} {threads_label(row['threads'])}"
            places.setdefault(f"{row['variant']}: {row['failure']}", []).append(where)
    lines = [f"- {reason} ({', '.join(where)})" for reason, where in places.items()]
    return "\n\nWithout figures:\n" + "\n".join(lines) if lines else ""


def quality_table(rows):
    header = ["model", "dtype", "nats a token", "perplexity", "the same likeliest token", "KL divergence, nats", "targets"]
    return markdown(header, [[row["model"], row["dtype"], f"{row['nats']:.4f}", f"{row['perplexity']:+.2%}",
                              f"{row['top_1']:.1%}", f"{row['kl']:.1e}",
                              "; ".join(f"{t} {value:+.1%}: {row['verdicts'][t]}" for t, value in row["targets"].items()) or "-"]
                             for row in rows if row["dtype"] != "float32"])


def gpu_predicted_table(rows):
    """A line for each of our kernels at its plain call, the rivals behind them: predicted shares of a GPU's limits."""
    header = ["", "config, sm_80 / sm_90", "registers", "predicted share of the limit, sm_80 / sm_90", "bytes moved, MB",
              "least time for them, us, A100 / H100"]
    kernels = {}
    for row in rows:
        if row["arch"] in GPU_ARCHS:
            kernels.setdefault((row["source"], row["spec"], row["kernel"]), {})[row["arch"]] = row
    return markdown(header, [_gpu_row(name, *(found[arch] for arch in GPU_ARCHS)) for name, found in kernels.items()])


GPU_ARCHS, MEMORY = (80, 90), (2.039e12, 3.35e12)  # bytes a second of an A100 80 GB and an H100, SXM


def _gpu_row(name, *rows):
    source, spec, kernel = name
    label = f"{spec}: `{kernel}`" if source in ("fastgpt", "fastgpt, CUDA") else f"*{spec}* ({source})"
    moved = rows[0].get("bytes")
    floors = [f"{moved / rate * 1e6:.0f}" for rate in MEMORY] if moved else ["-"]
    return [label, " / ".join(map(_gpu_config, rows)), " / ".join(str(row["registers"]) for row in rows),
            " / ".join(_gpu_share(row) + f" ({row['spills']} spills)" * bool(row["spills"]) for row in rows),
            f"{moved / 1e6:.1f}" if moved else "-", " / ".join(floors)]


def _gpu_share(row):
    return "-" if row["efficiency"] is None else f"{row['efficiency']:.0%}"


def _gpu_config(row):
    if "grid" in row["config"]:
        return f"{row['config']['grid']} x w{row['config']['num_warps']}"
    blocks = [str(value) for name, value in row["config"].items()
              if name.startswith("BLOCK") and name not in ("BLOCK_D",)]
    return f"{'x'.join(blocks)} w{row['config']['num_warps']}s{row['config'].get('num_stages', 1)}"


TABLES = {"ops": ops_table, "train": train_table, "generate": generate_table, "quality": quality_table,
          "gpu_predicted": gpu_predicted_table}


def main():
    documents = results.load_all()
    for name, found in documents.items():
        if found["benchmark"] in plots.PLOTS:
            plots.save(found, results.RESULTS / f"{name}.png")
            print(f"benchmarks/results/{name}.png")
    for path in READMES:
        text = path.read_text()
        path.write_text(fill(text, documents))
        print(f"{path.relative_to(ROOT)}: {len(SECTION.findall(text))} tables")


if __name__ == "__main__":
    main()
