"""The model on a GPU: weights, the pages of the KV cache, and a step of tokens into logits.

A step's sequences are put in order: those with few tokens first, whose attention splits the keys (csrc/cuda), then the
prompts, whose attention is tiled (fastgpt/kernels). A step that only decodes runs as a CUDA graph for the next larger of
a ladder of batch sizes; its spare rows decode token 0 into a page that no sequence has.
"""
import contextlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from fastgpt import ops
from fastgpt.cuda import paged as cuda_paged
from fastgpt.cuda.launch import pointer, run
from fastgpt.cuda.paged import MOST_DECODE_ROWS, Sequences
from fastgpt.cuda.sampling import Row, draws_of, sample
from fastgpt.paged import LARGEST, PagedCache, row_size

CACHE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8,
                "float8": torch.float8_e4m3fn}
LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # batch sizes that have a graph


@dataclass
class Batch:
    """A step on the device: tokens and positions (M,) int32, slots (M,) int64 in the cache. `few` of M rows are those of the
    first sequences, with few tokens each, the others those of prompts; wanted: the rows whose logits count, None for all."""

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    few: int
    decoding: Sequences | None
    prompts: Sequences | None
    wanted: torch.Tensor | None


class GpuRunner:
    """weights: a `GpuWeights`. device: what `gpu_device.CudaDevice` is: uploads, downloads, captures."""

    def __init__(self, weights, num_pages, page_size, cache_dtype, device):
        self.weights, self.device, self.page_size = weights, device, page_size
        config = weights.config
        self.H, self.D = config.n_head, config.n_embd // config.n_head
        self._scratch_page = num_pages
        dtype, layers = CACHE_DTYPES[cache_dtype], config.n_layer
        pages = (layers, 2, num_pages + 1, self.H, page_size)
        self._pages = torch.zeros(*pages, row_size(self.D, dtype), dtype=dtype, device=device.torch)
        self._scales = torch.zeros(pages, dtype=torch.float32, device=device.torch) if dtype in LARGEST else None
        self._caches = [self._cache(layer) for layer in range(layers)]
        self._pool = device.new_pool()
        self._graphs = {}  # batch size -> (static inputs, logits, replay)
        self._entered = False
        self._table_width = -(-config.block_size // page_size)

    @staticmethod
    def bytes_of_token(config, cache_dtype):
        """Of the KV cache."""
        dtype, D = CACHE_DTYPES[cache_dtype], config.n_embd // config.n_head
        row = row_size(D, dtype) * dtype.itemsize + 4 * (dtype in LARGEST)
        return 2 * config.n_layer * config.n_head * row

    def _cache(self, layer):
        k, v = self._pages[layer, :, ..., :self.D]
        scales = () if self._scales is None else self._scales[layer]
        return PagedCache(k.unsqueeze(-1), v, *scales)

    def copy_pages(self, copies):
        """copies: (page, copy) pairs."""
        if not copies:
            return
        pairs = self.device.upload(np.array(copies, np.int32))
        for tensor in (self._pages, self._scales):
            if tensor is not None:
                count, stride = 2 * len(self._caches), tensor.stride(1) * tensor.element_size()
                page_bytes = tensor.stride(2) * tensor.element_size()
                run("copy_pages", tensor.device, pointer(tensor), count, stride, page_bytes, pointer(pairs), len(copies))

    @contextlib.contextmanager
    def alone(self):
        """Within this context nothing that the caller has switched on changes what is computed; nested, it does nothing."""
        if self._entered:
            yield
            return
        with self.device.turn(), torch.inference_mode(), torch.autocast(self.device.torch.type, enabled=False):
            self._entered = True
            try:
                yield
            finally:
                self._entered = False

    # ---- a step

    def step(self, step, logits=None, drawn=None):
        """Runs a scheduler's `Step`: -> the logits (L, V) of its wanted rows, float32 on the device, which the next step may
        overwrite; copied into `logits`, an array, where that is given. drawn: the tokens that the step before drew."""
        with self.alone():
            if len(step.tokens) == len(step.places) == len(step.wanted) and len(step.places) <= LADDER[-1]:
                found = self._decode(step, drawn)
            else:
                found = self._forward(self._batch(step, drawn))
            if logits is not None:
                logits[:] = found.cpu().numpy()
            return found

    def _decode(self, step, drawn):
        """A token for each sequence, by the graph of the next larger batch size."""
        count = len(step.places)
        size = next(size for size in LADDER if size >= count)
        if size not in self._graphs:
            self._capture(size)
        static, logits, replay = self._graphs[size]
        self.device.upload(self._integers(step.tokens, step.places, step.tables, size, self._table_width), static)
        self._fill_in(static[_parts(size, size, 0)[1]], step.late, drawn)
        replay()
        return logits[:count]

    def capture(self, sequences):
        """The graphs of all batches of up to so many sequences. The largest first: the others find room in its memory."""
        last = next((i for i, size in enumerate(LADDER) if size >= sequences), len(LADDER) - 1)
        with self.alone():
            for size in LADDER[last::-1]:
                if size not in self._graphs:
                    self._capture(size)

    def _capture(self, size):
        """The graph of a batch size, by sequences that it does not have."""
        nobody = np.empty(0, np.int32), np.empty((0, 3), np.int64), np.empty((0, 0), np.int32)
        static = self.device.upload(self._integers(*nobody, size, self._table_width))
        batch = self._views(static, size, size, self._table_width, self.weights.config.block_size)
        self._graphs[size] = static, *self.device.capture(lambda: self._forward(batch), self._pool)

    def _batch(self, step, drawn):
        counts = step.places[:, 1]
        order = np.argsort(counts > MOST_DECODE_ROWS, kind="stable")
        places, M = step.places[order], len(step.tokens)
        width = -(-int((places[:, 1] + places[:, 2]).max()) // self.page_size)
        integers = self.device.upload(self._integers(step.tokens, places, step.tables[order], M, width))
        rows = np.concatenate([np.arange(first, first + count) for first, count, _ in places])
        new_row = np.empty(M, np.int64)
        new_row[rows] = np.arange(M)
        batch = self._views(integers, M, len(order), width, 0)
        self._fill_in(batch.tokens, np.stack((new_row[step.late[0]], step.late[1])), drawn)
        self._divide(batch, places)
        batch.wanted = self.device.upload(new_row[step.wanted])
        return batch

    def _integers(self, step_tokens, places, step_tables, M, width):
        """(slots, of int64; tokens, positions, starts of the sequences' rows, their lengths, tables: one int32 array) of a step's
        tokens, its sequences' places and tables in their new order, for M rows; those that the step does not have are padding."""
        count, rows = len(places), len(step_tokens)
        S = count if M == rows else M
        parts = _parts(M, S, width)
        integers = np.zeros(parts[-1].stop, np.int32)
        slots, tokens, positions, starts, lengths, tables = (integers[part] for part in parts)
        slots, tables = slots.view(np.int64), tables.reshape(S, width)
        known = min(width, step_tables.shape[1])
        tables[:count, :known], tables[count:, 0] = step_tables[:, :known], self._scratch_page
        counts, begins = places[:, 1], places[:, 2]
        np.add(begins, counts, out=lengths[:count], casting="unsafe")
        lengths[count:] = 1
        np.cumsum(counts, out=starts[1:count + 1])
        starts[count + 1:] = np.arange(rows + 1, rows + 1 + S - count)
        if rows == count:  # a token each, in order
            sequence, at, source = np.arange(rows), begins, places[:, 0]
        else:
            sequence = np.repeat(np.arange(count), counts)  # of each row
            place = np.arange(rows) - starts[sequence]  # within its sequence's tokens
            at, source = begins[sequence] + place, places[sequence, 0] + place
        tokens[:rows] = np.maximum(step_tokens[source], 0)  # -1: still on its way
        positions[:rows] = at
        slots[:rows] = tables[sequence, at // self.page_size].astype(np.int64) * self.page_size + at % self.page_size
        slots[rows:] = self._scratch_page * self.page_size
        return integers

    @staticmethod
    def _views(integers, M, S, width, context):
        """The parts of such an array on the device, as a `Batch` of sequences with few tokens."""
        slots, tokens, positions, starts, lengths, tables = (integers[part] for part in _parts(M, S, width))
        decoding = Sequences(tables.view(S, width), starts, lengths, 1, context)
        return Batch(tokens, positions, slots.view(torch.int64), M, decoding, None, None)

    @staticmethod
    def _divide(batch, places):
        """Parts the sequences of a batch into those with few tokens and prompts."""
        counts, lengths, all_of = places[:, 1], places[:, 1] + places[:, 2], batch.decoding
        short = int((counts <= MOST_DECODE_ROWS).sum())
        batch.few = int(counts[:short].sum())

        def part(begin, end):
            if begin == end:
                return None
            tensors = (all_of.tables[begin:end], all_of.query_starts[begin:end + 1] - (batch.few if begin else 0),
                       all_of.context_lens[begin:end])
            if begin:  # Triton would compile anew for an address that is not a multiple of 16 bytes
                tensors = (tensor.clone() for tensor in tensors)
            return Sequences(*tensors, int(counts[begin:end].max()), int(lengths[begin:end].max()))
        batch.decoding, batch.prompts = part(0, short), part(short, len(counts))

    def _fill_in(self, tokens, late, drawn):
        """late (2, N): rows of tokens that were drawn on the device and have not been seen yet, and as which they were drawn; for
        -1, drawn from no distribution, some other token, since the next thing to be seen is the error."""
        rows, numbers = late
        if not len(rows):
            return
        in_order = np.arange(len(rows))
        if np.array_equal(rows, in_order) and np.array_equal(numbers, in_order):
            torch.clamp(drawn[:len(rows)], min=0, out=tokens[:len(rows)])
        else:
            rows, numbers = self.device.upload(late)
            tokens[rows] = drawn[numbers].clamp(min=0)

    # ---- the model

    def _forward(self, batch):
        w, config = self.weights, self.weights.config
        eps, M = config.layer_norm_epsilon, len(batch.tokens)
        x = F.embedding(batch.tokens, w.embedding) + F.embedding(batch.positions, w.positions)  # (M, C)
        h = ops.layer_norm(x, *w.layers[0]["ln_1"], eps)
        for i, layer in enumerate(w.layers):
            q, k, v = layer["qkv"](h).view(M, 3, self.H, self.D).unbind(1)
            h, x = ops.add_layer_norm(layer["proj"](self._attend(i, q, k, v, batch)), x, *layer["ln_2"], eps)
            h = layer["out"](layer["fc"](h, config.activation))
            h, x = ops.add_layer_norm(h, x, *(w.layers[i + 1]["ln_1"] if i + 1 < len(w.layers) else w.ln_f), eps)
        return w.head(h if batch.wanted is None else h[batch.wanted]).float()

    def _attend(self, layer, q, k, v, batch):
        """(M, C) of q, k and v (M, H, D), whose keys and values go to the cache first."""
        cache, scale, few = self._caches[layer], self.weights.config.attention_scale(layer), batch.few
        cuda_paged.write(cache, k, v, batch.slots)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if batch.decoding is not None:
            cuda_paged.attend(q[:few], cache, batch.decoding, scale=scale, out=out[:few])
        if batch.prompts is not None:
            cuda_paged.prefill(q[few:], cache, batch.prompts, scale=scale, out=out[few:])
        return out.view(len(q), -1)

    # ---- what is drawn

    def next_draws(self, draws):
        """How each sequence's token behind the one that was drawn so is drawn: the same Draws, changed."""
        with self.alone():
            draws.position.add_(1)
            return draws

    def draws(self, ready, positions, drawn_at, drawn):
        """How the next token of each sequence is drawn. positions: where it goes; drawn, drawn_at: the tokens that the step
        before drew, and which of them is each sequence's, where the host does not know it yet."""
        with self.alone():
            positions = positions.tolist()
            found = draws_of([Row(s.request.params, s.request.seed, s.sample, position,
                                  s.ids[:position] if s.request.params.penalises else (), len(s.request.prompt))
                              for s, position in zip(ready, positions)], self.device.torch)
            late = [i for i, s in enumerate(ready) if s.request.params.penalises and positions[i] > s.length]
            if late:
                places = np.array([late, [positions[i] - 1 for i in late], drawn_at[late]], np.int64)
                rows, last, numbers = self.device.upload(places)
                found.history[rows, last] = drawn[numbers]
            return found

    def draw(self, logits, draws, known):
        """The next tokens from logits (R, V), of which the first `known` ids count and which are overwritten: -> (R,) int32 on
        the device."""
        with self.alone():
            return sample(logits[:, :known], draws)

    def log_probabilities(self, logits):
        with self.alone():
            return torch.log_softmax(logits, 1)

    def report(self, tokens, own, logs, count):
        """(tokens (R,), then for each of L rows the `count` likeliest ids, (L, count), the log probabilities of these and of
        its own token, (L, count + 1), whose bits are those of float32): one int32 tensor. own (L,), logs (L, V): of these rows."""
        with self.alone():
            values, ids = logs.topk(count, 1)
            values = torch.cat((values, logs.gather(1, own.clamp(min=0).long()[:, None])), 1)
            return torch.cat((tokens, ids.int().view(-1), values.view(torch.int32).view(-1)))

    @staticmethod
    def repeat(logits, counts):
        """Each row of logits as often as counts says."""
        return torch.cat([row.expand(count, -1) for row, count in zip(logits.split(1), counts)])


def _parts(M, S, width):
    """Where slots, tokens, positions, starts, lengths and tables lie in an array: each from a multiple of 16 bytes on."""
    parts, begin = [], 0
    for size in (2 * M, M, M, S + 1, S, S * width):
        parts.append(slice(begin, begin + size))
        begin += -(-size // 4) * 4
    return parts
