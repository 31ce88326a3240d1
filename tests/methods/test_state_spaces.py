"""What is trained within state spaces: A and D of some channels, and an offset of the state."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.mamba import modeling_mamba

from autopeft.core.configuration import Adapter, Configuration, Site
from autopeft.evaluation.memory.counter import MemoryCounter
from autopeft.export.merging import merged_model
from autopeft.export.verification import trained_logits
from autopeft.methods import attach, obstacle
from autopeft.models.backbone import Backbone
from autopeft.search_spaces import PerLayer
from benchmarks.memory import measure_live_storage
from tests.every_method import ON_STATE_SPACES
from tests.exports import difference, export, trained
from tests.tasks.test_causal_lm import task_of
from tests.tiny_models import OPTIONS, draw_parameters, everywhere, tiny_batch, tiny_language_model

SITE = Site(0, "state_space")
OTHERS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "attn_layer_indices": [1]},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4},
}


@cache
def backbone_of(architecture: str) -> Backbone:
    return Backbone(tiny_language_model(architecture), None, name=f"tiny-{architecture}", head=())


def logits_of(backbone: Backbone, **options: Any) -> Tensor:
    found: Tensor = backbone.model(**tiny_batch(), **options).logits
    return found


def mixer_of(backbone: Backbone) -> nn.Module:
    return backbone.model.get_submodule(backbone.shape(SITE).module)


@pytest.mark.parametrize(
    ("architecture", "channels", "states", "source"),
    [
        ("mamba", 64, 4, "mixer.x_proj"),
        ("falcon_mamba", 64, 4, "mixer.c_layernorm"),
        ("jamba", 64, 4, "mamba.c_layernorm"),
        ("mamba2", 8, 1, ""),
        ("bamba", 8, 1, ""),
        ("falcon_h1", 8, 1, ""),
    ],
)
def test_what_is_found(architecture: str, channels: int, states: int, source: str) -> None:
    same = "mamba" if architecture == "falcon_mamba" else architecture
    options = OPTIONS.get(same) or {**OPTIONS["llama"], **OTHERS[architecture]}
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(architecture, **options))
    backbone = Backbone(model, None, name=architecture, head=())
    shape = backbone.shape(SITE)
    assert (shape.in_features, shape.out_features) == (channels, states)
    assert shape.output_matrix_module == (f"layers.0.{source}" if source else "")
    assert obstacle(backbone, SITE, Adapter("sdt", channels)) is None
    assert (
        obstacle(backbone, SITE, Adapter("sdt", channels + 1)) == f"its state space has {channels} channels"
    )
    why = obstacle(backbone, SITE, Adapter("state_offset"))
    assert why == (None if source else "no module of its state space returns C")
    for method in ON_STATE_SPACES:
        with attach(backbone, everywhere(backbone, method)):  # to count memory, without weights
            pass


class TestSDT:
    @pytest.mark.parametrize("architecture", ["mamba", "mamba2"])
    def test_channels_lie_evenly_and_travel_along(self, architecture: str) -> None:
        backbone = backbone_of(architecture)
        mixer = mixer_of(backbone)
        rates = mixer.get_parameter("A_log").detach().clone()
        skips = mixer.get_parameter("D").detach().clone()
        with attach(backbone, Configuration({SITE: Adapter("sdt", 3)})) as attachment:
            state = attachment.state_dict()
            chosen = [0, len(rates) // 3, 2 * len(rates) // 3]
            assert state[f"{SITE}.sdt.channels"].tolist() == chosen
            state[f"{SITE}.sdt.channels"] = torch.tensor([0, 2, 5], dtype=torch.int32)
            state[f"{SITE}.sdt.A_log"].fill_(1.0)
            state[f"{SITE}.sdt.D"].fill_(2.0)
            attachment.load_state_dict(state)
            rates[[0, 2, 5]] += 1.0
            skips[[0, 2, 5]] += 2.0
            assert torch.equal(mixer.A_log, rates)  # type: ignore[arg-type]
            assert torch.equal(mixer.D, skips)  # type: ignore[arg-type]

    def test_parameters_keep_their_order(self) -> None:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", **OPTIONS["mamba"]))
        backbone = Backbone(model, None, name="new", head=())
        names = [name for name, _ in model.named_parameters()]
        with attach(backbone, Configuration({SITE: Adapter("sdt", 3)})):
            pass
        assert [name for name, _ in model.named_parameters()] == names

    def test_the_kernel_of_training_is_given_what_is_trained(self) -> None:
        backbone, given = backbone_of("mamba"), []
        with attach(backbone, everywhere(backbone, "sdt")) as attachment:
            draw_parameters(attachment.parameters.values(), std=0.3)
            expected = logits_of(backbone)

            def kernel(*arguments: Any, **_options: Any) -> None:
                given.append((arguments[7], arguments[10]))

            backbone.model.train()
            with patch.object(modeling_mamba, "mamba_inner_fn", kernel):
                torch.testing.assert_close(logits_of(backbone), expected)
            backbone.model.eval()
            rates, skips = given[0]
            mixer: Any = mixer_of(backbone)
            assert torch.equal(rates, -mixer.A_log.exp())
            assert torch.equal(skips, mixer.D)

    @pytest.mark.parametrize(
        ("architecture", "dtype"), [("mamba", torch.float32), ("mamba2", torch.bfloat16)]
    )
    def test_is_merged_into_a_model_that_transformers_loads(
        self, architecture: str, dtype: torch.dtype, tmp_path: Path
    ) -> None:
        model = tiny_language_model(architecture, dtype=dtype)
        backbone = Backbone(model, None, name="tiny", head=(), auto_class=AutoModelForCausalLM)
        configuration = everywhere(backbone, "sdt")
        export(backbone, configuration, tmp_path / "adapter", fresh=False)  # loads it again and compares
        export(backbone, configuration, tmp_path / "merged", target="merged", verify=False)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert {each.dtype for each in loaded.parameters()} == {dtype}
        assert {name for name, _ in loaded.named_parameters()} == {
            name for name, _ in model.named_parameters()
        }
        expected = trained_logits(backbone, configuration, trained(backbone, configuration), tiny_batch())
        assert difference(loaded, tiny_batch(), expected) <= (1e-5 if dtype == torch.float32 else 0.1)


def mamba_by_hand(mixer: Any, hidden: Tensor, mask: Tensor, offset: Tensor) -> Tensor:
    """Return what a Mamba mixer computes, with h' added to the state wherever the state is read.

    Gu and Dao, "Mamba", 2023, algorithm 2; Kang et al., 2025, equation 8.
    """
    inner, gate = (mixer.in_proj(hidden * mask)).chunk(2, dim=-1)
    kernel = mixer.conv1d.weight.squeeze(1)
    padded = functional.pad(inner, (0, 0, kernel.shape[1] - 1, 0))
    windows = padded.unfold(1, kernel.shape[1], 1)
    inner = functional.silu((windows * kernel).sum(-1) + mixer.conv1d.bias) * mask
    step, into, out_of = mixer.x_proj(inner).split(
        [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size], dim=-1
    )
    step = functional.softplus(mixer.dt_proj(step))
    state, found = torch.zeros(len(hidden), *offset.shape), []
    for token in range(hidden.shape[1]):
        at = step[:, token, :, None]
        state = (-mixer.A_log.exp() * at).exp() * state + at * into[:, token, None] * inner[:, token, :, None]
        read = ((state + offset) * out_of[:, token, None]).sum(-1) + mixer.D * inner[:, token]
        found.append(read * functional.silu(gate[:, token]))
    projected: Tensor = mixer.out_proj(torch.stack(found, dim=1))
    return projected


class TestStateOffset:
    @torch.no_grad()
    def test_is_added_to_the_state_wherever_it_is_read(self) -> None:
        backbone = backbone_of("mamba")
        mixer, batch = mixer_of(backbone), tiny_batch(rows=2, tokens=6, padding=2)
        hidden, mask = torch.randn(2, 6, 32), batch["attention_mask"]
        offset = torch.randn(64, 4)
        plain, expected = (mamba_by_hand(mixer, hidden, mask[..., None], by) for by in (0 * offset, offset))
        with attach(backbone, Configuration({SITE: Adapter("state_offset")})) as attachment:
            torch.testing.assert_close(mixer(hidden, attention_mask=mask), plain)
            attachment.load_state_dict({f"{SITE}.state_offset.offset": offset})
            torch.testing.assert_close(mixer(hidden, attention_mask=mask), expected)

    @pytest.mark.parametrize("architecture", ["mamba", "jamba"])
    @torch.no_grad()
    def test_a_text_that_is_generated_goes_on_from_its_state(self, architecture: str) -> None:
        backbone = backbone_of(architecture)
        ids = tiny_batch(rows=2, tokens=6, padding=0)["input_ids"]
        with attach(backbone, everywhere(backbone, "state_offset")) as attachment:
            draw_parameters(attachment.parameters.values(), std=0.5)
            whole = backbone.model(ids).logits
            cache = backbone.model(ids[:, :4], use_cache=True)
            kept = getattr(cache, "cache_params", None) or cache.past_key_values
            name = "cache_params" if "cache_params" in cache else "past_key_values"
            for token in (4, 5):
                step = backbone.model(ids[:, token : token + 1], use_cache=True, **{name: kept})
                torch.testing.assert_close(step.logits[:, -1], whole[:, token])

    def test_no_kernel_of_training_reads_past_it(self) -> None:
        backbone = backbone_of("mamba")
        with attach(backbone, everywhere(backbone, "state_offset")) as attachment:
            draw_parameters(attachment.parameters.values(), std=0.5)
            expected = logits_of(backbone)
            backbone.model.train()
            past = patch.object(modeling_mamba, "mamba_inner_fn", side_effect=AssertionError("read past"))
            with past:
                torch.testing.assert_close(logits_of(backbone), expected)
            assert mixer_of(backbone).training
            backbone.model.eval()
        backbone.model.train()
        with past, pytest.raises(AssertionError, match="read past"):  # without it, there the kernel is called
            logits_of(backbone)
        backbone.model.eval()

    def test_a_pass_that_fails_leaves_nothing_behind(self) -> None:
        backbone = backbone_of("mamba")
        with attach(backbone, Configuration({SITE: Adapter("state_offset")})):
            backbone.model.train()
            mixer: Any = mixer_of(backbone)
            hook = mixer.out_proj.register_forward_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                logits_of(backbone)
            hook.remove()
            assert mixer.training
            assert not mixer.autopeft_state_offset._seen
            backbone.model.eval()

    def test_activations_that_are_computed_again_are_the_same(self) -> None:
        backbone = Backbone(tiny_language_model("mamba"), None, name="tiny", head=())
        gradients = []
        with attach(backbone, everywhere(backbone, "state_offset")) as attachment:
            draw_parameters(attachment.parameters.values(), std=0.5)
            for again in (False, True):
                if again:
                    backbone.enable_checkpointing()
                backbone.model.train()
                backbone.model.zero_grad()
                logits_of(backbone).sum().backward()
                gradients.append([parameter.grad for parameter in attachment.parameters.values()])
        torch.testing.assert_close(gradients[1], gradients[0])

    def test_the_gate_is_that_of_an_adapted_projection(self) -> None:
        backbone = backbone_of("mamba")
        both = Configuration({Site(0, "mixer.in_proj"): Adapter("lora", 2), SITE: Adapter("state_offset")})
        state = trained(backbone, both, std=0.5)
        expected = trained_logits(backbone, both, state, tiny_batch())
        lora = {name: tensor for name, tensor in state.items() if ".lora." in name}
        merged = merged_model(backbone, Configuration({Site(0, "mixer.in_proj"): Adapter("lora", 2)}), lora)
        alone = Backbone(merged.eval(), None, name="merged", head=())
        with torch.no_grad(), attach(alone, Configuration({SITE: Adapter("state_offset")})) as attachment:
            attachment.load_state_dict({name: state[name] for name in attachment.tensors})
            torch.testing.assert_close(logits_of(alone), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "methods"), [("mamba", ON_STATE_SPACES), ("mamba2", ("sdt",))])
def test_memory_is_counted(architecture: str, methods: tuple[str, ...]) -> None:
    backbone, task = backbone_of(architecture), task_of()
    batch = tiny_batch(rows=2, tokens=4, padding=0)
    batch |= {"labels": batch["input_ids"]}
    adapters = [Adapter(method, 3 if method == "sdt" else None) for method in methods]
    with attach(backbone, Configuration({SITE: adapters})):
        counted = MemoryCounter(backbone.model).count(batch, task)
        backbone.model.train()
        assert counted == pytest.approx(measure_live_storage(backbone.model, batch, task), rel=0.01)
        backbone.model.eval()


def test_a_space_offers_the_sizes_that_a_state_space_has() -> None:
    backbone = backbone_of("mamba2")
    space = PerLayer(methods=("lora", "sdt"))
    space.validate(backbone)
    (choice,) = space.choices(backbone)[SITE].values()
    assert [*choice.sizes] == [4, 8]
