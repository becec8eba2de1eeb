import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from fastgpt.tokenizer import END_OF_TEXT, Tokenizer

CORPUS = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suffer\n" * 20
HARD = ["", " ", "\n\n \t x", "naïve café — 日本語 🎉👩‍👩‍👧 \x00\x7f\u0300", "\ufffd", "don't  stop",
        "\ufeff", f"a{END_OF_TEXT}b", "\r\n\r"]
GPT2_FILES = Path(__file__).parents[2] / "shared" / "data" / "gpt2"
texts = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def bpe():
    return Tokenizer.train_bpe([CORPUS], 300)


@pytest.fixture(scope="module")
def chars():
    return Tokenizer.characters(CORPUS)


@pytest.fixture(scope="module")
def gpt2_folder(bpe, tmp_path_factory):
    """A tiny BPE in GPT-2's own two files."""
    folder = tmp_path_factory.mktemp("gpt2")
    state = json.loads(bpe.backend.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(state["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in state["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges + "\n", encoding="utf-8")
    return folder


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_bpe_gives_back_any_text(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_survive(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text
    assert Tokenizer.characters("x" + text).decode(Tokenizer.characters("x" + text).encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_decode_is_the_librarys_on_any_ids(bpe, data):
    ids = data.draw(st.lists(st.integers(0, bpe.vocab_size - 1)))
    assert bpe.decode(ids) == bpe.backend.decode(ids, skip_special_tokens=False)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_stream_adds_up_and_emits_only_whole_characters(bpe, data):
    ids = data.draw(st.one_of(texts.map(bpe.encode), st.lists(st.integers(0, bpe.vocab_size - 1))))
    stream = bpe.stream()
    pieces = [stream.push(i) for i in ids] + [stream.flush()]
    assert "".join(pieces) == bpe.decode(ids)


def test_stream_holds_back_the_bytes_of_a_character(bpe):
    stream, ids = bpe.stream(), bpe.encode("🎉")
    assert len(ids) == 4
    assert [stream.push(i) for i in ids] == ["", "", "", "🎉"]
    assert stream.push(ids[0]) == "" and stream.flush() == "\ufffd"


def test_stream_and_decode_skip_special_tokens_when_asked(bpe):
    ids = bpe.encode(f"to be{END_OF_TEXT}or")
    assert bpe.eos_token_id in ids
    assert bpe.decode(ids, skip_special=True) == "to beor"
    stream = bpe.stream(skip_special=True)
    assert "".join(map(stream.push, ids)) + stream.flush() == "to beor"


def test_stream_of_a_tokenizer_whose_tokens_are_not_bytes():
    backend = tokenizers.Tokenizer(models.WordLevel({"▁to": 0, "▁be": 1, "▁or": 2, "<unk>": 3}, unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("to be or")
    assert tokenizer.decode(ids) == "to be or"
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == "to be or"


def test_characters_are_sorted_and_exact(chars):
    assert chars.vocab_size == len(set(CORPUS)) and chars.eos_token_id is None and chars.kind == "character"
    assert chars.encode("".join(sorted(set(CORPUS)))) == list(range(chars.vocab_size))
    assert chars.encode(CORPUS) == chars.backend.encode(CORPUS).ids
    assert chars.decode(chars.encode(CORPUS)) == CORPUS


def test_an_unseen_character_is_named(chars):
    with pytest.raises(ValueError, match=r"'é' \(U\+00E9\) at position 3 is not among the \d+ characters"):
        chars.encode("To é")


@pytest.mark.parametrize("kind", ["bpe", "chars"])
def test_save_and_load_and_transformers_reads_it(kind, request, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    tokenizer = request.getfixturevalue(kind)
    tokenizer.save(tmp_path)
    ids = tokenizer.encode(CORPUS)
    for again in (Tokenizer.from_dir(tmp_path), Tokenizer.from_file(tmp_path / "tokenizer.json"),
                  Tokenizer.from_pretrained(str(tmp_path))):
        assert again.encode(CORPUS) == ids and again.decode(ids) == CORPUS
        for name in ("vocab_size", "eos_token_id", "eos_token", "kind"):
            assert getattr(again, name) == getattr(tokenizer, name)
    for theirs in (PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")),
                   AutoTokenizer.from_pretrained(tmp_path)):
        assert theirs(CORPUS)["input_ids"] == ids and theirs.decode(ids) == CORPUS


def test_gpt2_files_agree_with_transformers(gpt2_folder):
    from transformers import GPT2TokenizerFast
    ours = Tokenizer.from_dir(gpt2_folder)
    theirs = GPT2TokenizerFast.from_pretrained(gpt2_folder)
    for text in [CORPUS, *HARD]:
        assert ours.encode(text) == theirs(text)["input_ids"], repr(text)
    assert ours.eos_token_id == theirs.eos_token_id == ours.encode(END_OF_TEXT)[0]
    assert Tokenizer.from_file(gpt2_folder / "merges.txt").encode(CORPUS) == ours.encode(CORPUS)


@pytest.mark.skipif(not GPT2_FILES.is_dir(), reason=f"GPT-2's own files are not at {GPT2_FILES}")
def test_gpt2_itself():
    gpt2 = Tokenizer.from_dir(GPT2_FILES)
    assert gpt2.vocab_size == 50257 and gpt2.eos_token_id == 50256
    assert gpt2.encode("Hello world, it's 2024!") == [15496, 995, 11, 340, 338, 48609, 0]
    for text in HARD:
        assert gpt2.decode(gpt2.encode(text)) == text


def test_encode_batch_equals_encode(bpe, chars):
    for tokenizer in (bpe, chars):
        batch = ["To be", "", "or not"]
        assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]
        assert tokenizer.encode_batch([]) == []


def test_bpe_sizes():
    assert Tokenizer.train_bpe(CORPUS, 280).vocab_size == 280
    assert Tokenizer.train_bpe("", 1000).vocab_size == 257
    with pytest.raises(ValueError, match="at least 257.*got 256"):
        Tokenizer.train_bpe(CORPUS, 256)


def test_a_files_truncation_and_padding_do_not_change_texts(bpe, tmp_path):
    state = json.loads(bpe.backend.to_str())
    state["truncation"] = {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    again = Tokenizer.from_dir(tmp_path)
    assert again.encode(CORPUS) == bpe.encode(CORPUS)


def test_eos_comes_from_the_config(tmp_path):
    Tokenizer.characters("ab#").save(tmp_path)
    for eos in ("#", {"content": "#", "lstrip": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        assert Tokenizer.from_dir(tmp_path).eos_token_id == 0
    for eos in (5, ["#"], {"content": 5}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
        with pytest.raises(ValueError, match="tokenizer_config.json must name eos_token by its text"):
            Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="tokenizer_config.json is not a valid JSON object"):
        Tokenizer.from_dir(tmp_path)


def test_bad_input_is_named(bpe, tmp_path):
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud800' at position 1"):
        bpe.encode("a\ud800")
    with pytest.raises(TypeError, match="must be a str, got bytes"):
        bpe.encode(b"a")
    for bad in (-1, bpe.vocab_size):
        with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 300 tokens"):
            bpe.decode([0, bad])
        with pytest.raises(ValueError, match=f"token id {bad} is outside"):
            bpe.stream().push(bad)
    with pytest.raises(ValueError, match="the text is empty"):
        Tokenizer.characters("")
    with pytest.raises(FileNotFoundError, match="no file .*nothing.json"):
        Tokenizer.from_file(tmp_path / "nothing.json")
    with pytest.raises(FileNotFoundError, match="has neither tokenizer.json nor vocab.json"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="belong together, but there is no .*merges.txt"):
        Tokenizer.from_dir(tmp_path)
    for broken in ("{", "[]", "\x00", '{"model": 1}'):
        (tmp_path / "tokenizer.json").write_text(broken)
        with pytest.raises(ValueError, match="tokenizer.json is not a valid tokenizer file"):
            Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="tokenizer.json is not a valid tokenizer file"):
        Tokenizer.from_dir(tmp_path)


def test_without_the_hub_client_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match="pip install huggingface_hub"):
        Tokenizer.from_pretrained("no/such")
