"""Seeds for purposes: the same for the same purpose, independent of each other, and without traces."""

from __future__ import annotations

import hashlib

import pytest
import torch

from layerdistill.core.seeds import derive_seed, random_for, seeded


def test_a_seed_is_the_first_31_bits_of_a_hash() -> None:
    digest = hashlib.sha256(b"7:projection:1").hexdigest()
    assert derive_seed(7, "projection", 1) == int(digest[:8], 16) // 2


def test_seeds_fit_every_generator_and_differ() -> None:
    seeds = {derive_seed(seed, purpose, number) for seed in range(20) for purpose in "ab" for number in range(20)}
    assert len(seeds) == 800
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_generator_of_its_own() -> None:
    draws = [random_for(3, "layer_map", 0).random() for _ in range(2)]
    assert draws[0] == draws[1]
    assert random_for(3, "layer_map", 1).random() != draws[0]
    assert random_for(4, "layer_map", 0).random() != draws[0]


def test_a_seeded_block_leaves_the_global_generator_as_it_was() -> None:
    torch.manual_seed(1)
    undisturbed = torch.rand(3)
    torch.manual_seed(1)
    with seeded(5, "head"):
        first = torch.rand(3)
    assert torch.equal(torch.rand(3), undisturbed)
    with seeded(5, "head"):
        assert torch.equal(torch.rand(3), first)
    with seeded(5, "other"):
        assert not torch.equal(torch.rand(3), first)


def test_the_generator_is_put_back_after_an_exception() -> None:
    state = torch.random.get_rng_state()
    with pytest.raises(KeyError), seeded(5):
        raise KeyError(torch.rand(1))
    assert torch.equal(torch.random.get_rng_state(), state)
