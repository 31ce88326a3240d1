"""compute_scores: several scores of every site, sharing one pass over the data."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.errors import check_choice, check_whole
from autopeft.core.method_specs import ENCODER_FED_ROLES
from autopeft.core.objectives import parse_quantity
from autopeft.core.precision import Precision
from autopeft.models.backbone import Backbone
from autopeft.sensitivity.activation_variance import (
    IncrementalVariance,
    WatchedInputs,
    explained_variance_scores,
)
from autopeft.sensitivity.curvature_scores import grasp_scores, hessian_scores
from autopeft.sensitivity.gradient_scores import (
    BATCH_SCORES,
    BatchScore,
    gora_scores,
    gradient_spectrum_scores,
)
from autopeft.sensitivity.layer_gradients import LayerGradient, layer_gradients
from autopeft.sensitivity.mean_gradients import MeanGradients, bytes_of, mean_gradient_groups
from autopeft.sensitivity.registry import CHEAP_SCORES, SCORES
from autopeft.sensitivity.scored_matrices import MatrixSite, Subject, matrix_sites, undisturbed
from autopeft.sensitivity.site_scores import SiteScores
from autopeft.sensitivity.weight_scores import condition_number_scores, synflow_scores
from autopeft.tasks import Task

_DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16}
_HESSIAN_PROBES = 4  # a batch
_COMPONENTS = 64  # of a spectrum, and those that `explained_variance` carries along, up to the rank if more
_CONVERGENCE = 0.999  # with EVA's 0.99 the scores are off by up to a tenth
TrainOne = Callable[[Configuration], float]
"""Trains a configuration and returns its validation score, better when larger (a loss: its negative)."""
_Receiver = Callable[[LayerGradient], None]


def compute_scores(
    backbone: Backbone,
    batches: Sequence[Mapping[str, Tensor]],
    task: Task,
    names: Sequence[str] = CHEAP_SCORES,
    *,
    rank: int = 8,
    seed: int = 0,
    train_one: TrainOne | None = None,
    precision: Precision = "32-true",
    mean_gradient_budget: int | str = "2 GiB",
) -> dict[str, SiteScores]:
    """Score every site of a backbone that is one weight matrix, before anything is trained.

    All first-order scores share one forward and backward pass a batch, in evaluation mode, in which the
    weights stay frozen and the gradient of one weight at a time is alive. synflow takes one more pass over
    one row; grasp and hessian one twice differentiated pass a batch (hessian: four), with the memory that
    takes; leave_one_out one training a site. Afterwards parameters, flags and torch's random generators are
    what they were.

    Args:
        backbone: The backbone, with nothing attached; its head takes part as it is.
        batches: Batches of the training split, on any device.
        task: Gives the forward pass and the loss.
        names: Scores to compute, from `SCORES`; all cheap ones unless given.
        rank: Rank that gradient_spectrum, explained_variance and leave_one_out suppose.
        seed: Seed of random, hessian and of the randomised SVD of explained_variance.
        train_one: See `TrainOne`; only leave_one_out needs it.
        precision: "bf16-mixed" runs the passes that first-order scores and explained_variance share under
            autocast, and multiplies the weights' gradients in bfloat16 too. "32-true": in the model's own
            precision, or single where that is less, as all other scores.
        mean_gradient_budget: Bytes that mean gradients (gora, gradient_spectrum, grasp) may take in a
            temporary file, 4 a scored weight, where they do not fit on the GPU. Beyond it the sites are
            scored in groups, each with a pass of its own; grasp needs all at once and is refused.

    Returns:
        The scores by name, in the order asked for.

    Raises:
        ValueError: An argument is not valid or is missing, the loss, an input or a score is not finite,
            something is attached to the backbone, a weight is quantised, or the mean gradients that grasp
            needs are beyond their budget.
        OSError: The disk has no room for the mean gradients.
    """
    names = tuple(dict.fromkeys(names))
    _check(backbone, batches, names, rank, train_one)
    check_choice("precision", _DTYPES, precision)
    sites = matrix_sites(backbone)
    places = [matrix.site for matrix in sites]
    subject = Subject(model=backbone.model, sites=sites, batches=batches, task=task, seed=seed)
    components = max(rank, _COMPONENTS)
    state = IncrementalVariance(components, leading=rank, convergence=_CONVERGENCE)
    variance = WatchedInputs(sites, state)
    of_means: Mapping[str, Callable[[MeanGradients], SiteScores]] = {
        "gora": gora_scores,
        "gradient_spectrum": lambda means: gradient_spectrum_scores(means, rank=rank, components=components),
        "grasp": lambda means: grasp_scores(subject, means),
    }
    others: Mapping[str, Callable[[], SiteScores]] = {
        "explained_variance": lambda: explained_variance_scores(variance.states, rank),
        "hessian": lambda: hessian_scores(subject, _HESSIAN_PROBES),
        "condition_number": lambda: condition_number_scores(sites),
        "synflow": lambda: synflow_scores(subject),
        "random": lambda: random_scores(places, seed),
        "uniform": lambda: uniform_scores(places),
    }
    of_batches = [
        BatchScore(name, BATCH_SCORES[name], len(batches)) for name in names if name in BATCH_SCORES
    ]
    asked_of_means = [name for name in names if name in of_means]

    def score_group(
        group: Sequence[MatrixSite], receivers: Sequence[_Receiver], watched: WatchedInputs[Any] | None
    ) -> dict[str, SiteScores]:
        with TemporaryFile() as file:
            means = MeanGradients(group, len(batches), file) if group else None
            with backbone.cached_casts.in_place(precision):
                all_receivers = receivers if means is None else [*receivers, means.add]
                run_pass(replace(subject, precision=precision), all_receivers, watched)
            return {} if means is None else {name: of_means[name](means) for name in asked_of_means}

    first_group, *other_groups = _groups(sites, asked_of_means, mean_gradient_budget)
    watched = variance if "explained_variance" in names else None
    with undisturbed(backbone.model, seed):
        scores = score_group(first_group, [score.add for score in of_batches], watched)
        for group in other_groups:
            scores = {name: scores[name] | further for name, further in score_group(group, (), None).items()}
        scores |= {score.name: score.scores(places) for score in of_batches}
        scores |= {name: others[name]() for name in names if name in others}
    if train_one is not None and "leave_one_out" in names:
        alone = {site: train_one(Configuration({site: Adapter("lora", rank)})) for site in places}
        scores["leave_one_out"] = SiteScores(name="leave_one_out", values=alone)
    return {name: scores[name] for name in names}


def random_scores(sites: Iterable[Site], seed: int) -> SiteScores:
    """Return uniform random numbers in [0, 1): a control. Does not touch the global generators."""
    generator = random.Random(seed)
    return SiteScores(name="random", values={site: generator.random() for site in sites})


def uniform_scores(sites: Iterable[Site]) -> SiteScores:
    """Return 1 for every site: a control, which leads to the same rank everywhere."""
    return SiteScores(name="uniform", values=dict.fromkeys(sites, 1.0))


def run_pass(subject: Subject, receivers: Sequence[_Receiver], watched: WatchedInputs[Any] | None) -> None:
    """Run the model once on every batch, backwards too if a gradient is received."""

    def receive(layer: LayerGradient) -> None:
        for receiver in receivers:
            receiver(layer)

    dtype = _DTYPES[subject.precision]
    for index in range(len(subject.batches) if receivers or watched else 0):
        mask_of = partial(_mask, subject.task, subject.batch(index))
        with watched.watch(mask_of) if watched else nullcontext():
            if receivers:
                with layer_gradients(subject.sites, receive, dtype) as run_backward:
                    run_backward(subject.forward_loss(index))
            else:
                with torch.no_grad():
                    subject.output(subject.batch(index))


def _mask(task: Task, batch: Mapping[str, Tensor], site: Site) -> Tensor | None:
    """Return the mask of what a site is given: keys and values of cross-attention are the encoder's."""
    return task.mask(batch, is_decoder=site.stack == "decoder" and site.role not in ENCODER_FED_ROLES)


def _groups(
    sites: Sequence[MatrixSite], asked_of_means: Sequence[str], budget: int | str
) -> list[Sequence[MatrixSite]]:
    """Return the groups of sites whose mean gradients are taken together; an empty one where none are."""
    if not asked_of_means:
        return [()]
    groups = mean_gradient_groups(sites, int(parse_quantity(budget, "bytes")))
    if "grasp" in asked_of_means and len(groups) > 1:
        raise ValueError(
            "The score 'grasp' needs the mean gradients of all sites at once, "
            f"{bytes_of(sites) / 2**20:,.1f} MiB: more than mean_gradient_budget="
            f"{budget!r} or half of the free disk. Set a larger budget, point TMPDIR "
            "to a larger disk, or leave 'grasp' out."
        )
    return groups


def _check(
    backbone: Backbone,
    batches: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    rank: int,
    train_one: TrainOne | None,
) -> None:
    check_choice("score", SCORES, *names)
    check_whole("rank", rank, least=1)
    if backbone.attached is not None:
        raise ValueError(f"{backbone.name} carries {backbone.attached!r}: detach it before scoring sites.")
    if "leave_one_out" in names and train_one is None:
        raise ValueError(
            "The score 'leave_one_out' trains each site alone: pass train_one, a function that trains a "
            "Configuration and returns its validation score (better when larger)."
        )
    of_batches = [name for name in names if SCORES[name].needs_batches]
    if of_batches and not len(batches):
        raise ValueError(f"The score {of_batches[0]!r} needs at least one batch of training data, got none.")
