"""Hugging Face transformers: generate() with its default cache."""
import time

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from benchmarks.peers import gpt2


def make(source, folder, precision):
    """Nothing: the folder is its own."""


class Stamps(BaseStreamer):
    """The time of each step. Its first call hands over the prompts."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


class Engine:
    version = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def __init__(self, source, folder, precision, threads):
        self.device = torch.device("cuda" if threads == "cuda" else "cpu")
        if threads != "cuda":
            torch.set_num_threads(threads)
        dtype = getattr(torch, precision)
        self.model = transformers.GPT2LMHeadModel.from_pretrained(source, dtype=dtype).eval().to(self.device)
        self.model.generation_config.eos_token_id = None
        self.weight_bytes = gpt2.matrix_bytes(source, 8 * dtype.itemsize)

    @torch.inference_mode()
    def generate(self, prompts, new):
        x, stamps = torch.tensor(prompts, device=self.device), Stamps()
        y = self.model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=new, do_sample=False,
                                pad_token_id=0, streamer=stamps)
        return y[:, x.shape[1]:].tolist(), [stamps.times[1:]] * len(prompts)
