"""OpenVINO GenAI's continuous batching: the pipeline that its LLMPipeline runs, driven step by step for the times.

The model is written in OpenVINO's own operators (what optimum-intel would export, without optimum-intel, whose pins
exclude the other engines' packages); nncf compresses its weights.
"""
import time
from pathlib import Path

import numpy as np
import openvino
import openvino_genai
from openvino import opset15 as op

from benchmarks.peers import gpt2

MODEL = "openvino_model.xml"
BITS = {"f32": 32, "bf16": 16, "int8": 8, "int4": 4}
GROUP = 64  # weights of int4 to a scale of 2 bytes
APPROXIMATION = {"gelu_new": "tanh", "gelu": "erf"}


def make(source, folder, precision):
    model = Graph(gpt2.config(source), gpt2.weights(source)).model()
    if BITS[precision] < 16:
        model = _compress(model, precision)
    openvino.save_model(model, str(Path(folder, MODEL)), compress_to_fp16=False)


def _compress(model, precision):
    import nncf
    if precision == "int8":
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    # the head in 4 bits too, which its default leaves in 8: fewer bytes to read
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=GROUP, ratio=1.0,
                                 all_layers=True)


class Graph:
    """The stateful model: tokens in, logits out, keys and values in variables."""

    def __init__(self, config, weights):
        self.c, self.w, self.assigns = config, weights, []
        self.ids, self.mask, self.positions = (op.parameter([-1, -1], np.int64, name=name) for name in (
            "input_ids", "attention_mask", "position_ids"))
        self.beam = op.parameter([-1], np.int32, name="beam_idx")

    def norm(self, x, name):
        x = op.mvn(x, [-1], True, self.c["layer_norm_epsilon"], "inside_sqrt")
        return op.add(op.multiply(x, self.w[f"{name}.weight"]), self.w[f"{name}.bias"])

    def linear(self, x, name):
        matrix = np.ascontiguousarray(self.w[f"{name}.weight"].T)
        return op.add(op.matmul(x, op.constant(matrix), False, True), self.w[f"{name}.bias"])

    def remember(self, x, name):
        """The past's (B, H, S, D) with x behind it."""
        H, D = self.c["n_head"], self.c["n_embd"] // self.c["n_head"]
        batch = op.gather(op.shape_of(self.ids, "i64"), [0], 0)
        empty = op.broadcast(np.float32(0), op.concat([batch, np.array([H, 0, D])], 0))
        past = op.gather(op.read_value(empty, name, np.float32, [-1, H, -1, D]), self.beam, 0)
        whole = op.concat([past, x], 2)
        self.assigns.append(op.assign(whole, name))
        return whole

    def causal(self):
        """(B, 1, T, S), added to the scores."""
        S = op.squeeze(op.gather(op.shape_of(self.mask, "i64"), [1], 0), [0])
        visible = op.greater_equal(op.unsqueeze(self.positions, [1, 3]), op.range(np.int64(0), S, np.int64(1), "i64"))
        return op.select(visible, np.float32(0), np.float32(-np.inf))

    def attention(self, x, h):
        H, C = self.c["n_head"], self.c["n_embd"]
        parts = op.variadic_split(self.linear(x, f"{h}.attn.c_attn"), -1, [C, C, C]).outputs()
        q, k, v = (op.transpose(op.reshape(part, [0, 0, H, C // H], True), [0, 2, 1, 3]) for part in parts)
        k, v = self.remember(k, f"{h}.key"), self.remember(v, f"{h}.value")
        heads = op.scaled_dot_product_attention(q, k, v, self.causal())
        heads = op.reshape(op.transpose(heads, [0, 2, 1, 3]), [0, 0, C], True)
        return self.linear(heads, f"{h}.attn.c_proj")

    def mlp(self, x, h):
        wide = op.gelu(self.linear(x, f"{h}.mlp.c_fc"), APPROXIMATION[self.c["activation_function"]])
        return self.linear(wide, f"{h}.mlp.c_proj")

    def model(self):
        tokens = op.constant(self.w["wte.weight"])
        x = op.add(op.gather(tokens, self.ids, 0), op.gather(op.constant(self.w["wpe.weight"]), self.positions, 0))
        for i in range(self.c["n_layer"]):
            x = op.add(x, self.attention(self.norm(x, f"h.{i}.ln_1"), f"h.{i}"))
            x = op.add(x, self.mlp(self.norm(x, f"h.{i}.ln_2"), f"h.{i}"))
        logits = op.matmul(self.norm(x, "ln_f"), tokens, False, True)
        logits.output(0).set_names({"logits"})
        inputs = [self.ids, self.mask, self.positions, self.beam]
        for node in inputs:
            node.output(0).set_names({node.friendly_name})
        return openvino.Model([op.result(logits)], self.assigns, inputs, "gpt2")


class Engine:
    version = f"openvino-genai {openvino_genai.__version__}"

    def __init__(self, source, folder, precision, threads):
        if precision == "bf16" and "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise RuntimeError(f"{self.version} has no bf16 on this processor")
        plan = openvino_genai.SchedulerConfig()
        plan.enable_prefix_caching = False
        plan.max_num_batched_tokens = 4096  # a prompt, and a batch of them, in one step
        plan.cache_size = 1  # GB
        properties = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY",
                      "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}
        self.pipe = openvino_genai.ContinuousBatchingPipeline(str(folder), plan, "CPU", properties)
        self.weight_bytes = gpt2.matrix_bytes(source, BITS[precision] + (16 / GROUP if precision == "int4" else 0))

    def generate(self, prompts, new):
        wanted = openvino_genai.GenerationConfig()
        wanted.max_new_tokens, wanted.ignore_eos, wanted.do_sample = new, True, False
        wanted.set_eos_token_id(0)  # ignored, but there must be one
        handles = [self.pipe.add_request(i, openvino.Tensor(np.array([p])), wanted) for i, p in enumerate(prompts)]
        times = []
        while self.pipe.has_non_finished_requests():
            self.pipe.step()
            times.append(time.perf_counter())
        ids = [handle.read_all()[0].generated_ids for handle in handles]
        return ids, [times] * len(prompts)
