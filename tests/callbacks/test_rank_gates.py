"""What every callback that decides about ranks promises."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from peft import PeftModel
from torch import nn

from autopeft.callbacks import (
    ARDLoRA,
    BestWeights,
    ElaLoRA,
    IncreLoRA,
    RankGates,
    SoRA,
    find_lora_modules,
)
from tests.callbacks.lora_fits import (
    RANK,
    Classifier,
    Probe,
    batch_of,
    examples,
    fit,
    logits_of,
    lora,
)
from tests.conftest import ModelFactory

# By kind, for so many modules, to be fitted for 12 steps. Ranks move after steps 3, 6, 9 and 12; the
# learned gates shrink by about 0.6.
FACTORIES: dict[str, Callable[[int], RankGates]] = {
    "plain": lambda modules: RankGates(),
    "incremental": lambda modules: IncreLoRA(modules + 4, every_n_steps=3, modules_per_growth=1),
    "elastic": lambda modules: ElaLoRA(2 * modules, every_n_steps=3, moves=2),
    "sparse": lambda modules: SoRA(0.2, learning_rate=0.25),
    "scales": lambda modules: ARDLoRA(0.2, total_variation=0.01, learning_rate=0.25),
    "module-scales": lambda modules: ARDLoRA(0.2, granularity="module", learning_rate=0.25),
}


@pytest.fixture(params=["bert", "llama", "gpt2"])
def tiny(
    request: pytest.FixtureRequest,
    tiny_bert: ModelFactory,
    tiny_llama: ModelFactory,
    tiny_gpt2: ModelFactory,
) -> ModelFactory:
    return {"bert": tiny_bert, "llama": tiny_llama, "gpt2": tiny_gpt2}[request.param]


def callback_for(kind: str, classifier: Classifier) -> RankGates:
    """Return a fresh callback; gates that are learned start spread, so that some fall to 0."""
    names = list(find_lora_modules(classifier))
    callback = FACTORIES[kind](len(names))
    if kind == "module-scales":
        spread = torch.linspace(0.1, 2.0, len(names))
        callback.load_state_dict({"gates": dict(zip(names, spread[:, None], strict=True))})
    elif isinstance(callback, SoRA):
        callback.load_state_dict({"gates": {name: torch.linspace(0.1, 2.0, RANK) for name in names}})
    return callback


def check_ranks(callback: RankGates, classifier: Classifier) -> None:
    """Check that `ranks()` counts the ranks that are not 0, but for those that may still be."""
    ranks = callback.ranks()
    assert ranks.keys() == find_lora_modules(classifier).keys()
    for name, module in find_lora_modules(classifier).items():
        is_left = (callback.factors(name) != 0).expand(module.rank).cpu()
        assert ranks[name] == int(is_left.sum())
        assert not module.up.weight[:, ~is_left].any()


@pytest.mark.parametrize("kind", FACTORIES)
def test_the_fitted_model_has_the_ranks_and_computes_what_it_did(kind: str, tiny: ModelFactory) -> None:
    classifier = lora(tiny(), RANK)
    callback = callback_for(kind, classifier)
    probe = Probe()
    fit(classifier, callback, probe, steps=12)

    assert not any(module._forward_hooks for module in classifier.modules())
    torch.testing.assert_close(logits_of(classifier), probe.logits)
    ranks = callback.ranks()
    check_ranks(callback, classifier)
    if kind != "plain":
        assert 0 < sum(ranks.values()) < RANK * len(ranks)
    # peft's own merging knows nothing of gates: they must be in the weights.
    assert isinstance(classifier.model, PeftModel)
    merged = Classifier(classifier.model.merge_and_unload())
    torch.testing.assert_close(logits_of(merged), probe.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty")
@pytest.mark.parametrize("kind", FACTORIES)
def test_a_resumed_fit_goes_on_as_if_nothing_had_happened(
    kind: str, tiny_llama: ModelFactory, tmp_path: Path
) -> None:
    def run(checkpoint: Path | None = None) -> tuple[Classifier, RankGates]:
        classifier = lora(tiny_llama(), RANK)
        callback = callback_for(kind, classifier)
        saving = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
        fit(classifier, callback, saving, epochs=3, checkpoint=checkpoint, enable_checkpointing=True)
        return classifier, callback

    whole, expected = run()
    resumed, found = run(tmp_path / "epoch=1.ckpt")
    assert found.ranks() == expected.ranks()
    state = resumed.state_dict()
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(state[name], tensor, msg=name)


def masked_gates(classifier: Classifier) -> RankGates:
    """Return gates that switch off rank 1 everywhere and all of the last module."""
    callback = RankGates()
    gates = {name: torch.tensor([1.0, 0.0, 1.0, 1.0]) for name in find_lora_modules(classifier)}
    gates[list(gates)[-1]] = torch.zeros(RANK)
    callback.load_state_dict({"gates": gates})
    return callback


class Inspection(Probe):
    """Looks at what masked ranks do, within the fit."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        assert isinstance(pl_module, Classifier)
        modules = list(find_lora_modules(pl_module).values())
        for module in modules[:-1]:
            down, up = module.down.weight.grad, module.up.weight.grad
            assert down is not None
            assert up is not None
            assert not down[1].any()
            assert not up[:, 1].any()
            assert down[0].any()
        before = logits_of(pl_module)
        saved = copy.deepcopy(pl_module.state_dict())
        with torch.no_grad():
            for module in modules:
                module.down.weight[1] = 1e3
                module.up.weight[:, 1] = -1e3
        assert torch.equal(logits_of(pl_module), before)
        pl_module.load_state_dict(saved)
        self.notes.append(before)


def test_masked_ranks_contribute_nothing_and_get_no_gradient(tiny: ModelFactory) -> None:
    classifier = lora(tiny(), RANK)
    callback, inspection = masked_gates(classifier), Inspection()
    fit(classifier, callback, inspection, steps=2)
    assert len(inspection.notes) == 2
    ranks = callback.ranks()
    assert list(ranks.values()) == [3] * (len(ranks) - 1) + [0]


def test_an_exception_leaves_no_gates_in_the_model(tiny_llama: ModelFactory) -> None:
    class Failing(Classifier):
        def training_step(self, batch: Any, batch_index: int) -> torch.Tensor:
            if batch_index == 1:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_index)

    failing = Failing(lora(tiny_llama(), RANK).model)
    callback = masked_gates(failing)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(failing, callback, steps=4)
    assert not any(module._forward_hooks for module in failing.modules())
    assert not any(module.up.weight[:, 1].any() for module in find_lora_modules(failing).values())


def test_gates_go_on_in_a_second_fit_and_refuse_another_model(
    tiny_llama: ModelFactory, tiny_bert: ModelFactory
) -> None:
    classifier = lora(tiny_llama(), RANK)
    callback = masked_gates(classifier)
    fit(classifier, callback, steps=1)
    before = callback.ranks()
    fit(classifier, callback, steps=1)
    assert callback.ranks() == before
    with pytest.raises(ValueError, match=r"belong to other LoRA layers: \d+ differ.*new RankGates"):
        fit(lora(tiny_bert(), RANK), callback, steps=1)


def test_frozen_layers_are_left_alone(tiny_llama: ModelFactory) -> None:
    classifier = lora(tiny_llama(), RANK)
    first = next(iter(find_lora_modules(classifier)))
    classifier.get_submodule(first).requires_grad_(False)
    assert first not in find_lora_modules(classifier)


def test_models_without_separable_ranks_are_refused(
    tiny_llama: ModelFactory, tiny_bert: ModelFactory
) -> None:
    with pytest.raises(ValueError, match="Classifier has no trainable LoRA layer"):
        find_lora_modules(Classifier(tiny_llama()))
    with pytest.raises(ValueError, match="a LoRA variant, DoraLinearVariant"):
        find_lora_modules(lora(tiny_llama(), use_dora=True))
    with pytest.raises(ValueError, match="its class Embedding is no linear layer"):
        find_lora_modules(lora(tiny_llama(), target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="its adapter has a bias"):
        find_lora_modules(lora(tiny_bert(), lora_bias=True))


def test_merged_and_doubled_adapters_are_refused(tiny_llama: ModelFactory) -> None:
    classifier = lora(tiny_llama())
    model = classifier.model
    assert isinstance(model, PeftModel)
    model.merge_adapter()
    with pytest.raises(ValueError, match="its adapter is merged"):
        find_lora_modules(classifier)
    model.unmerge_adapter()
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"several adapters are active \(default, second\)"):
        find_lora_modules(classifier)


def test_gates_act_in_validation(tiny_llama: ModelFactory) -> None:
    classifier = lora(tiny_llama(), RANK)
    fitted = fit(classifier, masked_gates(classifier), epochs=1)
    batch = batch_of(examples())
    with torch.no_grad():
        expected = nn.functional.cross_entropy(logits_of(classifier), batch["labels"])
    torch.testing.assert_close(fitted.callback_metrics["loss"], expected)


@pytest.mark.parametrize("kind", FACTORIES)
def test_gates_fold_after_mixed_precision(kind: str, tiny_llama: ModelFactory) -> None:
    classifier, probe = lora(tiny_llama(), RANK), Probe()
    callback = callback_for(kind, classifier)
    fit(classifier, callback, probe, steps=12, precision="bf16-mixed")
    torch.testing.assert_close(logits_of(classifier), probe.logits)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", FACTORIES)
def test_gates_follow_the_model_to_the_gpu(kind: str, tiny_llama: ModelFactory) -> None:
    classifier = lora(tiny_llama(), RANK)
    callback = callback_for(kind, classifier)
    fit(classifier, callback, steps=12, accelerator="cuda")
    check_ranks(callback, classifier.cpu())


@pytest.mark.parametrize("kind", ["incremental", "sparse", "scales"])
def test_scaled_losses_are_refused(kind: str, tiny_llama: ModelFactory) -> None:
    classifier = lora(tiny_llama(), RANK)
    scaling = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match=r"precision 16-mixed scales: train in bf16-mixed or 32-true"):
        fit(classifier, callback_for(kind, classifier), steps=12, plugins=[scaling])


@pytest.mark.parametrize("kind", ["elastic", "sparse", "module-scales"])
@pytest.mark.parametrize("best_first", [True, False])
def test_the_best_validation_comes_back_with_its_gates(
    kind: str, best_first: bool, tiny_bert: ModelFactory
) -> None:
    """The largest loss stands for the best, as it falls: the best validation is not the last."""
    classifier = lora(tiny_bert())
    best = BestWeights("loss", "max")
    gates = FACTORIES[kind](len(find_lora_modules(classifier)))
    trainer = fit(classifier, *([best, gates] if best_first else [gates, best]), epochs=3)
    assert float(trainer.callback_metrics["loss"]) < best.best
    classifier.eval()
    with torch.no_grad():
        losses = [classifier.loss(batch_of(examples()[start : start + 4])) for start in range(0, 16, 4)]
    assert float(torch.stack(losses).mean()) == pytest.approx(best.best, rel=1e-4)
