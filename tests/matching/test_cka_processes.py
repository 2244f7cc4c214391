"""`cka_loss(all_reduce=...)`: value and gradient are those of all processes' tokens together."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

from layerdistill.core.types import Mean
from layerdistill.matching import cka_loss

VARIANTS: tuple[dict[str, bool], ...] = ({}, {"sqrt": True}, {"debiased": True})
each_variant = pytest.mark.parametrize("options", VARIANTS, ids=["plain", "sqrt", "debiased"])


def batch(rows: int = 26) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(rows, 6, generator=generator, dtype=torch.float64) * 2 + 5
    teacher = torch.randn(rows, 9, generator=generator, dtype=torch.float64) - 4
    teacher[:, :6] += student
    return student, teacher


def whole(student: Tensor, teacher: Tensor, options: dict[str, bool]) -> tuple[Mean, Tensor]:
    student = student.clone().requires_grad_()
    mean = cka_loss(student, teacher, **options)
    mean.value.backward()
    assert student.grad is not None
    return mean, student.grad


class Meeting:
    """Threads that play processes: each hands in a tensor and gets the sum of all; so do the gradients."""

    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=20)
        self.given: list[Tensor | None] = [None] * size

    def sum(self, rank: int, tensor: Tensor) -> Tensor:
        self.given[rank] = tensor.detach().clone()
        self.barrier.wait()
        total = torch.stack([given for given in self.given if given is not None]).sum(0)
        self.barrier.wait()
        return total

    def all_reduce(self, rank: int) -> Callable[[Tensor], Tensor]:
        meeting = self

        class Sum(torch.autograd.Function):
            @staticmethod
            def forward(ctx: object, tensor: Tensor) -> Tensor:
                return meeting.sum(rank, tensor)

            @staticmethod
            def backward(ctx: object, slope: Tensor) -> Tensor:
                return meeting.sum(rank, slope)

        return Sum.apply


def in_threads(shards: list[tuple[Tensor, Tensor]], options: dict[str, bool]) -> list[tuple[Mean, Tensor]]:
    meeting = Meeting(len(shards))
    results: list[tuple[Mean, Tensor] | None] = [None] * len(shards)

    def work(rank: int) -> None:
        student, teacher = shards[rank][0].clone().requires_grad_(), shards[rank][1]
        mean = cka_loss(student, teacher, all_reduce=meeting.all_reduce(rank), **options)
        mean.value.backward()
        assert student.grad is not None
        results[rank] = mean, student.grad

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(shards))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return [result for result in results if result is not None]


@each_variant
@pytest.mark.parametrize("cuts", [(10,), (1, 20), (0, 13)], ids=["two", "three", "one is empty"])
def test_shards_give_the_value_and_gradient_of_the_whole(cuts: tuple[int, ...], options: dict[str, bool]) -> None:
    student, teacher = batch()
    expected, slope = whole(student, teacher, options)
    shards = list(zip(student.tensor_split(cuts), teacher.tensor_split(cuts), strict=True))
    results = in_threads(shards, options)
    assert len(results) == len(shards)
    for mean, _ in results:
        assert mean.count.item() == 1
        assert mean.value.item() == pytest.approx(expected.value.item(), rel=1e-12)
    gathered = torch.cat([local for _, local in results]) / len(shards)
    assert (gathered - slope).abs().max() < 1e-12
    assert slope.abs().max() > 1e-4


@each_variant
def test_no_sum_over_processes_carries_a_graph(options: dict[str, bool]) -> None:
    student, teacher = batch()
    seen: dict[tuple[int, ...], bool] = {}

    def watch(tensor: Tensor) -> Tensor:
        seen[tuple(tensor.shape)] = tensor.requires_grad
        return tensor

    cka_loss(student.requires_grad_(), teacher, all_reduce=watch, **options)
    assert {(9, 6), (6, 6), (9, 9)} <= set(seen)
    assert not any(seen.values())


@each_variant
def test_too_few_tokens_in_all_is_zero_weight_everywhere(options: dict[str, bool]) -> None:
    student, teacher = batch(rows=1)
    results = in_threads([(student, teacher), (student[:0], teacher[:0])], options)
    assert len(results) == 2
    for mean, slope in results:
        assert (mean.total.item(), mean.count.item()) == (0, 0)
        assert torch.equal(slope, torch.zeros_like(slope))


def test_one_token_here_and_many_there_is_defined() -> None:
    student, teacher = batch()
    results = in_threads([(student[:1], teacher[:1]), (student[1:], teacher[1:])], {})
    assert [mean.count.item() for mean, _ in results] == [1, 1]
    assert cka_loss(student[:1], teacher[:1]).count.item() == 0


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    student, teacher = (side.tensor_split((10,))[rank] for side in batch())
    results = {}
    for number, options in enumerate(VARIANTS):
        student = student.detach().clone().requires_grad_()
        mean = cka_loss(student, teacher, all_reduce=all_reduce, **options)
        mean.value.backward()
        assert student.grad is not None
        results[str(number)] = (mean.value.item(), student.grad.tolist())
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def test_two_gloo_processes_give_the_value_and_gradient_of_the_whole(tmp_path: Path) -> None:
    mp.spawn(_process, args=(str(tmp_path),), nprocs=2, join=True)
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    student, teacher = batch()
    for number, options in enumerate(VARIANTS):
        expected, slope = whole(student, teacher, options)
        (first, first_slope), (second, second_slope) = (result[str(number)] for result in results)
        assert first == second == pytest.approx(expected.value.item(), rel=1e-12)
        gathered = torch.tensor(first_slope + second_slope, dtype=torch.float64) / 2
        assert (gathered - slope).abs().max() < 1e-12
