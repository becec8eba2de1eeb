"""Tokens out of a model: the KV cache, ragged batches and the loop behind `GPT.generate`.

The rows of a batch are aligned at their last token and padded on the left, so that one step appends one column to
all; a key mask hides the padding.
Shapes: P prompts, R = P * n rows, B batch, T new tokens, S tokens so far, H heads, D head size, V vocabulary.
"""
import torch

from fastgpt import torch_sampling
from fastgpt.engine import in_model
from fastgpt.engine.sequence import Ending
from fastgpt.sampling import uniform
from fastgpt.text import known_ids


class KVCache:
    """The keys and values of every layer, (B, H, capacity, D) each, allocated once, at a layer's first `append`."""

    def __init__(self, capacity):
        self.capacity, self.length, self.layers = capacity, 0, {}

    def append(self, layer, k, v):
        """Stores k and v (B, H, T, D) after the `length` positions held, which the model advances after its last layer.

        -> all keys and all values so far, (B, H, length + T, D).
        """
        end = self.length + k.shape[2]
        if end > self.capacity:
            raise ValueError(f"KV cache: {end} positions do not fit into its capacity of {self.capacity}")
        if layer not in self.layers:
            self.layers[layer] = tuple(x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in (k, v))
        for held, new in zip(self.layers[layer], (k, v), strict=True):
            held[:, :, self.length:end] = new
        return tuple(held[:, :, :end] for held in self.layers[layer])

    def repeat(self, n):
        """Each row n times, side by side."""
        self.layers = {layer: tuple(x.repeat_interleave(n, dim=0) for x in held) for layer, held in self.layers.items()}


class _Context:
    """What the model has read: gives the next token's logits of every row, cached while all fit into block_size."""

    def __init__(self, model, pads, capacity):
        self.model = model
        self.block_size = model.config.block_size
        self.pads = pads  # (B, 1): columns of padding before each row, or None when there are none
        self.cache = KVCache(min(capacity, self.block_size))

    def next_logits(self, tokens):
        """tokens (B, S), all that the rows hold -> (B, V)."""
        S = tokens.shape[1]
        if S > self.block_size:
            self.cache = None  # the window slides: every token's position changes with each step
        start = max(0, S - self.block_size)  # the first column in sight
        first = start if self.cache is None else self.cache.length  # the first that the model has not read
        positions = key_mask = None
        if self.pads is not None:
            origin = self.pads.clamp(min=start)
            columns = torch.arange(start, S, device=tokens.device)  # (S - start,)
            key_mask = columns >= origin
            positions = (columns[first - start:] - origin).clamp(min=0)
        h = self.model.hidden_states(tokens[:, first:], last=True, positions=positions, key_mask=key_mask,
                                     cache=self.cache)
        return self.model.lm_head(h)[:, 0]

    def repeat(self, n):
        self.pads = None if self.pads is None else self.pads.repeat_interleave(n, dim=0)
        if self.cache is not None:
            self.cache.repeat(n)


class _Row:
    """One sequence in the making: its tokens and whether it has ended."""

    def __init__(self, prompt, params, tokenizer):
        self.ids, self.prompt_length, self.ended = prompt.tolist(), len(prompt), False
        self.ending = Ending(params, tokenizer)

    def push(self, token):
        self.ids.append(token)
        self.ended = self.ending.look(token, self.ids, self.prompt_length)[0] is not None


class _Sampler:
    """Chooses the next token of every row, with what that needs to remember."""

    def __init__(self, params, seeds, tokens, pads):
        """seeds: one for each prompt, or None. tokens (R, S): the prompts. pads: columns of padding of each row."""
        self.params, self.seeds, self.pads = params, seeds, pads
        self.tokens, self.counts = tokens, None

    def choose(self, logits, S):
        """logits (R, V), of rows that hold S columns -> ids (R,)."""
        if self.params.penalises and self.counts is None:
            self.counts = self._prompt_tokens(logits)
        ids = torch_sampling.choose(logits, self.params, self.counts, self._uniforms(S, logits.device))
        if self.counts is not None:
            rows = torch.arange(len(ids), device=ids.device)
            self.counts[rows, ids] = self.counts[rows, ids].clamp(min=0) + 1
        return ids

    def _prompt_tokens(self, logits):
        counts = torch.zeros(logits.shape, dtype=torch.int32, device=logits.device)
        for row, tokens, pad in zip(counts, self.tokens, self.pads, strict=True):
            own = tokens[pad:]
            row[own[own < len(row)]] = -1
        return counts

    def _uniforms(self, S, device):
        if self.seeds is None or self.params.temperature == 0:
            return None
        n = self.params.n
        draws = [uniform(self.seeds[r // n], r % n, S - pad) for r, pad in enumerate(self.pads)]
        return torch.tensor(draws, dtype=torch.float64, device=device)


@torch.no_grad()
def generate(model, idx, params, *, tokenizer=None, streamer=None):
    """The loop of `GPT.generate`, which says what goes in and what comes out; params is a `fastgpt.SamplingParams`."""
    if params.stop and tokenizer is None:
        raise ValueError("generate: stop strings need a tokenizer")
    prompts = _check_prompts(idx, model.config.vocab_size)
    seeds = None if params.seed is None else params.seeds(len(prompts))
    rows = [_Row(prompt, params, tokenizer) for prompt in prompts for _ in range(params.n)]
    if rows and params.max_tokens:
        run = _run if in_model.why_not(model, prompts, params) else _run_on_engine
        run(model, prompts, rows, params, seeds, streamer, tokenizer)
    return _as_tensor(rows, idx) if isinstance(idx, torch.Tensor) else [row.ids for row in rows]


def _run_on_engine(model, prompts, rows, params, seeds, streamer, tokenizer):
    for row, token in in_model.generate(model, prompts, params, seeds, known_ids(tokenizer), tokenizer):
        rows[row].ids.append(token)
        if streamer is not None:
            streamer(row, token)


def _run(model, prompts, rows, params, seeds, streamer, tokenizer):
    """Lets every row grow until it has ended or has max_tokens more, by the ids that the tokenizer knows alone."""
    known = known_ids(tokenizer)
    S = max(len(prompt) for prompt in prompts)
    device = model.lm_head.weight.device
    pads = [S - len(prompt) for prompt in prompts]
    tokens = torch.zeros(len(prompts), S + params.max_tokens, dtype=torch.int64, device=device)
    for row, prompt, pad in zip(tokens, prompts, pads, strict=True):
        row[pad:S] = prompt
    padding = torch.tensor(pads, device=device)[:, None] if any(pads) else None
    context = _Context(model, padding, capacity=S + params.max_tokens - 1)  # the last token is not read
    logits = context.next_logits(tokens[:, :S]).repeat_interleave(params.n, dim=0)  # the n samples share one prefill
    context.repeat(params.n)
    tokens, pads = tokens.repeat_interleave(params.n, dim=0), [pad for pad in pads for _ in range(params.n)]
    sampler = _Sampler(params, seeds, tokens[:, :S], pads)
    for end in range(S, S + params.max_tokens):
        if end > S:
            logits = context.next_logits(tokens[:, :end])
        tokens[:, end] = sampler.choose(logits[:, :known], end)
        for r, token in enumerate(tokens[:, end].tolist()):
            if not rows[r].ended:
                rows[r].push(token)
                if streamer is not None:
                    streamer(r, token)
        if all(row.ended for row in rows):
            return


def _check_prompts(idx, vocab_size):
    """idx as a list of 1-D int64 tensors, each with at least one token, all tokens inside the vocabulary."""
    if isinstance(idx, torch.Tensor) and idx.dim() != 2:
        raise ValueError(f"idx must have shape (B, T) or be a list of token-id lists, got shape {tuple(idx.shape)}")
    if not hasattr(idx, "__iter__"):
        raise TypeError(f"idx must be a (B, T) tensor or a list of token-id lists, got {type(idx).__name__}")
    prompts = []
    for p, ids in enumerate(idx):
        try:
            prompt = torch.as_tensor(ids)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"idx[{p}] must be a sequence of token ids, got {ids!r}") from error
        if prompt.dim() != 1:
            raise ValueError(f"idx[{p}] must be a sequence of token ids, got {ids!r}")
        if len(prompt) == 0:
            raise ValueError(f"idx[{p}] is empty: a prompt needs at least one token")
        if prompt.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"idx[{p}] must hold token ids as int64 or int32, got {prompt.dtype}")
        low, high = prompt.aminmax()
        if low < 0 or high >= vocab_size:
            raise ValueError(f"idx[{p}] holds the token id {int(low if low < 0 else high)}, outside [0, {vocab_size})")
        prompts.append(prompt.long())
    return prompts


def _as_tensor(rows, idx):
    """(R, longest): rows that ended early are filled up with the token they ended on."""
    longest = max((len(row.ids) for row in rows), default=idx.shape[1])
    filled = [row.ids + row.ids[-1:] * (longest - len(row.ids)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64, device=idx.device).view(len(rows), longest)
