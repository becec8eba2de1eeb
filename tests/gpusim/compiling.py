"""Compiles Triton kernels for an architecture without its GPU."""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

WARP = 32


def compile_kernel(kernel, signature, constexprs, divisible, arch, num_warps=4, num_stages=3):
    """Triton's CompiledKernel: asm["ptx"], asm["cubin"], metadata.shared.

    signature: every parameter in order -> its type ("*fp16", "i32", "fp32", "constexpr", ...). divisible: names of the
    parameters known to be divisible by 16, without which each access moves one element. arch: 80, 90, ...
    """
    names = list(signature)
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(kernel, signature, constexprs, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=options)
