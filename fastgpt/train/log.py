"""What a run leaves behind and shows: log.jsonl, a plot of it, and a progress bar or plain lines."""
import json
import sys
import time
from pathlib import Path

from fastgpt.checkpoint import atomic_file


class RunLog:
    """log.jsonl: one JSON object a step (loss, lr, grad_norm, seconds), one a validation. Each step stands once."""

    def __init__(self, path, step):
        """Continues the log at `step`: what a run that was killed later had written after it goes."""
        self.path = Path(path)
        kept = [json.dumps(record) for record in read_log(path) if record["step"] <= step]
        with atomic_file(path) as file:
            file.write("".join(line + "\n" for line in kept).encode())

    def write(self, **record):
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}") from error


def read_log(path):
    """The records of a log.jsonl; none when it is missing. A line that a kill cut short, or that is no record, ends it."""
    path = Path(path)
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


def plot_log(log, image):
    """Draws the losses of a log.jsonl into a PNG or SVG. Without matplotlib: ImportError with what to install."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("no loss plot without matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="step", ylabel="nats per token")
    records = read_log(log)
    for key, label, style in (("loss", "training", {"linewidth": 0.8}), ("val_loss", "validation", {"marker": "."})):
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image, dpi=120)


class Progress:
    """A tqdm bar on a terminal, where tqdm is installed; plain lines elsewhere. Speeds leave validation out."""

    def __init__(self, steps, step, quiet=False):
        self.steps, self.quiet, self._bar = steps, quiet, None
        self._tokens, self._seconds, self._last_line = 0, 0.0, time.perf_counter()
        if not quiet and sys.stderr.isatty():
            try:
                from tqdm import tqdm
                self._bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stderr)
            except ImportError:
                self.say("(a progress bar comes with: pip install tqdm)")

    def step(self, step, loss, tokens, seconds):
        """Counts one step; without a bar a line shows the first, the last, and one every ten seconds of training."""
        self._tokens, self._seconds = self._tokens + tokens, self._seconds + seconds
        speed = f"{self._tokens / self._seconds:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            self._bar.set_postfix_str(f"loss {loss:.4f}, {speed}", refresh=False)
        elif self._seconds > 10.0 or step == self.steps or step == 1:
            self.say(f"step {step}/{self.steps}: loss {loss:.4f}, {speed}")
        if self._seconds > 10.0:
            self._tokens, self._seconds = 0, 0.0

    def say(self, text):
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self):
        if self._bar is not None:
            self._bar.close()
