"""Opening a tokenizer: a model folder, a hub id, or a folder that holds only vocabulary files."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

from layerdistill.core.errors import UserError
from layerdistill.data.paths import is_hub_id, listed_places, locate

CONFIGURED = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model")
"""A folder with any of these says itself what its tokenizer is."""

VOCABULARIES = ("vocab*", "merges.txt", "*.model", "*.bpe", "*.tiktoken", "tekken.json")
"""With any of these the model's config.json says it; without them transformers quietly makes an empty one."""


def open_tokenizer(source: str, base: Path | None = None) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model folder, of a hub id, or of a folder with bare vocabulary files.

    Bare files: `vocab.json` + `merges.txt` is GPT-2's byte-level BPE; `vocab.txt` is BERT's WordPiece, cased if any of
    its words has a capital letter. A relative path is looked for below `base`, then in the current folder. Code from
    the hub is never run. Raises UserError when there is no tokenizer there or its files are broken.
    """
    place = locate(source, base)
    if place is None and not is_hub_id(source):
        raise UserError(f"tokenizer: there is no folder {source!r}. Tried: {listed_places(source, base)}.")
    if place is not None and not place.is_dir():
        raise UserError(f"tokenizer: {place} is a file. Give the folder that it lies in.")
    try:
        if place is None:
            return AutoTokenizer.from_pretrained(source)
        return _from_folder(place)
    except UserError:
        raise
    except Exception as error:  # the Rust tokenizers raise plain Exception for a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"no tokenizer can be opened from {source!r} ({listed_places(source, base) if place is None else place}): "
            f"{reason}. Give a folder with a tokenizer, or a hub id that can be reached."
        ) from error


def _from_folder(folder: Path) -> PreTrainedTokenizerBase:
    described = (folder / "config.json").exists() and any(any(folder.glob(pattern)) for pattern in VOCABULARIES)
    if described or any((folder / name).exists() for name in CONFIGURED):
        return AutoTokenizer.from_pretrained(str(folder))
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        return GPT2Tokenizer.from_pretrained(str(folder))
    if (folder / "vocab.txt").exists():
        return BertTokenizer.from_pretrained(str(folder), do_lower_case=not _has_capitals(folder / "vocab.txt"))
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"
    raise UserError(
        f"tokenizer: {folder} holds no tokenizer. Needed: {', '.join(CONFIGURED[:2])}, or vocab.json with merges.txt, "
        f"or vocab.txt. There: {there}."
    )


def _has_capitals(vocabulary: Path) -> bool:
    words = vocabulary.read_text(encoding="utf-8").splitlines()
    return any(word != word.lower() for word in words if not word.startswith("["))


def padding_id(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> int:
    """Return the id that fills up a batch: the pad token's, else the end-of-text token's (GPT-2), else 0.

    An id for which a model of `rows` embeddings has none (a pad token that was added to the tokenizer alone) is passed
    over. Which id it is does not matter to a model that is given the attention mask, but a decoder that classifies
    reads the last token that is not `config.pad_token_id`: see `core.padding`.
    """
    known = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in known if token is not None and (rows is None or token < rows)), 0)
