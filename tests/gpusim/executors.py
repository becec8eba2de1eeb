"""What takes the GPU's place behind `fastgpt.kernels.launch`: an interpreter of the source, a simulator of the compiled
code, a recorder of launches. `running(executor)` puts one there."""

import torch
from answering import answering
from compiling import compile_kernel
from interpreter import simulate
from ptx_machine import Kernel

from fastgpt import kernels

POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32",
            torch.int64: "*i64", torch.uint8: "*u8", torch.int8: "*i8"}
WARP = 32


class Interpreter:
    """Runs the source of a kernel, strictly, with the configurations of an architecture."""

    def __init__(self, arch=90, processors=2):
        self.arch, self.count = arch, processors

    @torch.compiler.disable
    def run(self, kernel, programs, arguments, constants, options):
        simulate(kernel)[(programs,)](*arguments, **constants, **options)

    def architecture(self, device):
        return self.arch

    def processors(self, device):
        return self.count


class MachineCode(Interpreter):
    """Compiles a kernel for an architecture as its launch would, and executes the PTX. edit: a change of the text."""

    def __init__(self, arch, processors=2, edit=None):
        super().__init__(arch, processors)
        self.edit = edit or (lambda kernel, ptx: ptx)

    def run(self, kernel, programs, arguments, constants, options):
        signature, constexprs, divisible = specialise(kernel, arguments, constants)
        compiled = compile_kernel(kernel, signature, constexprs, divisible, self.arch, **options)
        passed = [a for name, a in zip(kernel.arg_names, arguments) if name not in constexprs]
        Kernel(self.edit(kernel, compiled.asm["ptx"])).launch(
            (programs,), options["num_warps"] * WARP, passed, shared=compiled.metadata.shared)


class Recorder(Interpreter):
    """Runs nothing and notes every launch: (kernel, programs, arguments, constants, options). For tensors of any size, on
    the device "meta"."""

    def __init__(self, arch, processors=132):
        super().__init__(arch, processors)
        self.launches = []

    def run(self, *launched):
        self.launches.append(launched)


def running(executor, device="cpu"):
    """Within this context the Triton kernels answer every op, for tensors of `device`, and `executor` runs them."""
    kernels.load()
    return answering(kernels, "triton", executor, device)


def specialise(kernel, arguments, constants):
    """(signature, constexprs, names divisible by 16) as triton's launcher derives them from a call's arguments."""
    signature, constexprs, divisible = {}, dict(constants), []
    fixed = set(kernel.do_not_specialize or ())
    for name, argument in zip(kernel.arg_names, arguments):
        if argument is None or type(argument) is int and argument == 1 and name not in fixed:
            signature[name], constexprs[name] = "constexpr", argument
        elif isinstance(argument, torch.Tensor):
            signature[name] = POINTERS[argument.dtype]
            if argument.is_meta or argument.data_ptr() % 16 == 0:
                divisible.append(name)
        elif isinstance(argument, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -2 ** 31 <= argument < 2 ** 31 else "i64"
            if argument % 16 == 0 and name not in fixed:
                divisible.append(name)
    signature.update({name: "constexpr" for name in constants})
    return {name: signature[name] for name in kernel.arg_names}, constexprs, divisible
