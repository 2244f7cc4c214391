"""The order of examples: a function of seed and epoch, with nothing lost."""

from __future__ import annotations

from layerdistill.train.sampler import MEGABATCHES, EpochSampler


def test_order_depends_on_seed_and_epoch_only() -> None:
    sampler = EpochSampler(100, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(100))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(EpochSampler(100, seed=4)) != first
    again = EpochSampler(100, seed=3)
    again.set_epoch(1)
    assert list(again) == list(sampler)


def test_grouping_keeps_every_example_and_brings_lengths_together() -> None:
    size, batch_size = 1003, 4
    lengths = [(index * 37) % 101 for index in range(size)]
    order = list(EpochSampler(size, seed=1, lengths=lengths, batch_size=batch_size))
    assert sorted(order) == list(range(size))
    spread = [
        max(lengths[index] for index in order[at : at + batch_size])
        - min(lengths[index] for index in order[at : at + batch_size])
        for at in range(0, size - batch_size, batch_size)
    ]
    random_order = list(EpochSampler(size, seed=1))
    random_spread = [
        max(lengths[index] for index in random_order[at : at + batch_size])
        - min(lengths[index] for index in random_order[at : at + batch_size])
        for at in range(0, size - batch_size, batch_size)
    ]
    assert sum(spread) < 0.1 * sum(random_spread)
    means = [lengths[order[at]] for at in range(0, MEGABATCHES * batch_size, batch_size)]
    assert means != sorted(means, reverse=True), "batches of one piece are shuffled, so lengths do not fall"
