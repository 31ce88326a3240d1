"""The sites that are scored: one weight matrix each; and a model that scoring leaves as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from autopeft.core.adapter import Site
from autopeft.models.backbone import Backbone, SiteShape
from autopeft.tasks.base import Loss
from autopeft.tasks.batch import model_inputs

_MASK = "attention_mask"
_SHORT = 128  # tokens; at 256 the flash kernel is quicker again (9 heads of 64, and 12 of 32)


@dataclass(frozen=True, eq=False)  # tensors have no single truth to compare by
class MatrixSite:
    """A site that is one weight matrix: an `nn.Linear`, or a Conv1D of transformers.

    Attributes:
        site: The site.
        shape: What the backbone has there.
        module: The module.
        weight: Its weight as (out, in) however it is stored, a view that shares its memory. Kept here, as the
            module may be multiplying by a copy in lower precision.
    """

    site: Site
    shape: SiteShape
    module: nn.Module
    weight: Tensor


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is scored, and on what.

    Attributes:
        model: The transformers model.
        sites: Its matrix sites.
        batches: Training batches, labels under "labels".
        loss: Maps logits and labels to a scalar, the mean over the batch's rows.
        seed: Seed of whatever a score draws.
    """

    model: nn.Module
    sites: Sequence[MatrixSite]
    batches: Sequence[Mapping[str, Tensor]]
    loss: Loss
    seed: int

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return next(self.model.parameters()).device

    def inputs(self, index: int) -> dict[str, Tensor]:
        """Return the input tensors of a batch, on the model's device."""
        inputs = model_inputs(self.batches[index])
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def rows(self, index: int) -> int:
        """Return the number of rows of a batch with labels."""
        return len(self.batches[index]["labels"])

    def autocast(self, dtype: torch.dtype | None) -> torch.autocast:
        """Return the context in which the model computes in a dtype; in its own for None."""
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _quick_attention(
        self, inputs: Mapping[str, Tensor], dtype: torch.dtype | None
    ) -> AbstractContextManager[None]:
        """Return the context in which attention takes the kernel whose backward pass is quick.

        The CPU's flash kernel goes backwards through short rows in bfloat16 up to ten times more slowly than
        attention step by step, which is what training with dropout takes anyway.
        """
        mask = inputs.get(_MASK)
        short = mask is not None and mask.shape[-1] <= _SHORT
        if dtype is None or self.device.type != "cpu" or not short:
            return nullcontext()
        context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
        return context

    def forward_loss(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return the loss of a batch, a scalar with its graph.

        Args:
            index: The batch.
            dtype: What the model computes in, under autocast; the loss is of single precision logits.

        Raises:
            ValueError: The loss is not finite.
        """
        inputs = self.inputs(index)
        with self.autocast(dtype), self._quick_attention(inputs, dtype):
            logits = self.model(**inputs).logits
        logits = logits if dtype is None else logits.float()
        value = self.loss(logits, self.batches[index]["labels"].to(self.device))
        if not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"The loss of batch {index} is {value.item()}: scores need a finite one. "
                "Check the batch's labels and the precision of the model."
            )
        return value


def matrix_sites(backbone: Backbone) -> tuple[MatrixSite, ...]:
    """Return every site that is one weight matrix, from the input to the output.

    Raises:
        ValueError: There is none, or a weight is not stored as a plain matrix of floating-point numbers.
    """
    found = tuple(
        _matrix_site(site, shape, backbone.model.get_submodule(shape.module))
        for site, shape in sorted(backbone.sites.items())
        if shape.kind == "linear"
    )
    if not found:
        raise ValueError(f"{backbone.name} has no site that is one weight matrix: nothing can be scored.")
    for matrix in found:
        weight, expected = matrix.weight, (matrix.shape.out_features, matrix.shape.in_features)
        if tuple(weight.shape) != expected or not weight.is_floating_point():
            raise ValueError(
                f"The weight of {matrix.site} ({matrix.shape.module}) is {tuple(weight.shape)} of "
                f"{weight.dtype}, expected {expected} of floating-point numbers: load the model without "
                "quantisation."
            )
    return found


def _matrix_site(site: Site, shape: SiteShape, module: nn.Module) -> MatrixSite:
    weight = module.get_parameter("weight").detach()
    return MatrixSite(site, shape, module, weight.mT if shape.transposed else weight)


@contextmanager
def undisturbed(model: nn.Module, seed: int) -> Iterator[None]:
    """Put a model in evaluation mode with every parameter frozen; leave all as it was.

    Inside, torch's random generators of the CPU and of the model's devices start from `seed`; outside
    they go on where they were. Gradients that parameters carry are not touched.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = sorted({parameter.device.index for parameter, _ in flags if parameter.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
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
    """Call `hook(site, input, output)` after each run of a site's module; its result replaces the output."""

    def bind(site: MatrixSite) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        return lambda _, arguments, output: hook(site, arguments[0], output)

    handles = [site.module.register_forward_hook(bind(site)) for site in sites]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
