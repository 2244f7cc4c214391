"""Whether two models speak of the same tokens, so that their logits may be compared."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

EXAMPLES = 3
"""How many differing tokens an explanation shows."""


@dataclass(frozen=True)
class VocabularyCheck:
    """The answer of `compare_vocabularies`.

    `identical`: every token has the same id on both sides and a logit row in both models; only then may terms compare
    logits over the vocabulary. `shared`: how many tokens have the same id in both. `vocab_size`: the number of ids a
    token can have (highest id + 1, the smaller of both sides); logit rows from there on are padding, which gets no
    probability on either side. `reason`: a sentence that explains the answer.
    """

    identical: bool
    shared: int
    vocab_size: int
    reason: str


def compare_vocabularies(
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_rows: int,
    student_rows: int,
) -> VocabularyCheck:
    """Compare the token-to-id maps, not the sizes; `*_rows` is the number of logits each model gives per position.

    Matrices are often padded to a multiple of 64 and thus larger than the tokenizer: with identical ids that is fine.
    """
    teacher, student = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    shared = sum(student.get(token) == number for token, number in teacher.items())
    size = min(max(teacher.values()), max(student.values())) + 1
    if shared < len(teacher) or shared < len(student):
        return VocabularyCheck(False, shared, size, _difference(teacher, student, shared))
    for who, rows in (("teacher", teacher_rows), ("student", student_rows)):
        if rows < size:
            reason = (
                f"the tokenizers are identical, but the {who} has only {rows} logits for {size} token ids. Use the "
                f"tokenizer that belongs to the {who}."
            )
            return VocabularyCheck(False, shared, size, reason)
    padding = [
        f"the {who}'s last {rows - size}"
        for who, rows in (("teacher", teacher_rows), ("student", student_rows))
        if rows > size
    ]
    reason = f"identical token-to-id maps ({len(teacher)} tokens)"
    if padding:
        reason += f"; {' and '.join(padding)} logits belong to no token and get no probability"
    return VocabularyCheck(True, shared, size, reason)


def _difference(teacher: dict[str, int], student: dict[str, int], shared: int) -> str:
    differing = sorted(
        (token for token in teacher.keys() | student.keys() if teacher.get(token) != student.get(token)),
        key=lambda token: (min(teacher.get(token, len(teacher)), student.get(token, len(student))), token),
    )
    shown = "; ".join(
        f"{token!r} is {teacher.get(token, 'missing')} in the teacher, {student.get(token, 'missing')} in the student"
        for token in differing[:EXAMPLES]
    )
    return (
        f"the tokenizers differ: {shared} tokens have the same id ({len(teacher)} in the teacher, {len(student)} in "
        f"the student); {shown}"
    )
