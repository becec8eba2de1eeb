"""What the machine code of every Triton kernel says at GPT-2 124M's sizes: the rows of benchmarks/results/gpu_predicted.json.

The launches are recorded, not written down a second time: the ops run on tensors of the device "meta", and what would have
been launched is compiled for each architecture.
"""
from dataclasses import dataclass

import torch
from compiling import compile_kernel
from efficiency import predicted_efficiency
from executors import Recorder, running, specialise
from sass_model import describe

from fastgpt import kernels, ops

ARCHS = (80, 90, 100)
DTYPES = {"bfloat16": torch.bfloat16}
# Published figures of the A100 80 GB and the H100, both SXM: bytes and (16-bit tensor) FLOPs a second.
DEVICES = {"A100": (2.039e12, 312e12), "H100": (3.35e12, 989e12)}
# The head sizes beside GPT-2's own, 64.
HEAD_SIZES = (64, 128)


@dataclass(frozen=True)
class Launch:
    kernel: object
    programs: int
    arguments: dict
    constants: dict
    options: dict

    @property
    def name(self):
        return self.kernel.fn.__name__

    def value(self, table):
        """Of the expression that a module's FLOPS or BYTES has for this kernel; 0 where it has none."""
        for module in kernels.MODULES:
            expression = getattr(module, table, {}).get(self.name)
            if expression:
                return eval(expression, {"__builtins__": {}}, self.sizes())
        return 0

    def sizes(self):
        """What the expressions may name: constants, numbers, e (an element's bytes), programs, and of attention B, H, T, G and S."""
        tensors = [t for t in self.arguments.values() if isinstance(t, torch.Tensor)]
        known = {**self.arguments, **self.constants, "e": tensors[0].element_size(), "rows": len(tensors[0]),
                 "programs": self.programs}
        known.update({name: a for name, a in self.arguments.items() if isinstance(a, int)})
        if "K" in self.arguments:
            known["B"], known["H"], known["T"] = self.arguments["Q"].shape[:3]
            known["G"], known["S"] = self.arguments["K"].shape[1:3]
        return known


def record(spec, arch, dtype=None):
    """The launches of a spec's forward and backward, at GPT-2's sizes; in the spec's dtype where none is given."""
    inputs, others = spec.inputs(dtype or spec.dtype, "meta", True)
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    with running(Recorder(arch), "meta") as recorder:
        outputs = (spec.launcher or getattr(ops, spec.op))(**leaves, **others, **spec.options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if leaves:
            torch.autograd.grad(outputs, list(leaves.values()), [torch.empty_like(o) for o in outputs])
    return [Launch(kernel, programs, dict(zip(kernel.arg_names, arguments)), constants, options)
            for kernel, programs, arguments, constants, options in recorder.launches]


def specs():
    """Those whose launches can be recorded: packed sequences are read on the way, and run attention's kernels."""
    kernels.load()
    found = [spec for module in kernels.MODULES for name in ("SPECS", "INFERENCE_SPECS") for spec in getattr(module, name, ())]
    return [spec for spec in found if spec.op != "packed_attention"]


def rows(archs=ARCHS, chosen=None):
    """One for each kernel, set of constants and architecture: as JSON has it. chosen: the names of some specs."""
    found = {}
    for arch in archs:
        for spec in (spec for spec in specs() if chosen is None or spec.name in chosen):
            for launch in record(spec, arch):
                key = arch, launch.name, str(sorted((n, str(c)) for n, c in launch.constants.items()))
                if key not in found:
                    found[key] = row(spec, launch, arch)
    return list(found.values())


def row(spec, launch, arch):
    signature, constexprs, divisible = specialise(launch.kernel, launch.arguments.values(), launch.constants)
    compiled = compile_kernel(launch.kernel, signature, constexprs, divisible, arch, **launch.options)
    flops, moved = launch.value("FLOPS"), launch.value("BYTES")
    description = describe(compiled.asm["cubin"], arch, launch.options["num_warps"], compiled.metadata.shared, flops)
    return {"spec": spec.name, "kernel": launch.name, "arch": arch,
            "config": {**{n: c for n, c in launch.constants.items() if n.startswith("BLOCK")}, **launch.options},
            "efficiency": rounded(efficiency(launch, description, arch)), "bytes": moved, **facts(description)}


def efficiency(launch, description, arch):
    if arch not in (80, 90):
        return None
    if launch.value("FLOPS"):
        return predicted_efficiency(description, arch)
    if launch.name == "cross_entropy_kernel" and launch.constants["HAS_GRADIENT"]:
        return predicted_efficiency(description, arch, 2, 3)  # BYTES has the second reading in it
    useful = launch.value("BYTES")
    return predicted_efficiency(description, arch, useful, useful + launch.value("REREAD"))


def rounded(value):
    return None if value is None else round(value, 3)


def facts(description):
    names = ("registers", "spills", "shared", "blocks", "warps", "limit", "tensor", "widths", "bound")
    return {name: description[name] for name in names if name in description}
