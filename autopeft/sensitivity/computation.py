"""compute_scores: several scores of every site, sharing one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autopeft.core.errors import unknown_choice
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
from autopeft.sensitivity.mean_gradient_file import MeanGradientFile
from autopeft.sensitivity.registry import CHEAP_SCORES, SCORES
from autopeft.sensitivity.scored_matrices import Subject, matrix_sites, undisturbed
from autopeft.sensitivity.shared_pass import run_data_pass
from autopeft.sensitivity.site_scores import SiteScores
from autopeft.sensitivity.weight_scores import condition_number_scores, synflow_scores
from autopeft.tasks.base import Loss

_DTYPES = {"32-true": None, "bf16-mixed": torch.bfloat16}
_OF_MEAN_GRADIENT = frozenset({"gora", "gradient_spectrum", "grasp"})


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
    precision: Precision = "32-true"

    def __post_init__(self) -> None:
        for name in ("hessian_probes", "components"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)!r}.")
        if self.convergence is not None and not 0 < self.convergence < 1:
            raise ValueError(f"convergence must be between 0 and 1, or None, got {self.convergence!r}.")
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
    weights stay frozen and the gradient of one weight at a time is alive. Scores of the mean gradient
    (gora, gradient_spectrum, grasp) keep it in a temporary file of 4 bytes an entry of the scored weights
    (folder: `TMPDIR`). synflow takes one more pass over one row; grasp and hessian one twice differentiated
    pass a batch (and a probe), with the memory that takes; leave_one_out one training a site. Afterwards
    parameters, flags and torch's random generators are what they were.

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
            `train_one` is missing, or a weight is quantised.
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
    with undisturbed(backbone.model, seed), MeanGradientFile(sites, len(batches)) as store:
        with backbone.cached_casts.in_place(options.precision):
            averages = run_data_pass(
                subject,
                [name for name in names if name in BATCH_SCORES],
                store=store if _OF_MEAN_GRADIENT & set(names) else None,
                variance=variance if "explained_variance" in names else None,
                per_sample_fisher=options.per_sample_fisher,
                dtype=_DTYPES[options.precision],
            )
        rest: Mapping[str, Callable[[], SiteScores]] = {
            "gora": lambda: gora_scores(store),
            "gradient_spectrum": lambda: gradient_spectrum_scores(store, rank=rank, components=components),
            "grasp": lambda: grasp_scores(subject, store),
            "explained_variance": lambda: variance.scores(rank),
            "hessian": lambda: hessian_scores(subject, options.hessian_probes),
            "condition_number": lambda: condition_number_scores(sites),
            "synflow": lambda: synflow_scores(subject),
            "random": lambda: random_scores(sites, seed),
            "uniform": lambda: uniform_scores(sites),
        }
        scores = averages | {name: rest[name]() for name in names if name in rest}
    if "leave_one_out" in names:
        scores["leave_one_out"] = leave_one_out_scores(sites, train_one, rank)
    return {name: scores[name] for name in names}


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
