"""A GPT-2 in a Hugging Face folder, as the adapters that write their own files read it."""
import json
from pathlib import Path


def config(source):
    return json.loads(Path(source, "config.json").read_text())


def weights(source):
    """Name, without "transformer.", -> array; the matrices of a layer are (in, out) in these files."""
    from safetensors.numpy import load_file
    return {name.removeprefix("transformer."): w for name, w in load_file(Path(source, "model.safetensors")).items()}


def matrix_bytes(source, bits):
    """Bytes of the matrices that one step reads, at so many bits a weight, scales included."""
    c = config(source)
    C, inner = c["n_embd"], c.get("n_inner") or 4 * c["n_embd"]
    return int((c["n_layer"] * (4 * C * C + 2 * C * inner) + c["vocab_size"] * C) * bits / 8)
