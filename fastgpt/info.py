"""What runs here, and why: `fastgpt info` prints `report()`."""
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import fastgpt
from fastgpt import cuda, extension, kernels, ops
from fastgpt.cpu.linear import bfloat16_product

PACKAGES = ("fastgpt", "torch", "numpy", "triton", "transformers")
VARIABLES = ("FASTGPT_BACKEND", "FASTGPT_CPU_ISA", "FASTGPT_BUILD")
DEVICES = ("cpu", "cuda")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def report():
    """The versions, the processor and its levels, the threads, the build, the GPU, and who answers each op: as text."""
    sections = [_versions(), _processor(), _threads(), _build(), _engine(), _gpu(), _environment(), _ops()]
    return "\n".join(line for section in sections for line in section)


def _row(name, text):
    return f"{name:<12} {text}"


def _versions():
    versions = [f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in PACKAGES)]
    return [_row("versions", ", ".join(versions))]


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor():
    rows = [_row("processor", f"{_cpu_model()} ({platform.machine()}), {os.cpu_count()} processors")]
    if extension._C is None:
        return rows
    for name in extension.LEVELS:
        chosen = f"in use: {extension.LEVEL_REASON}" if name == extension.LEVEL else "available"
        rows.append(_row(f"  {name}", extension.level_refusal(name) or chosen))
    rows.append(_row("  products", "of bfloat16 by {}: {}".format(*bfloat16_product())))
    for name, present in (("bf16", extension.HAS_BF16), ("vnni", extension.HAS_VNNI)):
        rows.append(_row(f"  {name}", "available" if present else f"the processor lacks avx512_{name}"))
    return rows


def _cpu_model():
    """The processor's name: from /proc/cpuinfo on Linux x86, elsewhere whatever Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown model")


def _threads():
    between = ("asleep between them" if fastgpt._TORCH_THREADS_SLEEP else
               "spinning between them where ours could run: import fastgpt before torch, or set OMP_WAIT_POLICY=passive")
    return [_row("threads", f"{extension.get_num_threads()}: {extension.THREADS_REASON}"),
            _row("", f"PyTorch's own ops: {torch.get_num_threads()}, {between}")]


def _build():
    return [_row("build", extension._C.BUILD if extension._C else extension.MISSING)]


def _engine():
    """What fastgpt.LLM and GPT.generate run on."""
    if extension._C is None:
        return [_row("engine", f"none, GPT.generate runs the model's ops: {extension.MISSING}")]
    dots = extension._C.engine_dots() or "none beside the level's own"
    refusal = kernels.missing(None) or cuda.missing(None)
    if ops.forced() == "reference":
        return [_row("engine", "none for fastgpt.LLM, and GPT.generate runs the model's ops: the reference was asked for")]
    gpu = f"not here: {refusal}" if refusal else "fastgpt.LLM(model, device=\"cuda\"), and GPT.generate of models there"
    return [_row("engine", f"C++ on the CPU for fastgpt.LLM, and for GPT.generate with float32 or bfloat16 weights; dot "
                           f"products: {dots}"),
            _row("", f"on a GPU by Triton and CUDA kernels: {gpu}"),
            _row("", "GPT.generate runs the model's ops on other devices, under autocast, past the context, and for models "
                     "with hooks or other modules")]


def _gpu():
    rows = [_row("GPU", f"PyTorch: {_pytorch_gpu()}")]
    if extension._C is not None:
        found, reason = extension._C.cuda_devices()
        devices = ", ".join(_device_text(*device) for device in found)
        rows.append(_row("", f"fastgpt._C: {devices or f'none, {reason}'}"))
    return rows


def _pytorch_gpu():
    if torch.version.cuda is None:
        return f"none, torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"none, torch {torch.__version__} (CUDA {torch.version.cuda}) finds no device or no driver"
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return ", ".join(_device_text(p.name, p.major, p.minor, p.total_memory) for p in found)


def _device_text(name, major, minor, memory):
    return f"{name} (compute capability {major}.{minor}, {memory / 2**30:.1f} GiB)"


def _environment():
    return [_row("environment", ", ".join(f"{name}={os.environ.get(name, '(not set)')}" for name in VARIABLES))]


def _ops():
    """A table of the implementations, op by device and dtype, and the reasons that its numbers stand for."""
    columns = [(device, dtype) for device in DEVICES for dtype in DTYPES]
    reasons = {}  # reason -> its number
    rows = [_cells("ops", (f"{device} {str(dtype).removeprefix('torch.')}" for device, dtype in columns))]
    for op in (*ops.OPS, *ops.INFERENCE_OPS):
        answers = (_answer(op, device, dtype) for device, dtype in columns)
        cells = (f"{name} [{reasons.setdefault(reason, len(reasons) + 1)}]" for name, reason in answers)
        rows.append(_cells(f"  {op}", cells))
    return rows + [f"  [{number}] {reason}" for reason, number in reasons.items()]


def _cells(name, cells):
    return f"{name:<20}" + "".join(f"{cell:<15}" for cell in cells).rstrip()


def _answer(op, device, dtype):
    """(implementation, reason) for a call with tensors of `dtype`, or what it raises."""
    try:
        return ops.resolve(op, torch.empty(1, dtype=dtype), device=device)
    except RuntimeError as error:
        return "raises", str(error).partition(", but ")[2] or str(error)
