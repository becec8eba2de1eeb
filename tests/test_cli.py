import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgpt import GPT, Tokenizer, loading, ops
from fastgpt.cli import main, make_parser
from fastgpt.talk import StopFilter
from fastgpt.train.log import read_log
from fastgpt.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = "".join(f"{n} men went to mow, went to mow a meadow.\n" for n in range(40))
SMALL = ["--layers", "1", "--heads", "2", "--width", "16", "--context", "16", "--batch", "4", "--eval-every", "5"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(text file, run folder) of a run by the command line."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "mow.txt").write_text(TEXT)
    assert main(["train", str(folder / "mow.txt"), "--out", str(folder / "run"), "--steps", "10", *SMALL]) == 0
    return str(folder / "mow.txt"), str(folder / "run")


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A folder to be in, with nothing of interest."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    (tmp_path / "short.txt").write_text("mow")
    (tmp_path / "one.txt").write_text("m")
    return tmp_path


def run(capsys, *argv):
    """(status, stdout, stderr) of a command line."""
    try:
        status = main([str(a) for a in argv])
    except SystemExit as ending:
        status = ending.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize("verb", [[], ["train"], ["eval"], ["generate"], ["info"]])
def test_help_reads_well(verb, capsys):
    status, out, err = run(capsys, *verb, "--help")
    assert status == 0 and err == "" and out.startswith(f"usage: {' '.join(['fastgpt', *verb])}")
    assert "None" not in out and "%(" not in out and "==" not in out


def test_help_is_quick():
    code = "import sys, fastgpt.cli as c; c.make_parser().format_help(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_every_setting_has_a_flag_and_only_those_given_are_set():
    args = make_parser().parse_args(["train", "x", "--final-lr", "0.5", "--eval-every", "7"])
    assert (args.final_lr, args.eval_every) == (0.5, 7) and not hasattr(args, "steps")


def test_train_tells_what_it_does(trained, here, capsys):
    text, _ = trained
    status, out, err = run(capsys, "train", text, "--steps", 5, *SMALL, "--tokenizer", "bpe:260", "--sample", 5)
    assert status == 0 and err == ""
    assert re.search(r"text: +[\d,]+ training and [\d,]+ validation tokens, byte-level BPE tokenizer of 260", out)
    assert re.search(r"model: 0.01 M parameters: 1 layers, 2 heads, 16 wide, context 16, dropout 0.0", out)
    assert re.search(r"steps 0 to 5 of 4 x 16 tokens \(0.\d epochs\) on cpu in \w+ \(\w", out)
    assert re.search(r"step 5: validation loss \d.\d{4} nats/token, perplexity [\d.]+, the best so far, saved in", out)
    assert "finished at step 5; best validation loss" in out and "fastgpt generate --model out" in out
    assert sorted(os.listdir("out")) == ["best", "last", "log.jsonl", "loss.png", "run.json"]


def test_ctrl_c_saves_and_resume_goes_on_exactly(trained, here, capsys, monkeypatch):
    text, _ = trained
    command = ["train", text, "--steps", 12, *SMALL, "--dropout", 0.1]
    assert run(capsys, *command, "--out", "whole")[0] == 0
    backward = Trainer._backward
    monkeypatch.setattr(Trainer, "_backward", lambda self, n: (
        os.kill(os.getpid(), signal.SIGINT) if n == 6 else None, backward(self, n))[1])
    status, out, err = run(capsys, *command, "--out", "part")
    assert status == 130 and err == "" and "interrupted at step 7" in out
    assert "go on with: fastgpt train --resume --out part" in out
    monkeypatch.setattr(Trainer, "_backward", backward)
    assert run(capsys, "train", "--resume", "--out", "part")[0] == 0
    whole, part = ([(r["step"], r.get("loss"), r.get("val_loss")) for r in read_log(f"{out}/log.jsonl")]
                   for out in ("whole", "part"))
    assert whole == part and whole[-1][0] == 12
    status, out, _ = run(capsys, "train", "--resume", "--out", "part")
    assert status == 0 and out == "nothing to do: part is at step 12 of 12; --steps N trains further\n"
    assert run(capsys, "train", "--resume", "--out", "part", "--steps", 14)[0] == 0
    assert read_log("part/log.jsonl")[-1]["step"] == 14


def test_a_run_is_not_overwritten_unasked(trained, here, capsys):
    text, _ = trained
    command = ["train", text, "--steps", 2, *SMALL]
    assert run(capsys, *command)[0] == 0
    status, _, err = run(capsys, *command)
    assert status == 2 and "out holds a run already: --resume goes on with it, --overwrite throws it away" in err
    assert run(capsys, *command, "--overwrite", "--seed", 5)[0] == 0
    assert [r["step"] for r in read_log("out/log.jsonl") if "loss" in r] == [1, 2]


def test_validation_may_have_its_own_text(trained, here, capsys):
    text, _ = trained
    (here / "val.txt").write_text(TEXT[:100] + "§")
    status, out, _ = run(capsys, "train", text, "--val", "val.txt", "--steps", 2, *SMALL)
    assert status == 0 and f"{len(TEXT):,} training and 101 validation tokens" in out
    os.chdir("/")
    assert run(capsys, "train", "--resume", "--out", here / "out", "--steps", 3)[0] == 0


def test_init_fine_tunes_ours_and_nanogpts(trained, here, capsys):
    text, folder = trained
    status, out, _ = run(capsys, "train", text, "--init", folder, "--out", "ours", "--steps", 2, "--batch", 2)
    assert status == 0 and "character tokenizer" in out
    first = read_log("ours/log.jsonl")
    assert first[0]["loss"] < 3.2 and first[0]["lr"] <= 1e-4
    model = GPT.from_pretrained(folder + "/last")
    shape = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    torch.save({"model": model.state_dict(), "model_args": {k: getattr(model.config, k) for k in shape}}, "ckpt.pt")
    status, _, err = run(capsys, "train", text, "--init", "ckpt.pt", "--out", "theirs")
    assert status == 2 and "name the model's tokenizer with --tokenizer" in err
    status, _, err = run(capsys, "train", text, "--init", "ckpt.pt", "--out", "theirs", "--steps", 2, "--batch", 2,
                         "--tokenizer", folder + "/last")
    assert status == 0, err
    assert read_log("theirs/log.jsonl")[0]["loss"] == pytest.approx(first[0]["loss"], rel=0.05)


def test_eval_prints_a_table_or_json(trained, here, capsys, monkeypatch):
    text, folder = trained
    status, out, err = run(capsys, "eval", text, "--model", folder, "--stride", 4, "--json")
    values = json.loads(out)
    assert status == 0 and err == "" and values["context"] == 16 and values["stride"] == 4
    assert values["tokens"] == values["bytes"] == values["characters"] == len(TEXT) - 1
    status, out, _ = run(capsys, "eval", text, "--model", folder, "--stride", 4)
    table = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines())
    assert float(table["loss"].split()[0]) == pytest.approx(values["loss"], abs=1e-4)
    assert float(table["bits per byte"].split()[0]) == pytest.approx(values["bits_per_byte"], abs=1e-4)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode())))
    assert run(capsys, "eval", "-", "--model", folder, "--stride", 4)[1] == out


def test_generate_streams_what_the_model_says(trained, here, capsys, monkeypatch):
    _, folder = trained
    model, tokenizer = GPT.from_pretrained(folder + "/best"), Tokenizer.from_dir(folder + "/best")
    command = ["generate", "mow", "--model", folder, "--max-tokens", 20, "--seed", 3, "--no-compare"]
    status, out, err = run(capsys, *command)
    (ids,) = model.generate([tokenizer.encode("mow")], 20, temperature=0.8, seed=3)
    assert (status, out, err) == (0, tokenizer.decode(ids) + "\n", "")
    assert run(capsys, *command)[1] == out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"mow")))
    assert run(capsys, "generate", "-", *command[2:])[1] == out
    (ids,) = model.generate([tokenizer.encode("mow")], 20, temperature=0)
    assert run(capsys, *command, "--greedy")[1] == tokenizer.decode(ids) + "\n"
    texts = run(capsys, *command, "--n", 3)[1].removesuffix("\n").split("\n---\n")
    assert len(texts) == 3 and len(set(texts)) == 3 and texts[0] + "\n" == out
    stop = out[10:13]
    for more in ([], ["--n", 2]):
        stopped = run(capsys, *command, "--stop", stop, *more)[1]
        assert stopped.startswith(out[:out.index(stop, 3)] + "\n")


def test_generate_measures_itself_beside_plain_pytorch(trained, here, capsys):
    _, folder = trained
    status, out, err = run(capsys, "generate", "mow", "--model", folder, "--max-tokens", 16)
    assert status == 0 and out.startswith("mow")
    assert re.fullmatch(r"[\d,]+ tokens/s; the same model in plain PyTorch [\d,]+ tokens/s: \d+\.\d\d x "
                        r"\(median of 3 rounds in turn\)\n", err)
    _, _, err = run(capsys, "generate", "mow", "--model", folder, "--max-tokens", 15)
    assert err == "too few tokens to measure a speed\n"
    with ops.backend("reference"):
        _, _, err = run(capsys, "generate", "mow", "--model", folder, "--max-tokens", 16)
    assert err.startswith("the model ran in plain PyTorch")


def test_the_shipped_model_is_the_default(trained, here, capsys, monkeypatch):
    monkeypatch.setattr(loading, "SHIPPED", here / "missing")
    status, _, err = run(capsys, "generate", "mow")
    assert status == 2 and "no model came with this installation" in err and "--model" in err
    monkeypatch.setattr(loading, "SHIPPED", loading.checkpoint_folder(trained[1]))
    assert run(capsys, "generate", "mow", "--no-compare", "--max-tokens", 3)[1].startswith("mow")


@pytest.mark.parametrize("argv,message", [
    ([], "the following arguments are required: VERB"),
    (["fly"], "invalid choice: 'fly'"),
    (["train"], "no text given: name a file or a folder"),
    (["train", "nothing.txt"], "cannot read nothing.txt: No such file or directory"),
    (["train", "bytes"], "bytes is not UTF-8 text (byte 0"),
    (["train", "short.txt"], "needs at least 129: use a longer text or a smaller context"),
    (["train", "TEXT", "--steps", "x"], "argument --steps: invalid int value: 'x'"),
    (["train", "TEXT", "--steps", "-3"], "steps must be greater than 0, got -3"),
    (["train", "TEXT", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    (["train", "TEXT", "--tokenizer", "bpe:x"], "bpe:SIZE needs a number of tokens, got 'bpe:x'"),
    (["train", "TEXT", "--tokenizer", "bpe:99999999999"], "bpe:SIZE needs a number of tokens"),
    (["train", "TEXT", "--tokenizer", "bpe:99999999"], "vocab_size must be at most 10000000, got 99999999"),
    (["train", "TEXT", "--width", "0"], "--width must be at least 1, got 0"),
    (["train", "TEXT", "--val", "one.txt"], "--val one.txt holds 1 tokens, and a validation needs at least 2"),
    (["train", "TEXT", "--val", "short.txt", "--val-fraction", "0.5"], "--val and --val-fraction both say"),
    (["train", "--resume", "--out", "RUN", "--overwrite"], "--overwrite belongs to a new run"),
    (["train", "TEXT", "--tokenizer", "bpe:9"], "vocab_size must be at least 257"),
    (["train", "TEXT", "--tokenizer", "nowhere.json"], "tokenizer: no file or folder 'nowhere.json'"),
    (["train", "TEXT", "--heads", "3", "--width", "16"], "n_embd must be a multiple of n_head"),
    (["train", "TEXT", "--dropout", "1"], "dropout must be in [0, 1), got 1.0"),
    (["train", "TEXT", "--val-fraction", "1"], "--val-fraction must be in [0, 1), got 1.0"),
    (["train", "TEXT", "--val", "nothing.txt"], "cannot read nothing.txt"),
    (["train", "TEXT", "--init", "RUN", "--layers", "3"], "--layers belongs to a new model"),
    (["train", "TEXT", "--init", "RUN", "--tokenizer", "char"], "makes new tokens, which the model of --init does"),
    (["train", "--resume"], "no checkpoint of a run in out"),
    (["train", "--resume", "--out", "RUN", "--dropout", "0.1"], "--dropout belongs to a new run"),
    (["train", "--resume", "--out", "RUN", "bytes"], "bytes is not UTF-8 text"),
    (["train", "--resume", "--out", "RUN", "short.txt"], "are not those that"),
    (["train", "TEXT", "--device", "tpu"], "device must be cpu, cuda or cuda:N, got 'tpu'"),
    (["train", "TEXT", "--device", "cuda:99"], "device cuda:99: torch sees "),
    (["eval"], "the following arguments are required: TEXT"),
    (["eval", "nothing.txt", "--model", "RUN"], "cannot read nothing.txt"),
    (["eval", "TEXT", "--model", "RUN", "--context", "17"], "context must be from 1 to the model's block size 16"),
    (["eval", "TEXT", "--model", "RUN", "--stride", "0"], "stride must be from 1 to the context 16"),
    (["eval", "TEXT", "--model", "bytes"], "bytes"),
    (["generate", "", "--model", "RUN"], "the prompt is empty"),
    (["generate", "Q", "--model", "RUN"], "the character 'Q' (U+0051) at position 0 is not among"),
    (["generate", "m", "--model", "RUN", "--max-tokens", "-1"], "max_tokens must be"),
    (["generate", "m", "--model", "RUN", "--temperature", "nan"], "temperature must be from 0"),
    (["generate", "m", "--model", "RUN", "--top-p", "2"], "top_p must be in (0, 1], got 2.0"),
    (["generate", "m", "--model", "RUN", "--stop", ""], "stop must be a non-empty string"),
    (["generate", "m", "--model", "RUN", "--tokenizer", "bytes"], "bytes is not a valid tokenizer file"),
])
def test_errors_are_one_line_with_status_2(argv, message, trained, here, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    named = {"TEXT": trained[0], "RUN": trained[1]}
    status, _, err = run(capsys, *[named.get(a, a) for a in argv])
    assert status == 2 and message in err and err.count("\n") == 1
    assert re.match(r"fastgpt( \w+)?: error: ", err)


@given(text=st.text("ab.", max_size=20), stop=st.text("ab.", min_size=1, max_size=3), data=st.data())
def test_stop_strings_end_a_text_however_it_is_cut(text, stop, data):
    stop_filter, at, out = StopFilter([stop]), 0, ""
    while at < len(text):
        size = data.draw(st.integers(1, 4))
        out += stop_filter.push(text[at:at + size])
        # Held back is no more than might become the stop string.
        assert len(out) >= min(len(text[:at + size]) - len(stop) + 1, len(text.split(stop)[0]))
        at += size
    assert out + stop_filter.push("", last=True) == text.split(stop)[0]


def test_closed_standard_streams_are_no_crash(trained, here, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input is closed" in run(capsys, "generate", "-", "--model", trained[1])[2]
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["generate", "m", "--model", trained[1], "--max-tokens", "2", "--no-compare"]) == 0


def test_an_error_amid_a_text_begins_its_own_line(trained, here, capsys, monkeypatch):
    def fail(self, *args, **kwargs):
        raise ValueError("no more")
    monkeypatch.setattr(GPT, "generate", fail)
    assert run(capsys, "generate", "m", "--model", trained[1]) == (2, "m\n", "fastgpt generate: error: no more\n")


@pytest.mark.parametrize("name, content", [
    ("run.json", '{"paths": 5, "val": null, "val_fraction": 0.1}'),
    ("run.json", '{"paths": ["TEXT"], "val": null, "val_fraction": "x"}')])
def test_a_damaged_run_is_named(name, content, trained, here, capsys):
    shutil.copytree(trained[1], "run")
    (here / "run" / name).write_text(content)
    status, _, err = run(capsys, "train", "--resume", "--out", "run", "--steps", "12")
    assert status == 2 and "run.json does not say which text the run read" in err
