"""Families of ours on every kind of model: trained, exported, merged, and what is particular to one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.core.method_specs import METHOD_SPECS
from autopeft.evaluation.memory.counter import MemoryCounter
from autopeft.export.export import export_adapter
from autopeft.export.merging import merged_model
from autopeft.export.verification import trained_logits
from autopeft.methods import METHODS, attach, count_parameters, count_site, obstacle
from autopeft.methods.lora_xs import BetweenSingularVectors
from autopeft.methods.loreft import Intervention
from autopeft.methods.sparse import places_of_largest
from autopeft.models.backbone import Backbone
from tests.every_method import ON_STATE_SPACES
from tests.exports import difference, export
from tests.loss_task import CROSS_ENTROPY
from tests.methods.test_mixers import backbone_of as mixer_of
from tests.methods.test_peft_families import backbone_of
from tests.quantized import quantized, quiet, save_base
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import (
    LABELS,
    batch_of,
    draw_parameters,
    everywhere,
    fingerprint,
    places,
    tiny_backbone,
    tiny_batch,
    tiny_language_model,
)

FROM_DATA = ("eva", "lora_ga", "corda")
FAMILIES = ("full", "ssf", "sparse", "lora_sparse", "lora_fa", "lora_xs", "compacter", "loreft", *FROM_DATA)
ARCHITECTURES = ("bert", "gpt2", "llama", "t5", "vit")
PAIRS = [
    pytest.param(name, architecture, marks=() if architecture == "bert" else pytest.mark.slow)
    for name in FAMILIES
    for architecture in ARCHITECTURES
] + [(name, "jamba") for name in ON_STATE_SPACES]


@pytest.mark.parametrize(("name", "architecture"), PAIRS)
def test_loss_falls_and_what_is_exported_and_merged_computes_it(
    name: str, architecture: str, tmp_path: Path
) -> None:
    backbone, batch = backbone_of(architecture), batch_of(architecture)
    configuration = everywhere(backbone, name, size=64 if name == "sdt" else 4)
    before = fingerprint(backbone.model)
    labels = torch.arange(LABELS)

    def loss() -> Tensor:
        return torch.nn.functional.cross_entropy(backbone.model.eval()(**batch).logits, labels)

    with attach(backbone, configuration) as attachment:
        own = [parameter for key, parameter in attachment.parameters.items() if not key.startswith("head.")]
        optimizer = torch.optim.AdamW(own, 3e-3 * METHOD_SPECS[name].rate)
        start = loss().item()
        for _ in range(10):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
        assert loss().item() < start - 1e-3
        state = attachment.state_dict()
    # Loads it on a copy of the base and compares logits.
    report = export_adapter(backbone, configuration, state, tmp_path / "out", probe=batch, fresh=False)
    assert report.max_logit_difference is not None
    if METHODS[name].is_mergeable:
        expected = trained_logits(backbone, configuration, state, batch)
        assert difference(merged_model(backbone, configuration, state).eval(), batch, expected) <= 1e-5
    assert fingerprint(backbone.model) == before


def together(backbone: Backbone, left_out: str = "") -> Configuration:
    """Return all families in one configuration, of small sizes."""
    layers = [name for name in FAMILIES if "linear" in METHOD_SPECS[name].kinds and name != left_out]
    adapters: dict[Site, list[Adapter]] = {}
    for index, site in enumerate(places(backbone, "lora")):
        name = layers[index % len(layers)]
        adapters[site] = [Adapter(name, 4 if METHOD_SPECS[name].size_name else None)]
    for site in places(backbone, "loreft"):
        adapters[site] = [Adapter("compacter", 1), Adapter("loreft", 2, {"positions": 2})]
    configuration = Configuration(adapters)
    assert {*configuration.methods} == {*FAMILIES} - {left_out}
    return configuration


@pytest.mark.slow
def test_all_of_them_are_exported_together_and_load_in_a_fresh_process(tmp_path: Path) -> None:
    backbone = tiny_backbone("bert")
    backbone.model.save_pretrained(tmp_path / "base")
    backbone.origin = str(tmp_path / "base")
    assert "fresh process" in export(backbone, together(backbone), tmp_path / "out").checked


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_all_of_them_are_exported_from_a_bf16_base(architecture: str, tmp_path: Path) -> None:
    backbone = tiny_backbone(architecture)
    backbone.model.bfloat16()
    report = export(backbone, together(backbone), tmp_path / "out", fresh=False)
    assert report.max_logit_difference is not None


@quiet
def test_packed_weights_cannot_be_trained_in_a_copy_and_take_the_others(tmp_path: Path) -> None:
    task = task_of(24)
    backbone = quantized(save_base(tmp_path), "nf4", task)
    with pytest.raises(ValueError, match=r"'full' cannot sit on .* packed in 4 bits"):
        attach(backbone, Configuration({Site(0, "query"): Adapter("full")}))
    batch = task.data(backbone.processor, batch_size=4, seed=0).largest_batch()
    with attach(backbone, together(backbone, left_out="full")) as attachment:
        kept = {tensor.dtype for tensor in attachment.tensors.values() if tensor.is_floating_point()}
        assert kept == {torch.float32}  # A of LoRA-FA too, or nothing trains without autocast
        for is_on in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
                task.loss(task.forward(backbone.model, batch), batch).backward()
            assert all(parameter.grad is not None for parameter in attachment.parameters.values())
            backbone.model.zero_grad()


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        (Adapter("sparse", 1025), "its weight has 1,024 numbers"),
        (Adapter("lora_sparse", 2, {"density": 1.5}), "its density is a share, at most 1, got 1.5"),
        (Adapter("lora_xs", 33), "its weight has 32 singular values"),
    ],
)
def test_a_size_that_a_layer_does_not_have_is_refused(adapter: Adapter, why: str) -> None:
    assert obstacle(backbone_of("bert"), Site(0, "query"), adapter) == why


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
def test_sparse_numbers_are_the_largest_ones_and_travel_with_the_adapter(architecture: str) -> None:
    backbone = tiny_backbone(architecture)
    site = Site(0, "ffn_up")
    layer = backbone.model.get_submodule(backbone.shape(site).module)
    weight = layer.get_parameter("weight").detach()
    matrix = weight.mT if backbone.shape(site).transposed else weight
    with attach(backbone, Configuration({site: Adapter("sparse", 5)})) as attachment:
        state = attachment.state_dict()
        chosen = matrix.flatten()[state[f"{site}.sparse.indices"].long()].abs()
        assert torch.equal(
            chosen.sort(descending=True).values, matrix.abs().flatten().sort().values[-5:].flip(0)
        )
        state[f"{site}.sparse.indices"] = torch.arange(5, dtype=torch.int32)
        state[f"{site}.sparse.values"] = torch.ones(5)
        hidden = torch.randn(2, 3, matrix.shape[1])
        plain = layer(hidden)
        attachment.load_state_dict(state)
        expected = plain.clone()
        expected[..., 0] += hidden[..., :5].sum(-1)
        torch.testing.assert_close(layer(hidden), expected)


def test_of_equal_numbers_the_first_are_sparse() -> None:
    scores = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)).mul(3).round().bfloat16()
    in_order = scores.flatten().argsort(descending=True, stable=True)
    for count in (1, 7, 500, 32 * 64):
        assert torch.equal(places_of_largest(scores, count), in_order[:count].sort().values.int())
    assert places_of_largest(torch.empty(4, 4, device="meta"), 3).shape == (3,)


def test_lora_xs_takes_the_leading_singular_vectors() -> None:
    left, _, right = torch.linalg.svd(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    values = 0.9 ** torch.arange(64)  # they fall slowly: what is drawn has to be wider than the rank
    found = BetweenSingularVectors(left * values @ right, 8)
    torch.testing.assert_close(found.left.norm(dim=0), values[:8], atol=1e-4, rtol=0)


def test_sparse_numbers_may_be_any() -> None:
    backbone, site = backbone_of("bert"), Site(0, "query")
    configuration = Configuration({site: Adapter("sparse", 100, {"choice": "random"})})
    drawn = []
    for seed in (0, 0, 1):
        with attach(backbone, configuration, seed) as attachment:
            drawn.append(attachment.state_dict()[f"{site}.sparse.indices"])
    assert len(drawn[0].unique()) == 100
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_a_sparse_update_keeps_no_copy_of_a_weight_for_the_backward_pass() -> None:
    backbone = tiny_backbone("bert", intermediate_size=4096)
    batch = tiny_batch(rows=1, tokens=4, padding=0) | {"labels": torch.tensor([0])}
    sites = [Site(block, "ffn_up") for block in (0, 1)]
    weight = 4 * 4096 * 32
    with attach(backbone, Configuration()):
        head = MemoryCounter(backbone.model).count(batch, CROSS_ENTROPY)
    peaks = []
    for several in (sites[:1], sites):
        with attach(backbone, Configuration(dict.fromkeys(several, Adapter("sparse", 8)))):
            peaks.append(MemoryCounter(backbone.model).count(batch, CROSS_ENTROPY) - head)
    assert peaks[1] - peaks[0] < weight / 2


def test_lora_fa_is_a_lora_to_peft_and_needs_less_memory() -> None:
    backbone = tiny_backbone("bert")
    batch = tiny_batch(rows=3, tokens=40, padding=4) | {"labels": torch.arange(LABELS)}
    peaks = {}
    for name in ("lora", "lora_fa"):
        with attach(backbone, everywhere(backbone, name, size=2)) as attachment:
            peaks[name] = MemoryCounter(backbone.model).count(batch, CROSS_ENTROPY)
            names = {key.removesuffix(".weight").rpartition(".")[2] for key in attachment.parameters}
    assert "lora_B" in names
    assert "lora_A" not in names
    assert peaks["lora_fa"] < peaks["lora"]


def test_compacter_counts_what_it_shares_once() -> None:
    backbone = tiny_backbone("bert")
    configuration = everywhere(backbone, "compacter", size=2)
    own = sum(count_site(backbone, site, adapter) for site, adapter in configuration)
    assert own == 4 * 3 * (32 + 8)
    assert count_parameters(backbone, configuration) == own + 4**3 + backbone.head_parameters
    odd = tiny_backbone("bert", hidden_size=36, num_attention_heads=6)
    assert obstacle(odd, Site(0, "ffn"), Adapter("compacter", 1)) is None
    odd = tiny_backbone("bert", hidden_size=34, num_attention_heads=2)
    assert obstacle(odd, Site(0, "ffn"), Adapter("compacter", 1)) == "its width of 34 is no multiple of 4"


class TestLoReFT:
    def test_the_basis_is_orthonormal_and_moves_smoothly(self) -> None:
        backbone = tiny_backbone("bert")
        with attach(backbone, everywhere(backbone, "loreft", size=3)) as attachment:
            draw_parameters(attachment.parameters.values(), std=1.0)
            block = backbone.blocks[0].get_submodule("autopeft_loreft")
            rows = block.rows()  # type: ignore[operator]
            torch.testing.assert_close(rows @ rows.mT, torch.eye(3), atol=1e-5, rtol=0)
            draw_parameters([block.get_parameter("basis")], std=1e-4)
            assert (block.rows() - rows).abs().max() < 1e-2  # type: ignore[operator]

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_first_tokens_are_counted_without_padding(self, side: str) -> None:
        backbone = tiny_backbone("llama")
        site = Site(1, "ffn")
        batch = tiny_batch(rows=2, tokens=6, padding=3)
        if side == "left":
            batch = {name: tensor.flip(1) for name, tensor in batch.items()}
        seen: list[Tensor] = []
        configuration = Configuration({site: Adapter("loreft", 2, {"positions": 2})})
        with torch.no_grad():
            for std in (0.0, 1.0):
                with attach(backbone, configuration) as attachment:
                    draw_parameters(attachment.parameters.values(), std=std)
                    hook = backbone.blocks[1].register_forward_hook(
                        lambda _module, _inputs, output: seen.append(output)
                    )
                    backbone.model.model(**batch)  # without a mask that is known to the hooks
                    backbone.model(**batch)
                    hook.remove()
        changed = [
            (output - other).abs().amax(-1) > 1e-6 for output, other in zip(seen[:2], seen[2:], strict=True)
        ]
        assert changed[0].nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
        real = batch["attention_mask"].cumsum(1) * batch["attention_mask"]
        assert torch.equal(changed[1], (real > 0) & (real <= 2))

    def test_first_tokens_are_those_of_each_packed_row(self) -> None:
        backbone = Backbone(tiny_language_model("llama"), None, name="tiny", head=())
        ids = tiny_batch(rows=1, tokens=9, padding=0)["input_ids"]
        lengths = (4, 5)
        places = torch.cat([torch.arange(length) for length in lengths])[None]
        with attach(backbone, Configuration({Site(0, "ffn"): Adapter("loreft", 2, {"positions": 2})})) as own:
            draw_parameters(own.parameters.values(), std=1.0)
            packed = backbone.model(ids, position_ids=places, use_cache=False).logits
            alone = [backbone.model(row).logits for row in ids.split(lengths, dim=1)]
        torch.testing.assert_close(packed, torch.cat(alone, dim=1))

    def test_a_small_update_is_not_lost_in_bfloat16(self) -> None:
        intervention = Intervention(256, 4, 0, {}, "")
        draw_parameters(intervention.source.parameters(), std=1e-3)
        hidden = torch.randn(2, 16, 256)
        exact = intervention(intervention, None, hidden) - hidden
        with torch.autocast("cpu", torch.bfloat16):
            rounded = intervention(intervention, None, hidden) - hidden
        assert (rounded - exact).norm() < 0.02 * exact.norm()

    def test_a_text_that_is_generated_goes_on_behind_its_first_tokens(self) -> None:
        backbone = tiny_backbone("llama")
        ids = tiny_batch(rows=1, tokens=5, padding=0)["input_ids"]
        configuration = Configuration({Site(0, "ffn"): Adapter("loreft", 2, {"positions": 2})})
        with torch.no_grad(), attach(backbone, configuration) as attachment:
            draw_parameters(attachment.parameters.values(), std=1.0)
            whole = backbone.model(ids, attention_mask=torch.ones_like(ids), use_cache=True)
            first = backbone.model(ids[:, :4], attention_mask=torch.ones(1, 4).long(), use_cache=True)
            last = backbone.model(
                ids[:, 4:], attention_mask=torch.ones(1, 5).long(), past_key_values=first.past_key_values
            )
        torch.testing.assert_close(last.logits, whole.logits)

    def test_activations_that_are_computed_again_are_the_same(self) -> None:
        backbone = tiny_backbone("llama")
        batch = {name: tensor.flip(1) for name, tensor in tiny_batch(rows=2, padding=4).items()}
        configuration = Configuration({Site(0, "ffn"): Adapter("loreft", 2, {"positions": 2})})
        gradients = []
        with attach(backbone, configuration) as attachment:
            draw_parameters(attachment.parameters.values(), std=0.5)
            for again in (False, True):
                if again:
                    backbone.enable_checkpointing()
                backbone.model.train()
                backbone.model.zero_grad()
                backbone.model(**batch).logits.sum().backward()
                gradients.append([parameter.grad for parameter in attachment.parameters.values()])
        torch.testing.assert_close(gradients[1], gradients[0])

    def test_blocks_without_attention_are_refused(self) -> None:
        assert places(backbone_of("vit"), "loreft")
        assert places(mixer_of("convnext"), "loreft") == []
