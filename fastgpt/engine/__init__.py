"""The decode engine: packed weights, a paged KV cache, and one C++ call for each step of the model. `fastgpt.LLM` is it.

pages: which page holds which tokens (integers only). weights: checkpoints and models into packed panels. runner: the
model and its cache in memory. scheduler: requests into steps. llm: what a user calls. None of it imports torch.
"""
