"""What the checks without a GPU walk over: every kernel module exports SPECS, FLOPS and BYTES."""
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Spec:
    """A call of an op that runs a module's kernels, forward and backward.

    inputs(dtype, device, gpt2) -> (the tensors that have gradients, by argument; the other tensors): sizes that fit no tile,
    or those of GPT-2 124M on 8 sequences of 1024 tokens. The tests run the former, the tables are made of the latter.
    """
    name: str
    op: str
    inputs: Callable
    options: dict = field(default_factory=dict)
