"""What the checks without a GPU walk over: every kernel module exports SPECS or INFERENCE_SPECS, FLOPS and BYTES."""
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Spec:
    """A call of an op that runs a module's kernels, forward and backward.

    inputs(dtype, device, gpt2) -> (the tensors that have gradients, by argument; the other tensors): sizes that fit no tile,
    or those of GPT-2 124M on 8 sequences of 1024 tokens. The tests run the former, the tables are made of the latter.
    launcher: of INFERENCE_SPECS, where no tensor has a gradient: what to call in the op's place, whose arguments differ.
    dtype: of the tables, and of the compiled code that the tests run.
    """
    name: str
    op: str
    inputs: Callable
    options: dict = field(default_factory=dict)
    launcher: Callable | None = None
    dtype: torch.dtype = torch.bfloat16
