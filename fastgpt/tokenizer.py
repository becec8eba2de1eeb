"""Text to token ids and back, over the `tokenizers` library: byte-level BPE (GPT-2's kind) and single characters.

A tokenizer is one tokenizer.json, which `transformers.PreTrainedTokenizerFast` reads as well. Byte-level BPE gives
back every text exactly, unseen characters included; a character tokenizer knows its corpus and names what it lacks.
"""
import codecs
import functools
import json
import os
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"
MAX_BPE_SIZE = 10 ** 7  # the library makes room for all of them first, and ends the process where there is none


class Tokenizer:
    """encode: str -> list of int; decode: the way back. Made by `from_file`, `from_dir`, `from_pretrained`,
    `train_bpe` or `characters`; `stream()` decodes token by token."""

    def __init__(self, backend, eos_token=END_OF_TEXT):
        """backend: a `tokenizers.Tokenizer`; eos_token: the token that ends a text, where the vocabulary has it."""
        backend.no_truncation()  # settings for fixed-size batches, which would silently change what a text becomes
        backend.no_padding()
        self.backend = backend
        self.eos_token_id = None if eos_token is None else backend.token_to_id(eos_token)
        self.eos_token = None if self.eos_token_id is None else eos_token

    @classmethod
    def from_file(cls, path):
        """Reads a tokenizer.json, or GPT-2's pair from either of its files, vocab.json and merges.txt side by side."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer: no file {path}")
        try:
            backend = _read_gpt2(path.parent) if path.name in ("vocab.json", "merges.txt") else _read_json(path)
        except FileNotFoundError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"tokenizer: {path} is not a valid tokenizer file ({error})") from error
        return cls(backend, _named_eos(path.parent))

    @classmethod
    def from_dir(cls, path):
        """Reads a folder's tokenizer.json or, without one, its vocab.json and merges.txt."""
        path = Path(path)
        for name in ("tokenizer.json", "vocab.json"):
            if (path / name).is_file():
                return cls.from_file(path / name)
        raise FileNotFoundError(f"tokenizer: {path} has neither tokenizer.json nor vocab.json and merges.txt")

    @classmethod
    def from_pretrained(cls, name):
        """Reads a file, a folder, or the tokenizer of a Hugging Face hub id such as "gpt2" (needs huggingface_hub)."""
        if os.path.isfile(name):
            return cls.from_file(name)
        return cls.from_dir(name if os.path.isdir(name) else _download(str(name)))

    @classmethod
    def train_bpe(cls, texts, vocab_size):
        """Byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909) learned from the strings in `texts`.

        vocab_size counts all tokens, the 256 bytes and <|endoftext|> included, so at least 257; a text too small to
        give so many merges gives fewer tokens.
        """
        if vocab_size > MAX_BPE_SIZE:
            raise ValueError(f"train_bpe: vocab_size must be at most {MAX_BPE_SIZE}, got {vocab_size}")
        if vocab_size < 257:
            raise ValueError(f"train_bpe: vocab_size must be at least 257 (bytes and {END_OF_TEXT}), got {vocab_size}")
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, show_progress=False, special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
        backend.train_from_iterator([texts] if isinstance(texts, str) else texts, trainer)
        return cls(backend)

    @classmethod
    def characters(cls, text):
        """One token for each distinct character of `text`, in the order of their code points."""
        alphabet = sorted(set(text))
        if not alphabet:
            raise ValueError("characters: the text is empty, so there is nothing to make a vocabulary from")
        _check_text(text)
        backend = tokenizers.Tokenizer(models.WordLevel({c: i for i, c in enumerate(alphabet)}, unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
        return cls(backend)

    def save(self, path):
        """Writes the file `path` (its name ends in .json), or tokenizer.json and its config into the folder `path`."""
        path = Path(path)
        if path.suffix == ".json":
            path.write_text(self.backend.to_str(), encoding="utf-8")
            return
        path.mkdir(parents=True, exist_ok=True)
        self.save(path / "tokenizer.json")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.eos_token is not None:
            config["eos_token"] = self.eos_token
        (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @functools.cached_property
    def vocab_size(self):
        """One more than the largest id: the least vocab_size of a model for this tokenizer."""
        return 1 + max(self.backend.get_vocab().values(), default=-1)

    @property
    def kind(self):
        """In words: "character", "byte-level BPE", or the library's name of another model."""
        if self._ids_of_characters is not None:
            return "character"
        name = type(self.backend.model).__name__
        return f"byte-level {name}" if isinstance(self.backend.decoder, decoders.ByteLevel) else name

    def encode(self, text):
        """The ids of `text`. Special tokens written in it, such as <|endoftext|>, become their ids."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        """The ids of every text, in parallel where that pays."""
        for text in texts:
            _check_text(text)
        if self._ids_of_characters is not None:
            return [self._encode_characters(text) for text in texts]
        return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids, skip_special=False):
        """The text of `ids` (any sequence of int). Bytes that are no UTF-8 become U+FFFD.

        skip_special leaves out special tokens such as <|endoftext|>.
        """
        ids = self._checked(ids)
        if skip_special:
            ids = [i for i in ids if i not in self._special_ids]
        if self._bytes is None:
            return self.backend.decode(ids, skip_special_tokens=False)
        return b"".join([self._bytes[i] for i in ids]).decode("utf-8", errors="replace")

    def stream(self, skip_special=False):
        """A decoder for one text that comes token by token: see `StreamDecoder`."""
        return StreamDecoder(self, skip_special)

    def _encode_characters(self, text):
        try:
            return [self._ids_of_characters[c] for c in text]
        except KeyError as error:
            character = error.args[0]
            raise ValueError(
                f"the character {character!r} (U+{ord(character):04X}) at position {text.index(character)} is not "
                f"among the {self.vocab_size} characters that this tokenizer knows") from None

    def _checked(self, ids):
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"decode: token id {i} is outside the vocabulary of {self.vocab_size} tokens")
        return ids

    @functools.cached_property
    def _special_ids(self):
        return {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    @functools.cached_property
    def _ids_of_characters(self):
        """{character: id} when every token is one character and nothing else has a say, else None."""
        parts = (self.backend.model, self.backend.decoder, self.backend.pre_tokenizer)
        kinds = (models.WordLevel, decoders.Fuse, pre_tokenizers.Split)
        if not all(isinstance(*pair) for pair in zip(parts, kinds, strict=True)) or self.backend.normalizer is not None:
            return None
        vocab = self.backend.get_vocab()
        return vocab if all(len(token) == 1 for token in vocab) else None

    @functools.cached_property
    def _bytes(self):
        """The bytes of every id, or None where tokens are more than the bytes they stand for."""
        if self._ids_of_characters is not None:
            return {i: c.encode("utf-8") for c, i in self._ids_of_characters.items()}
        if not isinstance(self.backend.decoder, decoders.ByteLevel):
            return None
        table = {i: _token_bytes(token) for token, i in self.backend.get_vocab().items()}
        return {i: table.get(i, b"") for i in range(self.vocab_size)}  # ids that no token has are empty


class StreamDecoder:
    """Turns tokens into text as they come: what `push` and then `flush` return, joined, equals `decode` of all ids.

    Only whole characters are emitted; bytes that may still become one are held back.
    """

    def __init__(self, tokenizer, skip_special=False):
        self._tokenizer = tokenizer
        self._skip = tokenizer._special_ids if skip_special else ()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._library = decoders.DecodeStream(skip_special_tokens=False)  # for tokens that are not plain bytes
        self._ids, self._emitted = [], 0

    def push(self, token_id):
        """The text that has become certain with this token; often "" within a character."""
        (token_id,) = self._tokenizer._checked([token_id])
        if token_id in self._skip:
            return ""
        if self._tokenizer._bytes is not None:
            return self._utf8.decode(self._tokenizer._bytes[token_id])
        self._ids.append(token_id)
        text = self._library.step(self._tokenizer.backend, token_id) or ""
        self._emitted += len(text)
        return text

    def flush(self):
        """The rest: U+FFFD for a character that never became whole, mostly ""."""
        if self._tokenizer._bytes is not None:
            return self._utf8.decode(b"", final=True)
        return self._tokenizer.decode(self._ids)[self._emitted:]


def _byte_level(model):
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _read_json(path):
    return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))


def _read_gpt2(folder):
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    for path in (vocab, merges):
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer: vocab.json and merges.txt belong together, but there is no {path}")
    backend = _byte_level(models.BPE.from_file(str(vocab), str(merges)))
    if backend.token_to_id(END_OF_TEXT) is not None:
        backend.add_special_tokens([END_OF_TEXT])
    return backend


def _named_eos(folder):
    """The end-of-text token that tokenizer_config.json names, else GPT-2's."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return END_OF_TEXT
    try:
        eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"tokenizer: {path} is not a valid JSON object ({error})") from error
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(eos, str | None):
        raise ValueError(  # noqa: TRY004 the file is wrong, no argument
            f"tokenizer: {path} must name eos_token by its text, got {eos!r}")
    return eos or END_OF_TEXT


def _download(name):
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"tokenizer: no file or folder {name!r}; to fetch it from the hub: pip install huggingface_hub") from None
    try:
        return snapshot_download(name, allow_patterns=["tokenizer*.json", "vocab.json", "merges.txt"])
    except Exception as error:  # the hub client's many kinds of network and name errors
        raise FileNotFoundError(f"tokenizer: no file or folder {name!r}, and the hub gave none ({error})") from error


def _check_text(text):
    """Raises unless `text` is a str with a UTF-8 form."""
    if not isinstance(text, str):
        raise TypeError(f"encode: text must be a str, got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"encode: the text has a lone surrogate {text[error.start]!r} at position {error.start}, "
                         "which has no UTF-8 form") from None


def _token_bytes(token):
    """A byte-level token's bytes; a token with characters outside GPT-2's byte alphabet stands for its own UTF-8."""
    try:
        return bytes([_BYTE_OF_CHARACTER[c] for c in token])
    except KeyError:
        return token.encode("utf-8")


def _byte_alphabet():
    """GPT-2's byte alphabet: printable Latin-1 bytes are themselves, the others in order are characters from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_alphabet()
