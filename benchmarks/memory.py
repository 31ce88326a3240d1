"""How close the memory count is to live storages of real steps, and how long it takes.

    python -m benchmarks.memory

For configurations of seven methods on MiniLM, in single precision and bfloat16: bytes counted before training
against bytes counted over two real optimizer steps on the CPU, on CUDA also against the allocator's peak, and
the time of a count.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from assets.prepare import prepare
from autopeft import Backbone, Configuration, attach
from autopeft.core.precision import Precision, autocast
from autopeft.evaluation.memory.counter import MemoryCounter
from autopeft.evaluation.memory.storage_tracker import StorageCounter
from autopeft.tasks import Batch, Task, TextClassification
from autopeft.training.accumulation import loss_in_parts
from benchmarks.machine import this_machine

RESULTS = Path(__file__).parent / "results"
LORA = {"method": "lora", "size": 8}
LINEAR = ("query", "key", "value", "attention_output", "ffn_up", "ffn_down")
CASES: tuple[tuple[tuple[int, int], Precision], ...] = (
    ((32, 20), "32-true"),
    ((16, 128), "32-true"),
    ((16, 128), "bf16-mixed"),
)


def configurations() -> Iterator[tuple[str, Configuration]]:
    """Yield named configurations: placements of LoRA, each other method, all together."""
    sites: dict[str, dict[str, object]] = {
        "head alone": {},
        "lora, all blocks": {f"0-5.{role}": LORA for role in LINEAR},
        "lora, blocks 0-2": {f"0-2.{role}": LORA for role in LINEAR},
        "lora, blocks 3-5": {f"3-5.{role}": LORA for role in LINEAR},
        "lora, block 5": {f"5.{role}": LORA for role in LINEAR},
        "ia3": {"0-5.key": {"method": "ia3"}, "0-5.ffn_down": {"method": "ia3"}},
        "layernorm": {"0-5.ffn_norm": {"method": "layernorm"}},
        "bitfit": {"0-5.ffn_up": {"method": "bitfit"}},
        "series": {"0-5.ffn": {"method": "series", "size": 32}},
        "parallel": {"0-5.ffn": {"method": "parallel", "size": 32}},
        "prefix": {"0-5.attention": {"method": "prefix", "size": 16}},
        "mixed": {
            "0-5.query": LORA,
            "2-5.ffn": {"method": "parallel", "size": 16},
            "4-5.attention": {"method": "prefix", "size": 8},
            "3-5.ffn_norm": {"method": "layernorm"},
        },
    }
    for name, placed in sites.items():
        yield name, Configuration.from_dict({"sites": placed})


def batch_of(shape: tuple[int, int]) -> dict[str, Tensor]:
    """Return a padded batch of a shape."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 1000, shape, generator=generator)
    mask = torch.ones_like(tokens)
    mask[1:, shape[1] // 2 :] = 0
    labels = torch.zeros(shape[0], dtype=torch.long)
    return {
        "input_ids": tokens,
        "attention_mask": mask,
        "token_type_ids": torch.zeros_like(tokens),
        "labels": labels,
    }


def as_parts(batch: Mapping[str, Tensor], count: int) -> list[Batch]:
    """Return a batch and copies of it, as the parts of a larger one."""
    copies = ({name: tensor.clone() for name, tensor in batch.items()} for _ in range(count - 1))
    return [dict(batch), *copies]


def take_steps(
    model: nn.Module, parts: Sequence[Batch], task: Task, precision: Precision, steps: int
) -> None:
    """Train the model's trainable parameters for some steps, each on a batch in equal parts."""
    optimizer = torch.optim.AdamW(each for each in model.parameters() if each.requires_grad)

    def loss_of(part: Batch) -> Tensor:
        return task.loss(task.forward(model, part), part)

    for _ in range(steps):
        with autocast(precision, next(model.parameters()).device.type):
            if len(parts) == 1:
                loss = loss_of(parts[0])
                optimizer.zero_grad()
            else:  # all parts but the last add their gradients in here
                optimizer.zero_grad()
                loss = loss_in_parts([(1 / len(parts), part) for part in parts], loss_of)
        loss.backward()
        del loss
        optimizer.step()


def measure_cuda(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    task: Task,
    precision: Precision,
    *,
    accumulate: int = 1,
) -> int:
    """Return the CUDA allocator's peak over two steps, each on so many copies of a batch as its parts."""
    device, before = torch.device("cuda"), next(model.parameters()).device
    nn.Module.to(model, device)
    parts = as_parts({name: tensor.to(device) for name, tensor in batch.items()}, accumulate)
    torch.cuda.reset_peak_memory_stats()
    take_steps(model, parts, task, precision, steps=2)
    peak = torch.cuda.max_memory_allocated()
    nn.Module.to(model, before)
    return peak


def measure_live_storage(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    task: Task,
    *,
    steps: int = 2,
    precision: Precision = "32-true",
    accumulate: int = 1,
) -> int:
    """Return the peak live bytes of real optimizer steps on the CPU: what `MemoryCounter` predicts.

    Trains the model's trainable parameters for `steps` steps, each on so many copies of a batch as its parts.
    """
    counter = StorageCounter()
    parts = as_parts(batch, accumulate)
    inputs = (tensor for part in parts for tensor in part.values())
    base = counter.exclude((*inputs, *model.parameters(), *model.buffers()))
    with counter:
        take_steps(model, parts, task, precision, steps)
    return base + counter.peak_bytes


def timed_count(
    counter: MemoryCounter, batch: Mapping[str, Tensor], task: Task, precision: Precision
) -> tuple[int, float]:
    """Return the counted bytes, and milliseconds of a count."""
    started = time.perf_counter()
    count = counter.count(batch, task, precision=precision)
    return count, 1000 * (time.perf_counter() - started)


def main() -> None:
    """Measure, print a table, write JSON."""
    task = TextClassification(dataset=str(prepare("questions") / "questions.csv"))
    backbone = Backbone.load(str(prepare("minilm")), task.head)
    counter = MemoryCounter(backbone.model)
    rows = []
    for shape, precision in CASES:
        batch = batch_of(shape)
        for name, configuration in configurations():
            with attach(backbone, configuration):
                counted, milliseconds = timed_count(counter, batch, task, precision)
                backbone.model.train()
                cuda = None
                if torch.cuda.is_available():
                    cuda = measure_cuda(backbone.model, batch, task, precision)
                real = measure_live_storage(backbone.model, batch, task, precision=precision)
                backbone.model.eval()
            rows.append(
                {
                    "configuration": name,
                    "batch": f"{shape[0]}×{shape[1]}",
                    "precision": precision,
                    "counted_bytes": counted,
                    "real_cpu_bytes": real,
                    "error": counted / real - 1,
                    "cuda_bytes": cuda,
                    "count_ms": milliseconds,
                }
            )
    report(rows)


def report(rows: list[dict[str, object]]) -> None:
    """Print the table and write the JSON."""
    table = Table(title="Peak training memory: counted before training, against real steps")
    for heading in (
        "configuration",
        "batch",
        "precision",
        "counted",
        "real",
        "error",
        "took",
    ):
        table.add_column(heading, justify="left" if heading == "configuration" else "right")
    for row in rows:
        table.add_row(
            str(row["configuration"]),
            str(row["batch"]),
            str(row["precision"]),
            f"{float(str(row['counted_bytes'])) / 2**20:.2f} MiB",
            f"{float(str(row['real_cpu_bytes'])) / 2**20:.2f} MiB",
            f"{float(str(row['error'])):+.3%}",
            f"{float(str(row['count_ms'])):.0f} ms",
        )
    Console(width=150).print(table)
    RESULTS.mkdir(exist_ok=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    record = {
        "command": "python -m benchmarks.memory",
        "machine": this_machine(),
        "device": device,
        "results": rows,
    }
    (RESULTS / "memory.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
