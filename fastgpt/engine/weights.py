"""A model's weights as the engine reads them: packed once, matrix by matrix, from a checkpoint or from a model.

A directory's safetensors files are read piece by piece, without torch: beside the packed weights there is never more than
one matrix (of the embedding, a run of rows) in memory, as it is stored and, where it is balanced, in float32 twice. Every other source becomes a `fastgpt.GPT` first.
"""
import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from fastgpt.config import GPTConfig
from fastgpt.engine.memory import Arena, address, rounded
from fastgpt.extension import _C, MISSING
from fastgpt.layout import (
    CONFIG,
    CONV1D,
    EMBEDDING,
    HEAD,
    INDEX,
    MASK_BUFFER,
    POSITIONS,
    WEIGHTS,
    our_name,
    safetensors_header,
)

FORMATS = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}  # kernels' numbers, csrc/engine.h
FEW_BITS = ("int8", "int4")
# safetensors' names of what can be read: numpy's dtype to read it with, and the kernels' number where they take it.
STORED = {"F32": (np.float32, 0), "BF16": (np.uint16, 1), "F16": (np.float16, None), "F64": (np.float64, None)}
ROWS = 4096  # of an embedding, read at a time
NORM_BEFORE = {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2"}
MOST_BALANCE = 2.0 ** 10


class FileTensor:
    """A tensor in a safetensors file. transposed: it is stored as (K, N), as Hugging Face's Conv1D has it."""

    def __init__(self, file, shape, kind, offset, transposed=False):
        self.file, self.kind, self.offset, self.transposed = file, kind, offset, transposed
        self.stored_shape = tuple(shape)
        self.shape = self.stored_shape[::-1] if transposed else self.stored_shape

    def read(self, begin=0, end=None):
        """Rows [begin, end): (array, the kernels' dtype number). A transposed tensor is read whole."""
        dtype, number = STORED[self.kind]
        rows = self.stored_shape if self.transposed or end is None else (end - begin, *self.stored_shape[1:])
        width = math.prod(self.stored_shape[1:]) * np.dtype(dtype).itemsize
        with open(self.file, "rb") as file:
            file.seek(self.offset + begin * width)
            array = np.fromfile(file, dtype, math.prod(rows))
        if array.size != math.prod(rows):
            raise ValueError(f"{self.file} ends within a tensor")
        array = array.reshape(rows)
        if number is None:
            array, number = array.astype(np.float32), 0
        return (array.T if self.transposed else array), number


class ModelTensor:
    """A parameter of a `fastgpt.GPT` in memory."""

    def __init__(self, tensor):
        self.tensor, self.shape = tensor.detach(), tuple(tensor.shape)

    def read(self, begin=0, end=None):
        import torch
        rows = self.tensor[begin:end].cpu()
        number = 1 if rows.dtype == torch.bfloat16 else 0
        return (rows.view(torch.int16) if number else rows.float()).numpy(), number


def of_directory(path):
    """(config, {name: FileTensor}) of a directory with config.json and safetensors, as transformers and we write it. None
    where it is anything else or anything about it is odd: `GPT.from_pretrained` takes more, and names what is wrong."""
    path = Path(path)
    try:
        config = GPTConfig.from_hf(json.loads((path / CONFIG).read_bytes()))
        tensors = {}
        for file in _weight_files(path):
            tensors.update(_tensors_of(file))
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        return None
    if config.n_layer > len(tensors):  # a lie: the names of so many layers would take for ever to list
        return None
    expected = shapes(config)
    names = {name for name in tensors if not MASK_BUFFER.search(name)}
    if names != expected.keys() or any(tensors[n].shape != shape or tensors[n].kind not in STORED
                                       for n, shape in expected.items()):
        return None
    return config, tensors


def of_model(model):
    """The same of a `fastgpt.GPT`, whose parameters must have the shapes that its config says."""
    config = dataclasses.replace(model.config)  # the model may change its own later
    tensors = {name: ModelTensor(tensor) for name, tensor in model.state_dict().items()}
    for name, shape in shapes(config).items():
        if name not in tensors or tensors[name].shape != shape:
            found = f"has shape {tensors[name].shape}" if name in tensors else "is missing"
            raise ValueError(f"model: {name} {found}, but its config says {shape}")
    return config, tensors


def shapes(config):
    """{name: shape} of every parameter of a model, a tied head left out."""
    C, inner, block = config.n_embd, config.inner_width, {}
    for name, n, k in (("attn.c_attn", 3 * C, C), ("attn.c_proj", C, C), ("mlp.c_fc", inner, C), ("mlp.c_proj", C, inner)):
        block[f"{name}.weight"], block[f"{name}.bias"] = (n, k), (n,)
    for name in ("ln_1", "ln_2"):
        block[f"{name}.weight"] = block[f"{name}.bias"] = (C,)
    found = {EMBEDDING: (config.vocab_size, C), POSITIONS: (config.block_size, C),
             "transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}
    for layer in range(config.n_layer):
        found.update({f"transformer.h.{layer}.{name}": shape for name, shape in block.items()})
    if not config.tie_word_embeddings:
        found[HEAD] = (config.vocab_size, C)
    return {name: shape for name, shape in found.items() if config.bias or not name.endswith(".bias")}


def _weight_files(path):
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    shards = set(json.loads((path / INDEX).read_bytes())["weight_map"].values())
    if any(not isinstance(name, str) or Path(name).name != name for name in shards):
        raise ValueError("a shard outside of the directory")
    return [path / name for name in sorted(shards)]


def _tensors_of(file):
    header, start = safetensors_header(file)
    return {our_name(name): FileTensor(file, entry["shape"], entry["dtype"], start + entry["data_offsets"][0],
                                       transposed=name.endswith(CONV1D)) for name, entry in header.items()}


def as_floats(array, number):
    """What `read` gives, as float32."""
    if number == 1:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array


def balance(highest):
    """(K,) powers of two, at least 1, by which the columns of a weight grow and the norm before it shrinks, exactly. highest:
    (K,) float32, the largest magnitude in each column.

    Where a column is far smaller than the others the norm's output is, as a rule, far larger (the outlier channels of GPT-2),
    and the one or the other would be lost among the neighbours that share a scale with it. After Nagel et al. 2019,
    arXiv:1906.04721.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        powers = np.exp2(np.floor(np.log2(np.median(highest) / highest)))
    return np.clip(np.nan_to_num(powers, nan=1.0, posinf=MOST_BALANCE), 1.0, MOST_BALANCE).astype(np.float32)


class PackedWeights:
    """The weights of one model in one format, for the instruction-set level that is in use when they are packed.

    streamed_bytes: what a token reads of them, the head included.
    """

    def __init__(self, config, tensors, dtype):
        if _C is None:
            raise RuntimeError(f"the decode engine needs the extension: {MISSING}")
        if dtype not in FORMATS:
            raise ValueError(f"dtype must be one of {', '.join(FORMATS)}, got {dtype!r}")
        self.config, self.dtype, self.level = config, dtype, _C.active_level()
        self._tensors, self._format, self._columns = tensors, FORMATS[dtype], _C.panel_columns()
        names = [name for name, shape in shapes(config).items() if len(shape) == 2 and name not in (EMBEDDING, POSITIONS)]
        head = HEAD if HEAD in names else EMBEDDING
        matrices = [*(name for name in names if name != HEAD), head]
        # The embedding's own panels, where the head's are another matrix or too coarse.
        own = config.tie_word_embeddings is False or dtype == "int4"
        self._embedding_format = FORMATS["int8"] if dtype == "int4" else self._format
        sizes = [self._size(name, self._format) for name in matrices]
        self.streamed_bytes = sum(sizes)
        self._arena = Arena(sum(sizes) + (self._size(EMBEDDING, self._embedding_format) if own else 0))
        self._vectors = []  # what the kernels point to
        self._balance = {}  # norm -> what it is divided by
        self._packed = {name: self._pack(name, self._format) for name in matrices}
        self.head = self._packed[head]
        self.embedding = self._pack(EMBEDDING, self._embedding_format) if own else self.head
        self.positions = self.vector(POSITIONS)
        self.ln_f = self.norm("transformer.ln_f")
        self.layers = [self._layer(f"transformer.h.{i}", i) for i in range(config.n_layer)]
        del self._tensors

    def _layer(self, name, index):
        matrix = {part: self._packed[f"{name}.{part}.weight"] for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc",
                                                                           "mlp.c_proj")}
        return (self.norm(f"{name}.ln_1"), matrix["attn.c_attn"], matrix["attn.c_proj"], self.norm(f"{name}.ln_2"),
                matrix["mlp.c_fc"], matrix["mlp.c_proj"], self.config.attention_scale(index))

    def norm(self, name):
        divisor = self._balance.get(name, 1.0)
        return self.vector(f"{name}.weight", divisor), self.vector(f"{name}.bias", divisor)

    def vector(self, name, divisor=1.0):
        """The address of a small tensor as float32; 0 where there is none."""
        if name not in self._tensors:
            return 0
        # Of any order in memory: the kernels read rows one behind another.
        self._vectors.append(np.ascontiguousarray(as_floats(*self._tensors[name].read()) / np.float32(divisor), np.float32))
        return address(self._vectors[-1])

    def _size(self, name, fmt):
        N, K = self._tensors[name].shape
        return rounded(-(-N // self._columns) * _C.panel_bytes(fmt, K))

    def _pack(self, name, fmt):
        """(format, N, K, address, bias) of a weight (N, K), packed."""
        tensor = self._tensors[name]
        N, K = tensor.shape
        panels = self._arena.take((self._size(name, fmt),), np.uint8)
        norm = self._norm_before(name)
        whole = norm is not None or getattr(tensor, "transposed", False)
        step = N if whole else ROWS // self._columns * self._columns
        for begin in range(0, N, step):
            rows, number = tensor.read(begin, min(begin + step, N))
            if norm is not None:
                rows, number = as_floats(rows, number), 0
                self._balance[norm] = balance(np.maximum(rows.max(0), -rows.min(0)))
                rows = rows * self._balance[norm]
            strides = [stride // rows.itemsize for stride in rows.strides]
            _C.pack_weight(fmt, number, address(rows), rows.shape[0], K, *strides,
                           address(panels) + begin // self._columns * _C.panel_bytes(fmt, K))
        return fmt, N, K, address(panels), self._bias(name.removesuffix("weight") + "bias", N)

    def _norm_before(self, name):
        """The norm that a weight's columns are balanced against, or None."""
        block, _, part = name.removesuffix(".weight").rpartition(".h.")[2].partition(".")
        return f"transformer.h.{block}.{NORM_BEFORE[part]}" if self.dtype in FEW_BITS and part in NORM_BEFORE else None

    def _bias(self, name, N):
        """A bias, padded to whole panels."""
        if name not in self._tensors:
            return 0
        bias = np.zeros(-(-N // self._columns) * self._columns, np.float32)
        bias[:N] = as_floats(*self._tensors[name].read())
        self._vectors.append(bias)
        return address(bias)
