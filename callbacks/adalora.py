"""Make peft's AdaLoRA allocate its budget."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraLayer, AdaLoraModel, RankAllocator
from torch import Tensor, nn

from autopeft.callbacks.rank_gates import StepCallback


class AdaLoRA(StepCallback):
    """Allocate the budget of peft's AdaLoRA after every optimizer step.

    Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023: of all
    triplets (λ, column of B, row of A) those with the highest s(λ) + mean s(A) + mean s(B) are kept, s
    being `SmoothedSensitivity` of |θ·∇θ|. peft does it all, but leaves the call to the training loop.

    It is called at the end of the batch: the weights have been updated (the optimizer would undo a mask set
    before) and the gradients, which peft reads, are still there. Steps are counted from 1, so that the target
    budget is set also where tfinal is 0.

    Args:
        schedule: The budget and when it falls, for layers that were injected without an AdaLoRA model; by
            default that of the AdaLoRA model in the module. peft's model adds the orthogonality of A and B to
            the loss (`orth_reg_weight`); without it the callback adds its gradient.
        budget: Ranks of all layers together at the end, in place of target_r a layer.

    Raises:
        ValueError: When training starts and the module holds no AdaLoRA model or several (with a schedule, no
            layer), total_step is not the number of steps the trainer will take, or there is nothing to prune
            (target_r >= init_r); after a step without gradients.
    """

    def __init__(self, schedule: AdaLoraConfig | None = None, budget: int | None = None) -> None:
        self._schedule = schedule
        self.budget = budget
        self._allocator: RankAllocator | None = None
        self._layers: dict[str, tuple[AdaLoraLayer, str]] = {}  # with the name of its peft adapter
        self._restored: Mapping[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the layers, and what allocates."""
        if stage != "fit":
            return
        inner = ""
        if self._schedule is None:
            inner, model = self._adalora_model(pl_module)
            adapter = str(model.trainable_adapter_name)
            self._model: nn.Module = model.model
            self._allocator = model.rankallocator
            self._config = cast(AdaLoraConfig, model.peft_config[adapter])
        self._layers = {
            name: (layer, adapter if self._schedule is None else next(iter(layer.r)))
            for name, layer in pl_module.named_modules()
            if isinstance(layer, AdaLoraLayer) and name.startswith(inner)
        }
        self._inner = inner
        if self._schedule is not None:
            if not self._layers:
                raise ValueError(f"{type(pl_module).__name__} holds no AdaLoRA layer.")
            self._model, self._config = pl_module, copy.copy(self._schedule)
            # peft takes every adapter whose name begins so.
            adapter = min((adapter for _, adapter in self._layers.values()), key=len)
            self._allocator = RankAllocator(pl_module, self._config, adapter)
        if self.budget is not None and self._allocator is not None:
            self._allocator.target_bgt = self.budget

    @staticmethod
    def _adalora_model(pl_module: LightningModule) -> tuple[str, AdaLoraModel]:
        """Return what the names of the layers in the one AdaLoRA model begin with, and the model."""
        models = {
            name: module for name, module in pl_module.named_modules() if isinstance(module, AdaLoraModel)
        }
        if len(models) != 1:
            raise ValueError(
                f"{type(pl_module).__name__} holds {len(models)} AdaLoRA models, expected one, made by "
                "peft.get_peft_model(model, AdaLoraConfig(...))."
            )
        ((prefix, model),) = models.items()
        return f"{prefix}.model." if prefix else "model.", model

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare peft's schedule with the trainer's."""
        super().on_train_start(trainer, pl_module)
        config = self._config
        steps = trainer.estimated_stepping_batches
        if config.total_step != steps:
            raise ValueError(
                f"AdaLoraConfig says total_step={config.total_step}, but this trainer takes {steps} "
                "optimizer steps: the budget would not fall as planned. Set total_step to that number."
            )
        if config.target_r >= config.init_r:
            raise ValueError(
                f"target_r={config.target_r} is not below init_r={config.init_r}: AdaLoRA has nothing to "
                "prune."
            )
        self._restore()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the gradient of the mean ‖P·Pᵀ − I‖ of A and Bᵀ, where no AdaLoRA model adds it to the loss."""
        if self._schedule is None:
            return
        weight = self._config.orth_reg_weight / (2 * len(self._layers))
        layers: Iterable[tuple[Any, str]] = self._layers.values()
        for layer, adapter in layers:
            down, up = layer.lora_A[adapter], layer.lora_B[adapter]
            if down.grad is None:
                continue  # which is said after the step
            with torch.enable_grad():
                for rows in (down, up.mT):
                    distance = torch.linalg.matrix_norm(rows @ rows.mT - torch.eye(len(rows)).to(rows))
                    (weight * distance).backward()

    def after_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Update the sensitivities and allocate, as `AdaLoraModel.update_and_allocate` does."""
        assert self._allocator is not None
        for name, (layer, _) in self._layers.items():
            parameters = cast(nn.Module, layer).parameters()
            if any(parameter.requires_grad and parameter.grad is None for parameter in parameters):
                raise ValueError(
                    f"{name} has no gradient after step {step}: it takes no part in the loss, or the "
                    "module clears its gradients after the optimizer step."
                )
        # total_step, as was checked.
        allocator, last = self._allocator, int(trainer.estimated_stepping_batches) - self._config.tfinal
        if step > last:
            allocator.mask_using_rank_pattern(self._model, self._config.rank_pattern)
            return
        _, pattern = allocator.update_and_allocate(self._model, step, force_mask=step == last)
        if pattern:
            self._config.rank_pattern = pattern
        if step == last:
            allocator.reset_ipt()

    def _kept(self, name: str) -> Tensor:
        """Return which ranks of a module are kept, of shape (rank,)."""
        layer, adapter = self._layers[name]
        pattern = self._config.rank_pattern or {}  # empty before the first allocation
        # peft's rank pattern names the layers as the inner model does.
        key = f"{name.removeprefix(self._inner)}.lora_E"
        everything = [True] * int(layer.r[adapter])
        # Saving with peft takes the adapter's name off the keys.
        return torch.tensor(pattern.get(f"{key}.{adapter}", pattern.get(key, everything)))

    def ranks(self) -> Mapping[str, int]:
        """Return the rank of every module, by its qualified name in the LightningModule."""
        return {name: int(self._kept(name).sum()) for name in self._layers}

    def state_dict(self) -> dict[str, Any]:
        """Return which ranks are kept, and peft's averages of sensitivity and uncertainty."""
        if self._allocator is None:
            return dict(self._restored or {})
        return {
            "pattern": dict(self._config.rank_pattern or {}),
            "means": dict(self._allocator.exp_avg_ipt),
            "uncertainties": dict(self._allocator.exp_avg_unc),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; peft is given it when training starts."""
        self._restored = state_dict

    def _restore(self) -> None:
        if not self._restored:
            return
        assert self._allocator is not None
        self._config.rank_pattern = dict(self._restored["pattern"]) or None
        allocator, parameters = self._allocator, dict(self._model.named_parameters())
        for name, mean in self._restored["means"].items():
            allocator.exp_avg_ipt[name] = mean.to(parameters[name].device)
            allocator.exp_avg_unc[name] = self._restored["uncertainties"][name].to(parameters[name].device)
            # Overwritten before it is read; peft takes its absence for the first step.
            allocator.ipt[name] = allocator.exp_avg_ipt[name]
        self._restored = None
