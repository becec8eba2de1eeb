import numpy as np
import pytest
import torch

from fastgpt import Tokenizer, corpus
from fastgpt.corpus import encode_texts, read_texts
from fastgpt.train.data import Windows, split_texts

TEXT = "".join(f"{n} men went to mow, went to mow a meadow. " for n in range(60))
CHARS = Tokenizer.characters(TEXT)


def test_texts_come_from_files_and_folders_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in {"b/2.txt": b"two\r\n", "b/1.md": b"one", "a.txt": b"zero", ".git/x": b"hidden", "empty": b"",
                          "b/.secret": b"hidden", "picture.png": b"\x89PNG\xff"}.items():
        (tmp_path / name).write_bytes(content)
    assert read_texts([tmp_path]) == (["zero", "one", "two\r\n"], [tmp_path / "picture.png"])
    assert read_texts([tmp_path / "b/2.txt", tmp_path / "a.txt"]) == (["two\r\n", "zero"], [])


def test_unreadable_text_is_named(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"ab\xff")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ValueError, match=r"x.bin is not UTF-8 text \(byte 2"):
        read_texts([tmp_path / "x.bin"])
    with pytest.raises(FileNotFoundError, match="cannot read .*nothing"):
        read_texts([tmp_path / "nothing"])
    with pytest.raises(ValueError, match="no text in .*empty"):
        read_texts([tmp_path / "empty"])


@pytest.mark.parametrize("fraction", [0, 0.1, 0.5, 0.999])
def test_split_keeps_every_character_and_the_end_for_validation(fraction):
    texts = ["abc", "d", "efghijkl"]
    train, val = split_texts(texts, fraction)
    assert "".join(train + val) == "abcdefghijkl"
    assert len("".join(train)) == int(12 * (1 - fraction)) and "" not in train + val


@pytest.mark.parametrize("make", [Tokenizer.characters, lambda text: Tokenizer.train_bpe(text, 300)])
def test_a_text_encoded_in_pieces_is_the_text_encoded_whole(make, monkeypatch):
    text, unbroken = TEXT + "\n\n  \t\n a  b\n" * 9, "nospace" * 50
    tokenizer = make(text + unbroken)
    whole = tokenizer.encode(text)
    monkeypatch.setattr(corpus, "PIECE", 37)
    ids = encode_texts([text], tokenizer)
    assert ids.dtype == np.uint16 and ids.tolist() == whole
    assert tokenizer.decode(encode_texts([text + unbroken], tokenizer)) == text + unbroken


def test_end_of_text_stands_between_texts():
    bpe = Tokenizer.train_bpe(TEXT, 300)
    a, b, end = bpe.encode("mow a"), bpe.encode("meadow"), [bpe.eos_token_id]
    assert encode_texts(["mow a", "meadow"], bpe).tolist() == a + end + b
    assert encode_texts(["mow", "a"], CHARS).tolist() == CHARS.encode("mowa")
    assert encode_texts([], CHARS).tolist() == []


@pytest.mark.parametrize("length,context", [(17, 16), (33, 16), (100, 7), (101, 1), (48, 16)])
def test_an_epoch_has_every_window_once(length, context):
    windows = Windows(np.arange(length, dtype=np.uint16), context, seed=1)
    offsets = set()
    for epoch in range(20):
        x, y = windows.batch(epoch * windows.per_epoch, windows.per_epoch)
        assert torch.equal(y, x + 1) and x.dtype == torch.int64  # the tokens count up
        starts = x[:, 0].sort().values
        assert torch.equal(starts.diff(), torch.full((windows.per_epoch - 1,), context))
        offsets.add(int(starts[0]))
    assert windows.per_epoch >= max(1, length // context - 1)
    assert len(offsets) > 1 or length in (17, 101)


def test_windows_are_a_function_of_seed_and_place():
    tokens = np.arange(1000, dtype=np.uint16)
    whole = Windows(tokens, 8, seed=1).batch(0, 400)[0]
    again = Windows(tokens, 8, seed=1)
    assert torch.equal(again.batch(300, 50)[0], whole[300:350])
    assert torch.equal(again.batch(100, 50)[0], whole[100:150])
    assert not torch.equal(Windows(tokens, 8, seed=2).batch(0, 400)[0], whole)
    assert not torch.equal(whole[:100].sort(0).values, whole[:100])
