"""The shape and the switches of a GPT: nanoGPT's fields with its order and defaults, then GPT-2's others."""
import operator
from dataclasses import asdict, dataclass, fields

# Every accepted name of an activation, and its name in `fastgpt.ops` (which is what a config holds).
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}
HF_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}
# Hugging Face's names for the fields that are called otherwise there.
HF_NAMES = {"block_size": "n_positions", "activation": "activation_function", "embd_dropout": "embd_pdrop",
            "attn_dropout": "attn_pdrop", "resid_dropout": "resid_pdrop"}
# Older or generic spellings that config.json files also use.
HF_ALIASES = {"n_ctx": "n_positions", "max_position_embeddings": "n_positions", "hidden_size": "n_embd",
              "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
# Hugging Face's defaults where they are not ours.
HF_DEFAULTS = {"vocab_size": 50257, "activation": "gelu_new",
               "embd_dropout": 0.1, "attn_dropout": 0.1, "resid_dropout": 0.1}
HF_END_OF_TEXT = 50256  # the bos and eos token that transformers assumes unless told otherwise
DROPOUTS = ("embd_dropout", "attn_dropout", "resid_dropout")
SIZES = ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_inner")
FLAGS = ("bias", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "tie_word_embeddings",
         "gradient_checkpointing")
# No dimension is larger: products of three of them stay far inside an int64, whatever a file claims.
MAX_SIZE = 2 ** 24


@dataclass
class GPTConfig:
    """What a model is. Wrong values raise a TypeError or ValueError that names the field.

    block_size: the longest context in tokens. n_inner: the width of the MLP, 4 * n_embd when None. bias: in the linear
    layers and the norms. activation: "gelu" (exact), "gelu_tanh" ("gelu_new" and its other names in transformers mean
    the same) or "relu". The three separate dropouts are `dropout` when None. scale_attn_weights divides the
    scores by sqrt(head size), scale_attn_by_inverse_layer_idx by 1 + the block's index. gradient_checkpointing
    recomputes each block in the backward instead of keeping its activations.
    """

    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    n_inner: int | None = None
    activation: str = "gelu"
    layer_norm_epsilon: float = 1e-5
    embd_dropout: float | None = None
    attn_dropout: float | None = None
    resid_dropout: float | None = None
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    gradient_checkpointing: bool = False

    def __post_init__(self):
        for name in SIZES:
            if name != "n_inner" or self.n_inner is not None:
                setattr(self, name, check_int(name, getattr(self, name), 1, MAX_SIZE))
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd must be a multiple of n_head, got n_embd={self.n_embd}, n_head={self.n_head}")
        for name in ("dropout", *DROPOUTS):
            if name == "dropout" or getattr(self, name) is not None:
                check_number(name, getattr(self, name), lambda p: 0 <= p < 1, "in [0, 1)")
        check_number("layer_norm_epsilon", self.layer_norm_epsilon, lambda eps: 0 < eps < 1, "in (0, 1)")
        check_number("initializer_range", self.initializer_range, lambda std: 0 <= std < 1e6, "non-negative and finite")
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if not isinstance(self.activation, str) or self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        self.activation = ACTIVATIONS[self.activation]

    def rate(self, name):
        """The dropout of "embd" (the embeddings), "attn" (the attention weights) or "resid" (the branches)."""
        own = getattr(self, f"{name}_dropout")
        return self.dropout if own is None else own

    @property
    def inner_width(self):
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    def attention_scale(self, layer):
        """What the attention scores of a block are multiplied by."""
        scale = (self.n_embd // self.n_head) ** -0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @classmethod
    def from_hf(cls, values):
        """The config of a Hugging Face config.json, given as a dict; keys of no consequence here are ignored."""
        if not isinstance(values, dict):
            raise TypeError(f"a model config must be a dict, got {type(values).__name__}")
        model_type = values.get("model_type", "gpt2")
        if model_type != "gpt2":
            raise ValueError(f"model_type must be 'gpt2', got {model_type!r}")
        if values.get("add_cross_attention"):
            raise ValueError("add_cross_attention must be false: fastgpt's model is a decoder alone")
        values = {HF_ALIASES.get(key, key): value for key, value in values.items()}
        given = {field.name: values[HF_NAMES.get(field.name, field.name)] for field in fields(cls)
                 if HF_NAMES.get(field.name, field.name) in values}
        return cls(**_one_dropout({**HF_DEFAULTS, **given}))

    def to_hf(self):
        """The values of a Hugging Face config.json, and beside them what transformers does not know."""
        values = {HF_NAMES.get(name, name): value for name, value in asdict(self).items()}
        values["activation_function"] = HF_ACTIVATIONS[self.activation]
        values.update({HF_NAMES[name]: self.rate(name.removesuffix("_dropout")) for name in DROPOUTS})
        if self.vocab_size <= HF_END_OF_TEXT:
            values["bos_token_id"] = values["eos_token_id"] = None
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **values}


def _one_dropout(values):
    """The separate dropouts as one `dropout` as far as they are equal, so that overriding that one is enough."""
    rates = [values[name] for name in DROPOUTS]
    dropout = values.get("dropout", rates[0] if rates.count(rates[0]) == len(rates) else 0.0)
    separate = {name: None if rate == dropout else rate for name, rate in zip(DROPOUTS, rates)}
    return {**values, "dropout": dropout, **separate}


def check_int(name, value, low, high=None):
    """value as an int, if it is one and lies in [low, high]; else an error that names it."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, got {value!r}")
    value = operator.index(value)
    if value < low or high is not None and value > high:
        expected = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {expected}, got {value}")
    return value


def check_number(name, value, accepts, expected):
    """Raises an error that names `value` unless it is a number that `accepts` takes: `expected` in words."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not accepts(value):
        raise ValueError(f"{name} must be {expected}, got {value}")
