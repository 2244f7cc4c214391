"""What a model costs: parameters, multiply-accumulates, time, memory, size on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from layerdistill.core.errors import UserError
from layerdistill.evaluate.config import EvaluationConfig
from layerdistill.evaluate.inference import forward_inputs, inference, text_config
from layerdistill.evaluate.latency import interleaved_latency
from layerdistill.evaluate.memory import peak_allocation
from layerdistill.models import count_parameters, positions

MEGABYTE = 10**6
"""Bytes in an MB, as disks are sold."""

DEFAULTS = EvaluationConfig()
"""Batches of 1 and 32, with latency."""


def measure_cost(
    model: nn.Module,
    seq: int,
    config: EvaluationConfig = DEFAULTS,
    folder: Path | None = None,
    device: torch.device | str | None = None,
    seconds: float = 2.0,
) -> dict[str, Any]:
    """Return the cost of one model; see `measure_costs`."""
    return measure_costs({"model": model}, seq, config, {"model": folder}, device, seconds)["model"]


def measure_costs(
    models: Mapping[str, nn.Module],
    seq: int,
    config: EvaluationConfig = DEFAULTS,
    folders: Mapping[str, Path | None] | None = None,
    device: torch.device | str | None = None,
    seconds: float = 2.0,
) -> dict[str, dict[str, Any]]:
    """Return, for each model, what a forward over `seq` random tokens costs; ready for JSON.

    Of `config`, `latency` and `latency_batch_sizes` count; for `seq` there is `config.seq_for(max_length)`.

    - `parameters`: `{"total", "embedding", "non_embedding"}`; a tied matrix counts once, as an embedding
    - `macs_per_token`: see `count_macs`
    - `latency_ms`: `{"1": ..., "32": ...}`, medians; the models take turns (see `interleaved_latency`), `seconds` each
    - `peak_memory_mb`: weights, buffers and the worst moment of a forward at the largest batch (see `peak_allocation`)
    - `size_mb`, `size_from`: the safetensors in the model's folder, or what its tensors would take (`"dtype"`)
    - `seq`, `peak_memory_batch`, `device`, `dtype`, `threads`: the conditions

    MB are 10^6 bytes. All models are on the device at once while they are timed, and back in their place afterwards. An
    encoder-decoder gets `seq` source and `seq` target tokens. Raises UserError when a model cannot read `seq` tokens.
    """
    costs: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        places = {name: stack.enter_context(inference(model, device)) for name, model in models.items()}
        for name, model in models.items():
            folder = folders.get(name) if folders else None
            costs[name] = _static_cost(model, seq, max(config.latency_batch_sizes), folder, places[name])
        for batch in config.latency_batch_sizes if config.latency else ():
            forwards = {
                name: _timed_forward(model, random_inputs(model, batch, seq, places[name]), places[name])
                for name, model in models.items()
            }
            for name, milliseconds in interleaved_latency(forwards, seconds).items():
                costs[name].setdefault("latency_ms", {})[str(batch)] = milliseconds
    return costs


def count_macs(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Return the multiply-accumulates of a forward: matrix products and convolutions; half of FlopCounterMode's FLOPs.

    Attention counts as two full matrix products, also where a causal mask makes half of them needless. FlopCounterMode
    (torch 2.13) knows no fused attention of the CPU and would silently count it as 0, so attention is decomposed into
    matrix products while it is counted. Kernels from outside torch (flash-attn) are not seen.
    """
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs)
    return counter.get_total_flops() // 2


def size_on_disk(model: nn.Module, folder: Path | None) -> tuple[int, str]:
    """Return the bytes of the safetensors files in `folder` or, without any, of the model's state; and which it was."""
    files = sorted(folder.glob("*.safetensors")) if folder is not None else []
    if files:
        return sum(file.stat().st_size for file in files), "safetensors"
    storages = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    return sum(storages.values()), "dtype"


def random_inputs(model: nn.Module, batch: int, seq: int, device: torch.device) -> dict[str, Any]:
    """Return inputs `(batch, seq)` without padding, always the same, for `model.forward`.

    Ids are drawn from the vocabulary without the special ones, because some models read a pad or eos id as the end of
    the text; the last id is eos where the config has one, which BART and T5 classifiers need. Raises UserError when
    `seq` exceeds the model's positions.
    """
    config = text_config(model)
    limit = positions(config)
    if limit is not None and 0 < limit < seq:
        raise UserError(
            f"cost is to be measured at {seq} tokens, but the model has {limit} positions. Give "
            f"evaluation.latency_seq a value from 1 to {limit}."
        )
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    special = [given for given in (getattr(config, name, None) for name in names) if isinstance(given, int)]
    ordinary = torch.tensor(sorted(set(range(config.vocab_size)) - set(special)))
    draws = torch.randint(len(ordinary), (batch, seq), generator=torch.Generator().manual_seed(0))
    ids = ordinary[draws]
    eos = getattr(config, "eos_token_id", None)
    if isinstance(eos, int) and 0 <= eos < config.vocab_size:
        ids[:, -1] = eos
    columns: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        columns["decoder_input_ids"] = ids
    return forward_inputs(model, columns, device)


def _static_cost(model: nn.Module, seq: int, batch: int, folder: Path | None, device: torch.device) -> dict[str, Any]:
    single = random_inputs(model, 1, seq, device)
    tokens = sum(ids.numel() for name, ids in single.items() if name in ("input_ids", "decoder_input_ids"))
    # Counting comes first: it also makes the device reserve what it reserves only once.
    macs = count_macs(model, single)
    inputs = random_inputs(model, batch, seq, device)
    state = {id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *_tensors(inputs))}
    peak = sum(state.values()) + peak_allocation(partial(model, **inputs), device)
    size, size_from = size_on_disk(model, folder)
    return {
        "parameters": {key: value for key, value in count_parameters(model).items() if key != "trainable"},
        "macs_per_token": macs / tokens,
        "peak_memory_mb": peak / MEGABYTE,
        "size_mb": size / MEGABYTE,
        "size_from": size_from,
        "seq": seq,
        "peak_memory_batch": batch,
        "device": device.type,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _tensors(inputs: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in inputs.values() if isinstance(value, Tensor)]


def _timed_forward(model: nn.Module, inputs: Mapping[str, Any], device: torch.device) -> Callable[[], None]:
    def forward() -> None:
        model(**inputs)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    return forward
