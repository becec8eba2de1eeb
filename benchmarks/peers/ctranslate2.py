"""CTranslate2's generator. Its model is written without transformers, which its own converter needs.

An end token that cannot be had for nothing: while `min_length` lasts, CTranslate2 takes it out of the choice. So the
vocabulary gets one token more than the model has, with an embedding of zeros.
"""
import time

import ctranslate2
import numpy as np
from ctranslate2.specs import common_spec, transformer_spec

from benchmarks.peers import gpt2

ACTIVATIONS = {"gelu_new": common_spec.Activation.GELUTanh, "gelu": common_spec.Activation.GELU}


def make(source, folder, precision):
    c, w = gpt2.config(source), gpt2.weights(source)
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        c["n_layer"], c["n_head"], pre_norm=True, activation=ACTIVATIONS[c["activation_function"]])
    _fill(spec.decoder, w)
    tokens = [str(i) for i in range(c["vocab_size"] + 1)]
    spec.register_vocabulary(tokens)
    spec.config.bos_token = spec.config.unk_token = tokens[0]
    spec.config.eos_token = tokens[-1]
    spec.validate()
    spec.optimize(quantization=precision)
    spec.save(str(folder))


def _fill(decoder, w):
    decoder.scale_embeddings = False
    head = np.concatenate([w["wte.weight"], np.zeros_like(w["wte.weight"][:1])])
    decoder.embeddings.weight = decoder.projection.weight = head
    decoder.position_encodings.encodings = w["wpe.weight"]
    _fill_norm(decoder.layer_norm, w, "ln_f")
    for i, layer in enumerate(decoder.layer):
        attention, ffn = layer.self_attention, layer.ffn
        _fill_norm(attention.layer_norm, w, f"h.{i}.ln_1")
        _fill_linear(attention.linear[0], w, f"h.{i}.attn.c_attn")
        _fill_linear(attention.linear[1], w, f"h.{i}.attn.c_proj")
        _fill_norm(ffn.layer_norm, w, f"h.{i}.ln_2")
        _fill_linear(ffn.linear_0, w, f"h.{i}.mlp.c_fc")
        _fill_linear(ffn.linear_1, w, f"h.{i}.mlp.c_proj")


def _fill_norm(spec, w, name):
    spec.gamma, spec.beta = w[f"{name}.weight"], w[f"{name}.bias"]


def _fill_linear(spec, w, name):
    spec.weight, spec.bias = np.ascontiguousarray(w[f"{name}.weight"].T), w[f"{name}.bias"]


class Engine:
    version = f"ctranslate2 {ctranslate2.__version__}"

    def __init__(self, source, folder, precision, threads):
        if precision not in ctranslate2.get_supported_compute_types("cpu"):
            raise RuntimeError(f"{self.version} has no {precision} on this processor")
        self.generator = ctranslate2.Generator(str(folder), device="cpu", compute_type=precision, inter_threads=1,
                                               intra_threads=threads)
        self.weight_bytes = gpt2.matrix_bytes(source, {"float32": 32, "bfloat16": 16, "int8": 8}[precision])

    def generate(self, prompts, new):
        times = [[] for _ in prompts]

        def stamp(result):
            times[result.batch_id].append(time.perf_counter())
            return False

        out = self.generator.generate_batch([[str(i) for i in p] for p in prompts], max_length=new, min_length=new,
                                            sampling_topk=1, include_prompt_in_result=False, callback=stamp)
        return [result.sequences_ids[0] for result in out], times
