"""AdaLoRA against peft's own documented loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import AdaLoraConfig, PeftModel, get_peft_model
from peft.tuners.adalora import AdaLoraLayer, AdaLoraModel

from autopeft.callbacks import AdaLoRA
from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.training.rank_allocation import allocation_callbacks
from tests.callbacks.lora_fits import (
    ROWS,
    Classifier,
    Probe,
    batch_of,
    examples,
    fit,
    logits_of,
    lora,
)
from tests.conftest import ModelFactory

TARGETS = ["q_proj", "v_proj", "down_proj"]
SCHEDULE: dict[str, Any] = {"total_step": 12, "tinit": 2, "tfinal": 3, "deltaT": 2}


def adalora(tiny: ModelFactory, **options: Any) -> Classifier:
    settings: dict[str, Any] = {"init_r": 6, "target_r": 3, "lora_alpha": 6, "orth_reg_weight": 0.0}
    torch.manual_seed(0)
    config = AdaLoraConfig(target_modules=TARGETS, **(settings | SCHEDULE | options))
    return Classifier(get_peft_model(tiny(), config))


def ranks_in(classifier: Classifier) -> dict[str, int]:
    """Return the number of λ of every layer that are not 0."""
    layers = {name: layer for name, layer in classifier.named_modules() if isinstance(layer, AdaLoraLayer)}
    return {name: int(torch.count_nonzero(layer.lora_E["default"])) for name, layer in layers.items()}


def test_ranks_fall_to_the_budget(tiny_llama: ModelFactory) -> None:
    classifier = adalora(tiny_llama)
    callback = AdaLoRA()
    probe = Probe(lambda: sum(callback.ranks().values()))
    fit(classifier, callback, probe, steps=12)
    # Six modules from rank 6 to 3 on average: the cubic schedule between steps 2 and 9, every 2 steps.
    cubic = [int(18 * (1 - (step - 2) / 7) ** 3 + 18) for step in (4, 6, 8)]
    assert probe.notes == [36] * 3 + [cubic[0]] * 2 + [cubic[1]] * 2 + [cubic[2]] + [18] * 4
    ranks = callback.ranks()
    assert len(set(ranks.values())) > 1
    assert ranks_in(classifier) == ranks


def test_it_does_what_pefts_documented_loop_does(tiny_llama: ModelFactory) -> None:
    classifier, reference = adalora(tiny_llama), adalora(tiny_llama)
    callback = AdaLoRA()
    fit(classifier, callback, steps=12)
    optimizer = reference.configure_optimizers()
    assert isinstance(reference.model, PeftModel)
    allocator = reference.model.base_model
    assert isinstance(allocator, AdaLoraModel)
    rows = examples()
    for step in range(1, 13):
        start = ROWS * (step - 1) % len(rows)
        reference.loss(batch_of(rows[start : start + ROWS])).backward()
        optimizer.step()
        allocator.update_and_allocate(step)
        optimizer.zero_grad()
    expected = reference.state_dict()
    for name, tensor in classifier.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_the_term_for_orthogonality_is_that_of_pefts_loss(tiny_llama: ModelFactory) -> None:
    injected, reference = (adalora(tiny_llama, orth_reg_weight=0.5).model for _ in range(2))
    assert isinstance(injected, PeftModel)
    assert isinstance(reference, PeftModel)
    config = injected.peft_config["default"]
    assert isinstance(config, AdaLoraConfig)
    classifier = Classifier(injected.base_model.get_submodule("model"))
    fit(classifier, AdaLoRA(config), steps=12)
    allocator, rows = reference.base_model, examples()
    assert isinstance(allocator, AdaLoraModel)
    optimizer = Classifier(reference).configure_optimizers()
    for step in range(1, 13):
        start = ROWS * (step - 1) % len(rows)
        allocator(**batch_of(rows[start : start + ROWS])).loss.backward()
        optimizer.step()
        allocator.update_and_allocate(step)
        optimizer.zero_grad()
    expected = allocator.model.state_dict()
    for name, tensor in classifier.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-3, msg=name)


def test_a_budget_need_not_be_a_whole_number_a_layer(tiny_llama: ModelFactory) -> None:
    sites = {Site(block, "query"): Adapter("adalora", 3) for block in range(2)}
    (planned,) = allocation_callbacks(Configuration(sites, allocation="adalora"), steps=12)
    assert isinstance(planned, AdaLoRA)
    assert planned.budget == 3
    classifier = adalora(tiny_llama)
    callback = AdaLoRA(budget=19)  # of six layers
    fit(classifier, callback, steps=12)
    assert sum(callback.ranks().values()) == sum(ranks_in(classifier).values()) == 19


def test_the_budget_is_reached_where_no_steps_come_after_it(tiny_llama: ModelFactory) -> None:
    classifier = adalora(tiny_llama, tfinal=0)
    callback = AdaLoRA()
    fit(classifier, callback, steps=12)
    assert sum(callback.ranks().values()) == 18
    assert ranks_in(classifier) == callback.ranks()


# peft takes a module of rank 0 for one whose shards were not gathered.
@pytest.mark.filterwarnings("ignore:Adapter 'default'.* have invalid shape")
def test_saving_with_peft_does_not_change_the_report(tiny_llama: ModelFactory, tmp_path: Path) -> None:
    classifier = adalora(tiny_llama)
    callback = AdaLoRA()
    fit(classifier, callback, steps=12)
    before = callback.ranks()
    assert isinstance(classifier.model, PeftModel)
    classifier.model.save_pretrained(str(tmp_path))
    assert callback.ranks() == before


def test_gradient_accumulation_counts_as_one_step(tiny_llama: ModelFactory) -> None:
    callback = AdaLoRA()
    probe = Probe(lambda: sum(callback.ranks().values()))
    fit(adalora(tiny_llama), callback, probe, steps=12, accumulate_grad_batches=2)
    assert len(probe.notes) == 24
    assert probe.notes[-1] == 18
    assert probe.notes[6] == 36


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
def test_a_resumed_fit_goes_on_as_if_nothing_had_happened(tiny_llama: ModelFactory, tmp_path: Path) -> None:
    def run(checkpoint: Path | None = None) -> tuple[Classifier, AdaLoRA]:
        classifier, callback = adalora(tiny_llama), AdaLoRA()
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
        fit(classifier, callback, saving, epochs=3, checkpoint=checkpoint, enable_checkpointing=True)
        return classifier, callback

    whole, expected = run()
    for epoch in (0, 1):
        resumed, found = run(tmp_path / f"epoch={epoch}.ckpt")
        assert found.ranks() == expected.ranks()
        torch.testing.assert_close(logits_of(resumed), logits_of(whole))


def test_wrong_plans_are_refused(tiny_llama: ModelFactory) -> None:
    with pytest.raises(ValueError, match=r"total_step=12, but this trainer takes 8 optimizer steps"):
        fit(adalora(tiny_llama), AdaLoRA(), steps=8)
    with pytest.raises(ValueError, match=r"target_r=6 is not below init_r=6"):
        fit(adalora(tiny_llama, target_r=6), AdaLoRA(), steps=12)
    with pytest.raises(ValueError, match="holds 0 AdaLoRA models, expected one"):
        fit(lora(tiny_llama()), AdaLoRA(), steps=12)


def test_cleared_gradients_are_said(tiny_llama: ModelFactory) -> None:
    class Clearing(Classifier):
        def optimizer_step(self, *arguments: Any, **options: Any) -> None:
            super().optimizer_step(*arguments, **options)
            self.zero_grad()

    with pytest.raises(ValueError, match=r"has no gradient after step 1"):
        fit(Clearing(adalora(tiny_llama).model), AdaLoRA(), steps=12)
