"""compute_scores: several scores of every site, sharing one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autopeft.core.errors import unknown_choice
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
from autopeft.sensitivity.gradient_scores import BATCH_SCORES, gora_scores, gradient_spectrum_scores
from autopeft.sensitivity.mean_gradients import MeanGradients, format_bytes, mean_gradient_groups
from autopeft.sensitivity.registry import CHEAP_SCORES, SCORES
from autopeft.sensitivity.scored_matrices import MatrixSite, Subject, matrix_sites, undisturbed
from autopeft.sensitivity.shared_pass import run_data_pass
from autopeft.sensitivity.site_scores import SiteScores
from autopeft.sensitivity.weight_scores import condition_number_scores, synflow_scores
from autopeft.tasks.base import Loss

_DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16}


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
            Small batches move components little, converged or not, and the fewer inputs, the higher the
            ratios: EVA's 0.99 was off by up to a tenth after 64 batches of 16 questions, 0.999 by a fortieth.
            Inputs up to 8 times as wide as `components` are always all used: their covariances cost less.
        mean_gradient_budget: Bytes that mean gradients (gora, gradient_spectrum, grasp) may take in a
            temporary file, 4 a scored weight, where they do not fit on the GPU. Beyond it the sites are
            scored in groups, each with a pass over the batches of its own; grasp needs all at once and is
            refused.
        precision: "bf16-mixed" runs the passes that first-order scores and `explained_variance` share under
            autocast, and multiplies the weights' gradients in bfloat16 too, with sums in single precision:
            MiniLM's scores move by less than a hundredth, and in order next to nothing. "32-true": in the
            model's own precision, or single where that is less. Other scores always do the latter.

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
        for name in ("hessian_probes", "components"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}.")
        if self.convergence is not None and not 0 < self.convergence < 1:
            raise ValueError(f"convergence must be between 0 and 1, or None, got {self.convergence!r}.")
        parse_quantity(self.mean_gradient_budget, "bytes")
        if self.precision not in _DTYPES:
            raise unknown_choice("precision", self.precision, _DTYPES)


def compute_scores(
    backbone: Backbone,
    batches: Sequence[Mapping[str, Tensor]],
    loss: Loss,
    names: Sequence[str] = CHEAP_SCORES,
    *,
    rank: int = 8,
    seed: int = 0,
    train_one: TrainOne | None = None,
    options: ScoreOptions | None = None,
) -> dict[str, SiteScores]:
    """Score every site of a backbone that is one weight matrix, before anything is trained.

    All first-order scores share one forward and backward pass a batch, in evaluation mode, in which the
    weights stay frozen and the gradient of one weight at a time is alive. Scores of the mean gradient (gora,
    gradient_spectrum, grasp) keep it on the GPU or in a temporary file, and take more passes where that would
    be too large (see `ScoreOptions.mean_gradient_budget`). synflow takes one more pass over one row; grasp
    and hessian one twice differentiated pass a batch (and a probe), with the memory that takes; leave_one_out
    one training a site. Afterwards parameters, flags and torch's random generators are what they were.

    Args:
        backbone: The backbone, with nothing attached; its head takes part as it is.
        batches: Batches of the training split: the model's inputs, and "labels". On any device.
        loss: Maps logits and labels to a scalar, the mean over the batch's rows.
        names: Scores to compute, from `SCORES`; all cheap ones unless given.
        rank: Rank that gradient_spectrum, explained_variance and leave_one_out suppose.
        seed: Seed of random, hessian and of the randomised SVD of explained_variance.
        train_one: Trains a configuration and returns its validation score, better when larger; only
            leave_one_out needs it.
        options: Options of single scores.

    Returns:
        The scores by name, in the order asked for.

    Raises:
        ValueError: A score is unknown, the rank is below 1, there are no batches or one has no labels while a
            score needs them, the loss or a score is not finite, something is attached to the backbone,
            `train_one` is missing, a weight is quantised, or the mean gradients that grasp needs are beyond
            their budget.
        OSError: The disk has no room for the mean gradients.
    """
    options = options or ScoreOptions()
    names = tuple(dict.fromkeys(names))
    _check(backbone, batches, names, rank, train_one)
    sites = matrix_sites(backbone)
    subject = Subject(model=backbone.model, sites=sites, batches=batches, loss=loss, seed=seed)
    components = max(rank, options.components)
    variance = InputVariance(
        sites, IncrementalVariance(components, leading=rank, convergence=options.convergence)
    )
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
        "random": lambda: random_scores((matrix.site for matrix in sites), seed),
        "uniform": lambda: uniform_scores(matrix.site for matrix in sites),
    }
    asked_of_means = [name for name in names if name in of_means]
    groups = _groups(sites, asked_of_means, options)
    parts: dict[str, list[SiteScores]] = {name: [] for name in asked_of_means}
    scores: dict[str, SiteScores] = {}
    with undisturbed(backbone.model, seed):
        for index, group in enumerate(groups):
            with MeanGradients(group, len(batches)) as means:
                with backbone.cached_casts.in_place(options.precision):
                    scores |= run_data_pass(
                        subject if index == 0 else replace(subject, sites=group),
                        [name for name in names if name in BATCH_SCORES and index == 0],
                        store=means if asked_of_means else None,
                        variance=variance if "explained_variance" in names and index == 0 else None,
                        per_sample_fisher=options.per_sample_fisher,
                        dtype=_DTYPES[options.precision],
                    )
                for name in asked_of_means:
                    parts[name].append(of_means[name](means))
        scores |= {name: SiteScores.merged(several) for name, several in parts.items()}
        scores |= {name: others[name]() for name in names if name in others}
    if "leave_one_out" in names:
        scores["leave_one_out"] = leave_one_out_scores(sites, train_one, rank)
    return {name: scores[name] for name in names}


def _groups(
    sites: Sequence[MatrixSite], asked_of_means: Sequence[str], options: ScoreOptions
) -> list[Sequence[MatrixSite]]:
    """Return the groups of sites that share passes over the batches; all in one without mean gradients."""
    if not asked_of_means:
        return [sites]
    budget = int(parse_quantity(options.mean_gradient_budget, "bytes"))
    groups = mean_gradient_groups(sites, budget)
    if "grasp" in asked_of_means and len(groups) > 1:
        needed = format_bytes(sum(4 * matrix.weight.numel() for matrix in sites))
        raise ValueError(
            f"The score 'grasp' needs the mean gradients of all sites at once, {needed}: more than "
            f"mean_gradient_budget={options.mean_gradient_budget!r} or half of the free disk. Set a larger "
            "budget, point TMPDIR to a larger disk, or leave 'grasp' out."
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
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}.")
    if backbone.attached is not None:
        raise ValueError(f"{backbone.name} carries {backbone.attached!r}: detach it before scoring sites.")
    if "leave_one_out" in names and train_one is None:
        leave_one_out_scores((), None, rank)  # before hours of work, not after
    of_batches = [name for name in names if SCORES[name].needs_batches]
    if of_batches and not len(batches):
        raise ValueError(f"The score {of_batches[0]!r} needs at least one batch of training data, got none.")
    if any("gradients" in SCORES[name].needs for name in of_batches):
        for index, batch in enumerate(batches):
            if "labels" not in batch:
                raise ValueError(f"Batch {index} has no 'labels', only {', '.join(batch) or 'nothing'}.")
