"""How a checkpoint is laid out on disk: file names, tensor names, and the header of a safetensors file; without torch."""
import json
import re

import safetensors

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Hugging Face stores these transposed: its Conv1D multiplies x (..., K) by a weight (K, N).
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
HEAD, EMBEDDING, POSITIONS = "lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight"
MASK_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias$")  # the causal mask, which old checkpoints hold


def our_name(name):
    """A tensor's name in our state_dict."""
    name = name.removeprefix("_orig_mod.")  # torch.compile's
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def safetensors_header(file):
    """({name: its entry}, where the data begin) of a safetensors file, checked by the library against the file's size.
    ValueError where it is none."""
    try:
        with safetensors.safe_open(file, framework="np"), open(file, "rb") as data:
            size = int.from_bytes(data.read(8), "little")
            header = json.loads(data.read(size))
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a valid safetensors file ({error})") from error
    header.pop("__metadata__", None)
    return header, 8 + size
