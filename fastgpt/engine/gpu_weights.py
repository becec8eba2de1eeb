"""A model's weights as the GPU's runner reads them: tensors on the device, matrix by matrix, from a checkpoint or a model."""
import numpy as np
import torch

from fastgpt import ops
from fastgpt.cuda.weight_only import pack, weight_only_linear
from fastgpt.engine.weights import FEW_BITS, ModelTensor, balance, shapes
from fastgpt.layout import EMBEDDING, HEAD, POSITIONS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Dense:
    """A weight (N, K) and its bias of one floating dtype."""

    def __init__(self, weight, bias):
        self.weight, self.bias = weight, bias
        self.nbytes = weight.nbytes

    def __call__(self, x, activation=None):
        return ops.linear(x, self.weight, self.bias, activation=activation)


class FewBits:
    """A weight (N, K) of 8 or 4 bits, for a few rows by a kernel that reads each weight once."""

    def __init__(self, weight, bias, kind):
        self.packed = pack(weight, kind, bias)
        self.nbytes = self.packed.data.nbytes + self.packed.scales.nbytes

    def __call__(self, x, activation=None):
        return weight_only_linear(x, self.packed, activation=activation)


class GpuWeights:
    """The weights of one model on one device. dtype: of the matrices; `compute` is that of the rest and of activations.
    shared: parameters that lie there in this dtype already are used as they are, whatever becomes of them.

    streamed_bytes: what a token reads of the matrices, the head included.
    """

    def __init__(self, config, tensors, dtype, device, shared=False):
        dtype = dtype or "bfloat16"
        if dtype not in DTYPES and dtype not in FEW_BITS:
            raise ValueError(f"dtype must be one of {', '.join((*DTYPES, *FEW_BITS))} on a GPU, got {dtype!r}")
        self.config, self.dtype, self.device, self._tensors, self._shared = config, dtype, device, tensors, shared
        self.compute = DTYPES.get(dtype, torch.bfloat16)
        self.embedding, self.positions = self._tensor(EMBEDDING), self._tensor(POSITIONS)
        self.ln_f = self._norm("transformer.ln_f")
        self.layers = [self._layer(f"transformer.h.{i}") for i in range(config.n_layer)]
        self.head = self._head(HEAD if HEAD in shapes(config) else EMBEDDING)
        self.streamed_bytes = self.head.nbytes + sum(
            part.nbytes for layer in self.layers for part in layer.values() if not isinstance(part, tuple))
        del self._tensors

    def _layer(self, name):
        ln_1, qkv = self._behind_norm(f"{name}.ln_1", f"{name}.attn.c_attn")
        ln_2, fc = self._behind_norm(f"{name}.ln_2", f"{name}.mlp.c_fc")
        return {"ln_1": ln_1, "qkv": qkv, "proj": self._matrix(f"{name}.attn.c_proj"), "ln_2": ln_2, "fc": fc,
                "out": self._matrix(f"{name}.mlp.c_proj")}

    def _norm(self, name):
        return self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias")

    def _behind_norm(self, norm, matrix):
        """A norm and the matrix that takes its output."""
        vectors = self._norm(norm)
        if self.dtype not in FEW_BITS:
            return vectors, self._matrix(matrix)
        weight = self._tensor(f"{matrix}.weight")
        highest = weight.abs().amax(0)
        factors = torch.from_numpy(balance(highest.float().cpu().numpy())).to(highest)
        return (tuple(None if v is None else v / factors for v in vectors),
                FewBits(weight * factors, self._tensor(f"{matrix}.bias"), self.dtype))

    def _matrix(self, name):
        weight, bias = self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias")
        return FewBits(weight, bias, self.dtype) if self.dtype in FEW_BITS else Dense(weight, bias)

    def _head(self, name):
        weight = self.embedding if name == EMBEDDING else self._tensor(name)
        return FewBits(weight, None, self.dtype) if self.dtype in FEW_BITS else Dense(weight, None)

    def _tensor(self, name):
        """A tensor on the device, or None where the model has none of this name."""
        if name not in self._tensors:
            return None
        source = self._tensors[name]
        if isinstance(source, ModelTensor):
            return source.tensor.to(self.device, self.compute, copy=not self._shared).contiguous()
        array, number = source.read()
        if number == 1:  # bfloat16, as 16-bit integers
            tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array)
        return tensor.to(self.device, self.compute).contiguous()
