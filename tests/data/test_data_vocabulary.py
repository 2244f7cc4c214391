"""Vocabularies are compared by what each id means, not by size."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from layerdistill.data.vocabulary import VocabularyCheck, compare_vocabularies

WORDS = ["a", "b", "c", "d", "e"]


def tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    model = models.WordLevel(vocab={word: number for number, word in enumerate(words)}, unk_token=words[0])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


def test_identical_vocabularies() -> None:
    check = compare_vocabularies(tokenizer(WORDS), tokenizer(WORDS), 5, 5)
    assert check == VocabularyCheck(True, 5, 5, "identical token-to-id maps (5 tokens)")


def test_padded_logits_are_fine() -> None:
    check = compare_vocabularies(tokenizer(WORDS), tokenizer(WORDS), 8, 5)
    assert check.identical
    assert check.vocab_size == 5
    assert "the teacher's last 3 logits belong to no token" in check.reason


@pytest.mark.parametrize(
    ("student", "shared", "says"),
    [
        (["a", "c", "b", "d", "e"], 3, "'b' is 1 in the teacher, 2 in the student; 'c' is 2 in the teacher, 1"),
        (WORDS[:4], 4, "'e' is 4 in the teacher, missing in the student"),
        ([*WORDS, "<pad>"], 5, "'<pad>' is missing in the teacher, 5 in the student"),
        (["v", "w", "x", "y", "z"], 0, "'a' is 0 in the teacher, missing in the student; 'v' is missing"),
    ],
)
def test_other_vocabularies_of_any_size_are_refused(student: list[str], shared: int, says: str) -> None:
    check = compare_vocabularies(tokenizer(WORDS), tokenizer(student), 8, 8)
    assert not check.identical
    assert check.shared == shared
    assert says in check.reason
    assert check.reason.count(" is ") <= 3


def test_a_model_with_fewer_logits_than_ids_is_refused() -> None:
    check = compare_vocabularies(tokenizer(WORDS), tokenizer(WORDS), 5, 4)
    assert not check.identical
    assert "the student has only 4 logits for 5 token ids" in check.reason
