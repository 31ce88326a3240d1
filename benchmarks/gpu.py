"""Every check of this project that needs a GPU, in at most eight minutes, with nothing but a card.

    python -m benchmarks.gpu                        # a table, and results/gpu.json
    python -m benchmarks.gpu --device cpu --quick   # the same code on a CPU, with tiny models

SmolLM2 and MiniLM are used where they are prepared (`assets/prepare.py`), models of their shapes with random
weights elsewhere. Each check runs in a process of its own, which ends when its time is up; what fails is a
row of the table, and the others go on. The exit code is 0 where all passed, 1 where one did not, and 2
without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from assets.prepare import assets_folder
from autopeft import Backbone, Configuration, PackedExecutor, Search, attach
from autopeft.core.adapter import Adapter
from autopeft.core.objectives import COST_OBJECTIVES, resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.executor import ExecutorFactory
from autopeft.evaluation.memory.counter import MemoryCounter
from autopeft.models.loading import LoadOptions, Quantization
from autopeft.search_spaces import Uniform
from autopeft.tasks import CausalLM, Task
from autopeft.training.settings import Training
from benchmarks.datasets import DATASETS
from benchmarks.machine import this_machine
from benchmarks.memory import measure_cuda, measure_live_storage
from tests.learnable import learnable_task
from tests.tiny_models import tiny_backbone, tiny_chat_tokenizer

RESULTS = Path(__file__).parent / "results" / "gpu.json"
SECONDS = 480  # of all checks together
ERROR_GOAL = 0.05  # of counted memory
PACKING_GOAL = 1.5  # times as many trials an hour
_PARTS = 4  # of a batch that is accumulated
_LINEAR = ("query", "key", "value", "attention_output", "ffn_up", "ffn_gate", "ffn_down")
_TINY: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
_SMOLLM2: Mapping[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
_MINILM: Mapping[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "vocab_size": 30522,
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Where and how large checks run.

    Attributes:
        device: "cuda" or "cpu".
        quick: Whether models are tiny and trainings short; goals are then not asked for.
        folder: For what a check writes.
        seconds: That a check may take.
    """

    device: Literal["cpu", "cuda"]
    quick: bool
    folder: Path
    seconds: float

    def training(self, **settings: Any) -> Training:
        """Return the settings of trainings on the device."""
        return Training(**{"epochs": 1, "batch_size": 16, "device": self.device, **settings})


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a check found: whether it passed (None: it was skipped), in words and in figures."""

    passed: bool | None
    result: str
    figures: Mapping[str, float]


def language_model(setting: Setting) -> Path:
    """Return SmolLM2's folder, or that of a model of its shape; tiny where it is to be quick."""
    prepared = assets_folder() / "models" / "SmolLM2-135M-Instruct"
    if not setting.quick and (prepared / "config.json").is_file():
        return prepared
    folder = setting.folder / "random-llama"
    torch.manual_seed(0)
    sizes = _TINY if setting.quick else _SMOLLM2
    model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]
    tiny_chat_tokenizer().save_pretrained(folder)
    return folder


def language_task(setting: Setting) -> CausalLM:
    """Return film dialogues where they are prepared, else random words."""
    sizes: dict[str, Any] = {
        "train_examples": 48 if setting.quick else 256,
        "validation_examples": 32,
        "test_examples": 32,
    }
    prepared = assets_folder() / "data" / "dialogue" / "dialogue.jsonl"
    if not setting.quick and prepared.is_file():
        return CausalLM(prepared, max_length=64, **sizes)
    draw = random.Random(0)
    words = [" ".join(f"w{draw.randrange(100)}" for _ in range(8)) for _ in range(800)]
    rows = [
        {"prompt": prompt, "completion": completion}
        for prompt, completion in zip(words[::2], words[1::2], strict=True)
    ]
    return CausalLM(Dataset.from_list(rows), max_length=64, **sizes)


def classifier(setting: Setting) -> tuple[Backbone, Task]:
    """Return MiniLM and questions where both are prepared, else a model of its shape and random words."""
    root, device = assets_folder(), torch.device(setting.device)
    model, data = root / "models" / "all-MiniLM-L6-v2", root / "data" / "questions" / "questions.csv"
    if not setting.quick and model.is_dir() and data.is_file():
        task = DATASETS["questions"].task(train=512, validation=200, test=100)
        return Backbone.load(str(model), task.head, device=device), task
    sizes = {} if setting.quick else _MINILM
    return tiny_backbone("bert", new_head=True, **sizes), learnable_task(rows=48 if setting.quick else 512)


def everywhere(backbone: Backbone, adapter: Adapter, lowest: int = 0) -> Configuration:
    """Return an adapter at every linear site from a block up."""
    sites = [site for site in backbone.sites if site.role in _LINEAR and site.block >= lowest]
    return Configuration(dict.fromkeys(sites, adapter), learning_rate=1e-3)


def check_tests(setting: Setting) -> Found:
    """Run the GPU tests."""
    counts: dict[str, int] = {}

    class Count:
        def pytest_terminal_summary(self, terminalreporter: Any) -> None:
            counts.update({name: len(found) for name, found in terminalreporter.stats.items() if name})

    place = "tests/test_gpu.py" if setting.quick else "tests"
    imported = "ignore::pytest.PytestAssertRewriteWarning"  # what tests use is in this process already
    code = pytest.main(
        ["-q", "-m", "gpu", "-p", "no:cacheprovider", "-W", imported, place], plugins=[Count()]
    )
    counts = {name: counts[name] for name in ("passed", "failed", "error", "skipped") if name in counts}
    said = ", ".join(f"{count} {name}" for name, count in counts.items()) or "none was found"
    were_run = counts.keys() != {"skipped"}
    return Found(passed=code == 0 and bool(counts) if were_run else None, result=said, figures=counts)


def memory_errors(setting: Setting, quantization: Quantization | None = None) -> dict[str, float]:
    """Return by how much counted peaks differ from those of real steps, relative to these."""
    task, options, device = language_task(setting), LoadOptions(quantization=quantization), setting.device
    source = str(language_model(setting))
    backbone = Backbone.load(source, task.head, options=options, device=torch.device(device))
    counter, rows, length = MemoryCounter(backbone.model), *((4, 16) if setting.quick else (8, 512))
    lora = everywhere(backbone, Adapter("lora", 16))
    in_parts, checkpointed = f"lora, a batch in {_PARTS} parts", "lora with checkpointing"
    cases = {
        "lora": lora,
        "lora in the top half": everywhere(backbone, Adapter("lora", 16), len(backbone.blocks) // 2),
        "ia3": everywhere(backbone, Adapter("ia3")),
        in_parts: lora,
        checkpointed: lora,
    }
    measure = measure_cuda if device == "cuda" else measure_live_storage
    errors = {}
    for name, configuration in (cases if quantization is None else {f"lora on {quantization}": lora}).items():
        parts = _PARTS if name == in_parts else 1
        batch = task.example_batch(rows // parts, length)
        if name == checkpointed:
            backbone.enable_checkpointing()
        with attach(backbone, configuration):
            counted = counter.count(batch, task, precision="bf16-mixed", accumulate=parts)
            model = backbone.model.train()
            real = measure(model, batch, task, precision="bf16-mixed", accumulate=parts)
            model.eval()
        errors[name] = counted / real - 1
    return errors


def check_memory(setting: Setting) -> Found:
    """Compare the peak memory that is counted with that of real steps."""
    errors = memory_errors(setting)
    if find_spec("bitsandbytes") is not None:
        gc.collect()  # or the first model would be counted as well
        errors |= memory_errors(setting, "nf4")
    said = ", ".join(f"{name} {error:+.1%}" for name, error in errors.items())
    within = max(map(abs, errors.values())) <= ERROR_GOAL
    return Found(passed=within or setting.quick, result=f"counted against real: {said}", figures=errors)


def check_packing(setting: Setting) -> Found:
    """Search over uniform LoRA with trials one by one and packed."""
    backbone, task = classifier(setting)
    trials, rates = 8 if setting.quick else 32, {}
    executors: dict[str, str | ExecutorFactory] = {"one by one": "local", "packed": PackedExecutor(size=8)}
    for name, executor in executors.items():
        search = Search(
            backbone,
            task,
            Uniform(sizes={"rank": (1, 16)}),
            training=setting.training(batch_size=32),
            halving=None,
            sampler="random",
            seeds=1,
            executor=executor,
            baselines=False,
            tracking=None,
            folder=setting.folder,
            name=name,
        )
        search.open().evaluator.evaluate(everywhere(backbone, Adapter("lora", 4)))  # loads on first use
        started = time.perf_counter()
        search.run(trials=trials, progress=False)
        rates[name] = 3600 * trials / (time.perf_counter() - started)
    gain = rates["packed"] / rates["one by one"]
    each = " and ".join(f"{rate:,.0f} {name}" for name, rate in rates.items())
    said = f"{each} in an hour: {gain:.2f} times as many packed"
    return Found(passed=gain >= PACKING_GOAL or setting.quick, result=said, figures={**rates, "gain": gain})


def check_steps(setting: Setting, quantization: Quantization | None = None) -> Found:
    """Train LoRA on a bfloat16 or packed base, and see the loss fall."""
    if quantization is not None and find_spec("bitsandbytes") is None:
        return Found(passed=None, result="bitsandbytes is not installed", figures={})
    task, options = language_task(setting), LoadOptions(dtype="bfloat16", quantization=quantization)
    device = torch.device(setting.device)
    backbone = Backbone.load(str(language_model(setting)), task.head, options=options, device=device)
    objectives = resolve_objectives(("loss", "trainable_parameters", "peak_memory"), task.objectives)
    evaluator = Evaluator(backbone, task, setting.training(epochs=2), objectives)
    before = evaluator.evaluate(Configuration()).values
    evaluation = evaluator.evaluate(everywhere(backbone, Adapter("lora", 16)))
    if evaluation.status != "complete":
        raise RuntimeError(evaluation.reason)
    after = evaluation.values
    speed, memory = after["examples_per_second"], COST_OBJECTIVES["peak_memory"].format(after["peak_memory"])
    said = f"{speed:,.0f} rows a second, loss {before['loss']:.3f} to {after['loss']:.3f}, {memory} counted"
    return Found(passed=after["loss"] < before["loss"], result=said, figures=dict(after))


def check_search(setting: Setting) -> Found:
    """Run the default strategy on a language model."""
    trials, folder = 4 if setting.quick else 20, language_model(setting)
    search = Search(
        folder,
        language_task(setting),
        training=setting.training(),
        seeds=1 if setting.quick else 3,
        tracking=None,
        folder=setting.folder,
        name="gpu",
    )
    started = time.perf_counter()
    front = search.run(trials=trials, hours=0.8 * setting.seconds / 3600, progress=False)
    rate = 3600 * len(front.records) / (time.perf_counter() - started)
    said = f"{len(front.records)} trials of {folder.name}, {rate:,.0f} an hour, {len(front)} on the front"
    figures = {"trials": len(front.records), "trials_an_hour": rate, "hypervolume": front.hypervolume}
    return Found(passed=len(front.records) >= trials and len(front) > 0, result=said, figures=figures)


CHECKS: Mapping[str, tuple[Callable[[Setting], Found], int]] = {
    "GPU tests": (check_tests, 110),
    "counted memory": (check_memory, 60),
    "packed trials": (check_packing, 90),
    "bf16 steps": (check_steps, 40),
    "nf4 steps": (partial(check_steps, quantization="nf4"), 40),
    "search": (check_search, 140),
}
"""By its name, a check and the seconds it may take."""


def run_check(name: str, *, device: str, quick: bool, seconds: float) -> dict[str, Any]:
    """Run a check in a process of its own and return its row."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gpu", "--check", name, "--device", device]
        command += ["--seconds", f"{seconds:.0f}", "--to", f"{folder}/found.json", *["--quick"] * quick]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=seconds, check=False
            )
            said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            why = said[-1] if said else f"exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            why = f"took more than {seconds:.0f} s"
        found = {"passed": False, "result": why, "figures": {}}
        if Path(folder, "found.json").is_file():
            found = json.loads(Path(folder, "found.json").read_text())
    return {"check": name, "seconds": time.perf_counter() - started, **found}


def show(rows: Sequence[Mapping[str, Any]], device: str) -> None:
    """Print the table."""
    table = Table(title=f"GPU checks: {device}", title_justify="left")
    for heading in ("check", "", "seconds", "result"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    words = {True: "passed", False: "failed", None: "skipped"}
    for row in rows:
        table.add_row(row["check"], words[row["passed"]], f"{row['seconds']:.0f}", row["result"])
    Console(width=150).print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks, print a table, write JSON, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--to", type=Path, help="JSON file; by default results/gpu.json on CUDA alone")
    parser.add_argument("--check", choices=CHECKS, help="one check, in this process")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that all take at most")
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print(
            "No CUDA device was found; on a CPU: python -m benchmarks.gpu --device cpu --quick",
            file=sys.stderr,
        )
        return 2
    if given.check:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["AUTOPEFT_CACHE"] = f"{folder}/cache"
            setting = Setting(
                device=given.device, quick=given.quick, folder=Path(folder), seconds=given.seconds
            )
            found = CHECKS[given.check][0](setting)
        given.to.write_text(json.dumps(vars(found)))
        return 0
    end, rows = time.perf_counter() + given.seconds, []
    for name, (_, limit) in CHECKS.items():
        seconds = min(limit, max(1.0, end - time.perf_counter()))
        rows.append(run_check(name, device=given.device, quick=given.quick, seconds=seconds))
    device = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    show(rows, device)
    path = given.to or (RESULTS if given.device == "cuda" else None)
    if path is not None:
        machine = this_machine(f"torch {torch.__version__}")
        command = " ".join(["python -m benchmarks.gpu", *(sys.argv[1:] if arguments is None else arguments)])
        record = {"command": command, "device": device, "machine": machine, "checks": rows}
        path.write_text(json.dumps(record, indent=2) + "\n")
    return 1 if any(row["passed"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
