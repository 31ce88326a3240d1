"""The one pass over the data that all first-order scores share."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from autopeft.core.adapter import Site
from autopeft.sensitivity.activation_variance import InputVariance
from autopeft.sensitivity.gradient_scores import BATCH_SCORES, fisher_of_samples
from autopeft.sensitivity.layer_gradients import LayerGradient, layer_gradients
from autopeft.sensitivity.mean_gradients import MeanGradients
from autopeft.sensitivity.scored_matrices import Subject
from autopeft.sensitivity.site_scores import SiteScores

_Sums = dict[str, dict[Site, Tensor]]


def run_data_pass(
    subject: Subject,
    names: Sequence[str],
    *,
    store: MeanGradients | None,
    variance: InputVariance | None,
    per_sample_fisher: bool,
    dtype: torch.dtype | None = None,
) -> dict[str, SiteScores]:
    """Run the model once on every batch, backwards too if a gradient is needed.

    Args:
        subject: What is scored.
        names: Scores of `BATCH_SCORES` to return.
        store: Filled with the gradients, unless None.
        variance: Filled with the inputs, unless None.
        per_sample_fisher: Whether "fisher" is of samples instead of batches.
        dtype: What matrices are multiplied in, the weights' gradients among them; None for the model's own.

    Returns:
        The scores in `names`: means over the batches (or samples).

    Raises:
        ValueError: The loss of a batch is not finite.
    """
    formulas = {name: BATCH_SCORES[name] for name in names}
    if per_sample_fisher and "fisher" in formulas:
        formulas["fisher"] = fisher_of_samples
    if not formulas and store is None and variance is None:
        return {}
    sums: _Sums = {name: defaultdict(lambda: torch.zeros((), dtype=torch.float64)) for name in formulas}
    for index in range(len(subject.batches)):
        inputs = subject.inputs(index)
        mask = inputs.get("attention_mask")
        with contextlib.nullcontext() if variance is None else variance.watch(mask):
            if formulas or store is not None:
                _run_backward(subject, index, formulas, sums, store, dtype)
            else:
                with torch.no_grad(), subject.autocast(dtype):
                    subject.model(**inputs)
    return {name: _mean(subject, name, sums[name], per_sample_fisher) for name in formulas}


def _run_backward(
    subject: Subject,
    index: int,
    formulas: Mapping[str, Callable[[LayerGradient], Tensor]],
    sums: _Sums,
    store: MeanGradients | None,
    dtype: torch.dtype | None,
) -> None:
    def receive(layer: LayerGradient) -> None:
        for name, formula in formulas.items():
            value = formula(layer).double()
            site = layer.site.site
            sums[name][site] = sums[name][site].to(value.device) + value
        if store is not None:
            store.add(layer)

    with layer_gradients(subject.sites, receive, rows=subject.rows(index), dtype=dtype) as run_backward:
        run_backward(subject.forward_loss(index, dtype))


def _mean(subject: Subject, name: str, sums: Mapping[Site, Tensor], per_sample_fisher: bool) -> SiteScores:
    count = len(subject.batches)
    if name == "fisher" and per_sample_fisher:
        count = sum(subject.rows(index) for index in range(count))
    values = {matrix.site: sums[matrix.site].item() / count for matrix in subject.sites}
    return SiteScores(name=name, values=values)
