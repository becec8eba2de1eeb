"""The contestants of the decode benchmark: the models' files, the processes, and the check of every engine's tokens."""
import sys
from pathlib import Path

import torch

from benchmarks.decoding import MODELS
from benchmarks.generation import random_prompts
from benchmarks.peers import ENGINES, OURS
from benchmarks.processes import Process
from benchmarks.timing import Failure, TooSlow
from fastgpt import GPT, ops

CHECKED_ROWS = 2
# How far a token's logit may lie below the largest, in standard deviations of the logits, under the float32 reference.
# Of ours in float32, each token: both sides' rounding, far below the distance between likely tokens.
TIE = 1e-4
# Of all the others the mean over the tokens: what rounded weights, keys and values may cost. A token chosen by chance
# lies 4 below (2 among 33 tokens).
MEAN_SHORTFALL = {"float32": 0.001, "float16": 0.001, "bfloat16": 0.005, "int8": 0.05, "int4": 0.6}

LIMIT = 4  # caps that a start may take, with its check and its first run


class Models:
    """The models with random weights, and each engine's files of them, made when first asked for and kept in `folder`.

    pythons: engine -> the Python that has it, where it is not this one. log: the file for what the engines print.
    """

    def __init__(self, folder, pythons, log):
        self.folder, self.pythons, self.log = Path(folder), pythons, log
        self.models, self.failures, self.slow = {}, {}, {}

    def model(self, name):
        if name not in self.models:
            torch.manual_seed(0)
            self.models[name] = GPT(MODELS[name]).eval()
        return self.models[name]

    def source(self, name):
        path = self.folder / name / "huggingface"
        if not path.exists():
            self.model(name).save_pretrained(path)
        return path

    def command(self, engine, *arguments):
        return [self.pythons.get(engine, sys.executable), "-m", "benchmarks.generation", *map(str, arguments)]

    def files(self, name, engine, precision):
        """The folder of an engine's own files. Raises Failure, again and again, where they can't be made."""
        path = self.folder / name / f"{engine}-{precision}"
        if path.exists():
            return path
        if path not in self.failures:
            self.failures[path] = self._make(path, engine, precision, self.source(name))
        if self.failures[path]:
            raise Failure(self.failures[path])
        return path

    def _make(self, path, engine, precision, source):
        """-> Why it could not be made, or None."""
        part = path.with_name(f"{path.name}.part")
        maker = Process(engine, self.command(engine, "--make", engine, precision, source, part), log=self.log)
        try:
            maker.prepare()
        except Failure as failure:
            return str(failure)
        finally:
            maker.close()
        part.rename(path)
        return None


class Contestant(Process):
    """An engine in one scenario. kind: (engine, dtype, threads or "cuda"). cap: seconds that a run may take.

    What exceeds it is not started in the model's scenarios that follow.
    """

    def __init__(self, name, kind, scenario, models, cap):
        self.kind, (self.engine, self.dtype, self.threads) = kind, kind
        self.precision = ENGINES[self.engine].precisions.get(self.dtype)
        self.scenario, self.models, self.cap, self.shortfall = scenario, models, cap, None
        # Every rival under its own defaults: `import fastgpt` has set the first in this process.
        threads = {} if self.threads == "cuda" else {"OMP_NUM_THREADS": str(self.threads)}
        super().__init__(name, None, env={"OMP_WAIT_POLICY": None, **threads}, log=models.log, limit=LIMIT * cap)

    def prepare(self):
        if self.precision is None:
            raise Failure(f"{self.engine} has no {self.dtype} here")
        s = self.scenario
        if (s.model, *self.kind) in self.models.slow:
            raise Failure(f"not started: {self.models.slow[(s.model, *self.kind)]}")
        folder = self.models.files(s.model, self.engine, self.precision)
        self.command = self.models.command(self.engine, self.engine, self.precision, self.threads,
                                           self.models.source(s.model), folder, s.batch, s.prompt, s.new)
        try:
            super().prepare()
            self._check_speed()
        except TooSlow as slow:
            self.models.slow[(s.model, *self.kind)] = f"in {s.label()}, {slow}"
            raise
        self._check_tokens()

    def _check_speed(self):
        """With a second chance: the first run may have been disturbed, which threads that spin bear badly."""
        if self.head["warm_seconds"] > self.cap and (seconds := self.sample().seconds) > self.cap:
            raise TooSlow(f"a run takes {seconds:.0f} s, over the cap of {self.cap:g} s")

    def _check_tokens(self):
        s, model = self.scenario, self.models.model(self.scenario.model)
        prompts = random_prompts(model.config.vocab_size, s.batch, s.prompt, 0)
        exact = self.name == OURS and self.dtype == "float32"
        self.shortfall = check_tokens(model, prompts, self.head["ids"], None if exact else MEAN_SHORTFALL[self.dtype])


def check_tokens(model, prompts, ids, mean_shortfall=None):
    """-> the mean shortfall of the new tokens `ids`. Raises Failure when it is larger than `mean_shortfall`, or, where
    that is None, when a token is not the likeliest one."""
    if not all(0 <= token < model.config.vocab_size for row in ids for token in row):
        raise Failure(f"gave ids outside of the vocabulary of {model.config.vocab_size}")
    short = shortfall(model, torch.tensor(prompts[:CHECKED_ROWS]), torch.tensor(ids[:CHECKED_ROWS]))
    found, bound = (short.max(), TIE) if mean_shortfall is None else (short.mean(), mean_shortfall)
    if not found <= bound:
        which = "a token's logit is" if mean_shortfall is None else "the tokens' logits are, in the mean,"
        raise Failure(f"not the likeliest tokens: {which} {found:.2g} deviations below the largest, at most {bound:g} "
                      "expected")
    return short.mean().item()


@torch.no_grad()
def shortfall(model, prompts, ids):
    """prompts (B, S), new tokens (B, T) -> (B, T): how far each new token's logit lies below the largest."""
    tokens = torch.cat([prompts, ids], 1)
    with ops.backend("reference"):
        logits = model(tokens[:, :-1], tokens[:, 1:].contiguous())[0][:, prompts.shape[1] - 1:]  # (B, T, V)
    chosen = logits.gather(2, ids[..., None])[..., 0]
    return (logits.amax(2) - chosen) / logits.std(2)
