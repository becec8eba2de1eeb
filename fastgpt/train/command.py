"""`fastgpt train`: its flags, made from TrainConfig, and what it sets up around a Trainer."""
import argparse
import dataclasses
import json
import math
import shutil
from pathlib import Path

from fastgpt.allocator import keep_freed_memory
from fastgpt.config import check_int
from fastgpt.train.config import TrainConfig

# layers, heads, width, context
SIZES = {"tiny": (4, 4, 128, 128), "mini": (6, 6, 192, 256), "small": (6, 6, 384, 256), "gpt2": (12, 12, 768, 1024)}
SHAPE = ("layers", "heads", "width")
DESCRIPTION = """Trains a GPT on text: a new model, or with --init one that exists. The folder --out then holds the
checkpoints best and last, log.jsonl and loss.png. Ctrl-C saves and stops; --resume goes on from there, exactly as if
nothing had been."""


def add_arguments(parser):
    parser.description = DESCRIPTION
    parser.set_defaults(run=train)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="text files, or folders of them")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out; "
                        "text and settings are those of the run, except for the flags given")
    parser.add_argument("--overwrite", action="store_true", help="throw away the run that --out holds")
    _add_data_arguments(parser.add_argument_group("text"))
    _add_model_arguments(parser.add_argument_group("model"))
    group = parser.add_argument_group("training")
    for f in dataclasses.fields(TrainConfig):
        # Only flags that are given show up in the namespace: a resumed run keeps its own values for the others.
        group.add_argument("--" + f.name.replace("_", "-"), type=f.type, default=argparse.SUPPRESS,
                           choices=f.metadata.get("choices"), metavar=None if "choices" in f.metadata else "X",
                           help=f"{f.metadata['help']} (default: {f.default!r})")


def _add_data_arguments(group):
    group.add_argument("--tokenizer", metavar="T", help="char (the default for a new model), bpe:SIZE (learnt from "
                       "the text, e.g. bpe:1024), or the path of one")
    group.add_argument("--val", metavar="PATH", help="a file or folder for validation, instead of a part of the text")
    group.add_argument("--val-fraction", type=float, metavar="F", help="share of the text, at its end, kept for "
                       "validation (default: 0.1)")


def _add_model_arguments(group):
    sizes = "; ".join(f"{name}: {L} layers, {H} heads, {C} wide, context {T}" for name, (L, H, C, T) in SIZES.items())
    group.add_argument("--init", metavar="MODEL", help="start from this model: a folder, a nanoGPT ckpt.pt, or a "
                       "Hugging Face hub id")
    group.add_argument("--size", choices=SIZES, help=f"of a new model (default: tiny). {sizes}")
    for name in SHAPE:
        group.add_argument(f"--{name}", type=int, metavar="N", help=f"{name} of a new model, instead of the size's")
    group.add_argument("--dropout", type=float, metavar="P", help="dropout rate (default: 0, or the --init model's)")
    group.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")


def train(args):
    """Runs the verb; the exit status."""
    changes = {f.name: getattr(args, f.name) for f in dataclasses.fields(TrainConfig) if hasattr(args, f.name)}
    out = Path(changes.pop("out", TrainConfig.out))
    trainer = _resumed(args, out, changes) if args.resume else _started(args, out, changes)
    if trainer.step >= trainer.config.steps:
        print(f"nothing to do: {out} is at step {trainer.step} of {trainer.config.steps}; --steps N trains further")
        return 0
    _describe(trainer)
    keep_freed_memory()
    result = trainer.run()
    _conclude(trainer, result)
    return 130 if result.why == "interrupted" else 0


def _started(args, out, changes):
    import torch

    from fastgpt.loading import choose_device
    from fastgpt.train import Trainer
    device = choose_device(args.device)
    _refuse_to_overwrite(args, out)
    config = TrainConfig(out=str(out), **_with_defaults(args, changes))
    if not args.paths:
        raise ValueError("no text given: name a file or a folder, or --resume a run")
    torch.manual_seed(config.seed)
    sources = {"paths": args.paths, "val": args.val, "val_fraction": _fraction(args)}
    parts = _read(sources)
    model, tokenizer = _initial(args, parts) if args.init else _new(args, config, parts)
    data = _tokens(parts, tokenizer)
    if args.val and len(data.val) < 2:
        raise ValueError(f"--val {args.val} holds {len(data.val)} tokens, and a validation needs at least 2")
    trainer = Trainer(model.to(device), data, config, tokenizer)
    _clear(out)
    _record(out, sources)
    return trainer


def _resumed(args, out, changes):
    from fastgpt import Tokenizer
    from fastgpt.loading import choose_device
    from fastgpt.train import Trainer
    from fastgpt.train.trainer import last_folder
    for name in ("init", "size", *SHAPE, "dropout", "tokenizer", "val_fraction", "overwrite"):
        if getattr(args, name) not in (None, False):
            raise ValueError(f"--{name.replace('_', '-')} belongs to a new run: --resume goes on with the run's own")
    tokenizer = Tokenizer.from_dir(last_folder(out))
    sources = _recorded(out)
    if args.paths:
        sources["paths"] = args.paths
    if args.val is not None:
        sources["val"] = args.val
    data = _tokens(_read(sources), tokenizer)
    return Trainer.resume(out, data, tokenizer, device=choose_device(args.device), **changes)


def _refuse_to_overwrite(args, out):
    from fastgpt.train.saving import recover
    recover(out / "last")
    if (out / "last").exists() and not args.overwrite:
        raise ValueError(f"{out} holds a run already: --resume goes on with it, --overwrite throws it away, "
                         "--out FOLDER keeps both")


def _with_defaults(args, changes):
    """Fine-tuning starts from good weights, which the learning rate for new ones would spoil."""
    return {"lr": 1e-4, **changes} if args.init else changes


def _fraction(args):
    if args.val and args.val_fraction is not None:
        raise ValueError("--val and --val-fraction both say what to validate on: give one of them")
    fraction = 0.1 if args.val_fraction is None else args.val_fraction
    if not 0 <= fraction < 1:
        raise ValueError(f"--val-fraction must be in [0, 1), got {fraction}")
    return 0.0 if args.val else fraction


def _read(sources):
    """(training texts, validation texts) of the recorded sources."""
    from fastgpt.corpus import read_texts
    from fastgpt.train.data import split_texts
    texts, skipped = read_texts(sources["paths"])
    training, validation = split_texts(texts, sources["val_fraction"])
    if sources["val"]:
        validation, more = read_texts([sources["val"]])
        skipped += more
    if skipped:
        print(f"left out, for not being UTF-8 text: {', '.join(map(str, skipped[:5]))}"
              + (f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""))
    return training, validation


def _tokens(parts, tokenizer):
    from fastgpt.corpus import encode_texts
    from fastgpt.train import TokenData
    return TokenData(*(encode_texts(part, tokenizer) for part in parts))


def _new(args, config, parts):
    """A model of the size asked for, with random weights, and its tokenizer."""
    from fastgpt import GPT, GPTConfig
    tokenizer = make_tokenizer(args.tokenizer or "char", *parts)
    *shape, context = SIZES[args.size or "tiny"]
    given = (args.layers, args.heads, args.width)
    layers, heads, width = (size if g is None else g for g, size in zip(given, shape, strict=True))
    # GPT-2's 0.02 belongs to 768 channels; a narrow model that starts so small stays at bigrams for hundreds of steps.
    initializer_range = 0.02 * math.sqrt(768 / check_int("--width", width, 1))
    model = GPT(GPTConfig(block_size=config.context or context, vocab_size=tokenizer.vocab_size, n_layer=layers,
                          n_head=heads, n_embd=width, dropout=args.dropout or 0.0, bias=False,
                          initializer_range=initializer_range))
    return model, tokenizer


def _initial(args, parts):
    """The model of --init and its tokenizer."""
    from fastgpt.loading import check_vocabulary, load_model
    for name in ("size", *SHAPE):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} belongs to a new model: --init takes the checkpoint's")
    if args.tokenizer and (args.tokenizer == "char" or args.tokenizer.startswith("bpe:")):
        raise ValueError(f"--tokenizer {args.tokenizer} makes new tokens, which the model of --init does not know")
    override = None if args.dropout is None else {"dropout": args.dropout}
    model, tokenizer = load_model(args.init, args.tokenizer, override)
    check_vocabulary(model, tokenizer)
    return model, tokenizer


def make_tokenizer(spec, training, validation=()):
    """The tokenizer that "char", "bpe:SIZE" or a path means; a BPE is learnt from the training texts alone."""
    from fastgpt import Tokenizer
    from fastgpt.tokenizer import MAX_BPE_SIZE
    if spec == "char":
        return Tokenizer.characters("".join({*"".join(training), *"".join(validation)}))
    if not spec.startswith("bpe:"):
        return Tokenizer.from_pretrained(spec)
    if not spec[4:].isdecimal() or len(spec[4:]) > len(str(MAX_BPE_SIZE)):
        raise ValueError(f"--tokenizer bpe:SIZE needs a number of tokens, got {spec!r}")
    return Tokenizer.train_bpe(training, int(spec[4:]))


def _clear(out):
    for name in ("last", "last.old", "best", "best.old"):
        shutil.rmtree(out / name, ignore_errors=True)
    (out / "log.jsonl").unlink(missing_ok=True)


def _record(out, sources):
    """Notes in out/run.json which text the run reads."""
    from fastgpt.checkpoint import atomic_file
    out.mkdir(parents=True, exist_ok=True)
    absolute = {"paths": [str(Path(p).resolve()) for p in sources["paths"]],
                "val": sources["val"] and str(Path(sources["val"]).resolve())}
    with atomic_file(out / "run.json") as file:
        file.write((json.dumps({**sources, **absolute}, indent=2) + "\n").encode())


def _recorded(out):
    path = out / "run.json"
    try:
        sources = json.loads(path.read_text(encoding="utf-8"))
        sources = {name: sources[name] for name in ("paths", "val", "val_fraction")}
        if not all(isinstance(sources[name], kind) for name, kind in
                   (("paths", list), ("val", str | None), ("val_fraction", float))):
            raise TypeError("a field is of the wrong type")
        return sources
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not say which text the run read ({error})") from error


def _describe(trainer):
    c, m, data = trainer.config, trainer.model.config, trainer.data
    windows = c.batch * c.accumulate
    print(f"text:  {len(data.train):,} training and {len(data.val):,} validation tokens, "
          f"{trainer.tokenizer.kind} tokenizer of {trainer.tokenizer.vocab_size:,}")
    print(f"model: {trainer.model.get_num_params() / 1e6:.2f} M parameters: {m.n_layer} layers, {m.n_head} heads, "
          f"{m.n_embd} wide, context {m.block_size}, dropout {m.dropout}")
    print(f"run:   steps {trainer.step} to {c.steps} of {windows} x {trainer.context} tokens "
          f"({c.steps * windows / trainer.windows.per_epoch:.1f} epochs) on {trainer.device} in "
          f"{str(trainer.dtype).removeprefix('torch.')} ({trainer.dtype_reason})", flush=True)


def _conclude(trainer, result):
    from fastgpt.train.log import plot_log
    out = Path(trainer.config.out)
    ends = {"done": "finished", "early": f"no better for {trainer.config.patience} validations: stopped",
            "interrupted": "interrupted"}
    best = result.best_loss
    print(f"{ends[result.why]} at step {result.step}"
          + ("" if best is None else f"; best validation loss {best:.4f} at step {result.best_step}"))
    if result.why == "interrupted":
        print(f"go on with: fastgpt train --resume --out {out}")
    else:
        print(f'try it with: fastgpt generate --model {out} "Once"')
    try:
        plot_log(out / "log.jsonl", out / "loss.png")
    except ImportError as error:
        print(f"({error})")
