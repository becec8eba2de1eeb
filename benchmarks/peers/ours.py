"""fastgpt itself."""
import time

import fastgpt


def make(source, folder, precision):
    """Nothing: fastgpt packs a Hugging Face folder while it loads it."""


class Engine:
    version = "this checkout"

    def __init__(self, source, folder, precision, threads):
        # The first run, which is not measured, makes the graphs that the others need.
        place = {"device": threads, "warm_up": 0} if threads == "cuda" else {"threads": threads}
        self.llm = fastgpt.LLM(source, dtype=precision, **place)
        self.weight_bytes = self.llm.weight_bytes

    def generate(self, prompts, new):
        ids, times = [[] for _ in prompts], [[] for _ in prompts]
        params = fastgpt.SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
        for event in self.llm.stream(prompts, params):
            times[event.index].append(time.perf_counter())
            ids[event.index].append(event.token_id)
        return ids, times
