"""Texts to batches of token windows, where the n-th window of a run is a pure function of (seed, n).

A run walks through shuffled epochs: an epoch cuts the text into windows of `context` tokens from a random offset and
shuffles them. So every token counts once an epoch, at a new position each time, while as many windows drawn
at random miss over a third of the text.
"""
import zlib

import numpy as np

from fastgpt.corpus import encode_texts, take_windows


def split_texts(texts, fraction):
    """(training texts, validation texts): the last `fraction` of all characters, in [0, 1), is for validation."""
    left = int(sum(map(len, texts)) * (1 - fraction))
    training, validation = [], []
    for text in texts:
        training.append(text[:left])
        validation.append(text[left:])
        left = max(0, left - len(text))
    return [t for t in training if t], [t for t in validation if t]


class TokenData:
    """The tokens of a run: train and val, 1-D integer arrays (a numpy.memmap serves too); val may be empty."""

    def __init__(self, train, val=()):
        self.train, self.val = (_check_tokens(*pair) for pair in (("train", train), ("val", val)))

    @classmethod
    def from_texts(cls, texts, tokenizer, val_fraction=0.1):
        return cls(*(encode_texts(part, tokenizer) for part in split_texts(texts, val_fraction)))

    def fingerprint(self):
        """A checksum by which a resumed run knows its text again."""
        return [int(zlib.crc32(np.ascontiguousarray(part, dtype=np.int64))) for part in (self.train, self.val)]

    def largest(self):
        return max(int(part.max(initial=0)) for part in (self.train, self.val))


class Windows:
    """The training windows of `tokens`, each of context + 1 tokens, in the order that `seed` gives."""

    def __init__(self, tokens, context, seed):
        if len(tokens) <= context:
            raise ValueError(f"the training text has {len(tokens)} tokens, but a context of {context} needs at least "
                             f"{context + 1}: use a longer text or a smaller context")
        self.tokens, self.context, self.seed = tokens, context, seed
        # An epoch has the windows that fit at every offset below the context.
        self.per_epoch = max(1, (len(tokens) - context) // context)
        self._epoch, self._starts = None, None

    def batch(self, first, count):
        """Windows `first` to `first + count - 1` of the run: inputs and targets (count, context) int64."""
        epochs, places = np.divmod(np.arange(first, first + count), self.per_epoch)
        starts = np.array([self._starts_of(epoch)[place] for epoch, place in zip(epochs, places, strict=True)])
        return take_windows(self.tokens, starts, self.context)

    def _starts_of(self, epoch):
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, int(epoch)])
            slack = len(self.tokens) - 1 - self.per_epoch * self.context
            offset = generator.integers(min(slack, self.context - 1) + 1)
            self._epoch, self._starts = epoch, offset + self.context * generator.permutation(self.per_epoch)
        return self._starts


def _check_tokens(name, tokens):
    tokens = np.asanyarray(tokens) if len(tokens) else np.zeros(0, np.uint16)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"TokenData: {name} must be 1-D and of integers, got {tokens.dtype} {tokens.shape}")
    return tokens
