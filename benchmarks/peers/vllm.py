"""vLLM: its engine, driven step by step for the times."""
import itertools
import time

import vllm

from benchmarks.peers import gpt2

MEMORY = 0.3  # of the GPU's: the others are loaded beside it


def make(source, folder, precision):
    """Nothing: vLLM reads a Hugging Face folder."""


class Engine:
    version = f"vllm {vllm.__version__}"

    def __init__(self, source, folder, precision, threads):
        self.engine = vllm.LLM(str(source), dtype=precision, skip_tokenizer_init=True, enable_prefix_caching=False,
                               gpu_memory_utilization=MEMORY).llm_engine
        self.weight_bytes = gpt2.matrix_bytes(source, 32 if precision == "float32" else 16)
        self.numbers = itertools.count()

    def generate(self, prompts, new):
        params = vllm.SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        names = [str(next(self.numbers)) for _ in prompts]
        for name, prompt in zip(names, prompts):
            self.engine.add_request(name, {"prompt_token_ids": prompt}, params)
        ids, times = ({name: [] for name in names} for _ in range(2))
        while self.engine.has_unfinished_requests():
            outputs, now = self.engine.step(), time.perf_counter()
            for output in outputs:
                tokens = list(output.outputs[0].token_ids)  # all so far
                times[output.request_id] += [now] * (len(tokens) - len(ids[output.request_id]))
                ids[output.request_id] = tokens
        return [ids[name] for name in names], [times[name] for name in names]
