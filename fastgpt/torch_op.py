"""From a kernel's launcher to a PyTorch op: one definition serves eager calls, autograd and torch.compile.

Costs of a call, in microseconds: the launcher itself 1, autograd.Function 6, an op of torch.library in Python 4 more.
So each call takes the cheapest way that does what it needs: the launcher when no gradient is wanted, an
autograd.Function in eager training, the library op only where a compiler or a tracer looks on.
"""
import torch
from torch.nn import Parameter

LIBRARY = torch.library.Library("fastgpt", "DEF")


def define(schema, launch, fake, *, setup_context=None, backward=None):
    """Defines the op `fastgpt::<name>` of `schema` and returns the callable that dispatches as said above.

    launch: computes it, on plain tensors. fake: the outputs' shapes. setup_context(ctx, inputs, output) and
    backward(ctx, *gradients) as in torch.autograd.Function; without them the op has no gradient.
    """
    name = schema[:schema.index("(")]
    LIBRARY.define(schema)
    # For every device: fastgpt.ops has chosen the launcher by then.
    LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastgpt::{name}", fake, lib=LIBRARY)
    if backward is not None:
        torch.library.register_autograd(f"fastgpt::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    library_op = getattr(torch.ops.fastgpt, name).default
    function = _autograd_function(name, launch, setup_context, backward) if backward is not None else None

    def call(*args):
        if torch.compiler.is_compiling() or any(is_traced(a) for a in args):
            return library_op(*args)
        if function is not None and needs_gradient(*args):
            return function.apply(*args)
        return launch(*args)

    call.__name__ = name
    return call


def is_traced(argument):
    """A fake, functional or otherwise wrapped tensor: it has no memory that a kernel could read."""
    return isinstance(argument, torch.Tensor) and type(argument) not in (torch.Tensor, Parameter)


def needs_gradient(*arguments):
    """Whether autograd will come back to a call with these arguments."""
    return torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments)


def _autograd_function(name, launch, setup_context, backward):
    def forward(ctx, *args):
        # Not as a setup_context of the Function's own: with one, torch binds the arguments to a signature, 60 us a call.
        output = launch(*args)
        setup_context(ctx, args, output)
        return output

    body = {"forward": staticmethod(forward),
            "backward": staticmethod(torch.autograd.function.once_differentiable(backward))}
    return type(name, (torch.autograd.Function,), body)


def seed_tensor(dropout_p, seed):
    """The seed as an op's argument: None without dropout, else a tensor () of int64, as a compiled graph holds it."""
    if not dropout_p:
        return None
    return torch.tensor(seed, dtype=torch.int64, device="cpu") if isinstance(seed, int) else seed
