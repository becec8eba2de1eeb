"""A model and its tokenizer from wherever a user says they are."""
import re
from pathlib import Path

from fastgpt.train.saving import kept_at

SHIPPED = Path(__file__).parent / "assets" / "shakespeare"


def load_model(path=None, tokenizer=None, override=None):
    """(model, tokenizer): the model in eval mode, and its own tokenizer unless the path of another is given.

    path: a model's folder, a training run's folder (then its best checkpoint, else its last), nanoGPT's ckpt.pt, a
    Hugging Face hub id, or None for the model that ships. override: as in `GPT.from_pretrained`.
    """
    from fastgpt import GPT, Tokenizer
    place = checkpoint_folder(SHIPPED if path is None else path)
    if path is None and not place.exists():
        raise FileNotFoundError(f"no model came with this installation ({SHIPPED} is missing): name one with --model")
    # A file may keep its weights in bfloat16 for its size; few processors multiply it, all multiply float32.
    model = GPT.from_pretrained(str(place), override).float()
    if tokenizer is not None:
        return model, Tokenizer.from_pretrained(tokenizer)
    try:
        return model, Tokenizer.from_pretrained(str(place.parent if place.is_file() else place))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; name the model's tokenizer with --tokenizer") from None


def choose_device(name=None):
    """The torch.device `name` or, for None, cuda if there is one. On the CPU torch is kept from taking more threads than
    a control group gives this process processors, which it does not look at itself."""
    import torch

    from fastgpt.extension import usable_cpus
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name}: torch sees {torch.cuda.device_count()} CUDA devices here")
    if device.type == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), usable_cpus()[0]))
    return device


def checkpoint_folder(path):
    """Where the model lies: `path` itself or, for the folder of a run, its best checkpoint, else its last."""
    path = Path(path)
    if (path / "config.json").exists() or not path.is_dir():
        return path
    for name in ("best", "last"):
        folder = kept_at(path / name)
        if (folder / "config.json").exists():
            return folder
    return path


def check_vocabulary(model, tokenizer):
    """ValueError when the tokenizer has ids that the model does not know."""
    known = model.config.vocab_size
    if tokenizer.vocab_size > known:
        raise ValueError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {known}: "
                         "they do not belong together")
