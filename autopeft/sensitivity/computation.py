"""compute_scores: several scores of every site, sharing one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autopeft.core.errors import check_whole, unknown_choice
from autopeft.core.objectives import parse_quantity
from autopeft.core.precision import Precision
from autopeft.models.backbone import Backbone
from autopeft.sensitivity.activation_variance import IncrementalVariance, InputVariance
from autopeft.sensitivity.control_scores import (
    TrainOne,
    leave_one_out_scores,
    random_scores,
    uniform_scores,
)
from autopeft.sensitivity.curvature_scores import grasp_scores, hessian_scores
from autopeft.sensitivity.gradient_scores import (
    BATCH_SCORES,
    BatchScore,
    fisher_of_samples,
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
_Receiver = Callable[[LayerGradient], None]


@dataclass(frozen=True, kw_only=True)
class ScoreOptions:
    """Options of single scores.

    Attributes:
        per_sample_fisher: `fisher` from the gradient of every sample instead of every batch.
        hessian_probes: Random vectors a batch for `hessian`.
        components: How many values a spectrum keeps, and how many components the incremental SVD of
            `explained_variance` carries along (if more, up to the rank that is scored).
        convergence: `explained_variance` ignores a site's further inputs once each of the `rank` leading
            components has a cosine similarity above this to itself a batch before; None to use all batches.
            EVA's 0.99 was off by up to a tenth after 64 batches of 16 questions, 0.999 by a fortieth. Inputs
            up to 8 times as wide as `components` are always all used: their covariances cost less.
        mean_gradient_budget: Bytes that mean gradients (gora, gradient_spectrum, grasp) may take in a
            temporary file, 4 a scored weight, where they do not fit on the GPU. Beyond it the sites are
            scored in groups, each with a pass of its own; grasp needs all at once and is refused.
        precision: "bf16-mixed" runs the passes that first-order scores and `explained_variance` share under
            autocast, and multiplies the weights' gradients in bfloat16 too: MiniLM's scores move by less than
            a hundredth. "32-true": in the model's own precision, or single where that is less, as all other
            scores.

    Raises:
        ValueError: A count is below 1, `convergence` is not between 0 and 1, or the precision is unknown.
    """

    per_sample_fisher: bool = False
    hessian_probes: int = 4
    components: int = 64
    convergence: float | None = 0.999
    mean_gradient_budget: int | str = "2 GiB"
    precision: Precision = "32-true"

    def __post_init__(self) -> None:
        check_whole("hessian_probes", self.hessian_probes, least=1)
        check_whole("components", self.components, least=1)
        if self.convergence is not None and not 0 < self.convergence < 1:
            raise ValueError(f"convergence must be between 0 and 1, or None, got {self.convergence!r}.")
        parse_quantity(self.mean_gradient_budget, "bytes")
        if self.precision not in _DTYPES:
            raise unknown_choice("precision", self.precision, _DTYPES)


def compute_scores(
    backbone: Backbone,
    batches: Sequence[Mapping[str, Tensor]],
    task: Task,
    names: Sequence[str] = CHEAP_SCORES,
    *,
    rank: int = 8,
    seed: int = 0,
    train_one: TrainOne | None = None,
    options: ScoreOptions | None = None,
) -> dict[str, SiteScores]:
    """Score every site of a backbone that is one weight matrix, before anything is trained.

    All first-order scores share one forward and backward pass a batch, in evaluation mode, in which the
    weights stay frozen and the gradient of one weight at a time is alive; see also
    `ScoreOptions.mean_gradient_budget`. synflow takes one more pass over one row; grasp and hessian one twice
    differentiated pass a batch (and a probe), with the memory that takes; leave_one_out one training a site.
    Afterwards parameters, flags and torch's random generators are what they were.

    Args:
        backbone: The backbone, with nothing attached; its head takes part as it is.
        batches: Batches of the training split, on any device.
        task: Gives the forward pass and the loss.
        names: Scores to compute, from `SCORES`; all cheap ones unless given.
        rank: Rank that gradient_spectrum, explained_variance and leave_one_out suppose.
        seed: Seed of random, hessian and of the randomised SVD of explained_variance.
        train_one: See `TrainOne`; only leave_one_out needs it.
        options: Options of single scores.

    Returns:
        The scores by name, in the order asked for.

    Raises:
        ValueError: A score is unknown, the rank is below 1, there are no batches while a score needs them,
            the loss or a score is not finite, something is attached to the backbone,
            `train_one` is missing, a weight is quantised, or the mean gradients that grasp needs are beyond
            their budget.
        OSError: The disk has no room for the mean gradients.
    """
    options = options or ScoreOptions()
    names = tuple(dict.fromkeys(names))
    _check(backbone, batches, names, rank, train_one)
    sites = matrix_sites(backbone)
    places = [matrix.site for matrix in sites]
    subject = Subject(model=backbone.model, sites=sites, batches=batches, task=task, seed=seed)
    components = max(rank, options.components)
    state = IncrementalVariance(components, leading=rank, convergence=options.convergence)
    variance = InputVariance(sites, state)
    of_means: Mapping[str, Callable[[MeanGradients], SiteScores]] = {
        "gora": gora_scores,
        "gradient_spectrum": lambda means: gradient_spectrum_scores(means, rank=rank, components=components),
        "grasp": lambda means: grasp_scores(subject, means),
    }
    others: Mapping[str, Callable[[], SiteScores]] = {
        "explained_variance": lambda: variance.scores(rank),
        "hessian": lambda: hessian_scores(subject, options.hessian_probes),
        "condition_number": lambda: condition_number_scores(sites),
        "synflow": lambda: synflow_scores(subject),
        "random": lambda: random_scores(places, seed),
        "uniform": lambda: uniform_scores(places),
    }
    of_batches = [_batch_score(name, subject, options) for name in names if name in BATCH_SCORES]
    asked_of_means = [name for name in names if name in of_means]

    def run_pass(receivers: Sequence[_Receiver], watched: InputVariance | None) -> None:
        with backbone.cached_casts.in_place(options.precision):
            _run_pass(replace(subject, precision=options.precision), receivers, watched)

    def score_means(
        group: Sequence[MatrixSite], receivers: Sequence[_Receiver], watched: InputVariance | None
    ) -> dict[str, SiteScores]:
        means = MeanGradients(group, len(batches))
        run_pass([*receivers, means.add], watched)
        return {name: of_means[name](means) for name in asked_of_means}

    scores: dict[str, SiteScores] = {}
    groups = _groups(sites, asked_of_means, options)
    receivers = [score.add for score in of_batches]
    watched = variance if "explained_variance" in names else None
    with undisturbed(backbone.model, seed):
        if groups:
            scores = score_means(groups[0], receivers, watched)
            for group in groups[1:]:
                further = score_means(group, (), None)
                scores = {name: scores[name] | further[name] for name in asked_of_means}
        else:
            run_pass(receivers, watched)
        scores |= {score.name: score.scores(places) for score in of_batches}
        scores |= {name: others[name]() for name in names if name in others}
    if train_one is not None and "leave_one_out" in names:
        scores["leave_one_out"] = leave_one_out_scores(sites, train_one, rank)
    return {name: scores[name] for name in names}


def _batch_score(name: str, subject: Subject, options: ScoreOptions) -> BatchScore:
    batches = range(len(subject.batches))
    if name == "fisher" and options.per_sample_fisher:
        return BatchScore(name, fisher_of_samples, sum(map(subject.rows, batches)))
    return BatchScore(name, BATCH_SCORES[name], len(batches))


def _run_pass(subject: Subject, receivers: Sequence[_Receiver], watched: InputVariance | None) -> None:
    """Run the model once on every batch, backwards too if a gradient is received."""

    def receive(layer: LayerGradient) -> None:
        for receiver in receivers:
            receiver(layer)

    dtype = _DTYPES[subject.precision]
    for index in range(len(subject.batches) if receivers or watched else 0):
        mask = subject.batch(index).get("attention_mask")
        with watched.watch(mask) if watched else nullcontext():
            if receivers:
                with layer_gradients(subject.sites, receive, subject.rows(index), dtype) as run_backward:
                    run_backward(subject.forward_loss(index))
            else:
                with torch.no_grad():
                    subject.output(subject.batch(index))


def _groups(
    sites: Sequence[MatrixSite], asked_of_means: Sequence[str], options: ScoreOptions
) -> list[Sequence[MatrixSite]]:
    """Return the groups of sites that share passes over the batches; none without mean gradients."""
    if not asked_of_means:
        return []
    groups = mean_gradient_groups(sites, int(parse_quantity(options.mean_gradient_budget, "bytes")))
    if "grasp" in asked_of_means and len(groups) > 1:
        raise ValueError(
            "The score 'grasp' needs the mean gradients of all sites at once, "
            f"{bytes_of(sites) / 2**20:,.1f} MiB: more than mean_gradient_budget="
            f"{options.mean_gradient_budget!r} or half of the free disk. Set a larger budget, point TMPDIR "
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
    for name in names:
        if name not in SCORES:
            raise unknown_choice("score", name, SCORES)
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
