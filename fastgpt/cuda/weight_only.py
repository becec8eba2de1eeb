"""Weights of 8 or 4 bits for decoding: packed once, multiplied by csrc/cuda/weight_only.cu."""
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastgpt.cuda.launch import pointer, rows, run
from fastgpt.extension import ACTIVATIONS

# Of the kernel; for more PyTorch multiplies weights that are made numbers again. By the bytes that move for a weight: a pass of
# 16 tokens loads it and, for 16 outputs, 2 of each token: 3 (int8) or 2.56 (int4), mostly from the L2 cache, whose rate is at
# least 1.6 times that of the memory (of H100 80 GB: 5.5 and 3.35 TB/s). To make weights numbers and multiply these moves 33 or
# 37, through the memory where the matrix is large, else in 8 to 11 launches. At 256 tokens the kernel's 16 passes are worth 30
# and 26 by L2's rate. 256 is the largest batch that has a graph, too; what is larger are prompts.
MOST_TOKENS = 256
OUTPUTS, GROUP = 16, 32  # rows of a tile; neighbours of k that share a scale of int4 weights
DEPTH = {"int8": 64, "int4": 128}  # neighbours of k in a tile
TRIED = 12  # scales of a group of int4 weights
ROWS_AT_A_TIME = 4096
DTYPES = (torch.float16, torch.bfloat16)

# The numbers as the kernel's lanes read them: n has the digits (tile, half, g), k (tile, piece, q, h, a, b), as _digits says,
# and here they are from the slowest to the fastest in memory. int8: a byte each; int4: a is the nibble of a byte.
ORDER = {"int8": (0, 3, 1, 2, 5, 4, 6, 8, 7), "int4": (0, 3, 1, 2, 5, 4, 8, 6, 7)}
ZERO = {"int8": 128, "int4": 8}  # what is added, so that the numbers are not negative


@dataclass
class WeightOnly:
    """Weights (N, K), packed. data: uint8 tiles; scales: float32 (N,) of int8, bfloat16 of the tiles' groups of int4;
    bias: float32 (N,) or None."""

    format: str
    data: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    N: int
    K: int

    def dequantised(self, dtype):
        """The weights (N, K) as the kernel takes them, rounded to dtype."""
        wide = torch.promote_types(dtype, torch.float32)
        numbers = _numbers(self.format, self.data, _padded(self.format, self.N, self.K)).to(wide)
        if self.format == "int8":
            return (numbers[:self.N, :self.K] * self.scales[:, None]).to(dtype)
        scales = self.scales.permute(0, 3, 2, 1, 4).reshape(len(numbers), -1, 1)
        return (numbers.view(*scales.shape[:2], GROUP) * scales).view(numbers.shape)[:self.N, :self.K].to(dtype)


def pack(weight, format, bias=None):
    """weight (N, K) of a floating dtype, bias (N,) or None -> WeightOnly, on the weight's device. format: "int8", with a
    scale for each output, or "int4", with one for each group of 32 neighbours of k."""
    if format not in DEPTH:
        raise ValueError(f"pack: format must be one of {', '.join(map(repr, DEPTH))}, got {format!r}")
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"pack: weight must have a shape (N, K) without a 0, got {tuple(weight.shape)}")
    N, K = weight.shape
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"pack: bias must have shape ({N},), got {tuple(bias.shape)}")
    padded = torch.zeros(_padded(format, N, K), dtype=torch.uint8, device=weight.device)
    quantise = _int8 if format == "int8" else _int4
    scales = []
    for begin in range(0, N, ROWS_AT_A_TIME):
        part = weight.detach()[begin:begin + ROWS_AT_A_TIME].float()
        numbers, scale = quantise(F.pad(part, (0, padded.shape[1] - K)))
        padded[begin:begin + len(part)] = numbers + ZERO[format]
        scales.append(scale)
    scales = torch.cat(scales)
    if not scales.isfinite().all():
        raise ValueError(f"pack: the weight ({N}, {K}) has entries that are not finite")
    padded[N:] = ZERO[format]
    if format == "int4":
        rows = F.pad(scales, (0, 0, 0, len(padded) - N))
        scales = rows.view(-1, 2, 8, padded.shape[1] // DEPTH[format], 4).permute(0, 3, 2, 1, 4)
    bias = None if bias is None else bias.detach().to(weight.device, torch.float32).contiguous()
    return WeightOnly(format, _tiles(format, padded), scales.contiguous(), bias, N, K)


def _padded(format, N, K):
    return -(-N // OUTPUTS) * OUTPUTS, -(-K // DEPTH[format]) * DEPTH[format]


def _int8(weight):
    """The nearest multiples of each row's largest magnitude / 127, and that."""
    scale = weight.abs().amax(1) / 127
    return (weight / torch.where(scale > 0, scale, 1.0)[:, None]).round().clamp(-127, 127), scale


def _int4(weight):
    """The numbers -8 .. 7 nearest to the weights over their groups' scales, and these (rows, groups): of some around the
    one that maps a group's largest weight to -8 the bfloat16 number that leaves the least squared error."""
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    extreme = torch.where(-low > high, low, high)
    best, least = torch.zeros_like(extreme), torch.full_like(extreme, math.inf)
    unit = torch.where(extreme != 0, extreme, 1.0)[:, :, None]  # so that no square underflows
    for i in range(TRIED):
        scale = (extreme / (-9.5 + 0.25 * i)).bfloat16().float()
        error = ((groups - _nibbles(groups, scale) * scale[:, :, None]) / unit).square().sum(2)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    best = torch.where(extreme.isfinite(), best, extreme)
    return _nibbles(groups, best).view(weight.shape), best.bfloat16()


def _nibbles(groups, scale):
    return (groups / torch.where(scale != 0, scale, 1.0)[:, :, None]).round().clamp(-8, 7)


def _digits(format, N, K):
    """How many values each digit of n and of k has, the highest first."""
    return N // OUTPUTS, 2, 8, K // DEPTH[format], DEPTH[format] // GROUP, 4, 2, 2, 2


def _tiles(format, numbers):
    """numbers (N, K) uint8, of whole tiles -> their bytes in the kernel's order."""
    split = numbers.view(_digits(format, *numbers.shape)).permute(ORDER[format])
    if format == "int4":
        split = split[..., 0] | split[..., 1] << 4
    return split.reshape(-1)


def _numbers(format, data, shape):
    """The reverse of _tiles, less what was added: int8 (N, K)."""
    if format == "int4":
        data = torch.stack([data & 15, data >> 4], -1)
    order, digits = ORDER[format], _digits(format, *shape)
    split = data.view([digits[i] for i in order]).permute([order.index(i) for i in range(len(order))])
    return (split.reshape(shape).to(torch.int16) - ZERO[format]).to(torch.int8)


def weight_only_linear(x, weight, activation=None, residual=None):
    """activation(x weight.T + bias) + residual: x (M, K) float16 or bfloat16, weight a WeightOnly (N, K), residual (M, N) of
    x's dtype or None -> (M, N). Up to MOST_TOKENS rows a row's bits depend on nothing but itself."""
    _check(x, weight, activation, residual)
    M, N = len(x), weight.N
    if M > MOST_TOKENS:
        return _many(x, weight, activation, residual)
    if weight.K % 8 or x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
        x = F.pad(x, (0, -weight.K % 8)).contiguous()
    if residual is not None and residual.stride(1) != 1:
        residual = residual.contiguous()
    out = torch.empty(M, N, dtype=x.dtype, device=x.device)
    of_weight = (int(weight.format[3:]), *map(pointer, (weight.data, weight.scales, weight.bias)), N, x.shape[1])
    run("weight_only_linear", x.device, of_weight, rows(x), rows(out), M, ACTIVATIONS[activation],
        (0, 0, 0) if residual is None else rows(residual))
    return out


def _many(x, weight, activation, residual):
    bias = None if weight.bias is None else weight.bias.to(x.dtype)
    y = F.linear(x, weight.dequantised(x.dtype), bias)
    if activation is not None:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        y = F.relu(y) if activation == "relu" else F.gelu(y, approximate=approximate)
    return y if residual is None else y + residual


def _check(x, weight, activation, residual):
    if x.dim() != 2 or x.shape[1] != weight.K:
        raise ValueError(f"weight_only_linear: x must have shape (M, {weight.K}) for weights ({weight.N}, {weight.K}), got "
                         f"{tuple(x.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"weight_only_linear: x must be float16 or bfloat16, got {x.dtype}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"weight_only_linear: activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    if residual is not None and (residual.shape != (len(x), weight.N) or residual.dtype != x.dtype):
        raise ValueError(f"weight_only_linear: residual must be {x.dtype} of shape {(len(x), weight.N)}, got "
                         f"{residual.dtype} of {tuple(residual.shape)}")
    for name, tensor in (("the weights are", weight.data), ("residual is", residual)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"weight_only_linear: {name} on {tensor.device}, x on {x.device}")
    if x.dtype == torch.bfloat16 and not _has_bfloat16(x.device):
        raise ValueError("weight_only_linear: the GPU has no tensor cores for bfloat16 (compute capability 8.0): use float16")


@functools.lru_cache
def _has_bfloat16(device):
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
