"""Models in and out of files: Hugging Face GPT-2 directories, hub ids and nanoGPT's ckpt.pt in, the first out.

Files are not trusted. Tensors come from safetensors or `torch.load(weights_only=True)`; the config is checked on its
own, then every name, shape and dtype against it, before a parameter is allocated. Errors are ValueErrors that name
the file and the tensor. Loading holds the parameters once plus one tensor. Saving writes beside the old file and
renames, so that a full disk leaves the old checkpoint. (A kill between the renames of the config and the weights leaves
one of each: a training run, which replaces whole folders, is safe from that too.)
"""
import contextlib
import dataclasses
import json
import os
import re
import secrets
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from fastgpt.config import DROPOUTS, GPTConfig
from fastgpt.layout import CONFIG, CONV1D, EMBEDDING, HEAD, INDEX, MASK_BUFFER, WEIGHTS, our_name, safetensors_header

NANOGPT = "ckpt.pt"
INDICES = (INDEX, "pytorch_model.bin.index.json")
# Where the weights of a directory are looked for, in this order.
WEIGHT_FILES = (WEIGHTS, INDICES[0], "pytorch_model.bin", INDICES[1])
NANOGPT_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
OVERRIDABLE = ("dropout", *DROPOUTS, "gradient_checkpointing")
BLOCK = re.compile(r"transformer\.h\.(\d{1,9})\.")
BIAS = re.compile(r"transformer\.(h\.\d+\..*|ln_f)\.bias")
SHARD = re.compile(r"\w[\w.-]*\.(safetensors|bin)")  # a plain file name, so that an index cannot lead elsewhere
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
KEPT_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclasses.dataclass
class StoredTensor:
    """A tensor that is still in a file: what it claims to be, and `read()` to get it, in memory that is its own."""

    file: Path
    name: str  # in the file
    shape: tuple
    dtype: torch.dtype | str  # a str where it is none that we load
    read: Callable

    def refuse(self, why):
        raise ValueError(f"{self.file}: the tensor {self.name!r} {why}")


def load(path, override_args=None, model_class=None):
    """The model at `path`, in eval mode: nanoGPT's ckpt.pt or a directory with one, a directory with config.json and
    weights as transformers and `save` write it, or, where no such path exists, a Hugging Face hub id such as "gpt2".

    override_args: other values for dropout, embd_dropout, attn_dropout, resid_dropout or gradient_checkpointing. The
    rates are the file's otherwise, except that nanoGPT's four names begin with dropout 0, as there. Weights keep the
    file's dtype if it is float32, bfloat16 or float64 throughout, else they become float32. Tensors that the model
    has no use for are named in a warning. Raises FileNotFoundError where there is nothing, and ValueError where the
    files are no such model.
    """
    name, path, override = str(path), Path(path), dict(override_args or {})
    if not path.exists():
        path = download(name)
        if name in NANOGPT_NAMES:
            override.setdefault("dropout", 0.0)
    if path.is_file() and path.suffix in (".safetensors", ".bin", ".json"):
        raise ValueError(f"{path}: give the directory with {CONFIG} and the weights instead")
    if path.is_dir() and not (path / CONFIG).is_file() and (path / NANOGPT).is_file():
        path = path / NANOGPT
    config, stored = _read_nanogpt(path) if path.is_file() else (_read_config(path / CONFIG), _find_weights(path))
    transposed = () if path.is_file() else CONV1D
    return _build(model_class, _override(config, override), _our_names(stored), transposed).eval()


def save(model, directory):
    """Writes config.json and model.safetensors into `directory`, which is made, in Hugging Face's names and layout.

    Both are complete on the disk before the first takes its place, so that a failure leaves the old ones. A model
    without biases gets biases of 0, since transformers' GPT-2 knows no other.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"save_pretrained: {directory} is a file; expected a directory")
    directory.mkdir(parents=True, exist_ok=True)
    config = {**model.config.to_hf(), "dtype": str(model.lm_head.weight.dtype).removeprefix("torch.")}
    with atomic_file(directory / CONFIG) as text, atomic_file(directory / WEIGHTS) as weights:
        text.write((json.dumps(config, indent=2) + "\n").encode())
        _to_disk(text)
        _write_safetensors(weights, dict(_hf_tensors(model)))


def skeleton(config, model_class=None):
    """A model of `config` on the meta device: every name and shape, and no memory."""
    if model_class is None:
        from fastgpt.model import GPT as model_class
    with torch.device("meta"), _NoDraws():
        return model_class(config)


@contextlib.contextmanager
def atomic_file(path):
    """A binary file to write, which takes the place of `path` when the block ends well; otherwise the old one stays."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            _to_disk(file)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:  # a write that fails does not say where
            raise OSError(error.errno, f"{error.strerror}, while writing", str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


class _NoDraws(TorchFunctionMode):
    """Random initialisation does nothing: on the meta device it would import torch's compiler, a second's work."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def download(name):
    """The local copy of the model with this hub id, fetched by huggingface_hub: a directory."""
    here = f"there is no file or directory {name!r}"
    if not HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"{here}, and it is no Hugging Face hub id")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{here}; to fetch it from the Hugging Face hub: pip install huggingface_hub") from None
    try:
        folder = Path(snapshot_download(name, allow_patterns=[CONFIG, "model*.safetensors", INDICES[0]]))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[CONFIG, "pytorch_model*.bin", INDICES[1]]))
    except Exception as error:  # the hub client's many kinds of network and name errors
        raise FileNotFoundError(
            f"{here}, and the Hugging Face hub gave none ({error}). Offline: on a machine with a network, download the "
            f"model's {CONFIG} and {WEIGHTS} into a directory, copy it here and give its path") from error
    return folder


def _override(config, override):
    for key in override:
        if key not in OVERRIDABLE:
            raise ValueError(f"override_args: {key!r} cannot be overridden, only {', '.join(OVERRIDABLE)}")
    if "dropout" in override:
        override = {**dict.fromkeys(DROPOUTS), **override}
    return dataclasses.replace(config, **override)


def _read_config(file):
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} holds neither {CONFIG} nor {NANOGPT}")
    values = _read_json(file)
    try:
        return GPTConfig.from_hf(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error


def _read_json(file):
    try:
        values = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error})") from error
    return _expect_dict(values, f"{file} must hold a JSON object")


def _expect_dict(value, expected):
    if isinstance(value, dict):
        return value
    raise ValueError(f"{expected}, not a {type(value).__name__}")


def _read_nanogpt(file):
    content = _torch_load(file)
    if not isinstance(content, dict) or not {"model", "model_args"} <= content.keys():
        raise ValueError(f"{file} is no checkpoint of nanoGPT: it has no model and model_args")
    try:
        config = GPTConfig(**content["model_args"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: model_args: {error}") from error
    return config, _stored_by_torch(file, content["model"])


def _find_weights(directory):
    """{name: StoredTensor} of the first of WEIGHT_FILES that `directory` has."""
    for name in WEIGHT_FILES:
        if (directory / name).is_file():
            return _read_index(directory / name) if name in INDICES else _read_weights(directory / name)
    raise FileNotFoundError(f"{directory} has no weights: none of {', '.join(WEIGHT_FILES)}")


def _read_index(file):
    weight_map = _expect_dict(_read_json(file).get("weight_map"), f"{file}: weight_map must be an object")
    shards, stored = {}, {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise ValueError(f"{file}: the tensor {name!r} must lie in a file of this directory, not in {shard!r}")
        if shard not in shards:
            if not (file.parent / shard).is_file():
                raise FileNotFoundError(f"{file} names the file {shard!r}, which is missing")
            shards[shard] = _read_weights(file.parent / shard)
        if name not in shards[shard]:
            raise ValueError(f"{file}: the tensor {name!r} is not in {shard!r}")
        stored[name] = shards[shard][name]
    return stored


def _read_weights(file):
    if file.suffix == ".bin":
        return _stored_by_torch(file, _torch_load(file))
    header, data_start = safetensors_header(file)
    return {name: _in_safetensors(file, name, entry, data_start) for name, entry in header.items()}


def _in_safetensors(file, name, entry, data_start):
    shape, dtype = tuple(entry["shape"]), DTYPES.get(entry["dtype"], entry["dtype"])
    begin = data_start + entry["data_offsets"][0]

    def read():
        """Into memory of its own, without a map of the file, whose pages would count twice."""
        tensor = torch.empty(shape, dtype=dtype)
        with open(file, "rb") as data:
            data.seek(begin)
            if data.readinto(tensor.view(-1).view(torch.uint8).numpy()) != tensor.nbytes:
                raise ValueError(f"{file} ends within the tensor {name!r}")
        return tensor

    return StoredTensor(file, name, shape, dtype, read)


def _torch_load(file):
    """What torch.save wrote, tensors and plain values only; memory-mapped where the format allows."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged pickle raises anything
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{file} is not a file of plain tensors as torch.save writes it ({reason})") from error


def _stored_by_torch(file, tensors):
    tensors = _expect_dict(tensors, f"{file} must hold a dict of tensors")
    return {str(name): _stored_tensor(file, name, tensor) for name, tensor in tensors.items()}


def _stored_tensor(file, name, tensor):
    stored = StoredTensor(file, str(name), (), "", None)
    if not torch.is_tensor(tensor):
        stored.refuse(f"is a {type(tensor).__name__}")
    dtype = tensor.dtype if tensor.dtype in DTYPE_NAMES else str(tensor.dtype)
    stored = StoredTensor(file, str(name), tuple(tensor.shape), dtype, tensor.clone)
    if tensor.layout != torch.strided or tensor.is_meta:
        stored.refuse("is not a dense tensor")
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        stored.refuse("claims more elements than the file holds")
    return stored


def _our_names(stored):
    """The same tensors under the names of our state_dict, without the buffers of old versions."""
    renamed = {}
    for name, tensor in stored.items():
        if MASK_BUFFER.search(name):
            continue
        name = our_name(name)
        if name in renamed:
            tensor.refuse(f"is the same as {renamed[name].name!r}")
        renamed[name] = tensor
    return renamed


def _build(model_class, config, stored, transposed):
    """The model of `config` with the parameters `stored`; those whose names end in one of `transposed` are turned."""
    _check_depth(config, stored)
    model = skeleton(config, model_class)
    expected = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    if config.tie_word_embeddings:
        del expected[HEAD]
    _check_names(expected, stored)
    for name, shape in expected.items():
        _check_tensor(stored[name], shape[::-1] if name.endswith(transposed) else shape)
    _check_rest(config, {name: stored[name] for name in stored.keys() - expected.keys()}, stored[EMBEDDING])
    dtypes = {stored[name].dtype for name in expected}
    dtype = dtypes.pop() if len(dtypes) == 1 and dtypes <= set(KEPT_DTYPES) else torch.float32
    state = {name: _materialised(stored[name], dtype, name.endswith(transposed)) for name in expected}
    state.setdefault(HEAD, state[EMBEDDING])
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def _check_depth(config, stored):
    """First of all, since the model of a lying n_layer would take for ever to build."""
    blocks = {int(match[1]) for match in map(BLOCK.match, stored) if match}
    if len(blocks) != config.n_layer or max(blocks) >= config.n_layer:
        raise ValueError(f"{_files(stored)}: the config says n_layer = {config.n_layer}, but the weights are of "
                         f"{len(blocks)} blocks")


def _check_names(expected, stored):
    missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing:
        beside = f"; there are others that the model does not have: {_some(extra)}" if extra else ""
        raise ValueError(f"{_files(stored)}: missing the tensors {_some(missing)}{beside}")


def _check_tensor(tensor, shape):
    if tensor.shape != shape:
        tensor.refuse(f"has shape {tensor.shape}, but the config says {shape}")
    if isinstance(tensor.dtype, str):
        tensor.refuse(f"is {tensor.dtype}; expected one of {', '.join(DTYPES)}")


def _check_rest(config, rest, embedding):
    """Tensors that are no parameter: a head must be the embedding, biases must be 0, the others get a warning."""
    head = rest.pop(HEAD, None)
    if head is not None:
        _check_tensor(head, embedding.shape)
        if not torch.equal(head.read(), embedding.read()):
            head.refuse(f"differs from {embedding.name!r}, but the config says tie_word_embeddings")
    if not config.bias:
        for tensor in [rest.pop(name) for name in sorted(rest) if BIAS.fullmatch(name)]:
            _check_tensor(tensor, tensor.shape)
            if tensor.read().count_nonzero():
                tensor.refuse("is not 0, but the config says that the model has no biases")
    if rest:
        names = sorted(tensor.name for tensor in rest.values())
        warnings.warn(f"{_files(rest)}: ignored the tensors {_some(names)}", stacklevel=5)


def _materialised(tensor, dtype, transposed):
    value = tensor.read()
    return (value.t() if transposed else value).to(dtype).contiguous()


def _files(stored):
    return ", ".join(sorted({str(tensor.file) for tensor in stored.values()})) or "the weights"


def _some(names, limit=8):
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(repr, names[:limit])) + more


def _hf_tensors(model):
    """(name, tensor) of everything that transformers' GPT2LMHeadModel loads."""
    for name, tensor in model.state_dict().items():
        if name == HEAD and model.config.tie_word_embeddings:
            continue
        yield name, tensor.t() if name.endswith(CONV1D) else tensor
        if not model.config.bias and (name.endswith(CONV1D) or ".ln_" in name):
            yield name.replace("weight", "bias"), tensor.new_zeros(tensor.shape[0])


def _write_safetensors(file, tensors):
    """The safetensors format, one tensor at a time: the header's length (8 bytes), the header (JSON), the data."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def _to_disk(file):
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory):
    """Makes the renames in it last through a power cut, where the system lets a directory be opened."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
