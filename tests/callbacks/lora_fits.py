"""A small LoRA classifier in a plain Trainer, for the tests of rank callbacks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from autopeft.callbacks import find_lora_modules

RANK = 4
ROWS = 4
TARGETS = {
    "bert": ["query", "value", "dense"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
}


class Classifier(LightningModule):
    """Trains whatever requires gradients, with decay and momentum, which must not touch masked ranks."""

    def __init__(self, model: nn.Module, rate: float = 1e-2) -> None:
        super().__init__()
        self.model = model
        self.rate = rate

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Mapping[str, Tensor], batch_index: int) -> None:
        self.log("loss", self.loss(batch))

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        logits: Tensor = self.model(input_ids=batch["input_ids"]).logits
        return nn.functional.cross_entropy(logits, batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=self.rate, weight_decay=0.1)


def examples(count: int = 16, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 128, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row[1] % 3} for row in tokens]


def batch_of(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def kind_of(model: PreTrainedModel) -> str:
    return str(model.config.model_type)


def lora(model: PreTrainedModel, rank: int = RANK, *, drawn: bool = True, **options: Any) -> Classifier:
    """Return a classifier with LoRA on its linear layers, B drawn (not 0) on request, without dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    targets = options.pop("target_modules", TARGETS[kind_of(model)])
    config = LoraConfig(r=rank, target_modules=targets, fan_in_fan_out=kind_of(model) == "gpt2", **options)
    classifier = Classifier(get_peft_model(model, config))
    if drawn:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in classifier.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return classifier


@torch.no_grad()
def logits_of(classifier: Classifier) -> Tensor:
    training = classifier.training
    classifier.eval()
    logits: Tensor = classifier.model(input_ids=batch_of(examples())["input_ids"]).logits
    classifier.train(training)
    return logits


def gated_loss(
    classifier: Classifier, gates: dict[str, Tensor], rows: list[dict[str, Tensor]] | None = None
) -> Tensor:
    """Return the loss with every rank multiplied by a gate, computed without the callback."""
    batch = batch_of(examples()[:ROWS] if rows is None else rows)
    handles = [
        module.down.register_forward_hook(lambda _, __, out, gate=gates[name]: out * gate)
        for name, module in find_lora_modules(classifier).items()
    ]
    loss = classifier.loss(batch)
    for handle in handles:
        handle.remove()
    return loss


class Probe(Callback):
    """Notes something after every optimizer step, and the logits when training ends."""

    def __init__(self, note: Any = None) -> None:
        self.note = note
        self.notes: list[Any] = []
        self.logits = torch.zeros(0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self.note is not None:
            self.notes.append(self.note())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Classifier)
        self.logits = logits_of(pl_module)


def fit(
    classifier: LightningModule,
    *callbacks: Callback,
    steps: int = -1,
    epochs: int | None = None,
    checkpoint: Any = None,
    **options: Any,
) -> Trainer:
    settings: dict[str, Any] = {"accelerator": "cpu", "enable_checkpointing": False} | options
    trainer = Trainer(
        max_steps=steps,
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    loader: DataLoader[Any] = DataLoader(examples(), batch_size=ROWS)  # type: ignore[arg-type]
    trainer.fit(classifier, loader, loader, ckpt_path=checkpoint)
    return trainer
