"""Every score once more, slowly and directly: full gradients by autograd, one score after another."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from autopeft.core.configuration import Site
from autopeft.models.backbone import Backbone
from tests.tiny_models import tiny_batch

Batch = dict[str, Tensor]
Matrices = dict[Site, Tensor]


def labelled_batches(count: int = 3, rows: int = 3) -> list[Batch]:
    """Return batches with padding and labels of three kinds."""
    labels = torch.arange(rows) % 3
    return [tiny_batch(rows=rows, seed=seed) | {"labels": labels.roll(seed)} for seed in range(count)]


def scored(backbone: Backbone) -> list[Site]:
    return sorted(site for site, shape in backbone.sites.items() if shape.kind == "linear")


def turned(backbone: Backbone, site: Site, matrix: Tensor) -> Tensor:
    return matrix.T if backbone.shape(site).transposed else matrix


def weights(backbone: Backbone) -> Matrices:
    """Return every scored weight as (out, in)."""
    return {
        site: turned(
            backbone, site, backbone.model.get_parameter(f"{backbone.shape(site).module}.weight").detach()
        )
        for site in scored(backbone)
    }


@contextmanager
def _trainable(backbone: Backbone) -> Iterator[list[Tensor]]:
    parameters: list[Tensor] = [
        backbone.model.get_parameter(f"{backbone.shape(site).module}.weight") for site in scored(backbone)
    ]
    backbone.model.eval()
    for parameter in parameters:
        parameter.requires_grad_(True)
    yield parameters
    for parameter in parameters:
        parameter.requires_grad_(False)


def batch_loss(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return cross_entropy(model(**inputs).logits, batch["labels"])


def gradients(backbone: Backbone, batch: Batch) -> Matrices:
    """Return the gradient (out, in) of a batch's loss for every scored weight."""
    with _trainable(backbone) as parameters:
        found = torch.autograd.grad(batch_loss(backbone.model, batch), parameters)
    return {
        site: turned(backbone, site, gradient) for site, gradient in zip(scored(backbone), found, strict=True)
    }


def mean_gradients(backbone: Backbone, batches: Sequence[Batch]) -> Matrices:
    each = [gradients(backbone, batch) for batch in batches]
    return {site: torch.stack([matrices[site] for matrices in each]).mean(0) for site in each[0]}


def mean_over_batches(
    backbone: Backbone, batches: Sequence[Batch], formula: Callable[[Tensor, Tensor], Tensor]
) -> dict[Site, float]:
    """Return the mean over batches of a formula of W and G."""
    each = [gradients(backbone, batch) for batch in batches]
    return {
        site: torch.stack([formula(weight, matrices[site]) for matrices in each]).mean().item()
        for site, weight in weights(backbone).items()
    }


def gradient_norm(backbone: Backbone, batches: Sequence[Batch]) -> dict[Site, float]:
    return mean_over_batches(backbone, batches, lambda _, g: g.pow(2).sum().sqrt())


def fisher(backbone: Backbone, batches: Sequence[Batch]) -> dict[Site, float]:
    return mean_over_batches(backbone, batches, lambda _, g: g.pow(2).mean())


def snip(backbone: Backbone, batches: Sequence[Batch]) -> dict[Site, float]:
    return mean_over_batches(backbone, batches, lambda w, g: (w * g).abs().sum())


def taylor2(backbone: Backbone, batches: Sequence[Batch]) -> dict[Site, float]:
    return mean_over_batches(backbone, batches, lambda w, g: (w * g).pow(2).sum())


def gora(backbone: Backbone, batches: Sequence[Batch]) -> dict[Site, float]:
    means = mean_gradients(backbone, batches)
    return {site: (weight * means[site]).abs().mean().item() for site, weight in weights(backbone).items()}


def spectra(backbone: Backbone, batches: Sequence[Batch]) -> Matrices:
    means = mean_gradients(backbone, batches)
    return {site: torch.linalg.svd(mean.double()).S for site, mean in means.items()}


def gradient_spectrum(backbone: Backbone, batches: Sequence[Batch], rank: int = 8) -> dict[Site, float]:
    return {
        site: spectrum[:rank].pow(2).sum().sqrt().item()
        for site, spectrum in spectra(backbone, batches).items()
    }


def variance_ratios(backbone: Backbone, batches: Sequence[Batch]) -> Matrices:
    """Return the explained-variance ratios of all inputs at once, padding left out."""
    backbone.model.eval()
    seen: dict[Site, list[Tensor]] = {site: [] for site in scored(backbone)}
    mask = torch.empty(0)

    def hook(site: Site) -> Any:
        return lambda _, given, __: seen[site].append(given[0][mask].detach())

    modules = {site: backbone.model.get_submodule(backbone.shape(site).module) for site in seen}
    handles = [module.register_forward_hook(hook(site)) for site, module in modules.items()]
    for batch in batches:
        mask = batch["attention_mask"].bool()
        batch_loss(backbone.model, batch)
    for handle in handles:
        handle.remove()
    ratios = {}
    for site, parts in seen.items():
        vectors = torch.cat(parts).double()
        squares = torch.linalg.svdvals(vectors - vectors.mean(0)).pow(2)
        ratios[site] = squares / squares.sum()
    return ratios


def explained_variance(backbone: Backbone, batches: Sequence[Batch], rank: int = 8) -> dict[Site, float]:
    return {site: ratios[:rank].sum().item() for site, ratios in variance_ratios(backbone, batches).items()}


def condition_number(backbone: Backbone, batches: Sequence[Batch]) -> dict[Site, float]:
    return {site: 1 / torch.linalg.cond(weight.double()).item() for site, weight in weights(backbone).items()}


def synflow(backbone: Backbone, batches: Sequence[Batch]) -> dict[Site, float]:
    model: Any = copy.deepcopy(backbone.model).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.abs()
        parameter.requires_grad_(True)
    width = model.get_input_embeddings().weight.shape[1]
    ones = torch.ones(1, batches[0]["input_ids"].shape[1], width)
    model(inputs_embeds=ones).logits.sum().backward()
    values = {}
    for site in scored(backbone):
        weight = model.get_parameter(f"{backbone.shape(site).module}.weight")
        values[site] = (weight * weight.grad).abs().sum().item()
    return values


def hessian_product(backbone: Backbone, batches: Sequence[Batch], direction: Matrices) -> Matrices:
    """Return H v (out, in) of the loss averaged over the batches, in all scored weights."""
    with _trainable(backbone) as parameters, sdpa_kernel(SDPBackend.MATH):
        value = torch.stack([batch_loss(backbone.model, batch) for batch in batches]).mean()
        first = torch.autograd.grad(value, parameters, create_graph=True)
        slope = sum(
            (turned(backbone, site, gradient) * direction[site]).sum()
            for site, gradient in zip(scored(backbone), first, strict=True)
        )
        assert isinstance(slope, Tensor)
        second = torch.autograd.grad(slope, parameters)
    return {
        site: turned(backbone, site, product) for site, product in zip(scored(backbone), second, strict=True)
    }


def grasp(backbone: Backbone, batches: Sequence[Batch]) -> dict[Site, float]:
    product = hessian_product(backbone, batches, mean_gradients(backbone, batches))
    return {site: (weight * product[site]).sum().item() for site, weight in weights(backbone).items()}


EXACT: Mapping[str, Callable[[Backbone, Sequence[Batch]], dict[Site, float]]] = {
    formula.__name__: formula
    for formula in (
        gradient_norm,
        fisher,
        snip,
        taylor2,
        gora,
        gradient_spectrum,
        explained_variance,
        condition_number,
        synflow,
        grasp,
    )
}
"""The scores whose formula is exact."""
