"""Fingerprints: equal for equal content, different for any change of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from layerdistill.core.fingerprint import LENGTH, fingerprint_files, fingerprint_json, fingerprint_model


def test_the_order_of_keys_does_not_count_and_that_of_lists_does() -> None:
    assert fingerprint_json({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint_json({"b": {"d": 3, "c": 2}, "a": 1})
    assert fingerprint_json([1, 2]) != fingerprint_json([2, 1])
    assert fingerprint_json({"a": None}) != fingerprint_json({})
    assert len(fingerprint_json({})) == LENGTH


def test_a_known_value_is_the_same_on_every_machine() -> None:
    # SHA-256 of `{"a": 1}`, from `printf '{"a": 1}' | sha256sum`.
    assert fingerprint_json({"a": 1}) == "f9d86028c6e0d64e"


def test_files_count_by_content_and_order(tmp_path: Path) -> None:
    for name, content in (("a", b"1" * 3_000_000), ("b", b"2"), ("same", b"1" * 3_000_000)):
        (tmp_path / name).write_bytes(content)
    a, b, same = (tmp_path / name for name in ("a", "b", "same"))
    assert fingerprint_files([a, b]) == fingerprint_files([same, b])
    assert fingerprint_files([a, b]) != fingerprint_files([b, a])
    (tmp_path / "same").write_bytes(b"1" * 2_999_999 + b"3")
    assert fingerprint_files([a]) != fingerprint_files([same])


class Small(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(6.0).view(2, 3).to(dtype))
        self.register_buffer("seen", torch.tensor(3))
        self.register_buffer("flags", torch.tensor([True, False]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_bit_of_a_model_counts(dtype: torch.dtype) -> None:
    model = Small(dtype)
    before = fingerprint_model(model)
    assert fingerprint_model(Small(dtype)) == before
    with torch.no_grad():
        model.weight.view(torch.uint8)[1, 0] ^= 1
    assert fingerprint_model(model) != before


def test_shape_type_and_buffers_count() -> None:
    model, before = Small(), fingerprint_model(Small())
    model.weight = nn.Parameter(torch.arange(6.0).view(3, 2))
    assert fingerprint_model(model) != before
    assert fingerprint_model(Small(torch.bfloat16)) != before
    model = Small()
    model.seen += 1
    assert fingerprint_model(model) != before


def test_how_a_tensor_lies_in_memory_does_not_count() -> None:
    model = Small()
    before = fingerprint_model(model)
    model.weight = nn.Parameter(model.weight.detach().t().contiguous().t())
    assert not model.weight.is_contiguous()
    assert fingerprint_model(model) == before
