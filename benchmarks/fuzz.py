"""Damaged and hostile input for everything that reads a file: no crash that is not a clear error.

    python -m benchmarks.fuzz [--inputs 100000] [--seed 0]

Samples that are valid are changed at random, their bytes and their values, and read. What is wrong with a
file is a ValueError that says so in at most 2,000 letters; anything else is a crash, and its seed is kept:
`python -m benchmarks.fuzz --reader NAME --seed SEED --inputs 1` repeats it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import pickle
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table
from torch import Tensor

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.durable_files import load_json, load_tensors, save_json, save_tensors
from autopeft.core.evaluation import Cost, Evaluation, TrialRecord
from autopeft.core.objectives import Objective, resolve_objectives
from autopeft.evaluation.largest_lora import LargestLora
from autopeft.export.folder_format import CONFIGURATION_FILE, MANIFEST_FILE
from autopeft.export.loading import load_adapter
from autopeft.optimization.proposal import Proposal
from autopeft.optimization.study_store import STUDY_FILE, StudyStore, load_study
from autopeft.reporting.console import wide_console
from autopeft.reporting.front import ParetoFront
from autopeft.training.training_checkpoint import TrainingCheckpoint, TrainingState
from autopeft.yaml_config import load_config
from benchmarks.machine import this_machine
from tests.exports import export
from tests.tiny_models import tiny_backbone

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
CONFIGS = Path(__file__).parents[1] / "configs"
LONGEST_MESSAGE = 2000
_SNIPPETS = (
    "\0,\n,\t,  ,- ,: ,{,},[,],\",',&a ,*a,|,?,#,---,!!int x,!!timestamp x,!!binary x,!!bool x,<<: ,=,null,"
    "true,.nan,.inf,-1,0,1e999,1_0,99-99-99,../../etc/passwd,lora,size,0-4095.query,\ud800,!!set {a}"
)
_TEXTS = ",x,lora,0.query,0-4095.query,../x,<b>,\0,1e-3,complete"
_TOKENS = (*_SNIPPETS.split(","), "9" * 30, "9" * 5000, "é" * 100, "x" * 1000, "[" * 2000)
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 10**30, 10**400, 0.5, -0.0, math.nan, math.inf, -math.inf, 1e308),
    *(*_TEXTS.split(","), "x" * 1000, [], {}, [[]], [None], {"a": 1}, {"": {}}, [1, 2, 3]),
)


@dataclass(frozen=True)
class Reader:
    """What reads the content of a file, with valid content."""

    samples: tuple[bytes, ...]
    read: Callable[[bytes], object]

    def outcome(self, seed: int) -> str:
        """Return "read", "ValueError", or what another error is, for an input of this seed."""
        draw = random.Random(seed)
        content = changed(draw.choice(self.samples), draw)
        try:
            self.read(content)
        except ValueError as error:
            is_clear = 0 < len(str(error)) <= LONGEST_MESSAGE
            return "ValueError" if is_clear else f"ValueError of {len(str(error))} letters"
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:80]}"
        return "read"


def changed(content: bytes, draw: random.Random) -> bytes:
    """Return content in which a few bytes, or values, are others."""
    if draw.random() < 0.5:
        try:
            if content[8:9] == b"{":
                return _with_another_header(content, draw)
            lines = content.splitlines() if content.startswith(b'{"op_code"') else [content]
            place = draw.randrange(len(lines))
            lines[place] = _with_other_values(lines[place], draw)
            return b"\n".join(lines) + b"\n"
        except (ValueError, yaml.YAMLError):
            pass  # bytes of a sample that is no document
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(content) + 1)
        end = min(len(content), start + int(draw.expovariate(0.1)))
        token = draw.choice(_TOKENS).encode("utf-8", "surrogatepass")
        kinds: tuple[bytes, ...] = (
            token,
            b"",
            content[start:end] * 2,
            bytes(draw.randrange(256) for _ in range(end - start)),
        )
        content = content[:start] + draw.choice(kinds) + content[end:]
    return content


def _with_another_header(content: bytes, draw: random.Random) -> bytes:
    """Return a safetensors file in whose header a few values are others."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = _with_other_values(content[8:end], draw)
    return len(header).to_bytes(8, "little") + header + content[end:]


def _with_other_values(content: bytes, draw: random.Random) -> bytes:
    """Return a document in which a few values, at any depth, are others."""
    root: dict[Any, Any] = {"": yaml.safe_load(content)}
    for _ in range(draw.randint(1, 3)):
        place: Any = root
        key: Any = ""
        while isinstance(place[key], dict | list) and place[key] and draw.random() < 0.8:
            place = place[key]
            key = draw.choice(list(place)) if isinstance(place, dict) else draw.randrange(len(place))
        if draw.random() < 0.2 and isinstance(place, dict) and place is not root:
            place[draw.choice(("x", "size", "", "type"))] = place.pop(key)
        else:
            place[key] = draw.choice(_VALUES)
    return json.dumps(root[""]).encode()


def readers(folder: Path) -> Mapping[str, Reader]:
    """Return every reader, which may write in a folder."""
    configuration = Configuration(
        {
            Site(0, "query"): [Adapter("lora", 4, {"alpha": 2})],
            Site(1, "ffn"): [Adapter("parallel", 8, {"activation": "relu"})],
            Site(1, "value", "decoder"): [Adapter("ia3"), Adapter("bitfit")],
        },
        weight_decay=0.1,
    )
    by_hand = "sites: {0-5.query: {method: lora, rank: 4}}\nlearning_rate: 1.0e-3\n"
    documents = tuple(path.read_bytes() for path in sorted(CONFIGS.glob("*.yaml")))
    return {
        "configuration (YAML)": Reader(
            (configuration.to_yaml().encode(), by_hand.encode()),
            partial(_of_file, folder / "configuration.yaml", Configuration.load),
        ),
        "configuration (JSON)": Reader(
            (json.dumps(configuration.to_dict()).encode(),),
            partial(_of_file, folder / "configuration.json", Configuration.load),
        ),
        "search (YAML)": Reader(documents, partial(_of_file, folder / "search.yaml", load_config)),
        "journal": Reader(
            (_journal(folder / "study", configuration),), partial(_read_study, folder / "study")
        ),
        **_of_adapters(folder),
        **_of_kept(folder),
    }


def _of_file(path: Path, read: Callable[[Path], object], content: bytes) -> None:
    path.write_bytes(content)
    read(path)


def _journal(folder: Path, configuration: Configuration) -> bytes:
    """Return the journal of a study of three trials."""
    score = Objective.score("accuracy")
    study = StudyStore(folder, "study", resolve_objectives(("accuracy", "trainable_parameters"), [score]))
    for number, status in enumerate(("complete", "failed", "paused")):
        evaluation = Evaluation(
            configuration=configuration.replace(learning_rate=10.0**-number),
            status=status,  # type: ignore[arg-type]
            values={"accuracy": 0.5, "trainable_parameters": 10.0} if status != "failed" else {},
            reason="diverged" if status == "failed" else None,
        )
        proposal = Proposal(configuration=configuration, params={}, distributions={})
        study.tell(TrialRecord(number=number, evaluation=evaluation), proposal)
    study.set_attribute("metrics", [vars(score)])
    study.set_attribute("axes", [["accuracy", 0.0, 1.0], ["trainable_parameters", 1000.0, 1.0]])
    study.set_attribute("identity", {"search": {"objectives": "accuracy, trainable_parameters"}})
    study.close()
    return (folder / STUDY_FILE).read_bytes()


def _read_study(folder: Path, content: bytes) -> None:
    (folder / STUDY_FILE).write_bytes(content)
    repr(ParetoFront.stored(*load_study(folder)))


def _of_adapters(folder: Path) -> Mapping[str, Reader]:
    """Return the readers of the files of adapter folders, in both layouts, onto a tiny base."""
    backbone = tiny_backbone("bert", num_hidden_layers=1)
    base = pickle.dumps(backbone.model)  # read again faster than the model is copied
    query, attention = Site(0, "query"), Site(0, "attention")
    of_layouts = {
        "peft": Configuration({query: Adapter("lora", 2)}),
        "mixed": Configuration(
            {query: [Adapter("vera", 16), Adapter("bitfit")], attention: Adapter("series", 2)}
        ),
    }
    found: dict[str, Reader] = {}
    for layout, configuration in of_layouts.items():
        place = folder / layout
        export(backbone, configuration, place, verify=False)
        files = place / MANIFEST_FILE, place / CONFIGURATION_FILE, *sorted(place.rglob("*.safetensors"))
        for path in files:
            name = f"adapter, {layout} ({path.relative_to(place)})"
            read = partial(_load_adapter, base, place, path, path.read_bytes())
            found[name] = Reader((path.read_bytes(),), read)
    return found


def _load_adapter(base: bytes, folder: Path, path: Path, whole: bytes, content: bytes) -> None:
    """Load a folder with other content in one of its files."""
    path.write_bytes(content)
    try:
        load_adapter(pickle.loads(base), folder)
    finally:
        path.write_bytes(whole)


def _of_kept(folder: Path) -> Mapping[str, Reader]:
    """Return the readers of what a search keeps for itself, where damage counts as missing.

    A checksum finds all of it: texts are also changed, and signed again.
    """
    configuration = Configuration({Site(0, "query"): Adapter("lora", 2)})
    tensors = {"0.query.lora.lora_A.weight": torch.ones(2, 4)}
    cost = Cost(steps=3)
    state = TrainingState(
        step=3,
        weights=tensors,
        best_weights={name: 2 * tensor for name, tensor in tensors.items()},
        best=0.5,
        best_metrics={"accuracy": 0.5},
        optimizer={"a|step": torch.tensor(3.0)},
        generators={"cpu": torch.zeros(8, dtype=torch.uint8)},
        early_stopping={"wait_count": 1},
        callbacks=[{"seen": [torch.ones(2), (1, "x")]}],
    )
    evaluation = Evaluation(configuration=configuration, status="paused", values={"accuracy": 0.5}, cost=cost)
    paused = TrainingCheckpoint(evaluation=evaluation, state=state)
    largest = LargestLora(configuration=configuration, tensors=tensors, cost=cost)
    found: dict[str, Reader] = {}
    kept: Any
    for name, kept in {"paused training": paused, "warm start": largest}.items():
        path = folder / f"{name}.safetensors"
        kept.save(path)
        whole = load_tensors(path)
        assert whole is not None
        ((key, text),) = whole[1].items()
        read = partial(_present, type(kept).load)
        found[name] = Reader((path.read_bytes(),), partial(_of_file, path, read))
        signed = partial(_of_signed, path, read, whole[0], key)
        found[f"{name} (signed)"] = Reader((text.encode(),), signed)
    path = folder / "kept.json"
    save_json(path, {"accuracy": [0.5, None, "x"]})
    found["kept JSON"] = Reader((path.read_bytes(),), partial(_of_file, path, partial(_present, load_json)))
    return found


def _present(load: Callable[[Path], object], path: Path) -> None:
    if load(path) is None:
        raise ValueError(f"{path} counts as missing.")


def _of_signed(
    path: Path, read: Callable[[Path], object], tensors: Mapping[str, Tensor], key: str, content: bytes
) -> None:
    save_tensors(path, tensors, {key: content.decode(errors="replace")})
    read(path)


def main() -> None:
    """Feed the readers in turn, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", help="this one alone")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # that a kept file is damaged
    place = tempfile.mkdtemp(dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    began = time.process_time()
    try:
        known = readers(Path(place))
        names = [arguments.reader] if arguments.reader else list(known)
        counts: dict[str, Counter[str]] = {name: Counter() for name in names}
        crashes: list[dict[str, Any]] = []
        for number in range(arguments.inputs):
            name, seed = names[number % len(names)], arguments.seed + number
            outcome = known[name].outcome(seed)
            counts[name][outcome if outcome in ("read", "ValueError") else "crash"] += 1
            if outcome not in ("read", "ValueError"):
                crashes.append({"reader": name, "seed": seed, "error": outcome})
    finally:
        shutil.rmtree(place)
    table = Table(title="What became of damaged input")
    for heading in ("reader", "read", "ValueError", "crash"):
        table.add_column(heading, justify="left" if heading == "reader" else "right")
    for name, of_reader in counts.items():
        table.add_row(name, *(str(of_reader[kind]) for kind in ("read", "ValueError", "crash")))
    wide_console().print(table)
    for crash in {each["reader"] + each["error"].partition(":")[0]: each for each in crashes}.values():
        print(crash)
    if arguments.reader:
        return
    record = {
        "command": f"python -m benchmarks.fuzz --inputs {arguments.inputs} --seed {arguments.seed}",
        "machine": this_machine(),
        "inputs": arguments.inputs,
        "processor_seconds": time.process_time() - began,
        "readers": counts,
        "crashes": crashes[:100],
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
