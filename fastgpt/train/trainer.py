"""The training loop. Every step is a pure function of the state saved with a checkpoint and of (seed, step), so that a
resumed run gives the same losses, to the last bit, as one that was never stopped."""
import contextlib
import dataclasses
import math
import signal
import threading
import time
from pathlib import Path

import numpy as np
import torch

from fastgpt.extension import HAS_BF16
from fastgpt.evaluate import perplexity, plan_windows, score
from fastgpt.train.average import Average
from fastgpt.train.config import TrainConfig
from fastgpt.train.data import Windows
from fastgpt.train.log import Progress, RunLog
from fastgpt.train.saving import recover, replaced_folder

# What trainer.pt holds, and of which kind.
STATE = {"step": int, "best_loss": float | None, "best_step": int | None, "stale": int, "config": dict, "data": object,
         "optimizer": dict, "average": list | None}


@dataclasses.dataclass
class Result:
    """How a run ended: why is "done", "early" (patience ran out) or "interrupted"; losses are in nats per token."""

    why: str
    step: int
    loss: float | None
    best_loss: float | None
    best_step: int | None


class Trainer:
    """Trains `model` on `data` as `config` says: `Trainer(model, data, TrainConfig()).run()`.

    model: a fastgpt.GPT, trained in place on the device it is on; data: a TokenData; tokenizer: saved with the
    checkpoints, and needed for samples. Checkpoints are folders that `GPT.from_pretrained` reads: out/last, with
    the trainer's own state beside the model, and out/best, where there is validation text.
    """

    def __init__(self, model, data, config=None, tokenizer=None, quiet=False):
        self.model, self.data, self.config = model, data, config or TrainConfig()
        self.tokenizer, self.quiet = tokenizer, quiet
        self.device = next(model.parameters()).device
        self.context = self.config.context or model.config.block_size
        self.windows = Windows(data.train, self.context, self.config.seed)
        self._check()
        self.dtype, self.dtype_reason = choose_dtype(self.config.dtype, self.device.type)
        betas = (self.config.beta1, self.config.beta2)
        self.optimizer = model.configure_optimizers(self.config.weight_decay, self.config.lr, betas, self.device.type)
        self.average = Average(model.parameters(), self.config.ema) if self.config.ema else None
        self.step, self.loss, self.saved_step = 0, None, None
        self.best_loss, self.best_step, self.stale = None, None, 0

    @classmethod
    def resume(cls, out, data, tokenizer=None, device="cpu", quiet=False, **changes):
        """The trainer as it was at the checkpoint out/last; `changes` are settings to replace, such as steps."""
        from fastgpt import GPT
        folder = last_folder(out)
        state = load_state(folder)
        if state["data"] != data.fingerprint():
            raise ValueError(f"the text or its tokens are not those that {folder} was trained on, so its run cannot "
                             "go on; to train it on other text, start a new run from it")
        try:
            config = TrainConfig(**{**state["config"], **changes, "out": str(out)})
        except TypeError as error:  # of another version
            raise ValueError(f"{folder / 'trainer.pt'} has other settings than a run of this version ({error})") from error
        trainer = cls(GPT.from_pretrained(str(folder)).to(device), data, config, tokenizer, quiet)
        try:
            trainer._restore(state)
        except Exception as error:  # whatever a state of the wrong form makes torch raise
            raise ValueError(f"{folder / 'trainer.pt'} is not the state of this model's training "
                             f"({type(error).__name__}: {error})") from error
        return trainer

    def run(self):
        """Trains to the last step, the end of patience, or Ctrl-C, and saves; a Result. A second Ctrl-C does not wait.

        FloatingPointError when the loss stops being a number, OSError when a checkpoint cannot be written: either way
        the last checkpoint stays as it was.
        """
        if self.step == 0 and (Path(self.config.out) / "last").exists():
            raise FileExistsError(f"{self.config.out} holds a run already: resume it, or name another folder")
        self.log = RunLog(_made(self.config.out) / "log.jsonl", self.step)
        self.progress = Progress(self.config.steps, self.step, self.quiet)
        devices = [self.device] if self.device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices), _interrupts() as stop:
                return self._loop(stop)
        finally:
            self.model.eval()
            self.progress.close()

    def _loop(self, stop):
        while not (why := self._end(stop)):
            self._logged_step()
            if self.step == self.config.steps or self.step % self.config.eval_every == 0:
                self._milestone()
        if self.saved_step != self.step:
            self._save_last()
        return Result(why, self.step, self.loss, self.best_loss, self.best_step)

    def _end(self, stop):
        if self.step >= self.config.steps:
            return "done"
        if self.config.patience and self.stale >= self.config.patience:
            return "early"
        return "interrupted" if stop else None

    def _logged_step(self):
        start = time.perf_counter()
        self.loss, lr, norm = self._train_step()
        c, seconds = self.config, time.perf_counter() - start
        self.log.write(step=self.step, loss=self.loss, lr=lr, grad_norm=norm, seconds=round(seconds, 6))
        self.progress.step(self.step, self.loss, c.batch * c.accumulate * self.context, seconds)

    def _train_step(self):
        c = self.config
        self.model.train()
        # Dropout draws from torch's generator: so its masks depend on the step, not on the steps before.
        torch.manual_seed(int(np.random.SeedSequence([c.seed, self.step]).generate_state(1, np.uint64)[0] >> 1))
        lr = learning_rate(c, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = sum(self._backward(self.step * c.accumulate + n) for n in range(c.accumulate))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c.clip or math.inf).item()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise FloatingPointError(f"step {self.step + 1}: the loss is {loss}, its gradient's norm {norm}: "
                                     f"try a lower learning rate than {c.lr}" + self._kept())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self.average is not None:
            self.average.update(self.step)
        return loss, lr, norm

    def _backward(self, n):
        """Adds the gradients of the run's n-th micro-batch; its share of the step's loss."""
        x, y = self.windows.batch(n * self.config.batch, self.config.batch)
        with self._autocast():
            _, loss = self.model(x.to(self.device), y.to(self.device), return_logits=False)
        loss = loss / self.config.accumulate
        loss.backward()
        return loss.item()

    def _milestone(self):
        """Validation, a checkpoint, a sample."""
        with contextlib.nullcontext() if self.average is None else self.average.in_place():
            text = f"step {self.step}: " + self._validate()
            sample = self._sample() if self.config.sample else None
        self.progress.say(text + self._save_last())
        if sample:
            self.progress.say(sample)

    def _validate(self):
        if len(self.data.val) < 2:
            return f"training loss {self.loss:.4f}, "
        loss = self.validation_loss()
        self.log.write(step=self.step, val_loss=loss, val_perplexity=perplexity(loss))
        text = f"validation loss {loss:.4f} nats/token, perplexity {perplexity(loss):.4g}, "
        if self.best_loss is not None and loss >= self.best_loss:
            self.stale += 1
            return text + f"best {self.best_loss:.4f} at step {self.best_step}, "
        self.best_loss, self.best_step, self.stale = loss, self.step, 0
        self._save("best")
        return text + "the best so far, "

    def validation_loss(self):
        """Nats per token over at most eval_tokens of the validation text: windows side by side, the same every time."""
        length, starts, first = plan_windows(len(self.data.val), self.context, self.context, self.context)
        number = min(len(starts), max(1, self.config.eval_tokens // length))
        chosen = np.linspace(0, len(starts) - 1, number).round().astype(int)
        self.model.eval()
        with self._autocast():
            nats, count = score(self.model, self.data.val, (length, starts[chosen], first[chosen]), self.config.batch)
        return nats / count

    def _sample(self):
        self.model.eval()
        prompt = self.tokenizer.encode(self.config.prompt)[-self.model.config.block_size:]
        with torch.no_grad(), self._autocast():
            (ids,) = self.model.generate([prompt], self.config.sample, temperature=0.8, seed=self.step)
        return "  | " + self.tokenizer.decode(ids).strip("\n").replace("\n", "\n  | ")

    def _save_last(self):
        state = {"step": self.step, "best_loss": self.best_loss, "best_step": self.best_step, "stale": self.stale,
                 "config": dataclasses.asdict(self.config), "data": self.data.fingerprint(),
                 "optimizer": self.optimizer.state_dict(), "average": self.average and self.average.tensors}
        self._save("last", state)
        self.saved_step = self.step
        return f"saved in {Path(self.config.out) / 'last'}"

    def _save(self, name, state=None):
        with replaced_folder(_made(self.config.out) / name) as folder:
            self.model.save_pretrained(str(folder))
            if self.tokenizer is not None:
                self.tokenizer.save(folder)
            if state is not None:
                with open(folder / "trainer.pt", "wb") as file:
                    torch.save(state, file)

    def _restore(self, state):
        chosen = [{name: group[name] for name in ("betas", "weight_decay")} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, chosen, strict=True):
            group.update(settings)  # those of the config, should they have been changed
        if self.average is not None and state["average"] is not None:
            torch._foreach_copy_(self.average.tensors, state["average"])
        self.step = self.saved_step = state["step"]
        self.best_loss, self.best_step, self.stale = state["best_loss"], state["best_step"], state["stale"]

    def _kept(self):
        return "" if self.saved_step is None else f"; the checkpoint of step {self.saved_step} is kept"

    def _autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _check(self):
        size, block_size = self.model.config.vocab_size, self.model.config.block_size
        if self.context > block_size:
            raise ValueError(f"context must be at most the model's block size {block_size}, got {self.context}")
        if self.data.largest() >= size:
            raise ValueError(f"the text has token id {self.data.largest()}, but the model only {size} tokens")
        for name in ("patience", "ema"):
            if getattr(self.config, name) and len(self.data.val) < 2:
                raise ValueError(f"{name} needs validation text, and there is none")
        if self.config.sample and not (self.tokenizer and self.tokenizer.encode(self.config.prompt)):
            raise ValueError("samples need a tokenizer and a prompt of at least one token")


def learning_rate(config, step):
    """The rate of step 0, 1, ...: linear warmup, then a cosine to final_lr * lr (Loshchilov & Hutter 2016)."""
    warmup = min(config.warmup, config.steps // 10)
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, config.steps - 1 - warmup))
    return config.lr * (config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def choose_dtype(name, device_type):
    """(torch.dtype, the reason as text) for a config's dtype on a device."""
    if name != "auto":
        return getattr(torch, name), "as asked for"
    if device_type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device_type == "cpu" and HAS_BF16
    if native:
        return torch.bfloat16, f"this {device_type} multiplies bfloat16"
    return torch.float32, f"this {device_type} has no bfloat16 arithmetic"


def last_folder(out):
    """The folder of the run's last checkpoint; FileNotFoundError when there is none."""
    folder = Path(out) / "last"
    recover(folder)
    if not (folder / "trainer.pt").exists():
        raise FileNotFoundError(f"no checkpoint of a run in {out}: {folder / 'trainer.pt'} is missing")
    return folder


def load_state(folder):
    """The trainer's state in a checkpoint's folder, read without running any code in it."""
    path = Path(folder) / "trainer.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = set(STATE) - set(state)
    except Exception as error:  # whatever a broken archive makes the reader raise
        raise ValueError(f"{path} is not a trainer's state ({type(error).__name__}: {error})") from error
    if missing:
        raise ValueError(f"{path} is not a trainer's state: it lacks {', '.join(sorted(missing))}")
    wrong = [name for name, kind in STATE.items() if not isinstance(state[name], kind)]
    if wrong:
        raise ValueError(f"{path} is not a trainer's state: its {wrong[0]} is {state[wrong[0]]!r:.60}")
    return state


@contextlib.contextmanager
def _interrupts():
    """A list that SIGINT and SIGTERM append to, so that a step is never cut in two; the second one ends at once."""
    caught = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def catch(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _made(folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
