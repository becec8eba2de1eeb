"""llama.cpp by llama-cpp-python's plain bindings: one llama_decode a step, its own quantiser, weights as GGUF."""
import ctypes
import time
from pathlib import Path

import gguf
import llama_cpp as llama
import numpy as np

from benchmarks.peers import gpt2

MODEL = "model.gguf"
STORED = {"f32": gguf.GGMLQuantizationType.F32, "bf16": gguf.GGMLQuantizationType.BF16}
QUANTISED = {"q8_0": (llama.LLAMA_FTYPE_MOSTLY_Q8_0, llama.GGML_TYPE_Q8_0),
             "q4_0": (llama.LLAMA_FTYPE_MOSTLY_Q4_0, llama.GGML_TYPE_Q4_0)}
NORMS = {"ln_1": "attn_norm", "ln_2": "ffn_norm"}
MATRICES = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
CELLS = 256  # llama.cpp rounds a sequence's share of the cache up to a multiple of this


def make(source, folder, precision):
    path = Path(folder, MODEL)
    if precision in STORED:
        _write(source, path, STORED[precision])
        return
    plain = Path(folder, "f32.gguf")
    _write(source, plain, STORED["f32"])
    _quantise(plain, path, *QUANTISED[precision])
    plain.unlink()


def _quantise(plain, path, kind, tensor_type):
    """All matrices alike: its default for q4_0 leaves the head in 6 bits, which is slower to read."""
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.pure = kind, True
    params.token_embedding_type = params.output_tensor_type = tensor_type
    if llama.llama_model_quantize(str(plain).encode(), str(path).encode(), ctypes.byref(params)):
        raise RuntimeError("llama_model_quantize failed")


def _write(source, path, kind):
    c, w = gpt2.config(source), gpt2.weights(source)
    if c["activation_function"] != "gelu_new":
        raise ValueError("llama.cpp's gpt2 has the tanh GELU alone (gelu_new)")
    file = gguf.GGUFWriter(str(path), "gpt2")
    file.add_context_length(c["n_positions"])
    file.add_embedding_length(c["n_embd"])
    file.add_feed_forward_length(c.get("n_inner") or 4 * c["n_embd"])
    file.add_block_count(c["n_layer"])
    file.add_head_count(c["n_head"])
    file.add_layer_norm_eps(c["layer_norm_epsilon"])
    file.add_vocab_size(c["vocab_size"])
    file.add_tokenizer_model("no_vocab")
    _add_matrix(file, "token_embd.weight", w["wte.weight"], kind)  # the head is tied to it
    file.add_tensor("position_embd.weight", w["wpe.weight"])
    for i in range(c["n_layer"]):
        _add_layer(file, w, i, kind)
    _add_norm(file, "output_norm", w, "ln_f")
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def _add_layer(file, w, i, kind):
    for theirs, name in NORMS.items():
        _add_norm(file, f"blk.{i}.{name}", w, f"h.{i}.{theirs}")
    for theirs, name in MATRICES.items():
        _add_matrix(file, f"blk.{i}.{name}.weight", w[f"h.{i}.{theirs}.weight"].T, kind)
        file.add_tensor(f"blk.{i}.{name}.bias", w[f"h.{i}.{theirs}.bias"])


def _add_norm(file, name, w, theirs):
    for part in ("weight", "bias"):
        file.add_tensor(f"{name}.{part}", w[f"{theirs}.{part}"])


def _add_matrix(file, name, matrix, kind):
    file.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(matrix), kind), raw_dtype=kind)


@llama.llama_log_callback
def _quiet(level, text, data):
    """Without it, every load prints hundreds of lines."""


class Engine:
    version = f"llama-cpp-python {llama.__version__}"

    def __init__(self, source, folder, precision, threads):
        llama.llama_log_set(_quiet, ctypes.c_void_p(0))
        llama.llama_backend_init()
        path = str(Path(folder, MODEL))
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(path.encode(), params)
        if not self.model:
            raise RuntimeError("llama_model_load_from_file failed")
        self.vocab = gpt2.config(source)["vocab_size"]
        self.threads, self.shape = threads, None
        self.weight_bytes = int(sum(t.n_bytes for t in gguf.GGUFReader(path).tensors
                                    if len(t.shape) == 2 and t.name != "position_embd.weight"))

    def _prepare(self, prompts, new):
        """A context for as many prompts and tokens as these, kept for the next ones of the same shape."""
        shape = len(prompts), len(prompts[0]), new
        if shape == self.shape:
            return
        batch, prompt = shape[:2]
        params = llama.llama_context_default_params()
        params.n_ctx = batch * -(-(prompt + new) // CELLS) * CELLS
        params.n_seq_max, params.n_batch = batch, batch * prompt
        params.n_threads = params.n_threads_batch = self.threads
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama_init_from_model failed")
        self.batch, self.shape = llama.llama_batch_init(batch * prompt, 0, 1), shape

    def _put(self, i, token, position, sequence, wanted):
        b = self.batch
        b.token[i], b.pos[i], b.logits[i] = token, position, wanted
        b.n_seq_id[i], b.seq_id[i][0] = 1, sequence

    def _decode(self, tokens):
        self.batch.n_tokens = tokens
        if status := llama.llama_decode(self.context, self.batch):
            raise RuntimeError(f"llama_decode failed with {status}")

    def _likeliest(self, row):
        return int(np.ctypeslib.as_array(llama.llama_get_logits_ith(self.context, row), (self.vocab,)).argmax())

    def generate(self, prompts, new):
        self._prepare(prompts, new)
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        batch, length = len(prompts), len(prompts[0])
        for s, prompt in enumerate(prompts):
            for j, token in enumerate(prompt):
                self._put(s * length + j, token, j, s, j == length - 1)
        ids, times, rows = [[] for _ in prompts], [], [s * length + length - 1 for s in range(batch)]
        for i in range(new):
            self._decode(batch if i else batch * length)
            for s, row in enumerate(rows):
                ids[s].append(self._likeliest(row))
                self._put(s, ids[s][-1], length + i, s, True)
            times.append(time.perf_counter())
            rows = range(batch)
        return ids, [times] * batch
