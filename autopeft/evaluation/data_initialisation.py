"""Initial values from the first training batches, for adapters that begin from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from tempfile import TemporaryFile

import torch
from torch import Tensor

from autopeft.core.adapter import Adapter, Site
from autopeft.core.profiling import section
from autopeft.evaluation.context import EvaluationContext
from autopeft.methods import METHODS, Attachment, adapters_off
from autopeft.methods.data_initialised import DataInitialised, Statistic
from autopeft.sensitivity.activation_variance import IncrementalVariance, SecondMoment, WatchedInputs
from autopeft.sensitivity.computation import run_pass
from autopeft.sensitivity.mean_gradients import MeanGradients, mean_gradient_groups
from autopeft.sensitivity.scored_matrices import MatrixSite, Subject, groups_within, undisturbed

_Found = Iterator[tuple[MatrixSite, Tensor]]
"""A layer that was given nothing is left out: it begins as LoRA does."""
_BATCHES = 4  # as scores look at
_ROOM = 2 * 2**30
"""Bytes of mean gradients (in a file) or second moments (in main memory) at a time; sites take turns, with
passes for each group.
"""


@section("initialise")
def initialise_from_data(evaluator: EvaluationContext, attachment: Attachment, seed: int) -> None:
    """Give adapters that begin from data their initial values, from the training's first batches.

    Once a training, replicates included, and not once a search: which batches come first depends on the seed,
    and gradients also on the head. Adapters are off meanwhile, as a prefix changes what a model computes from
    the start.

    Each method takes a forward pass over four batches, one that looks at gradients a backward pass too; where
    second moments or gradients take more than 2 GiB, such passes for each group of layers within.
    `peak_memory` does not count them: they are in evaluation mode, in which transformers keeps all
    activations, with one part of a batch at a time (`accumulate`) and one layer's sum on the device.

    Args:
        evaluator: Has the backbone, the task and its data.
        attachment: What is attached; nothing happens where no adapter begins from data.
        seed: The training's.

    Raises:
        ValueError: The loss of a batch, or what is found out about a layer, is not finite.
    """
    backbone, configuration = evaluator.backbone, attachment.configuration
    from_data: dict[str, tuple[DataInitialised, dict[Site, Adapter]]] = {}
    for site, adapter in configuration:
        own = METHODS[adapter.method]
        if isinstance(own, DataInitialised) and own.begins_from_data(adapter):
            from_data.setdefault(adapter.method, (own, {}))[1][site] = adapter
    if not from_data:
        return
    with torch.random.fork_rng(devices=[]):
        count = _BATCHES * evaluator.training.accumulate
        batches = list(islice(evaluator.data.train_dataloader(seed), count))
    precision, tensors = evaluator.training.resolved_precision(), attachment.tensors
    for name, (method, adapters) in from_data.items():
        subject = Subject(
            model=backbone.model,
            sites=[MatrixSite.of(backbone, site) for site in adapters],
            batches=batches,
            task=evaluator.task,
            seed=seed,
            precision=precision,
        )
        rank = max(adapter.size_or_zero for adapter in adapters.values())
        with (
            adapters_off(backbone.model, kept=backbone.head),
            undisturbed(backbone.model, seed),
            backbone.cached_casts.in_place(precision),
        ):
            for matrix, statistic in _STATISTICS[method.statistic](subject, rank):
                if not bool(statistic.isfinite().all()):
                    raise ValueError(
                        f"The {method.statistic} of {matrix.site} is not finite. Check the data and the "
                        "precision of the model."
                    )
                values = method.initial_values(adapters[matrix.site], statistic, matrix)
                for local, value in values.items():
                    tensors[f"{matrix.site}.{name}.{local}"][: len(value)] = value


def _input_directions(subject: Subject, rank: int) -> _Found:
    inputs = WatchedInputs(subject.sites, IncrementalVariance(rank))
    run_pass(subject, (), inputs)
    found = {state: state.directions() for state in dict.fromkeys(inputs.states.values())}
    for matrix in subject.sites:
        directions = found[inputs.states[matrix.site]]
        if directions is not None:
            yield matrix, directions


def _second_moments(subject: Subject, rank: int) -> _Found:
    for group in groups_within(_ROOM, subject.sites, lambda matrix: 4 * matrix.shape.in_features**2):
        inputs = WatchedInputs(group, SecondMoment())
        run_pass(replace(subject, sites=group), (), inputs)
        for matrix in group:
            total = inputs.states[matrix.site].total
            if total is not None and total.any():
                yield matrix, total.to(matrix.stored.device)


def _mean_gradients(subject: Subject, rank: int) -> _Found:
    for group in mean_gradient_groups(subject.sites, _ROOM, in_file=True):
        with TemporaryFile() as file:
            means = MeanGradients(group, len(subject.batches), file, in_file=True)
            run_pass(replace(subject, sites=group), [means.add], None)
            yield from means.means()


_STATISTICS: Mapping[Statistic, Callable[[Subject, int], _Found]] = {
    "input directions": _input_directions,
    "second moment": _second_moments,
    "mean gradient": _mean_gradients,
}
