"""Many points from one training: what is left of a trained LoRA at smaller budgets of parameters.

The update of every site is split into ranks of falling singular values σ. One threshold on σ² for each
parameter that a rank costs says over all sites which stay: ranks become smaller, and sites are dropped. Where
ranks were allocated in training, those that it left open are the one point.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from autopeft.callbacks import DivergenceError
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.evaluation import VALIDATION_LOSS, Cost
from autopeft.core.jobs import Rivals
from autopeft.evaluation.evaluator import Evaluator
from autopeft.evaluation.run import Trained, reason_of_failure
from autopeft.methods import attach, count_site
from autopeft.methods.lora import Lora, lora_scaling, lora_tensors
from autopeft.models.backbone import Backbone
from autopeft.training.compute_meter import ComputeMeter

_ADALORA = "adalora"
SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
"""Of a trial's LoRA parameters. What is cut to less mostly falls to nothing without further training."""


def derive(evaluator: Evaluator, trained: Trained, rivals: Rivals) -> list[Trained]:
    """Cut a whole training to one share after another, while that may give a point of the front.

    A cut is measured if it would be on the front with its own sizes and the metrics of what has more
    parameters, and kept if it is on the front with its own.

    Returns:
        The training, which bears the cost, and the cuts.
    """
    assert trained.state is not None
    meter = ComputeMeter(evaluator.device)
    backbone, configuration = evaluator.backbone, trained.evaluation.configuration
    hoped = trained.evaluation.values
    known, found = [*rivals, hoped], list[Trained]()

    def adds(values: Mapping[str, float]) -> bool:
        return not any(
            all(not each.is_better(values[each.name], rival[each.name]) for each in evaluator.objectives)
            for rival in known
        )

    for share in SHARES:
        cut = cut_configuration(backbone, configuration, trained.state, share)
        with attach(backbone, cut, evaluator.seed) as attachment:
            sizes = evaluator.sizes(attachment)
        if not len(cut) or not adds({**hoped, **sizes}):
            break
        point = measured_cut(evaluator, trained, cut)
        if point.evaluation.status != "complete":
            break
        hoped = point.evaluation.values
        if adds(hoped):
            found.append(point)
            known.append(hoped)
    return _with_cuts(trained, found, meter.read())


def derive_again(evaluator: Evaluator, trained: Trained, cuts: Iterable[Configuration]) -> list[Trained]:
    """Cut another training of a trial to the configurations that the first was cut to; see `derive`."""
    found = [measured_cut(evaluator, trained, cut) for cut in cuts]
    return _with_cuts(trained, found, sum((cut.evaluation.cost for cut in found), Cost()))


def allocated(evaluator: Evaluator, trained: Trained) -> list[Trained]:
    """Return a whole training, and what is left of it without the ranks that its allocation has closed.

    Both compute the same: the metrics are those of the training. There is the training alone where no rank
    was closed.
    """
    assert trained.state is not None
    meter, whole = ComputeMeter(evaluator.device), trained.evaluation
    left = without_closed_ranks(whole.configuration, trained.state)
    if left == whole.configuration.replace(allocation=None):
        return [trained]
    point = measured_cut(evaluator, trained, left)
    metrics = [VALIDATION_LOSS, *(metric.name for metric in evaluator.task.metrics)]
    kept = {name: whole.values[name] for name in metrics if name in whole.values}
    evaluation = replace(point.evaluation, values={**point.evaluation.values, **kept})
    return _with_cuts(trained, [replace(point, evaluation=evaluation)], meter.read())


def _with_cuts(trained: Trained, cuts: Sequence[Trained], cost: Cost) -> list[Trained]:
    evaluation = replace(trained.evaluation, derived=tuple(cut.evaluation for cut in cuts))
    return [replace(trained, evaluation=evaluation).with_added_cost(cost), *cuts]


def measured_cut(evaluator: Evaluator, trained: Trained, cut: Configuration) -> Trained:
    """Cut a whole training to the ranks of a configuration, and measure that on the validation split.

    What it took to train, peak memory too, is what its training took: a cut costs what its
    training cost. What it is by itself, as its parameters and its latency, is its own.
    """
    meter, values = ComputeMeter(evaluator.device), dict(trained.evaluation.values)
    assert trained.state is not None
    whole = trained.evaluation.configuration
    state = cut_state(whole, trained.state, cut)
    frozen = evaluator.backbone.blocks_below(whole.lowest_block)

    def attempt() -> None:
        for name, value in evaluator.measure(cut, state, frozen).items():
            if not math.isfinite(value):
                raise DivergenceError(f"{name} is {value}")
            values[name] = value

    reason = reason_of_failure(attempt)
    evaluation = replace(
        trained.evaluation,
        configuration=cut,
        status="complete" if reason is None else "failed",
        reason=reason,
        values=values,
        curves=(),
        cost=meter.read(),
        derived=(),
    )
    return Trained(evaluation, state if reason is None else None)


def cut_configuration(
    backbone: Backbone, configuration: Configuration, state: Mapping[str, Tensor], share: float
) -> Configuration:
    """Return what is left of a trained configuration whose LoRA may have a share of its parameters."""
    loras, worth, left = _loras(configuration), [], 0.0
    for site, adapter in loras.items():
        cost = count_site(backbone, site, adapter) // (adapter.size or 1)
        worth += [(float(sigma**2) / cost, site, cost) for sigma in _decomposed(state, site, adapter)[1]]
        left += share * count_site(backbone, site, adapter)
    ranks: Counter[Site] = Counter()
    for value, site, cost in sorted(worth, key=lambda rank: -rank[0]):
        left -= cost
        if left < 0 or value == 0:
            break
        ranks[site] += 1
    adapters: dict[Site, list[Adapter]] = {}
    for site, adapter in configuration:
        if adapter is not loras.get(site):
            adapters.setdefault(site, []).append(adapter)
        elif ranks[site]:
            adapters.setdefault(site, []).append(_of_rank(ranks[site], adapter))
    return configuration.replace(adapters=adapters, allocation=None)


def without_closed_ranks(configuration: Configuration, state: Mapping[str, Tensor]) -> Configuration:
    """Return a trained configuration with the ranks whose row of A and column of B are not 0.

    Adapters of AdaLoRA become LoRA, as Λ can be taken into A.
    """
    adapters = dict(configuration.adapters)
    for site, adapter in _loras(configuration).items():
        down, up = _factors(state, site, adapter)
        rank = int((down.any(dim=1) & up.any(dim=0)).sum())
        others = [other for other in adapters[site] if other is not adapter]
        adapters[site] = (*others, *([_of_rank(rank, adapter)] if rank else []))
    return configuration.replace(adapters=adapters, allocation=None)


def _of_rank(rank: int, adapter: Adapter) -> Adapter:
    """Return the LoRA of a rank that is left of an adapter."""
    return Adapter(Lora.name, rank, dict(adapter.options) if adapter.method == Lora.name else {})


def cut_state(
    configuration: Configuration, state: Mapping[str, Tensor], cut: Configuration
) -> dict[str, Tensor]:
    """Return a cut's tensors: at every site the largest singular values of what was trained there."""
    trained = _loras(configuration)
    of_loras = tuple(f"{site}.{adapter.method}." for site, adapter in trained.items())
    tensors = {name: tensor for name, tensor in state.items() if not name.startswith(of_loras)}
    for site, adapter in _loras(cut).items():
        left, sigma, right = _decomposed(state, site, trained[site])
        root = (sigma[: adapter.size] / lora_scaling(adapter)).sqrt()
        up, down = left[:, : adapter.size] * root, root[:, None] * right[: adapter.size]
        tensors |= {name: factor.float() for name, factor in zip(lora_tensors(site), (down, up), strict=True)}
    return tensors


def _loras(configuration: Configuration) -> dict[Site, Adapter]:
    """Return what can be cut: one peft adapter of fused experts has several updates, which stay whole."""
    return {
        site: adapter
        for site, adapter in configuration
        if adapter.method in (Lora.name, _ADALORA) and site.kind == "linear"
    }


def _factors(state: Mapping[str, Tensor], site: Site, adapter: Adapter) -> tuple[Tensor, Tensor]:
    """Return A and B of what an adapter adds to a weight, B·A: scales lie in B, Λ of AdaLoRA in A."""
    if adapter.method == Lora.name:
        down, up = (state[name].double() for name in lora_tensors(site))
        return down, up * lora_scaling(adapter)
    down, up, values = (state[f"{site}.{_ADALORA}.lora_{letter}"].double() for letter in "ABE")
    rank = len(values)
    return down * values, up * (float(adapter.option("scaling")) * rank / (rank + 1e-5))  # as peft guards it


def _decomposed(state: Mapping[str, Tensor], site: Site, adapter: Adapter) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition U, σ, Vᵀ of a LoRA's update, by QR of its factors."""
    down, up = _factors(state, site, adapter)
    (outer, of_up), (inner, of_down) = torch.linalg.qr(up), torch.linalg.qr(down.T)
    left, sigma, right = torch.linalg.svd(of_up @ of_down.T, full_matrices=False)
    return outer @ left, sigma, right @ inner.T
