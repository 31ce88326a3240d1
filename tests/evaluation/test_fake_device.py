"""Everything that a trial does, on fake tensors of another device: what lies on the wrong one is told.

Fake tensors know their device and raise where an operation mixes two. CUDA itself cannot be faked through a
backward pass: autograd asks for the device's streams, and without a CUDA build the process aborts. "lazy" is
a device that autograd knows in every build. What depends on `device.type == "cuda"` is for `test_gpu.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Self
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Cost, Evaluation
from autopeft.core.objectives import resolve_objectives
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.run import best_weights
from autopeft.methods import Attachment, FullFineTuning, attach
from autopeft.methods.bottleneck import Bottleneck
from autopeft.models.backbone import Backbone
from autopeft.models.loading import Quantization
from autopeft.sensitivity import compute_scores
from autopeft.sensitivity.gradient_scores import BATCH_SCORES
from autopeft.sensitivity.scored_matrices import Subject
from autopeft.training.module import FineTuning
from autopeft.training.training_checkpoint import TrainingCheckpoint, capture_state, restore_state
from tests.every_method import EVERY_METHOD, architecture_for
from tests.learnable import TRAINING, tiny_evaluator
from tests.quantized import quantized, save_base
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import LABELS, everywhere, places, tiny_backbone, tiny_batch

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

LAZY = torch.device("lazy:0")
ARCHITECTURES = ("bert", "llama")
RANDOM = {"normal_", "uniform_", "random_", "rand", "randn", "randint", "bernoulli_", "bernoulli", "randperm"}
DECOMPOSED = ("pissa", "olora")
"""peft gives their parameters, on the CPU, data on the device: of real tensors alone."""
BATCH = tiny_batch() | {"labels": torch.arange(3) % LABELS}


class OneMode(FakeTensorMode):
    """A mode that fake tensors keep when the module they belong to is copied."""

    def __deepcopy__(self, memo: Mapping[int, Any]) -> Self:
        return self


class Values(TorchDispatchMode):
    """Answer 1 where a number is asked for, and note on which devices numbers are drawn."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.drawn_on: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if args[0].is_floating_point() else args[0].dtype == torch.bool or 1
        if func is torch.ops.aten.allclose.default:  # of metrics that may share states
            return False
        if func is torch.ops.aten.bincount.default:  # its shape would depend on numbers
            _, _, length = args
            return args[0].new_empty(length)
        if func is torch.ops.aten.index.Tensor:
            mask = args[1][0]
            if mask is not None and mask.dtype == torch.bool:  # here, all that there is
                return args[0].flatten(0, mask.ndim - 1)
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in RANDOM:
            self.drawn_on.add(result.device.type)
        return result


def moved(module: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
    """Do what `Module.to` does, which in torch swaps the insides of tensors: fake ones refuse it."""

    def own_buffer(tensor: Tensor) -> Tensor:
        found = tensor.to(*arguments, **options)
        if tensor.is_floating_point():
            return found
        return tensor.to(found.device)  # it keeps its dtype

    if not [*module.parameters(), *module.buffers()]:
        empty: nn.Module = module._apply(lambda tensor: tensor.to(*arguments, **options))
        return empty
    for part in module.modules():
        for name, parameter in [*part.named_parameters(recurse=False)]:
            values = parameter.detach().to(*arguments, **options)
            own: Any = nn.Parameter(values, requires_grad=parameter.requires_grad)
            part.__setitem__(name, own) if isinstance(part, nn.ParameterDict) else setattr(part, name, own)
        for name, buffer in [*part.named_buffers(recurse=False)]:
            setattr(part, name, own_buffer(buffer))
    return module


def copied(tensor: FakeTensor, memo: dict[int, Any]) -> Tensor:
    """Copy a fake tensor; torch cannot where it remembers the number it was made of, as metrics' means."""
    if tensor.constant is not None:
        return tensor.clone()
    own: Tensor = Tensor.__deepcopy__(tensor, memo)  # type: ignore[no-untyped-call]
    return own


def faked_attributes(attributes: Mapping[str, Any], fake: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return an object's attributes with fake tensors, also in the objects that hold scales."""
    found = dict(attributes)
    for name, value in attributes.items():
        if isinstance(value, Tensor):
            found[name] = fake(value)
        elif type(value).__name__ == "QuantState":
            found[name] = copy.copy(value)
            vars(found[name]).update(faked_attributes(vars(value), fake))
    return found


@contextmanager
def faked(
    model: nn.Module,
    device: torch.device,
    batch: Mapping[str, Tensor] = BATCH,
    places: Mapping[str, torch.device] | None = None,
) -> Iterator[tuple[dict[str, Tensor], Values]]:
    """Put fake tensors on a device in the place of a model's, and make every new tensor a fake one.

    Modules whose names begin as those in `places` go to another device.

    Yields:
        A batch on the device, and what was drawn.
    """
    mode, values = OneMode(), Values()
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor, device: torch.device = device) -> Tensor:
        shape = torch.empty_like(tensor.detach().as_subclass(Tensor), device="meta")
        return made.setdefault(id(tensor), FakeTensor(mode, shape, device))

    for path, module in model.named_modules():
        others = (place for start, place in (places or {}).items() if f"{path}.".startswith(f"{start}."))
        fake_here = partial(fake, device=next(others, device))
        for name, parameter in [*module.named_parameters(recurse=False)]:
            own = nn.Parameter(fake_here(parameter), requires_grad=False)
            vars(own).update(faked_attributes(vars(parameter), fake_here))  # of 4-bit weights: their scales
            setattr(module, name, own)
        for name, buffer in [*module.named_buffers(recurse=False)]:
            setattr(module, name, fake_here(buffer))
    moved_batch = {name: fake(tensor) for name, tensor in batch.items()}
    copies = patch.object(FakeTensor, "__deepcopy__", copied, create=True)
    with patch.object(nn.Module, "to", moved), copies, mode, values:
        yield moved_batch, values


def optimizer_step(
    module: FineTuning, batch: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None
) -> torch.optim.Optimizer:
    optimizer = module.configure_optimizers()["optimizer"] if optimizer is None else optimizer
    assert optimizer is not None
    module.train()
    module.training_step(dict(batch), 0).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def validated(module: FineTuning, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    module.eval()
    with torch.no_grad():
        module.metrics.to(batch["labels"].device)
        module.validation_step(batch, 0)
        return module.take_validated()


def trial(
    evaluator: Evaluator, kind: type[Attachment], configuration: Configuration, batch: Mapping[str, Tensor]
) -> None:
    """Attach, train, evaluate, pause, resume, restore the best weights, and load trained tensors."""
    best, resumed = best_weights(evaluator.monitor), best_weights(evaluator.monitor)
    device = batch["labels"].device
    with kind(evaluator.backbone, configuration, 1) as attachment:
        module = evaluator.module(configuration)
        optimizer = optimizer_step(module, batch)
        trainer = MagicMock(
            optimizers=[optimizer],
            global_step=1,
            early_stopping_callback=None,
            sanity_checking=False,
            callback_metrics=validated(module, batch),
        )
        best.on_validation_end(trainer, module)
        state = capture_state(trainer, module, best)
        trained = attachment.state_dict()
    for group in (state.weights, state.best_weights, state.optimizer, trained):
        assert {tensor.device.type for tensor in group.values()} == {"cpu"}
    evaluation = Evaluation(
        configuration=configuration, status="paused", reason="a rung", values={}, cost=Cost(), seed=1
    )
    paused = TrainingCheckpoint(evaluation=evaluation, state=state)
    with kind(evaluator.backbone, configuration, 1) as attachment:
        module = evaluator.module(configuration, paused)
        restore_state(state, trainer, module, resumed)
        optimizer_step(module, batch)
        resumed.restore(module)
        attachment.load_state_dict(trained)
        validated(module, batch)
        assert next(module.parameters()).device == module.device == device


@pytest.mark.parametrize("architecture", ["", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", [*EVERY_METHOD, FullFineTuning.__name__])
def test_a_trial_keeps_to_the_models_device(architecture: str, method: str) -> None:
    backbone = tiny_backbone(architecture or architecture_for(method), new_head=True)
    is_whole = method == FullFineTuning.__name__
    if not is_whole and not places(backbone, method):
        pytest.skip(f"{architecture} has no site for {method}")
    if method in DECOMPOSED:
        pytest.skip(f"{method} replaces the data of parameters")
    kind = FullFineTuning if is_whole else Attachment
    configuration = Configuration() if is_whole else everywhere(backbone, method)
    evaluator = tiny_evaluator(backbone)
    evaluator.costs(configuration)  # peft's layers are asked what they are before anything is faked
    with faked(backbone.model, LAZY) as (batch, _):
        trial(evaluator, kind, configuration, batch)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_a_trial_of_a_language_model_keeps_to_the_models_device(
    quantization: Quantization | None, tmp_path: Path
) -> None:
    task = task_of(24)
    backbone = quantized(save_base(tmp_path), quantization, task, dtype="bfloat16")
    objectives = resolve_objectives(("loss", "trainable_parameters"), task.metrics)
    evaluator = Evaluator(backbone, task, TRAINING, objectives)
    with faked(backbone.model, LAZY, task.example_batch(3, 9)) as (batch, _):
        assert backbone.model.dtype == torch.bfloat16
        trial(evaluator, Attachment, everywhere(backbone, "lora"), batch)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_initial_weights_are_drawn_on_the_cpu_and_stand_on_the_device(method: str) -> None:
    """The seed of a trial means the same weights on every device, a new head's too."""
    if method in DECOMPOSED:
        pytest.skip(f"{method} replaces the data of parameters")
    backbone = tiny_backbone(architecture_for(method), new_head=True)
    configuration = everywhere(backbone, method)
    with attach(backbone, configuration):
        pass  # peft's layers are asked what they are before anything is faked
    with faked(backbone.model, LAZY) as (_, values), attach(backbone, configuration, seed=1) as attachment:
        assert {parameter.device for parameter in attachment.parameters.values()} == {LAZY}
    assert values.drawn_on == {"cpu"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scoring_keeps_to_the_models_device(architecture: str) -> None:
    backbone = tiny_backbone(architecture)
    evaluator = tiny_evaluator(backbone)
    # torch knows no autocast for "lazy", not even one that is switched off.
    with faked(backbone.model, LAZY) as (batch, _), patch.object(Subject, "autocast", nullcontext):
        on_cpu = {name: tensor.to("cpu") for name, tensor in batch.items()}
        for batches in ([batch, batch], [on_cpu, on_cpu]):
            scores = compute_scores(backbone, batches, evaluator.task, [*BATCH_SCORES])
            assert scores.keys() == set(BATCH_SCORES)


class Misplaced(nn.Module):
    """A module that makes a tensor in its forward pass without saying where."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.ones(hidden.shape[-1])


def plant_in_forward(backbone: Backbone, optimizer: torch.optim.Optimizer) -> None:
    model = backbone.model
    model.classifier = nn.Sequential(Misplaced(), model.get_submodule("classifier"))


def plant_in_weights(backbone: Backbone, optimizer: torch.optim.Optimizer) -> None:
    bottleneck = next(part for part in backbone.model.modules() if isinstance(part, Bottleneck))
    bottleneck.down.bias = nn.Parameter(torch.zeros(bottleneck.down.bias.shape))


def plant_in_optimizer(backbone: Backbone, optimizer: torch.optim.Optimizer) -> None:
    state = next(iter(optimizer.state.values()))
    state["exp_avg"] = state["exp_avg"].to("cpu")


@pytest.mark.parametrize("plant", [plant_in_forward, plant_in_weights, plant_in_optimizer])
def test_a_planted_tensor_on_the_wrong_device_is_found(plant: Callable[..., None]) -> None:
    backbone = tiny_backbone("bert", new_head=True)
    configuration = everywhere(backbone, "series")
    evaluator = tiny_evaluator(backbone)
    with faked(backbone.model, LAZY) as (batch, _), attach(backbone, configuration):
        module = evaluator.module(configuration)
        optimizer = optimizer_step(module, batch)
        plant(backbone, optimizer)
        with pytest.raises(RuntimeError, match="device"):
            optimizer_step(module, batch, optimizer)


def test_metrics_on_the_wrong_device_are_found() -> None:
    backbone = tiny_backbone("bert", new_head=True)
    evaluator = tiny_evaluator(backbone)
    with faked(backbone.model, LAZY) as (batch, _), attach(backbone, Configuration()):
        module = evaluator.module(Configuration())
        with pytest.raises(RuntimeError, match="device"):
            module.validation_step(batch, 0)
