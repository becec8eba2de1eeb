"""Text onto standard output as the model makes it, and how fast that was beside the same model in plain PyTorch."""
import contextlib
import functools
import statistics
import sys
import time

from fastgpt import ops
from fastgpt.text import StopFilter

ROUNDS = 3
TOKENS_AT_LEAST, TOKENS_TO_COMPARE = 16, 64  # in a round, of each text
SECONDS_A_ROUND = 1.0
SEPARATOR = "\n---\n"


def write(model, tokenizer, prompt, params, file=None):
    """Writes the prompt and what follows it, params.n times.

    One text comes token by token, several come when all are done. A stop string is not written.
    """
    file = file or sys.stdout
    ids = encode_prompt(tokenizer, prompt)
    if params.n > 1:
        rows = model.generate([ids], params=params, tokenizer=tokenizer)
        texts = (tokenizer.decode(row[len(ids):], skip_special=True) for row in rows)
        file.write(SEPARATOR.join(prompt + StopFilter(params.stop).push(text, last=True) for text in texts) + "\n")
        return
    stream, stop_filter = tokenizer.stream(skip_special=True), StopFilter(params.stop)

    def put(text, last=False):
        file.write(stop_filter.push(text, last))
        file.flush()

    file.write(prompt)
    file.flush()
    try:
        model.generate([ids], params=params, tokenizer=tokenizer, streamer=lambda row, token: put(stream.push(token)))
        put(stream.flush(), last=True)
    finally:
        file.write("\n")  # an error's message begins its own line
        file.flush()


def compare(model, tokenizer, prompt, params):
    """One line with the speed of this generation's first tokens and that of the same model in plain PyTorch.

    Both take turns, so that a busy machine slows both; the ratio is the median of the rounds'.
    """
    if params.max_tokens < TOKENS_AT_LEAST:
        return "too few tokens to measure a speed"
    if ops.resolve("linear", model.lm_head.weight)[0] == "reference":
        return "the model ran in plain PyTorch: there is nothing to compare it with (fastgpt info says why)"
    ids = encode_prompt(tokenizer, prompt)
    tokens = params.n * min(TOKENS_TO_COMPARE, params.max_tokens)
    plainly = functools.partial(ops.backend, "reference")
    with plainly():
        _rate(model, ids, params, tokenizer, 2 * params.n)  # warms up what writing the text has not
    rounds = []
    for _ in range(ROUNDS):
        rounds.append([])
        for backend in (contextlib.nullcontext, plainly):
            with backend():
                rounds[-1].append(_rate(model, ids, params, tokenizer, tokens))
    if any(None in pair for pair in rounds):
        return "too few tokens to measure a speed"
    ours, plain = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(a / b for a, b in rounds)
    return (f"{ours:,.0f} tokens/s; the same model in plain PyTorch {plain:,.0f} tokens/s: {ratio:.2f} x "
            f"(median of {ROUNDS} rounds in turn)")


def _rate(model, ids, params, tokenizer, tokens):
    """Tokens a second, the reading of the prompt left out; None when there are too few."""
    pace = Pace(tokens)
    with contextlib.suppress(_Enough):
        model.generate([ids], params=params, tokenizer=tokenizer, streamer=pace)
    steps = len(pace.times) - params.n
    return steps / (pace.times[-1] - pace.times[params.n - 1]) if steps > 0 else None


def encode_prompt(tokenizer, prompt):
    if not prompt:
        raise ValueError("the prompt is empty: a model needs at least one token to go on from")
    return tokenizer.encode(prompt)


class Pace:
    """A streamer that notes when each token came, and ends the generation at `most` tokens or after some seconds."""

    def __init__(self, most):
        self.most, self.times = most, []

    def __call__(self, row, token):
        self.times.append(time.perf_counter())
        if len(self.times) >= self.most or self.times[-1] - self.times[0] > SECONDS_A_ROUND:
            raise _Enough


class _Enough(Exception):
    """Ends a generation from within its streamer."""
