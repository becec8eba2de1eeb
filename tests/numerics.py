"""The one accuracy rule of all tests.

Truth is the reference in float64. A kernel's error may be `factor` times (2 for values, 3 for gradients) the error of
PyTorch's own op in the same dtype on the same inputs, plus a floor that the number format gives: half a unit in the last
place of the result as it is stored, or of the products that it is made of where these have fewer bits. Both the
norm-relative error and the worst element are held to it.
"""
import torch

VALUES, GRADIENTS = 2.0, 3.0
THREE_TF32 = 2.0 ** -22  # of products of float32 that are made of three in TF32


def assert_accurate(name, actual, truth, pytorch, factor=VALUES, unit=None):
    """actual: our result, truth: the float64 result, pytorch: PyTorch's own in actual's dtype; all of one shape. unit: half
    a unit in the last place, by default of actual's dtype."""
    assert actual.shape == truth.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert actual.dtype == pytorch.dtype, f"{name}: dtype {actual.dtype}, expected {pytorch.dtype}"
    if truth.numel() == 0:
        return
    actual, truth, pytorch = actual.detach(), truth.detach(), pytorch.detach()
    unit = unit or torch.finfo(actual.dtype).eps / 2
    ours, theirs = ((result.double() - truth).abs() for result in (actual, pytorch))
    assert not ours.isnan().any(), f"{name}: NaN at {_where(ours.isnan().double())}"
    floor = unit * truth.abs()
    _hold(name, "norm-relative error", ours.norm() / (truth.norm() + 1e-30), theirs.norm() / (truth.norm() + 1e-30),
          floor.norm() / (truth.norm() + 1e-30), factor, ours)
    _hold(name, "worst element", ours.max(), theirs.max(), floor.max(), factor, ours)


def _hold(name, measure, ours, theirs, floor, factor, errors):
    bound = factor * theirs + floor
    assert ours <= bound, (f"{name}: {measure} {ours:.3e}, PyTorch's {theirs:.3e}, allowed {bound:.3e} "
                           f"= {factor:g} x + {floor:.1e}; worst at {_where(errors)}")


def _where(errors):
    return tuple(int(i) for i in torch.unravel_index(errors.argmax(), errors.shape))


def check_op(op, inputs, reference, pytorch=None, seed=0, unit=None):
    """Values and gradients of `op` against `reference` in float64 and `pytorch` (by default the reference) in the dtype.

    inputs: name -> tensor or None, in the order of the op's arguments. Every output is given a random gradient.
    """
    results = {}
    for kind, function, dtype in (("actual", op, None), ("truth", reference, torch.float64),
                                  ("pytorch", pytorch or reference, None)):
        leaves = {n: _leaf(t, dtype) for n, t in inputs.items()}
        outputs = function(*leaves.values())
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator("cpu").manual_seed(seed)
        gradients = [torch.randn(o.shape, generator=generator, device="cpu").to(inputs_dtype(inputs)).to(o.device, o.dtype)
                     for o in outputs]
        wanted = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
        grads = torch.autograd.grad(outputs, wanted.values(), gradients)
        results[kind] = outputs, dict(zip(wanted, grads))
    (ours, our_grads), (truth, true_grads), (theirs, their_grads) = results.values()
    for i, values in enumerate(zip(ours, truth, theirs)):
        assert_accurate(f"output {i}", *values, unit=unit)
    for name, gradient in our_grads.items():
        assert_accurate(f"gradient of {name}", gradient, true_grads[name], their_grads[name], GRADIENTS, unit)


def inputs_dtype(inputs):
    return next(t.dtype for t in inputs.values() if t is not None)


def _leaf(tensor, dtype):
    if tensor is None or not tensor.is_floating_point():
        return tensor
    # clone keeps strides: a strided view stays one
    return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()


def check_compiled(loss, leaves):
    """loss(*leaves) and its gradients have the same bits when compiled as one graph."""
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = function(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
    assert all(map(torch.equal, *results))
