"""ONNX Runtime on a graph of its fused operators, the ones that onnxruntime-genai builds other decoders of.

That builder knows no GPT-2, so the graph is written here: GroupQueryAttention on a cache that is bound once and grows
in place, SkipLayerNormalization, FastGelu, and MatMulNBits for 8 and 4 bits (blocks of 32, int8 arithmetic).
"""
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.peers import gpt2

MODEL, MICROSOFT = "model.onnx", "com.microsoft"
BITS = {"f32": 32, "int8": 8, "int4": 4}
BLOCK = 32  # weights to a scale of 4 bytes
INT8_ARITHMETIC = 4  # MatMulNBits's accuracy_level
CHUNK = 64  # the cache's length is a multiple of this


def make(source, folder, precision):
    c, w = gpt2.config(source), gpt2.weights(source)
    if c["activation_function"] != "gelu_new":
        raise ValueError("onnxruntime's FastGelu is the tanh GELU (gelu_new)")
    onnx.save(Graph(c, w, BITS[precision]).model(), str(Path(folder, MODEL)))


def quantise(matrix, bits):
    """(out, in) -> MatMulNBits's blob (out, blocks, bytes) and scales (out, blocks): symmetric, with an offset."""
    groups = matrix.reshape(len(matrix), -1, BLOCK)
    top = 2 ** (bits - 1)
    peak = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)
    scale = peak / -top
    q = np.clip(np.round(groups / np.where(scale == 0, 1, scale)) + top, 0, 2 * top - 1).astype(np.uint8)
    if bits == 4:
        q = q[..., 0::2] | q[..., 1::2] << 4
    return q, scale[..., 0].astype(np.float32)


class Graph:
    """Collects the nodes and the weights; a value is known by its name."""

    def __init__(self, config, weights, bits):
        self.c, self.w, self.bits = config, weights, bits
        self.nodes, self.weights, self.inputs, self.outputs = [], [], [], []

    def const(self, name, value):
        self.weights.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def weight(self, name):
        return self.const(name, self.w[name])

    def node(self, op, inputs, *outputs, domain="", **attributes):
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def linear(self, name, x, matrix):
        """matrix: (out, in). Without the bias, which the next operator adds where it can."""
        if self.bits == 32:
            return self.node("MatMul", [x, self.const(f"{name}.matrix", matrix.T)], f"{name}.out")
        q, scales = quantise(matrix, self.bits)
        inputs = [x, self.const(f"{name}.matrix", q), self.const(f"{name}.scales", scales)]
        return self.node("MatMulNBits", inputs, f"{name}.out", domain=MICROSOFT, N=matrix.shape[0], K=matrix.shape[1],
                         bits=self.bits, block_size=BLOCK, accuracy_level=INT8_ARITHMETIC)

    def conv1d(self, name, x):
        return self.linear(name, x, self.w[f"{name}.weight"].T)

    def skip_norm(self, x, branch, norm, bias):
        """-> (the norm of x + branch + bias, that sum)."""
        inputs = [x, branch, self.weight(f"{norm}.weight"), self.weight(f"{norm}.bias"), self.weight(bias)]
        outputs = f"{norm}.out", "", "", f"{norm}.sum"
        self.node("SkipLayerNormalization", inputs, *outputs, domain=MICROSOFT, epsilon=self.c["layer_norm_epsilon"])
        return outputs[0], outputs[3]

    def attention(self, i, y):
        qkv = self.conv1d(f"h.{i}.attn.c_attn", y)
        qkv = self.node("Add", [qkv, self.weight(f"h.{i}.attn.c_attn.bias")], f"h.{i}.qkv")
        past, present = ([f"{when}.{i}.{part}" for part in ("key", "value")] for when in ("past", "present"))
        shape = [None, self.c["n_head"], None, self.c["n_embd"] // self.c["n_head"]]
        for names, values in ((past, self.inputs), (present, self.outputs)):
            values += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in names]
        return self.node("GroupQueryAttention", [qkv, "", "", *past, "seqlens_k", "total_len"], f"h.{i}.heads",
                         *present, domain=MICROSOFT, num_heads=shape[1], kv_num_heads=shape[1])

    def layer(self, i, x, y):
        """x: the residual stream; y: its norm. -> the same after the layer."""
        h, last = f"h.{i}", i + 1 == self.c["n_layer"]
        branch = self.conv1d(f"{h}.attn.c_proj", self.attention(i, y))
        y, x = self.skip_norm(x, branch, f"{h}.ln_2", f"{h}.attn.c_proj.bias")
        wide = self.conv1d(f"{h}.mlp.c_fc", y)
        wide = self.node("FastGelu", [wide, self.weight(f"{h}.mlp.c_fc.bias")], f"{h}.wide", domain=MICROSOFT)
        branch = self.conv1d(f"{h}.mlp.c_proj", wide)
        y, x = self.skip_norm(x, branch, "ln_f" if last else f"h.{i + 1}.ln_1", f"{h}.mlp.c_proj.bias")
        return x, y

    def body(self):
        tokens = self.node("Gather", [self.weight("wte.weight"), "input_ids"], "tokens")
        positions = self.node("Gather", [self.weight("wpe.weight"), "position_ids"], "positions")
        x = self.node("Add", [tokens, positions], "embedded")
        y = self.node("LayerNormalization", [x, self.weight("h.0.ln_1.weight"), self.weight("h.0.ln_1.bias")],
                      "h.0.ln_1.out", epsilon=self.c["layer_norm_epsilon"])
        for i in range(self.c["n_layer"]):
            x, y = self.layer(i, x, y)
        last = self.node("Gather", [y, self.const("last", np.array([-1]))], "last_row", axis=1)
        self.node("Identity", [self.linear("head", last, self.w["wte.weight"])], "logits")

    def model(self):
        self.body()
        info = helper.make_tensor_value_info
        ids = [info(name, TensorProto.INT64, [None, None]) for name in ("input_ids", "position_ids")]
        lengths = [info("seqlens_k", TensorProto.INT32, [None]), info("total_len", TensorProto.INT32, [])]
        logits = info("logits", TensorProto.FLOAT, [None, 1, self.c["vocab_size"]])
        graph = helper.make_graph(self.nodes, "gpt2", [*ids, *lengths, *self.inputs], [logits, *self.outputs],
                                  self.weights)
        return helper.make_model(graph, ir_version=9, opset_imports=[
            helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)])


class Engine:
    version = f"onnxruntime {onnxruntime.__version__}"

    def __init__(self, source, folder, precision, threads):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        self.session = onnxruntime.InferenceSession(str(Path(folder, MODEL)), options,
                                                    providers=["CPUExecutionProvider"])
        self.c, self.shape = gpt2.config(source), None
        bits = BITS[precision]
        self.weight_bytes = gpt2.matrix_bytes(source, bits if bits == 32 else bits + 32 // BLOCK)

    def _bind(self, batch, length):
        """The cache and the logits: past and present are the same memory, so that a step adds to it in place."""
        if self.shape == (batch, length):
            return
        c, self.shape, self.io = self.c, (batch, length), self.session.io_binding()
        shape = batch, c["n_head"], -(-length // CHUNK) * CHUNK, c["n_embd"] // c["n_head"]
        for i in range(c["n_layer"]):
            for part in ("key", "value"):
                cache = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
                self.io.bind_ortvalue_input(f"past.{i}.{part}", cache)
                self.io.bind_ortvalue_output(f"present.{i}.{part}", cache)
        self.logits = onnxruntime.OrtValue.ortvalue_from_numpy(np.empty((batch, 1, c["vocab_size"]), np.float32))
        self.io.bind_ortvalue_output("logits", self.logits)

    def generate(self, prompts, new):
        x = np.array(prompts)
        batch, end = x.shape
        self._bind(batch, end + new)
        ids, times, start = [], [], 0
        for _ in range(new):
            self.io.bind_cpu_input("input_ids", x)
            self.io.bind_cpu_input("position_ids", np.arange(start, end)[None].repeat(batch, 0))
            self.io.bind_cpu_input("seqlens_k", np.full(batch, end - 1, np.int32))
            self.io.bind_cpu_input("total_len", np.array(end, np.int32))
            self.session.run_with_iobinding(self.io)
            x = self.logits.numpy()[:, -1].argmax(-1)[:, None]
            ids.append(x)
            times.append(time.perf_counter())
            start, end = end, end + 1
        return np.concatenate(ids, 1).tolist(), [times] * batch
