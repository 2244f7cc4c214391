"""Tokenizers open from model folders and from bare vocabulary files; anything else is explained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_samples import bert_tokenizer, byte_tokenizer
from tokenizers import pre_tokenizers

from layerdistill.core.errors import UserError
from layerdistill.data.tokenizer import open_tokenizer, padding_id


def gpt2_folder(folder: Path) -> Path:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: number for number, symbol in enumerate([*alphabet, "ab", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    return folder


def test_bare_gpt2_files(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(str(gpt2_folder(tmp_path)))
    ids = tokenizer("abc ab")["input_ids"]
    assert ids[0] == 256
    assert tokenizer.decode(ids) == "abc ab"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, padding_id(tokenizer)) == (257, None, 257)


@pytest.mark.parametrize(("words", "found"), [(["film", "the"], "film"), (["Film", "film"], "Film")])
def test_bare_bert_files_are_cased_if_the_vocabulary_is(words: list[str], found: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    tokenizer = open_tokenizer(str(tmp_path))
    assert tokenizer.convert_ids_to_tokens(tokenizer("Film")["input_ids"]) == ["[CLS]", found, "[SEP]"]
    assert padding_id(tokenizer) == 0


def test_a_saved_tokenizer_opens_relative_to_the_recipe(tmp_path: Path) -> None:
    for name, tokenizer in (("bert", bert_tokenizer()), ("bytes", byte_tokenizer(bos=True))):
        tokenizer.save_pretrained(tmp_path / name)
        opened = open_tokenizer(name, base=tmp_path)
        assert opened.get_vocab() == tokenizer.get_vocab()
        assert opened("good film")["input_ids"] == tokenizer("good film")["input_ids"]


def test_a_model_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="holds no tokenizer"):
        open_tokenizer(str(tmp_path))


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(UserError, match=r"holds no tokenizer. Needed: .*There: notes.md"):
        open_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match=r"is a file. Give the folder"):
        open_tokenizer(str(tmp_path / "notes.md"))
    with pytest.raises(UserError, match=r"there is no folder './nowhere'. Tried: "):
        open_tokenizer("./nowhere", base=tmp_path)
    with pytest.raises(UserError, match="no tokenizer can be opened from 'no-such-owner/no-such-model'"):
        open_tokenizer("no-such-owner/no-such-model")
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match="no tokenizer can be opened from"):
        open_tokenizer(str(tmp_path))
