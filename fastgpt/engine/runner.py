"""The model on the CPU: packed weights, the pages of the KV cache, and one C++ call for a step."""
import numpy as np

from fastgpt.engine.memory import Arena, address, rounded
from fastgpt.extension import _C, ACTIVATIONS, CACHE_DTYPES

STORAGE = {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}  # of keys and values


class CpuRunner:
    def __init__(self, weights, num_pages, page_size, cache_dtype, threads=None):
        self.weights, self.threads = weights, threads
        config, layers = weights.config, weights.config.n_layer
        number, dtype = CACHE_DTYPES[cache_dtype], STORAGE[cache_dtype]
        head_size = config.n_embd // config.n_head
        self.bytes_per_token = 2 * layers * config.n_head * (head_size * np.dtype(dtype).itemsize + 4 * (number == 2))
        # A page holds all layers' keys and values: what a sequence uses lies together, in few huge pages.
        rows, scaled = config.n_head * page_size, number == 2
        shape = (num_pages, layers, 2, rows)
        arena = Arena(sum(rounded(num_pages * layers * 2 * rows * width)
                          for width in (head_size * np.dtype(dtype).itemsize, *[4] * scaled)))
        self._pages = arena.take((*shape, head_size), dtype)
        self._scales = arena.take(shape, np.float32) if scaled else None
        caches = []
        for layer in range(layers):
            scales = map(address, self._scales[0, layer]) if scaled else (0, 0)
            caches.append((number, *map(address, self._pages[0, layer]), *scales, page_size, config.n_head, head_size,
                           layers * 2 * rows))
        sizes = (config.n_embd, config.n_head, config.inner_width, config.vocab_size, ACTIVATIONS[config.activation],
                 config.layer_norm_epsilon)
        self._decoder = _C.Decoder(sizes, weights.layers, caches, weights.ln_f, weights.head, weights.embedding,
                                   weights.positions)

    def step(self, step, logits=None):
        """Runs a scheduler's `Step`: -> the logits (L, V) float32 of its wanted rows, in `logits` where that is given."""
        if _C.active_level() != self.weights.level:
            raise RuntimeError(f"these weights were packed for the level {self.weights.level}, but {_C.active_level()} is "
                               "in use now")
        if logits is None:
            logits = np.empty((len(step.wanted), self.weights.config.vocab_size), np.float32)
        sequences = np.empty((len(step.places), 4), np.int64)  # csrc/engine.h's PagedSequence
        sequences[:, :3] = step.places
        sequences[:, 3] = address(step.tables) + np.arange(len(sequences)) * step.tables.strides[0]
        self._decoder.step(self.threads or 0, address(step.tokens), len(step.tokens), address(sequences), len(sequences),
                           address(step.wanted), len(step.wanted), address(logits))
        return logits

    def copy_pages(self, copies):
        """copies: (page, copy) pairs, or none."""
        for page, copy in copies:
            for array in (self._pages, self._scales):
                if array is not None:
                    array[copy] = array[page]
