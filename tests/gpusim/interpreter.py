"""Runs @triton.jit kernels on the CPU, strictly, in the same process that compiles them.

    simulate(kernel)[grid](*args, **constexprs)
    with strict(shuffle=3): ...

The programs of the grid run one after another on numpy arrays, by triton's interpreter with StrictBuilder's numbers.
Found on the way (SimulationError): an access outside the arguments' own extents, and an element that two programs
touch, one of them storing. Lanes that a masked load without `other` leaves undefined are NaN. libdevice functions are
known when called as `libdevice.name`. Private interfaces of triton are replaced when this module is imported.
"""
import contextlib
import dataclasses
import functools
import inspect
import itertools
import math
import random
import types

import numpy as np
import triton.language as tl
from bfloat16_reductions import in_float32
from program_memory import ProgramMemory, SimulationError
from strict_builder import StrictBuilder
from triton.backends.nvidia.compiler import CUDAOptions
from triton.language.extra import libdevice
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.jit import JITFunction

__all__ = ["SimulationError", "simulate", "strict"]
LAUNCH_OPTIONS = {field.name for field in dataclasses.fields(CUDAOptions)}
LIBDEVICE = {"tanh": np.tanh, "fast_tanhf": np.tanh, "exp": np.exp, "fast_expf": np.exp, "exp2": np.exp2, "log": np.log,
             "log2": np.log2, "pow": np.power, "erf": np.vectorize(math.erf, otypes=[np.float32]),
             "rsqrt": lambda x: 1 / np.sqrt(x)}
_builder = StrictBuilder()
_compiled_call = JITFunction.__call__
_options = {"bounds": True, "poison": True, "races": True, "shuffle": None}


@contextlib.contextmanager
def strict(**options):
    """Changes for a while what is checked: bounds, poison, races (all True); shuffle: a seed to order programs by."""
    unknown = set(options) - set(_options)
    if unknown:
        raise TypeError(f"no such check: {sorted(unknown)}")
    before = dict(_options)
    _options.update(options)
    try:
        yield
    finally:
        _options.update(before)


class simulate:
    """simulate(kernel)[grid](...) runs what kernel[grid](...) would launch."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return functools.partial(self._launch, grid)

    def _launch(self, grid, *args, **kwargs):
        given = _arguments(self.kernel, args, kwargs)
        positions = _positions(grid(given) if callable(grid) else grid)
        tensors = [getattr(value, "base", value) for value in given.values()]
        memory = ProgramMemory([t for t in tensors if hasattr(t, "data_ptr")], _options["bounds"], _options["races"])
        with _interpreting(memory), np.errstate(all="ignore"):
            values = _values(self.kernel, given)
            program = _interpreted(self.kernel.fn)
            for number, position in enumerate(positions):
                memory.enter(number, position)
                _builder.set_grid_idx(*position)
                program(**values)


def _arguments(kernel, args, kwargs):
    """Parameter -> argument, defaults included, launch options left out."""
    signature = inspect.signature(kernel.fn)
    kwargs = {k: v for k, v in kwargs.items() if k in signature.parameters or k not in LAUNCH_OPTIONS}
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _positions(grid):
    """Every program's place, in the order in which to run them."""
    grid = tuple(grid) + (1,) * (3 - len(grid))
    _builder.set_grid_dim(*grid)
    positions = list(itertools.product(*map(range, grid)))
    if _options["shuffle"] is not None:
        random.Random(_options["shuffle"]).shuffle(positions)
    return positions


def _values(kernel, given):
    """The arguments as a program sees them: constexprs as they are, the rest as triton tensors."""
    constexprs = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    return {name: value if name in constexprs else _tensor(value) for name, value in given.items()}


def _tensor(value):
    if type(value) is float:  # a compiled kernel's float argument is a float32 scalar, the interpreter's a Python float
        return tl.tensor(triton_interpreter.TensorHandle(np.array([value], np.float32), tl.float32), tl.float32)
    return triton_interpreter._implicit_cvt(value)


@contextlib.contextmanager
def _interpreting(memory):
    """triton.language means its interpreted functions, and calls of @triton.jit functions run them, inside this."""
    scope = triton_interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    for name in LIBDEVICE:
        scope.set_attr(libdevice, name, functools.partial(_libdevice_call, name))
    _builder.memory, _builder.poison = memory, _options["poison"]
    try:
        yield
    finally:
        _builder.memory = None
        scope.restore()


def _libdevice_call(name, *args):
    handles = [arg.handle for arg in args]
    result = _builder.unary_op(handles[0], lambda first: LIBDEVICE[name](first, *[h.data for h in handles[1:]]))
    return tl.core.tensor(result, args[0].type)


def _call(self, *args, **kwargs):
    """JITFunction.__call__: a device function, called by an interpreted kernel or, wrongly, from outside of any."""
    if _builder.memory is None:
        return _compiled_call(self, *args, **kwargs)
    kwargs.pop("_semantic", None)
    kwargs.pop("_generator", None)
    return _interpreted(self.fn)(*args, **kwargs)


def _member(self, instance, owner=None):
    """JITFunction.__get__: x.sum(0), a function of triton.language as a member of a tensor."""
    if _builder.memory is None or instance is None:
        return self
    return functools.partial(self, instance)


class _Rewriter(triton_interpreter.FunctionRewriter):
    """Makes assignments give triton tensors, and adds only the two names that needs to the kernel's module."""

    def _compile_and_exec(self, transformed_ast):
        names = {"interpreter_semantic": triton_interpreter.interpreter_semantic,
                 "_InterpreterComparison": triton_interpreter._InterpreterComparison}
        self.fn.__globals__.update(names)
        local = {}
        exec(compile(transformed_ast, filename=self.filename, mode="exec"), self.fn.__globals__, local)  # noqa: S102
        return local[self.fn.__name__]


@functools.cache
def _interpreted(function):
    return _Rewriter(function).rewrite_ast()


def _sum(self, operand):
    """Halves are added to halves, as threads and warps do it; numpy's sum along a first axis is one long chain."""
    values = operand.handle.data
    values = values.reshape(-1) if self.axis is None else np.moveaxis(values, self.axis, 0)
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    total = values[0]
    if self.keep_dims:
        total = np.expand_dims(total, tuple(range(operand.handle.data.ndim)) if self.axis is None else self.axis)
    return self.to_tensor(total, operand.dtype)


def _replace_triton_interfaces():
    triton_interpreter.ReduceOps.sum = _sum
    triton_interpreter.interpreter_semantic = TritonSemantic(_builder)
    for operation in (triton_interpreter.ReduceOps, triton_interpreter.ScanOps):
        operation.apply_impl = in_float32(operation.apply_impl)
    JITFunction.__call__, JITFunction.__get__ = _call, _member


_replace_triton_interfaces()
