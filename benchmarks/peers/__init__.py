"""What fastgpt is held against: an adapter for each engine, all under one interface, each run in its own process.

An adapter's module has
    make(source, folder, precision)            writes the engine's own files from a Hugging Face folder, before any run
    Engine(source, folder, precision, threads) loads them; threads: how many, or "cuda" for an NVIDIA GPU
        .generate(prompts, new)                greedy, never ended early: -> (ids, times), `new` ids for each prompt,
                                               and the time.perf_counter() at which each of them was known
        .weight_bytes                          of the matrices that a step reads, the head's included
        .version
`pytorch` has the models that the training benchmark runs. This file needs the standard library alone, since an engine
may live in an environment of its own.
"""
import importlib
from dataclasses import dataclass

DTYPES = ("float32", "bfloat16", "int8", "int4")
FLOATS = ("bfloat16", "float16", "float32")
GPU_DTYPES = (*FLOATS, "int8", "int4")


@dataclass(frozen=True)
class Peer:
    module: str
    precisions: dict  # dtype -> the engine's own name of what comes nearest
    places: tuple = ("cpu",)  # where it is measured
    package: str = "'.[peers]'"  # what pip installs it by

    def adapter(self):
        return importlib.import_module(f"benchmarks.peers.{self.module}")


OURS = "fastgpt"
ENGINES = {
    OURS: Peer("ours", {dtype: dtype for dtype in GPU_DTYPES}, ("cpu", "cuda")),
    "llama.cpp": Peer("llama_cpp", {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0", "int4": "q4_0"}),
    "openvino-genai": Peer("openvino", {"float32": "f32", "bfloat16": "bf16", "int8": "int8", "int4": "int4"}),
    "onnxruntime": Peer("onnxruntime", {"float32": "f32", "int8": "int8", "int4": "int4"}),
    "ctranslate2": Peer("ctranslate2", {"float32": "float32", "bfloat16": "bfloat16", "int8": "int8"}),
    "transformers": Peer("transformers", {dtype: dtype for dtype in FLOATS}, ("cpu", "cuda")),
    "torch.compile": Peer("static_cache", {dtype: dtype for dtype in (*FLOATS, "int8")}, ("cuda",)),
    "vllm": Peer("vllm", {dtype: dtype for dtype in FLOATS}, ("cuda",), "vllm"),
}
RIVALS, GPU_RIVALS = (tuple(name for name, peer in ENGINES.items() if name != OURS and place in peer.places)
                      for place in ("cpu", "cuda"))
