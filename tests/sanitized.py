"""The engine's C++ under a sanitizer: random requests of every dtype on three threads, and a fork. Run by
test_sanitizers.py with the path of an extension and of a model; imports no torch, whose own threads a sanitizer would
complain of."""
import importlib.util
import os
import sys
import threading


def load(path):
    spec = importlib.util.spec_from_file_location("fastgpt._C", path)
    sys.modules["fastgpt._C"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def generate(model, level, dtype, cache):
    import numpy as np

    from fastgpt import LLM, SamplingParams, extension
    extension.use_level(level)
    rng = np.random.default_rng(0)
    llm = LLM(model, dtype, threads=3, page_size=16, kv_cache_dtype=cache, max_step_tokens=40)

    def work(seed):
        own = np.random.default_rng(seed)
        prompts = [own.integers(0, llm.config.vocab_size, int(own.integers(1, 90))).tolist() for _ in range(5)]
        params = SamplingParams(max_tokens=5, n=2, seed=seed, temperature=0.8, top_k=9, top_p=0.9, min_p=0.01,
                                frequency_penalty=0.5, logit_bias={3: 1.0})
        llm.generate(prompts, params)

    workers = [threading.Thread(target=work, args=(int(rng.integers(100)),)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert llm.free_pages == llm._reservations.pages.num_pages
    return llm


def main(path, model, forks):
    load(path)
    from fastgpt import SamplingParams, extension
    for level in ("baseline", "avx2"):
        if extension.level_refusal(level):
            continue
        for dtype, cache in (("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int8"), ("int4", "bfloat16")):
            llm = generate(model, level, dtype, cache)
    if forks:
        child = os.fork()
        if child == 0:
            llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3))
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
    assert "torch" not in sys.modules
    print("clean")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "forks")
