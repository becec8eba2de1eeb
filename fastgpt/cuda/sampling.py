"""Drawing tokens on the device from rows of logits: csrc/cuda/sampling.cu."""
import itertools
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch

from fastgpt.cuda.launch import pointer, rows, run, upload
from fastgpt.sampling import SamplingParams

MOST_VOCABULARY = 2 ** 20
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Row(NamedTuple):
    """What is drawn of a row. position: of the new token in its sequence. ids: the sequence so far, of which the first
    `prompt` are the prompt's; only penalties look at them."""

    params: SamplingParams
    seed: int
    sample: int
    position: int
    ids: np.ndarray = ()
    prompt: int = 0


@dataclass
class Draws:
    """csrc/cuda/sampling.h's Draws: tensors on the device, (R,) where nothing else is said, int32 and float32 but for the
    seeds, which are int64. None: no row has a penalty, or none a bias."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    sample: torch.Tensor
    position: torch.Tensor
    repetition: torch.Tensor | None = None
    presence: torch.Tensor | None = None
    frequency: torch.Tensor | None = None
    history: torch.Tensor | None = None  # (R, most)
    prompt: torch.Tensor | None = None
    length: torch.Tensor | None = None
    counts: torch.Tensor | None = None  # (R, V), zeros before a draw and after it; None: `sample` makes them
    bias_starts: torch.Tensor | None = None  # (R + 1,)
    bias_ids: torch.Tensor | None = None
    bias: torch.Tensor | None = None


WORDS = ("top_k", "sample", "position", "temperature", "top_p", "min_p")
PENALTY_WORDS = ("prompt", "length", "repetition", "presence", "frequency")
WHOLE = {"top_k", "sample", "position", "prompt", "length", "history", "counts", "bias_starts", "bias_ids", "out"}  # int32
PENALTIES, BIASES = (*PENALTY_WORDS, "history"), ("bias_starts", "bias_ids", "bias")  # all or none
ANY = "any"
# 0: R, 1: V; of all others (R,), but bias_starts has one more.
SHAPES = {"history": (0, ANY), "counts": (0, 1), "bias_ids": (ANY,), "bias": (ANY,)}


def draws_of(drawn, device):
    """The Draws of a list of Rows, in few copies to the device."""
    penalised = any(row.params.penalises for row in drawn)
    words = (*WORDS, *(PENALTY_WORDS if penalised else ()))
    host = np.empty((2 + len(words), len(drawn)), np.int32)
    host[:2].reshape(-1).view(np.int64)[:] = [row.seed for row in drawn]
    columns = [_words(drawn), _penalty_words(drawn)] if penalised else [_words(drawn)]
    for name, column, to in zip(words, itertools.chain(*columns), host[2:]):
        (to if name in WHOLE else to.view(np.float32))[:] = column
    device_words = upload(host, device)
    found = {name: word if name in WHOLE else word.view(torch.float32) for name, word in zip(words, device_words[2:])}
    found["seed"] = device_words[:2].view(-1).view(torch.int64)
    if penalised:
        found["history"] = upload(_histories(drawn), device)
    if any(row.params.logit_bias for row in drawn):
        found.update(_biases(drawn, device))
    return Draws(**found)


def _words(drawn):
    """WORDS of each row, a column each."""
    return zip(*((p.top_k or 0, sample, position, p.temperature, p.top_p, p.min_p)
                 for p, _, sample, position, _, _ in drawn))


def _penalty_words(drawn):
    return zip(*((row.prompt, len(row.ids) if p.penalises else 0, p.repetition_penalty, p.presence_penalty, p.frequency_penalty)
                 for row, p in ((row, row.params) for row in drawn)))


def _histories(drawn):
    """(R, most) int32."""
    ids = [row.ids if row.params.penalises else () for row in drawn]
    histories = np.zeros((len(ids), max(map(len, ids))), np.int32)
    for row, of_row in zip(histories, ids):
        row[:len(of_row)] = of_row
    return histories


def _biases(drawn, device):
    starts = np.cumsum([0, *(len(row.params.logit_bias) for row in drawn)])
    both = np.empty((2, starts[-1]), np.int32)
    both[0] = [min(i, MOST_VOCABULARY) for row in drawn for i in row.params.logit_bias]
    both[1].view(np.float32)[:] = [bias for row in drawn for bias in row.params.logit_bias.values()]
    ids, bias = upload(both, device)
    return {"bias_starts": upload(starts.astype(np.int32), device), "bias_ids": ids, "bias": bias.view(torch.float32)}


def sample(logits, draws, out=None):
    """Draws the next token of each row of logits (R, V): -> (R,) int32, -1 where a row's largest logit is not finite or an
    entry is not a number. float32 logits are overwritten. out: where the tokens go."""
    _check(logits, draws, out)
    R, V = logits.shape
    device = logits.device
    work = logits if logits.dtype == torch.float32 else torch.empty(R, V, dtype=torch.float32, device=device)
    out = torch.empty(R, dtype=torch.int32, device=device) if out is None else out
    d, counts = draws, draws.counts
    if d.repetition is not None and counts is None:
        counts = torch.zeros(R, V, dtype=torch.int32, device=device)
    head = tuple(map(pointer, (d.temperature, d.top_k, d.top_p, d.min_p, d.seed, d.sample, d.position)))
    history = 0 if d.history is None else d.history.stride(0)
    penalties = (*map(pointer, (d.repetition, d.presence, d.frequency, d.history)), history,
                 *map(pointer, (d.prompt, d.length, counts)))
    biases = tuple(map(pointer, (d.bias_starts, d.bias_ids, d.bias)))
    run("sample", device, rows(logits), rows(work), R, V, head, penalties, biases, pointer(out))
    return out


def _check(logits, draws, out):
    if logits.dim() != 2 or not 0 < logits.shape[1] <= MOST_VOCABULARY or logits.stride(1) != 1:
        raise ValueError(f"sample: logits must be (R, V), V from 1 to {MOST_VOCABULARY}, with contiguous rows, got "
                         f"{tuple(logits.shape)} with strides {logits.stride()}")
    if logits.dtype not in DTYPES:
        raise ValueError(f"sample: logits must be float32, float16 or bfloat16, got {logits.dtype}")
    for group in (PENALTIES, BIASES):
        given = [name for name in group if getattr(draws, name) is not None]
        if given and len(given) < len(group):
            raise ValueError(f"sample: {', '.join(group)} come together, got {', '.join(given)} alone")
    for field in fields(draws):
        _check_tensor(field.name, getattr(draws, field.name), logits)
    _check_tensor("out", out, logits)


def _check_tensor(name, tensor, logits):
    if tensor is None:
        return
    shape = [logits.shape[size] if size in (0, 1) else size for size in SHAPES.get(name, (0,))]
    if name == "bias_starts":
        shape[0] = len(logits) + 1
    fits = tensor.dim() == len(shape) and all(size in (ANY, n) for size, n in zip(shape, tensor.shape))
    dtype = torch.int64 if name == "seed" else torch.int32 if name in WHOLE else torch.float32
    contiguous = tensor.stride(1) == 1 if name == "history" and fits else tensor.is_contiguous()
    if not (fits and contiguous and tensor.dtype == dtype and tensor.device == logits.device):
        raise ValueError(f"sample: for logits {tuple(logits.shape)} on {logits.device}, {name} must be a contiguous {dtype} "
                         f"of shape {tuple(shape)}, got {tensor.dtype} of {tuple(tensor.shape)} on {tensor.device}")
