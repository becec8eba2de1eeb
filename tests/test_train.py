import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt import GPT, GPTConfig, Tokenizer
from fastgpt.train import TokenData, TrainConfig, Trainer
from fastgpt.train.log import plot_log, read_log
from fastgpt.train.saving import kept_at, recover, replaced_folder
from fastgpt.train.trainer import choose_dtype, last_folder, learning_rate, load_state

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "".join(f"{n} men went to mow, went to mow a meadow. " for n in range(60))
CHARS = Tokenizer.characters(TEXT)
QUICK = {"batch": 4, "eval_every": 4, "eval_tokens": 64, "lr": 0.01}


def make_model(seed=0, **config):
    torch.manual_seed(seed)
    shape = {"block_size": 16, "vocab_size": CHARS.vocab_size, "n_layer": 2, "n_head": 2, "n_embd": 16, "bias": False}
    return GPT(GPTConfig(**{**shape, **config}))


def make_trainer(out, data=None, model=None, tokenizer=CHARS, **config):
    data = data or TokenData.from_texts([TEXT], CHARS)
    return Trainer(model or make_model(dropout=0.2), data, TrainConfig(out=str(out), **{**QUICK, **config}), tokenizer,
                   quiet=True)


def losses(out):
    names = ("step", "loss", "val_loss", "grad_norm")
    return [tuple(r.get(name) for name in names) for r in read_log(Path(out) / "log.jsonl")]


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


def assert_same_weights(a, b):
    for name, p in a.items():
        assert torch.equal(p, b[name]), name


class Interrupted(Trainer):
    """Gets a Ctrl-C in the middle of a step."""

    at = 6

    def _backward(self, n):
        if self.step == self.at and n % self.config.accumulate == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return super()._backward(n)


def test_bad_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="has 16 tokens, but a context of 16 needs at least 17"):
        make_trainer(tmp_path, TokenData(np.zeros(16, int)))
    with pytest.raises(ValueError, match="train must be 1-D and of integers, got float64"):
        TokenData(np.zeros(16))
    with pytest.raises(ValueError, match="val must be 1-D"):
        TokenData(np.zeros(16, int), np.zeros((2, 2), int))
    with pytest.raises(ValueError, match=f"token id 999, but the model only {CHARS.vocab_size} tokens"):
        make_trainer(tmp_path, TokenData(np.full(100, 999)))
    with pytest.raises(ValueError, match="context must be at most the model's block size 16, got 17"):
        make_trainer(tmp_path, context=17)
    with pytest.raises(ValueError, match="patience needs validation text"):
        make_trainer(tmp_path, TokenData(np.zeros(50, int)), patience=1)
    with pytest.raises(ValueError, match="ema needs validation text"):
        make_trainer(tmp_path, TokenData(np.zeros(50, int)), ema=0.9)
    with pytest.raises(ValueError, match="samples need a tokenizer"):
        make_trainer(tmp_path, tokenizer=None, sample=5)


# Settings

def test_wrong_settings_are_named():
    for name, value, message in [
            ("steps", 0, "steps must be greater than 0, got 0"), ("lr", -1, "lr must be greater than 0"),
            ("beta1", 1.0, r"beta1 must be in \[0, 1\), got 1.0"), ("dtype", "float16", "dtype must be one of auto"),
            ("lr", math.nan, "lr must be greater than 0, got nan"), ("final_lr", 2.0, r"final_lr must be in \[0, 1\]")]:
        with pytest.raises(ValueError, match=message):
            TrainConfig(**{name: value})
    for name, value in [("steps", 1.5), ("batch", True), ("lr", "0.1"), ("out", None)]:
        with pytest.raises(TypeError, match=f"{name} must be of type"):
            TrainConfig(**{name: value})
    assert TrainConfig(lr=1).lr == 1.0 and isinstance(TrainConfig(clip=0).clip, float)


def test_learning_rate_warms_up_and_ends_at_its_share():
    c = TrainConfig(steps=1000, warmup=10, lr=1.0, final_lr=0.1)
    rates = [learning_rate(c, step) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[10 + 495] == pytest.approx(0.55, abs=0.01)
    assert learning_rate(TrainConfig(steps=1, lr=1.0), 0) == 1.0
    assert max(learning_rate(TrainConfig(steps=20, lr=1.0), s) for s in range(20)) == 1.0  # warmup 100 is cut to 2


def test_dtype_comes_with_a_reason():
    assert choose_dtype("bfloat16", "cpu") == (torch.bfloat16, "as asked for")
    dtype, reason = choose_dtype("auto", "cpu")
    assert (dtype == torch.bfloat16) == (reason == "this cpu multiplies bfloat16")


# Training

def test_it_learns_and_leaves_what_it_should(tmp_path):
    trainer = make_trainer(tmp_path, model=make_model(), steps=40, eval_every=20, batch=16)
    result = trainer.run()
    records = read_log(tmp_path / "log.jsonl")
    assert (result.why, result.step, result.best_step) == ("done", 40, 40)
    assert records[0]["loss"] == pytest.approx(math.log(CHARS.vocab_size), abs=0.2)
    assert result.best_loss < 2.4 and records[-1]["val_perplexity"] == pytest.approx(math.exp(result.best_loss))
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 41))
    for name in ("last", "best"):
        assert_same_weights(weights(GPT.from_pretrained(str(tmp_path / name))), weights(trainer.model))
        assert Tokenizer.from_dir(tmp_path / name).decode(CHARS.encode("mow")) == "mow"
    assert not trainer.model.training and sorted(p.name for p in tmp_path.iterdir()) == ["best", "last", "log.jsonl"]


def test_the_callers_random_state_is_left_alone(tmp_path):
    trainer = make_trainer(tmp_path, steps=2)
    before = torch.get_rng_state()
    trainer.run()
    assert torch.equal(torch.get_rng_state(), before)


def test_accumulated_batches_are_one_larger_batch(tmp_path):
    runs = []
    for name, batch, accumulate in (("a", 8, 1), ("b", 2, 4)):
        make_trainer(tmp_path / name, model=make_model(), steps=3, batch=batch, accumulate=accumulate, lr=1e-3).run()
        runs.append(np.array([r["loss"] for r in read_log(tmp_path / name / "log.jsonl") if "loss" in r]))
    np.testing.assert_allclose(*runs, rtol=1e-5)


def test_best_holds_the_weights_of_the_best_validation(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, steps=40, patience=2)
    kept, script = [], iter([3.0, 2.0, 2.0, 2.5, 1.0])

    def validation_loss():
        kept.append(weights(trainer.model))
        return next(script)

    monkeypatch.setattr(trainer, "validation_loss", validation_loss)
    result = trainer.run()
    assert (result.why, result.step, result.best_step, result.best_loss) == ("early", 16, 8, 2.0)
    assert_same_weights(weights(GPT.from_pretrained(str(tmp_path / "best"))), kept[1])
    again = Trainer.resume(tmp_path, trainer.data, CHARS, quiet=True)
    assert again.run().step == 16  # patience is still out


def test_bfloat16_trains_with_float32_weights(tmp_path):
    results = {}
    for dtype in ("float32", "bfloat16"):
        trainer = make_trainer(tmp_path / dtype, model=make_model(), steps=12, dtype=dtype)
        trainer.run()
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        results[dtype] = [r["loss"] for r in read_log(tmp_path / dtype / "log.jsonl") if "loss" in r]
    assert results["float32"] != results["bfloat16"]
    np.testing.assert_allclose(results["float32"], results["bfloat16"], rtol=0.02)


def test_the_average_is_validated_and_kept_as_best_and_the_run_goes_on_without_it(tmp_path):
    plain = make_trainer(tmp_path / "plain", steps=8)
    plain.run()
    trainer = make_trainer(tmp_path / "ema", steps=8, ema=0.5)
    seen, update = [], trainer.average.update
    trainer.average.update = lambda step: (seen.append(weights(trainer.model)), update(step))
    trainer.run()
    assert [s[:2] for s in losses(tmp_path / "ema")] == [s[:2] for s in losses(tmp_path / "plain")]
    expected = weights(make_model(dropout=0.2))
    for step, w in enumerate(seen, 1):
        share = 1 - min(0.5, step / (step + 9))
        expected = {name: (1 - share) * p + share * w[name] for name, p in expected.items()}
    best = weights(GPT.from_pretrained(str(tmp_path / "ema" / "best")))
    for name, p in expected.items():
        torch.testing.assert_close(best[name], p, rtol=1e-5, atol=1e-6)
    assert losses(tmp_path / "ema")[-1][2] != losses(tmp_path / "plain")[-1][2]


def test_without_validation_text_only_last_is_kept(tmp_path):
    result = make_trainer(tmp_path, TokenData(CHARS.encode(TEXT)), steps=4).run()
    assert result.best_loss is None and not (tmp_path / "best").exists() and (tmp_path / "last").exists()


def test_samples_do_not_change_the_run(tmp_path, capsys):
    for sample in (0, 8):
        trainer = make_trainer(tmp_path / str(sample), steps=8, sample=sample, prompt="mow")
        trainer.quiet = False
        trainer.run()
    assert losses(tmp_path / "0") == losses(tmp_path / "8")
    assert capsys.readouterr().out.count("  | mow") == 2


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    trainer = make_trainer(tmp_path, steps=4)
    trainer.run()
    again = Trainer.resume(tmp_path, trainer.data, CHARS, quiet=True, steps=8)
    with torch.no_grad():
        again.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="step 5: the loss is nan.*lower learning rate.*step 4 is kept"):
        again.run()
    assert_same_weights(weights(GPT.from_pretrained(str(tmp_path / "last"))), weights(trainer.model))


def test_it_runs_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(make_trainer(tmp_path, steps=2).run()))
    thread.start()
    thread.join()
    assert results[0].step == 2


# Going on

@pytest.mark.parametrize("config,settings", [
    ({"dropout": 0.2}, {"accumulate": 2}),
    ({"dropout": 0.1}, {"ema": 0.9}),
    ({"dropout": 0.1, "bias": True, "tie_word_embeddings": False, "activation": "relu"}, {"dtype": "bfloat16"}),
])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(config, settings, tmp_path):
    settings = {"steps": 14, **settings}
    whole, handler = make_trainer(tmp_path / "whole", model=make_model(**config), **settings), signal.getsignal(signal.SIGINT)
    whole.run()
    part = make_trainer(tmp_path / "part", model=make_model(**config), **settings)
    part.__class__ = Interrupted
    result = part.run()
    assert (result.why, result.step) == ("interrupted", 7)  # the step was finished first
    assert signal.getsignal(signal.SIGINT) is handler
    again = Trainer.resume(tmp_path / "part", part.data, CHARS, quiet=True)
    assert again.step == 7 and again.run().step == 14
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    assert_same_weights(weights(whole.model), weights(again.model))
    best = [weights(GPT.from_pretrained(str(tmp_path / name / "best"))) for name in ("whole", "part")]
    assert_same_weights(*best)


def test_a_run_can_be_made_longer_and_its_settings_changed(tmp_path):
    trainer = make_trainer(tmp_path, steps=4, weight_decay=0.5)
    trainer.run()
    again = Trainer.resume(tmp_path, trainer.data, CHARS, quiet=True, steps=6, weight_decay=0.25, beta1=0.5)
    assert [g["weight_decay"] for g in again.optimizer.param_groups] == [0.25, 0.0]
    assert {g["betas"] for g in again.optimizer.param_groups} == {(0.5, 0.99)}
    assert again.run().step == 6
    assert [step for step, loss, *_ in losses(tmp_path) if loss] == [1, 2, 3, 4, 5, 6]


def test_what_cannot_be_resumed_is_named(tmp_path):
    trainer = make_trainer(tmp_path, steps=4)
    with pytest.raises(FileNotFoundError, match="no checkpoint of a run in"):
        last_folder(tmp_path)
    trainer.run()
    with pytest.raises(ValueError, match="are not those that .*last was trained on"):
        Trainer.resume(tmp_path, TokenData.from_texts([TEXT[1:]], CHARS))
    with pytest.raises(FileExistsError, match="holds a run already"):
        make_trainer(tmp_path).run()
    path = tmp_path / "last" / "trainer.pt"
    state = load_state(path.parent)
    torch.save({"step": 1}, path)
    with pytest.raises(ValueError, match="trainer.pt is not a trainer's state: it lacks .*config"):
        Trainer.resume(tmp_path, trainer.data)
    for name, value, message in [("config", {"flux": 1}, "other settings than a run of this version .*flux"),
                                 ("config", [], "its config is"), ("step", "x", "its step is 'x'"),
                                 ("optimizer", {}, "is not the state of this model's training")]:
        torch.save({**state, name: value}, path)
        with pytest.raises(ValueError, match=f"trainer.pt .*{message}"):
            Trainer.resume(tmp_path, trainer.data)
    path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="trainer.pt is not a trainer's state"):
        Trainer.resume(tmp_path, trainer.data)


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    torch.save({"step": Hostile()}, tmp_path / "trainer.pt")
    with pytest.raises(ValueError, match="is not a trainer's state"):
        load_state(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("rest", [b"5\n", b'{"a": 1}\n', b'{"step": "x"}\n', b"\xff\xfe\n", b'{"ste'])
def test_the_log_ends_where_it_is_damaged(rest, tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1}\n' + rest + b'{"step": 2}\n')
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}]


def test_the_log_forgets_what_a_killed_run_had_ahead(tmp_path):
    trainer = make_trainer(tmp_path, steps=8)
    trainer.run()
    whole = losses(tmp_path)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 9, "loss": 1.0}\n{"step": 10, "lo')
    Trainer.resume(tmp_path, trainer.data, CHARS, quiet=True, steps=10).run()
    assert losses(tmp_path)[:len(whole)] == whole
    assert [step for step, loss, *_ in losses(tmp_path) if loss] == list(range(1, 11))


# Saving

KILLED_SAVE = """
import os, sys
from pathlib import Path
from fastgpt.train import saving
left = int(sys.argv[2])
def dying(function):
    def run(*args, **kwargs):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return function(*args, **kwargs)
    return run
saving.os.fsync = dying(os.fsync)
Path.rename = dying(Path.rename)
saving.shutil.rmtree = dying(saving.shutil.rmtree)
with saving.replaced_folder(sys.argv[1]) as folder:
    for name in "ab":
        (folder / name).write_text("new")
"""


def test_a_kill_anywhere_in_a_save_leaves_the_old_or_the_new_folder(tmp_path):
    seen = []
    for operations in range(20):
        path = tmp_path / str(operations)
        with replaced_folder(path) as folder:
            for name in "ab":
                (folder / name).write_text("old")
        done = subprocess.run([sys.executable, "-c", KILLED_SAVE, path, str(operations)], timeout=60, check=False)
        content = {(kept_at(path) / name).read_text() for name in "ab"}
        assert len(content) == 1
        seen += content
        recover(path)
        with replaced_folder(path) as folder:  # and the next save works
            (folder / "a").write_text("next")
        assert [p.name for p in path.iterdir()] == ["a"]
        if done.returncode == 0:
            break
    assert done.returncode == 0 and operations > 5
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}


def test_an_error_while_saving_leaves_the_old_folder(tmp_path):
    path = tmp_path / "last"
    with replaced_folder(path) as folder:
        (folder / "a").write_text("old")
    message = "cannot save .*last: disk on fire; the one saved before is intact"
    with pytest.raises(OSError, match=message), replaced_folder(path) as folder:
        (folder / "a").write_text("new")
        raise RuntimeError("disk on fire")
    with pytest.raises(KeyboardInterrupt), replaced_folder(path):
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["last"] and (path / "a").read_text() == "old"


@pytest.fixture
def file_size_limit():
    """Writes beyond a size fail, much as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("share", [0.5, 1.5])  # the model's file fails; only the trainer's state does
def test_a_full_disk_keeps_the_checkpoint_before(share, tmp_path, file_size_limit):
    trainer = make_trainer(tmp_path, steps=8)
    trainer.data.val = trainer.data.val[:0]
    size = 4 * sum(p.numel() for p in trainer.model.parameters())

    def fill_the_disk():
        if trainer.step == 8:
            file_size_limit(int(size * share))
        return ""

    trainer._validate = fill_the_disk
    with pytest.raises(OSError, match="cannot save .*last: .*; the one saved before is intact"):
        trainer.run()
    file_size_limit(resource.RLIM_INFINITY)  # before pytest writes to its own output, which may be a file
    assert load_state(last_folder(tmp_path))["step"] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last", "log.jsonl"]


KILLED_RUN = """
import sys
sys.path.insert(0, sys.argv[2])
import test_train as t
t.torch.set_num_threads(1)
trainer = t.make_trainer(sys.argv[1], steps=1000000, warmup=5)
trainer.run()
"""


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path):
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-c", KILLED_RUN, out, Path(__file__).parent])
    try:
        deadline = time.monotonic() + 60
        while len(read_log(out / "log.jsonl")) < 30 and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        process.kill()
        process.wait()
    step = load_state(last_folder(out))["step"]
    assert step >= 20
    again = Trainer.resume(out, TokenData.from_texts([TEXT], CHARS), CHARS, quiet=True)
    again.config.eval_every = 10 ** 9
    again._end = lambda stop: "done" if again.step >= step + 3 else None
    again.run()
    whole = make_trainer(tmp_path / "whole", steps=1000000, warmup=5)
    whole._end = lambda stop: "done" if whole.step >= step + 3 else None
    whole.run()
    tail = [r for r in losses(tmp_path / "whole") if r[0] > step and r[1]]
    assert tail and tail == [r for r in losses(out) if r[0] > step and r[1]]


def test_the_plot_needs_matplotlib_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"step": n, "loss": 3.0 / n}) + "\n" for n in (1, 2)))
    pytest.importorskip("matplotlib")
    plot_log(tmp_path / "log.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_log(tmp_path / "log.jsonl", tmp_path / "loss.png")
