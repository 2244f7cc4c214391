"""Packing loses, repeats and reorders no token."""

from __future__ import annotations

import numpy as np
import pytest
from data_samples import byte_tokenizer
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from layerdistill.core.types import IGNORED_LABEL
from layerdistill.data import pack
from layerdistill.data.pack import blocks, encode_documents, encode_stream, windows


def encoded(texts: list[str], tokenizer: PreTrainedTokenizerBase, separator: str) -> NDArray[np.int32]:
    return np.concatenate(list(encode_stream(iter(texts), tokenizer, separator)))


@pytest.mark.parametrize("length", [2, 3, 7, 40])
def test_blocks_keep_every_token_in_order(length: int) -> None:
    stream = np.arange(100, dtype=np.int32)
    cut = list(blocks([stream], length))
    in_parts = list(blocks(np.split(stream, [0, 1, 1, 5, 60, 61, 99]), length))
    assert [block.tolist() for block in in_parts] == [block.tolist() for block in cut]
    assert all(len(block) == length for block in cut)
    assert np.concatenate(cut).tolist() == list(range(100 // length * length))


@pytest.mark.parametrize("total", [2, 5, 16, 17, 30, 31])
@pytest.mark.parametrize(("length", "stride"), [(8, 1), (8, 3), (8, 7), (2, 1), (5, 4), (40, 3)])
def test_overlapping_windows_score_every_token_but_the_first_once(total: int, length: int, stride: int) -> None:
    stream = np.arange(1000, 1000 + total, dtype=np.int32)
    predicted: list[int] = []
    for number, (ids, labels) in enumerate(windows(stream, length, stride)):
        start = number * stride
        assert ids.tolist() == list(range(1000 + start, 1000 + min(start + length, total)))
        # A causal model predicts position t from the positions before it, so a label at position 0 is never used.
        shifted = labels[1:].tolist()
        assert all(label in (IGNORED_LABEL, token) for label, token in zip(shifted, ids[1:].tolist(), strict=True))
        predicted += [label for label in shifted if label != IGNORED_LABEL]
    assert predicted == list(range(1001, 1000 + total))


@pytest.mark.parametrize(
    ("total", "lengths"), [(16, [8, 8]), (17, [8, 8]), (18, [8, 8, 2]), (5, [5]), (1, []), (0, [])]
)
def test_windows_without_overlap_keep_the_last_part(total: int, lengths: list[int]) -> None:
    stream = np.arange(total, dtype=np.int32)
    found = windows(stream, 8)
    assert [len(ids) for ids, _ in found] == lengths
    assert [ids.tolist() for ids, _ in found] == [labels.tolist() for _, labels in found]
    assert found == [] or np.concatenate([ids for ids, _ in found]).tolist() == list(range(sum(lengths)))


def test_a_window_does_not_change_the_stream() -> None:
    stream = np.arange(20, dtype=np.int32)
    windows(stream, 8, 2)
    assert stream.tolist() == list(range(20))


def test_documents_begin_and_end_as_the_tokenizer_says() -> None:
    texts = ["ab", "", "c"]
    plain, begun = byte_tokenizer(), byte_tokenizer(bos=True)
    assert plain.decode(encoded(texts, plain, "eos")) == "ab<end>c<end>"
    assert plain.decode(encoded(texts, plain, "none")) == "abc"
    assert begun.decode(encoded(texts, begun, "eos")) == "<begin>ab<end><begin>c<end>"
    assert begun.decode(encoded(texts, begun, "none")) == "<begin>abc"
    assert [len(ids) for ids in encode_documents(texts, begun, end=True)] == [4, 0, 3]


@pytest.mark.parametrize(("piece", "batch"), [(1, 1), (5, 30), (100, 7), (10_000, 1_000_000)])
def test_long_texts_in_pieces_give_the_same_tokens(piece: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(bos=True)
    texts = ["one\ntwo\n\nthree\n", "", "no line end at all", "\n\n", "last\n"]
    expected = "".join(f"<begin>{text}<end>" for text in texts if text)
    monkeypatch.setattr(pack, "PIECE", piece)
    monkeypatch.setattr(pack, "BATCH_CHARACTERS", batch)
    assert tokenizer.decode(encoded(texts, tokenizer, "eos")) == expected
