"""Make peft's AdaLoRA allocate its budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from peft import AdaLoraConfig
from peft.tuners.adalora import AdaLoraLayer, AdaLoraModel
from torch import Tensor, nn

from autopeft.callbacks.lora_modules import truncated_tensors
from autopeft.callbacks.rank_gates import StepCallback


class AdaLoRA(StepCallback):
    """Call `update_and_allocate` of a peft AdaLoRA model after every optimizer step.

    Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023: of all
    triplets (λ, column of B, row of A) those with the highest s(λ) + mean s(A) + mean s(B) are kept, s
    being `SmoothedSensitivity` of |θ·∇θ|. peft does it all, but leaves the call to the training loop.

    It is called at the end of the batch: the weights have been updated (the optimizer would undo a mask set
    before) and the gradients, which peft reads, are still there. Steps are counted from 1, so that the target
    budget is set also where tfinal is 0.

    Raises:
        ValueError: When training starts and the module holds no AdaLoRA model or several, total_step is
            not the number of steps the trainer will take, or there is nothing to prune
            (target_r >= init_r); after a step without gradients.
    """

    def __init__(self) -> None:
        self._model: AdaLoraModel | None = None
        self._layers: dict[str, AdaLoraLayer] = {}
        self._restored: Mapping[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the model and its layers."""
        if stage != "fit":
            return
        models = {
            name: module for name, module in pl_module.named_modules() if isinstance(module, AdaLoraModel)
        }
        if len(models) != 1:
            raise ValueError(
                f"{type(pl_module).__name__} holds {len(models)} AdaLoRA models, expected one, made by "
                "peft.get_peft_model(model, AdaLoraConfig(...))."
            )
        ((prefix, self._model),) = models.items()
        self._adapter = str(self._model.trainable_adapter_name)
        # peft's rank pattern names the layers as the inner model does.
        self._inner = f"{prefix}.model." if prefix else "model."
        self._layers = {
            name: layer
            for name, layer in pl_module.named_modules()
            if isinstance(layer, AdaLoraLayer) and name.startswith(self._inner)
        }

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

    def after_step(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Update the sensitivities and allocate."""
        assert self._model is not None
        for name, layer in self._layers.items():
            parameters = cast(nn.Module, layer).parameters()
            if any(parameter.requires_grad and parameter.grad is None for parameter in parameters):
                raise ValueError(
                    f"{name} has no gradient after step {step}: it takes no part in the loss, or the "
                    "module clears its gradients after the optimizer step."
                )
        self._model.update_and_allocate(step)

    @property
    def _config(self) -> AdaLoraConfig:
        assert self._model is not None
        config = self._model.peft_config[self._adapter]
        assert isinstance(config, AdaLoraConfig)
        return config

    def _kept(self, name: str) -> Tensor:
        """Return which ranks of a module are kept, of shape (rank,)."""
        pattern = self._config.rank_pattern or {}  # empty before the first allocation
        key = f"{name.removeprefix(self._inner)}.lora_E"
        everything = [True] * int(self._layers[name].r[self._adapter])
        # Saving with peft takes the adapter's name off the keys.
        return torch.tensor(pattern.get(f"{key}.{self._adapter}", pattern.get(key, everything)))

    def ranks(self) -> Mapping[str, int]:
        """Return the rank of every module, by its qualified name in the LightningModule."""
        return {name: int(self._kept(name).sum()) for name in self._layers}

    def truncated_state(self) -> dict[str, Tensor]:
        """Return the tensors of an ordinary LoRA (λ in A) that computes what the fitted model does.

        They are for a LoRA of each module's rank, scaled by lora_alpha/rank; modules of rank 0 are left
        out. Names are "<module>.lora_A.weight" and "<module>.lora_B.weight".
        """
        state: dict[str, Tensor] = {}
        for name, rank in self.ranks().items():
            layer, adapter = self._layers[name], self._adapter
            # As in peft's forward, which divides by the rank it began with, and guards the division.
            scaling = layer.scaling[adapter] / (float(layer.ranknum[adapter]) + 1e-5)
            state |= truncated_tensors(
                name,
                down=layer.lora_A[adapter] * layer.lora_E[adapter],
                up=cast(Tensor, layer.lora_B[adapter]),
                keep=self._kept(name),
                rescale=scaling * max(1, rank) / layer.lora_alpha[adapter],
            )
        return state

    def state_dict(self) -> dict[str, Any]:
        """Return which ranks are kept, and peft's averages of sensitivity and uncertainty."""
        if self._model is None:
            return dict(self._restored or {})
        allocator = self._model.rankallocator
        return {
            "pattern": dict(self._config.rank_pattern or {}),
            "means": dict(allocator.exp_avg_ipt),
            "uncertainties": dict(allocator.exp_avg_unc),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; peft is given it when training starts."""
        self._restored = state_dict

    def _restore(self) -> None:
        if not self._restored:
            return
        assert self._model is not None
        self._config.rank_pattern = dict(self._restored["pattern"]) or None
        allocator, parameters = self._model.rankallocator, dict(self._model.model.named_parameters())
        for name, mean in self._restored["means"].items():
            allocator.exp_avg_ipt[name] = mean.to(parameters[name].device)
            allocator.exp_avg_unc[name] = self._restored["uncertainties"][name].to(parameters[name].device)
            # Overwritten before it is read; peft takes its absence for the first step.
            allocator.ipt[name] = allocator.exp_avg_ipt[name]
        self._restored = None
