"""Text files to texts, texts to arrays of token ids, and those to windows: what training and evaluation read."""
import os
from pathlib import Path

import numpy as np
import torch

PIECE = 1 << 16  # characters encoded at once: bounds the memory that the tokenizer's own records take


def read_texts(paths):
    """The texts of files, and of all visible files under folders in the order of their names.

    Returns (texts, skipped): skipped are the files within folders that are not UTF-8 text. A file named itself must be.
    """
    texts, skipped = [], []
    for path in map(Path, paths):
        if not path.is_dir():
            texts.append(_read_text(path))
            continue
        for file in _files_under(path):
            try:
                texts.append(_read_text(file))
            except ValueError:
                skipped.append(file)
    if not any(texts):
        raise ValueError(f"no text in {', '.join(map(str, paths)) or 'no files'}")
    return [text for text in texts if text], skipped


def encode_texts(texts, tokenizer):
    """All texts as one array of ids, in a small integer type; between texts stands the end-of-text token, if any."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    parts = []
    for n, text in enumerate(texts):
        if n and tokenizer.eos_token_id is not None:
            parts.append(np.array([tokenizer.eos_token_id], dtype))
        parts += [np.array(ids, dtype) for ids in _encode_pieces(text, tokenizer)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def take_windows(tokens, starts, context):
    """Inputs and targets (len(starts), context) int64: the targets are the inputs one token on."""
    rows = torch.from_numpy(tokens[np.asarray(starts)[:, None] + np.arange(context + 1)].astype(np.int64))
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def _read_text(path):
    """The file's text with its line ends as they are."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason})") from None
    except OSError as error:
        raise type(error)(error.errno, f"cannot read {path}: {error.strerror}") from None


def _files_under(folder):
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith("."))


def _encode_pieces(text, tokenizer):
    """The ids of a long text in pieces, each cut before a whitespace that follows none: there words end anyway."""
    at = 0
    while at < len(text):
        end = _cut(text, at + PIECE)
        yield tokenizer.encode(text[at:end])
        at = end


def _cut(text, target):
    """The first good place to cut at or after `target`, or `target` itself when there is none nearby."""
    for end in range(target, min(target + PIECE, len(text))):
        if text[end].isspace() and not text[end - 1].isspace():
            return end
    return min(target, len(text))
