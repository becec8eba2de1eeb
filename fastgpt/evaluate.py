"""How well a model predicts a text: nats per token, perplexity, bits per byte, nats per character.

Only the last two compare models of different tokenizers. A window slides over the text by `stride` tokens and scores
those that no window before it scored: each token once, with context - stride to context tokens before it.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch

from fastgpt.corpus import encode_texts, take_windows
from fastgpt.loading import check_vocabulary


@dataclass(frozen=True)
class Evaluation:
    """Sums over the scored part of a text: all but its first token, which nothing precedes."""

    nats: float
    tokens: int
    characters: int
    bytes: int
    context: int
    stride: int

    @property
    def loss(self):
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self):
        return perplexity(self.loss)

    @property
    def bits_per_byte(self):
        return self.nats / math.log(2) / self.bytes

    @property
    def nats_per_character(self):
        return self.nats / self.characters


def evaluate(model, tokenizer, text, context=None, stride=None, batch=16):
    """The `Evaluation` of `text` by a GPT in eval mode.

    context: tokens in a window, the model's block_size when None; stride: half of that when None; batch: windows at
    once. ValueError for a text of fewer than two tokens and for sizes out of range.
    """
    context = model.config.block_size if context is None else context
    stride = max(1, context // 2) if stride is None else stride
    check_vocabulary(model, tokenizer)
    tokens = encode_texts([text], tokenizer)
    if len(tokens) < 2:
        raise ValueError(f"evaluate: the text must have at least 2 tokens, got {len(tokens)}")
    plan = plan_windows(len(tokens), context, stride, model.config.block_size)
    nats, count = score(model, tokens, plan, batch)
    first = tokenizer.decode(tokens[:1])
    return Evaluation(nats, count, len(text) - len(first), len(text.encode()) - len(first.encode()), context, stride)


def perplexity(loss):
    return math.exp(loss) if loss < 700 else math.inf


def plan_windows(n_tokens, context, stride, block_size):
    """The windows of a text as (length, starts, first scored places): the targets, one token on, are scored once each.

    The last window ends with the text, so all have one length: the context, or the whole text if that is shorter.
    """
    if not 1 <= context <= block_size:
        raise ValueError(f"context must be from 1 to the model's block size {block_size}, got {context}")
    if not 1 <= stride <= context:
        raise ValueError(f"stride must be from 1 to the context {context}, got {stride}")
    length = min(context, n_tokens - 1)
    starts = np.append(np.arange(0, n_tokens - 1 - length, stride), n_tokens - 1 - length)
    first = np.append(0, starts[:-1] + length)  # where the window before has ended
    return length, starts, first


@torch.no_grad()
def score(model, tokens, plan, batch):
    """(nats, number of scored tokens) of the plan's windows, on the model's device and in the mode that it is in."""
    length, starts, first = plan
    device = next(model.parameters()).device
    nats, count = 0.0, 0
    for at in range(0, len(starts), batch):
        rows = slice(at, at + batch)
        x, y = take_windows(tokens, starts[rows], length)
        places = torch.from_numpy(starts[rows, None] + np.arange(length))
        y = y.masked_fill(places < torch.from_numpy(first[rows, None]), -1)
        scored = int((y >= 0).sum())
        _, loss = model(x.to(device), y.to(device), return_logits=False)
        nats, count = nats + loss.item() * scored, count + scored
    return nats, count
