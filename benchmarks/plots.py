"""One plot for each results document: what is faster, by how much, and how sure that is."""
import matplotlib

from benchmarks.machine import one_line

matplotlib.use("Agg")
from matplotlib import pyplot, ticker

WIDTH = 8  # inches
COLOURS = {("float32", 1): "#8fb8de", ("float32", 2): "#1f5f99", ("bfloat16", 1): "#f0b27a", ("bfloat16", 2): "#b9561a"}
OURS, OTHERS = "#1f5f99", "#a8a8a8"


def save(found, path):
    figure = PLOTS[found["benchmark"]](found["rows"])
    figure.suptitle(one_line(found["machine"]), fontsize=6, color="0.4")
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def ops_plot(rows):
    """A dot for each shape: how many times faster than PyTorch, by op and pass."""
    names = list(dict.fromkeys((row["op"], row["what"]) for row in rows))
    figure, axes = pyplot.subplots(figsize=(WIDTH, 0.36 * len(names) + 1.2), layout="constrained")
    kinds = sorted({(row["dtype"], row["threads"]) for row in rows}, key=lambda kind: (kind[0] != "float32", kind))
    for i, kind in enumerate(kinds):
        dots = [(row["ratio"]["median"], names.index((row["op"], row["what"])) + 0.16 * (i - (len(kinds) - 1) / 2))
                for row in rows if (row["dtype"], row["threads"]) == kind and row["ratio"]]
        axes.scatter([x for x, _ in dots], [y for _, y in dots], s=14, label=f"{kind[0]}, {kind[1]} threads",
                     color=COLOURS.get(kind))
    axes.set_yticks(range(len(names)), [f"{op}, {what}" for op, what in names], fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="0.3", linewidth=1)
    axes.xaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("times faster than PyTorch's own (a dot for each shape)")
    axes.legend(fontsize=7)
    axes.grid(axis="x", alpha=0.3, which="both")
    return figure


def train_plot(rows):
    return _bars(rows, "tokens_per_second", lambda row: f"{row['variant']}, {row['dtype']}, {row['threads']} thr",
                 "training, tokens/s (quartiles)")


def generate_plot(rows):
    """A dot for each engine: tokens a second (with quartiles), by scenario, dtype and threads."""
    names = list(dict.fromkeys((row["scenario"], row["dtype"], row["threads"]) for row in rows))
    engines = sorted({row["variant"] for row in rows}, key=lambda name: (name != "fastgpt", name))
    figure, axes = pyplot.subplots(figsize=(WIDTH, 0.26 * len(names) + 1.2), layout="constrained")
    for engine, marker in zip(engines, "osD^v<>P"):
        dots = [(main_rate(row), names.index((row["scenario"], row["dtype"], row["threads"])))
                for row in rows if row["variant"] == engine and main_rate(row)]
        rates, places = [rate for rate, _ in dots], [place for _, place in dots]
        colour = {"color": OURS, "zorder": 3} if engine == "fastgpt" else {"alpha": 0.6}
        axes.errorbar([r["median"] for r in rates], places, fmt=marker, markersize=4, elinewidth=1, label=engine,
                      xerr=[[r["median"] - r["q1"] for r in rates], [r["q3"] - r["median"] for r in rates]], **colour)
    axes.set_yticks(range(len(names)), [f"{scenario}, {dtype}, {threads} thr" for scenario, dtype, threads in names],
                    fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.set_xlabel("tokens/s: of the prompt in prefill, else of the new ones (quartiles)")
    axes.legend(fontsize=7)
    axes.grid(axis="x", alpha=0.3, which="both")
    return figure


def main_rate(row):
    """Tokens a second of what the scenario measures; None when there is no figure."""
    return row["decode_tokens_per_second"] if row["new"] > 1 else row["prefill_tokens_per_second"]


def _bars(rows, field, label, title):
    rows = [row for row in rows if row[field]]
    values = [row[field] for row in rows]
    figure, axes = pyplot.subplots(figsize=(WIDTH, 0.26 * len(rows) + 1.2), layout="constrained")
    medians = [value["median"] for value in values]
    errors = [[v["median"] - v["q1"] for v in values], [v["q3"] - v["median"] for v in values]]
    colours = [OURS if row["variant"] == "fastgpt" else OTHERS for row in rows]
    axes.barh(range(len(rows)), medians, xerr=errors, color=colours, error_kw={"elinewidth": 1})
    axes.set_yticks(range(len(rows)), [label(row) for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(title)
    axes.grid(axis="x", alpha=0.3)
    return figure


PLOTS = {"ops": ops_plot, "train": train_plot, "generate": generate_plot}
