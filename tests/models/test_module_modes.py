"""Quick walks through a model, and its mode, against torch's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autopeft.models.module_modes import in_mode, iter_modules, iter_parameters, set_mode


class Counting(nn.Module):
    """A module that has something of its own to do when its mode changes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Dropout(0.5)
        self.calls: list[bool] = []

    def train(self, mode: bool = True) -> Counting:
        self.calls.append(mode)
        super().train(mode)
        return self

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.as_tensor(self.inner(inputs))


class Model(nn.Module):
    """A module under two names, tied parameters, a child that is None, and one more child."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        linear = nn.Linear(4, 4)
        self.first = nn.Sequential(linear, nn.Dropout(0.5))
        self.again = self.first
        self.tied = nn.Linear(4, 4)
        self.tied.weight = linear.weight
        self.nothing: nn.Module | None
        self.register_module("nothing", None)
        self.last = last

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.as_tensor(self.last(self.tied(self.again(self.first(inputs)))))


def scripted() -> Any:
    return torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))


LAST: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Dropout(0.5),
    "overriding": Counting,
    "scripted": scripted,
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("name", LAST)
def test_walks_and_modes_are_torchs_own(name: str) -> None:
    model = Model(LAST[name]())
    assert {id(one) for one in iter_modules(model)} == {id(one) for one in model.modules()}
    assert len(iter_modules(model)) == len([*model.modules()])
    assert {id(one) for one in iter_parameters(model)} == {id(one) for one in model.parameters()}
    assert len(iter_parameters(model)) == len([*model.parameters()])
    inputs = torch.randn(64, 4)
    model.eval()
    expected = model(inputs)
    for training in (True, False, True):
        set_mode(model, training=training)
        assert {one.training for one in model.modules()} == {training}
    assert not torch.equal(model(inputs), expected)
    with in_mode(model, training=False):
        assert torch.equal(model(inputs), expected)
    assert {one.training for one in model.modules()} == {True}


def test_a_module_that_overrides_train_below_the_top_is_told() -> None:
    last = Counting()
    model = Model(last)
    set_mode(model, training=False)
    set_mode(model, training=True)
    assert last.calls == [False, True]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_scripted_module_evaluates_without_dropout() -> None:
    model = Model(scripted())
    inputs = torch.randn(64, 4)
    set_mode(model, training=False)
    quick = model(inputs)
    assert torch.equal(quick, model(inputs))
    assert torch.equal(quick, model.eval()(inputs))


def test_a_train_of_the_object_is_called() -> None:
    model = Model(nn.Dropout(0.5))
    calls: list[bool] = []
    model.last.train = calls.append  # type: ignore[assignment]
    set_mode(model, training=False)
    assert calls == [False]


class KeepsInner(Counting):
    """A module that holds one that is always in evaluation mode."""

    def train(self, mode: bool = True) -> KeepsInner:
        super().train(mode)
        self.inner.eval()
        return self


def test_what_a_module_does_to_those_it_holds_lasts() -> None:
    last = KeepsInner()
    model = Model(nn.Sequential(last, nn.Dropout(0.5)))
    for training in (True, False, True):
        set_mode(model, training=training)
        quick = {name: one.training for name, one in model.named_modules()}
        model.train(training)
        assert quick == {name: one.training for name, one in model.named_modules()}
    assert last.calls == [True, True, False, False, True, True]
    assert not last.inner.training
    assert model.first[1].training
