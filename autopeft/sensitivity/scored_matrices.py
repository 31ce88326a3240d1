"""The sites that are scored: one weight matrix each; and a model that scoring leaves as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autopeft.core.adapter import Site
from autopeft.core.precision import Precision, autocast
from autopeft.core.seeding import seeded
from autopeft.models.backbone import Backbone
from autopeft.models.quantized_layers import full_weight
from autopeft.models.site_shapes import SiteShape
from autopeft.models.spread import devices_of
from autopeft.tasks import Task

_SHORT = 128  # tokens; at 256 the flash kernel is quicker again (9 heads of 64, and 12 of 32)


@dataclass(frozen=True, eq=False)  # tensors have no single truth to compare by
class MatrixSite:
    """A site that is one weight matrix: an `nn.Linear`, or a Conv1D of transformers.

    Experts in one parameter of shape (experts, rows, columns) are one matrix (experts × rows, columns). No
    hook sees what each of them is given and returns.

    The stored weight is kept here, as the module may be multiplying by a copy in lower precision.
    """

    site: Site
    shape: SiteShape
    module: nn.Module
    stored: nn.Parameter

    @classmethod
    def of(cls, backbone: Backbone, site: Site) -> Self:
        """Return what a backbone has at a site that is one matrix."""
        shape = backbone.shape(site)
        module = backbone.model.get_submodule(shape.module)
        return cls(site, shape, module, module.get_parameter(shape.parameter or "weight"))

    @property
    def weight(self) -> Tensor:
        """(out, in) however it is stored: a view that shares its memory; of a quantised one a fresh copy."""
        if self.is_fused:
            return self.stored.flatten(0, 1)
        weight = full_weight(self.module, self.stored)
        return weight.mT if self.shape.transposed else weight

    @property
    def size(self) -> tuple[int, int]:
        """Output and input width; of experts, rows of all and columns."""
        if self.is_fused:
            experts, rows, columns = self.stored.shape
            return experts * rows, columns
        return self.shape.out_features, self.shape.in_features

    @property
    def is_fused(self) -> bool:
        """Whether it holds the matrices of several experts."""
        return bool(self.shape.parameter)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is scored, and on what."""

    model: nn.Module
    sites: Sequence[MatrixSite]
    batches: Sequence[Mapping[str, Tensor]]
    task: Task
    seed: int  # seed of whatever a score draws
    # What the model computes in, under autocast; "32-true" for its own precision.
    precision: Precision = "32-true"

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return next(self.model.parameters()).device

    def batch(self, index: int) -> dict[str, Tensor]:
        """Return a batch on the model's device."""
        return {name: tensor.to(self.device) for name, tensor in self.batches[index].items()}

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context in which the model computes."""
        return autocast(self.precision, self.device.type)

    def output(self, batch: Mapping[str, Tensor]) -> Any:
        """Return the model's output for a batch on its device."""
        mask = batch.get("attention_mask")
        # The CPU's flash kernel goes backwards through short rows in bfloat16 up to ten times more slowly
        # than attention step by step, which is what training with dropout takes anyway.
        is_short = mask is not None and mask.shape[-1] <= _SHORT and torch.is_grad_enabled()
        step_by_step = is_short and self.precision == "bf16-mixed" and self.device.type == "cpu"
        with self.autocast(), sdpa_kernel(SDPBackend.MATH) if step_by_step else nullcontext():
            return self.task.forward(self.model, batch)

    def forward_loss(self, index: int) -> Tensor:
        """Return the loss of a batch, a scalar with its graph."""
        batch = self.batch(index)
        value = self.task.loss(self.output(batch), batch)
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"The loss of batch {index} is {value.item()}, expected a finite number. "
                "Check the batch's labels and the precision of the model."
            )
        return value


def matrix_sites(backbone: Backbone) -> tuple[MatrixSite, ...]:
    """Return every site that is one weight matrix, from the input to the output."""
    found = []
    for site, shape in sorted(backbone.sites.items()):
        if shape.kind not in ("linear", "experts"):
            continue
        matrix = MatrixSite.of(backbone, site)
        weight = matrix.stored
        fits = matrix.is_fused or sorted(weight.shape) == sorted(matrix.size)
        is_plain = weight.is_floating_point() and fits
        if not is_plain and shape.module not in backbone.quantized:
            raise ValueError(
                f"The weight of {site} ({shape.module}) is {tuple(weight.shape)} of {weight.dtype}, expected "
                f"{matrix.size} of floating-point numbers: load the model without quantisation, or with "
                "bitsandbytes'."
            )
        found.append(matrix)
    if not found:
        raise ValueError(f"{backbone.name} has no site that is one weight matrix: nothing can be scored.")
    return tuple(found)


def groups_within(
    room: int, sites: Sequence[MatrixSite], size: Callable[[MatrixSite], int]
) -> list[Sequence[MatrixSite]]:
    """Return the sites in groups whose sizes add up to no more than the room; one alone may exceed it."""
    groups: list[list[MatrixSite]] = [[]]
    for matrix in sites:
        if groups[-1] and sum(map(size, [*groups[-1], matrix])) > room:
            groups.append([])
        groups[-1].append(matrix)
    return list(groups)


@contextmanager
def undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """Put a model in evaluation mode with every parameter frozen; leave all as it was.

    Inside, torch's random generators of the CPU and of the model's devices start from `seed`; outside
    they go on where they were. Gradients that parameters carry are not touched.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with seeded(seed, devices_of(model)), torch.enable_grad():
        try:
            model.eval()
            model.requires_grad_(False)
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter, requires_grad in flags:
                parameter.requires_grad_(requires_grad)


@contextmanager
def forward_hooks(
    sites: Sequence[MatrixSite], hook: Callable[[MatrixSite, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call `hook(site, input, output)` after each run of a site's module; its result replaces the output.

    Sites of experts are left out.
    """

    def run(site: MatrixSite, _: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        return hook(site, arguments[0], output)

    with ExitStack() as handles:
        for site in (site for site in sites if not site.is_fused):
            handles.enter_context(site.module.register_forward_hook(partial(run, site)))
        yield


class _Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: Tensor, make: Callable[[], Tensor], turned: bool) -> Tensor:
        ctx.make, ctx.turned = make, turned
        made = make().to(given.dtype)
        return given @ (made if turned else made.mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return times(gradients[0], ctx.make, not ctx.turned), None, None


def times(given: Tensor, make: Callable[[], Tensor], turned: bool = False) -> Tensor:
    """Multiply by a matrix that is made anew for each pass: a graph keeps no copy of the weights' size.

    Args:
        given: (..., in); its gradient can itself be differentiated, as often as need be.
        make: Makes the matrix (out, in), always the same.
        turned: Whether to multiply by the matrix, and not by the transposed one.
    """
    product: Tensor = _Times.apply(given, make, turned)  # type: ignore[no-untyped-call]
    return product
