"""The command line: `fastgpt train | eval | generate | info`. A user's error ends in one line and status 2."""
import argparse
import os
import sys

from fastgpt.train import command


class Parser(argparse.ArgumentParser):
    """argparse with one line for an error."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv=None):
    """Runs a command line; the exit status: 0, 2 after an error, 130 after Ctrl-C."""
    args = make_parser().parse_args(argv)
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 it stays open as long as we run
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has gone, as `head` does; the flush at exit must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, ValueError, RuntimeError, ArithmeticError, ImportError, MemoryError) as error:
        print(f"fastgpt {args.verb}: error: {_in_one_line(error)}", file=sys.stderr)
        return 2


def make_parser():
    parser = Parser(prog="fastgpt", description="Train, measure and run GPT models.")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    command.add_arguments(verbs.add_parser("train", help="train a model on text, or go on training one"))
    _add_eval(verbs.add_parser("eval", help="measure how well a model predicts a text"))
    _add_generate(verbs.add_parser("generate", help="write text with a model"))
    info = verbs.add_parser("info", help="show versions, hardware, and which kernels run")
    info.description = "Shows versions, the hardware, and for each op and device which implementation answers and why."
    info.set_defaults(run=show_info)
    return parser


def _add_model(parser):
    parser.add_argument("--model", metavar="MODEL", help="a model's or a training run's folder, nanoGPT's ckpt.pt, or "
                        "a Hugging Face hub id (default: the small Shakespeare model that comes with fastgpt)")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json, or a folder with one (default: the "
                        "model's)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is one)")


def _add_eval(parser):
    parser.description = "Measures how well a model predicts a text, in windows that slide over it by --stride tokens."
    parser.add_argument("text", metavar="TEXT", help="a text file, a folder of them, or - for standard input")
    _add_model(parser)
    add = parser.add_argument
    add("--context", type=int, metavar="N", help="tokens in a window (default: the most that the model takes)")
    add("--stride", type=int, metavar="N", help="tokens from one window to the next, each window scoring only new ones "
        "(default: half the context)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=run_eval)


def _add_generate(parser):
    parser.description = "Continues a prompt. The text goes to standard output as it comes, all else to standard error."
    add = parser.add_argument
    add("prompt", nargs="?", default="\n", metavar="PROMPT", help="what to continue; - reads it from standard input, and "
        "-- goes before one that begins with a dash (default: a line break)")
    _add_model(parser)
    add("--max-tokens", type=int, default=200, metavar="N", help="new tokens at most (default: 200)")
    add("--temperature", type=float, default=0.8, metavar="X", help="below 1 likelier, above 1 wilder (default: 0.8)")
    add("--top-k", type=int, metavar="N", help="draw from the N likeliest tokens only")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the fewest tokens of probability P together")
    add("--min-p", type=float, default=0.0, metavar="P", help="drop tokens less likely than P times the likeliest")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: avoid tokens already there")
    add("--greedy", action="store_true", help="always take the likeliest token")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text (default: another one each time)")
    add("--n", type=int, default=1, metavar="N", help="texts to write (default: 1); several come whole, one by one")
    add("--stop", action="append", metavar="TEXT", help="end where this text would come; may be given several times")
    add("--dtype", choices=("float32", "bfloat16", "int8", "int4"), help="of the weights that are multiplied by (default: "
        "float32); on the CPU only")
    add("--no-compare", action="store_true", help="do not measure the same model in plain PyTorch afterwards")
    parser.set_defaults(run=run_generate)


def run_eval(args):
    import json

    from fastgpt.corpus import read_texts
    from fastgpt.evaluate import evaluate
    model, tokenizer = _load(args)
    text = _standard_input() if args.text == "-" else "".join(read_texts([args.text])[0])
    result = evaluate(model, tokenizer, text, args.context, args.stride)
    values = {"loss": result.loss, "perplexity": result.perplexity, "bits_per_byte": result.bits_per_byte,
              "nats_per_character": result.nats_per_character, "tokens": result.tokens, "bytes": result.bytes,
              "characters": result.characters, "context": result.context, "stride": result.stride}
    if args.json:
        print(json.dumps(values))
        return 0
    units = {"loss": "nats per token", "bits_per_byte": "bits", "nats_per_character": "nats"}
    for name, value in values.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        print(f"{name.replace('_', ' '):20}{shown:>12} {units.get(name, '')}".rstrip())
    return 0


def run_generate(args):
    from fastgpt import SamplingParams, talk
    prompt = _standard_input() if args.prompt == "-" else args.prompt
    seed = int.from_bytes(os.urandom(4), "little") if args.seed is None else args.seed
    params = SamplingParams(
        max_tokens=args.max_tokens, temperature=0.0 if args.greedy else args.temperature, top_k=args.top_k,
        top_p=args.top_p, min_p=args.min_p, repetition_penalty=args.repetition_penalty, n=args.n, seed=seed,
        stop=args.stop)
    model, tokenizer = _load(args)
    if args.dtype is not None:
        from fastgpt.engine import in_model
        in_model.use_dtype(model, args.dtype)
    talk.write(model, tokenizer, prompt, params)
    if not args.no_compare:
        print(talk.compare(model, tokenizer, prompt, params), file=sys.stderr)
    return 0


def show_info(args):
    from fastgpt.info import report
    print(report())
    return 0


def _load(args):
    from fastgpt.loading import check_vocabulary, choose_device, load_model
    device = choose_device(args.device)
    model, tokenizer = load_model(args.model, args.tokenizer)
    check_vocabulary(model, tokenizer)
    return model.to(device), tokenizer


def _standard_input():
    if sys.stdin is None:
        raise OSError("standard input is closed")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not UTF-8 text (byte {error.start}: {error.reason})") from None


def _in_one_line(error):
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())
