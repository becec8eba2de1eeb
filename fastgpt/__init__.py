"""fastgpt: a GPT engine with kernels of its own."""
import importlib
import os
import sys

# The public names and where they live. Each is imported at its first use, so that `import fastgpt` costs nothing.
_EXPORTS = {
    "GPT": "fastgpt.model",
    "GPTConfig": "fastgpt.config",
    "LLM": "fastgpt.engine.llm",
    "RequestOutput": "fastgpt.engine.llm",
    "SamplingParams": "fastgpt.sampling",
    "Tokenizer": "fastgpt.tokenizer",
    "get_num_threads": "fastgpt.extension",
    "set_num_threads": "fastgpt.extension",
}
_MODULES = ("ops", "reference")
__all__ = ["GPT", "GPTConfig", "LLM", "RequestOutput", "SamplingParams", "Tokenizer", "get_num_threads", "ops", "reference",
           "set_num_threads"]

# torch's OpenMP threads spin for milliseconds after each of its ops, on the cores that our kernels want next; asleep, they
# are there within microseconds. libgomp reads this once, when torch loads.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
_TORCH_THREADS_SLEEP = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"


def __getattr__(name):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"fastgpt.{name}")
    raise AttributeError(f"module 'fastgpt' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
