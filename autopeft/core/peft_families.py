"""The adapter families of peft that sit on linear layers, a row each.

A row is all that a family needs: `autopeft.methods.peft_family` asks the installed peft for the rest. Rates
are those that won in peft's method comparison, or the papers', beside LoRA's 3e-4. Those of DoRA, LoKr, MiSS,
VeRA, OFT, RoAd and FourierFT were tried on three backbones (`benchmarks/family_rates.py`): MiSS, VeRA, OFT
and RoAd have a rate near what was best, the others kept theirs. Nobody measured that of C3A, nor the
default, LoRA's own, for HRA, PSOFT, PEANuT, DEFT and GLoRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autopeft.core.method_spec import LORA_MINIMUMS, LORA_OPTIONS, PeftSpec


def _family(name: str, symbol: str, size_name: str | None, **given: Any) -> PeftSpec:
    """Return a family whose size is peft's `r`, unless it is said."""
    given = {"peft_type": name.upper(), "size_field": "r" if size_name else "", **given}
    if "alpha_field" in given:
        given = {"options": {"scaling": 1.0}, "minimums": {"scaling": 0.0}, **given}
    return PeftSpec(name=name, symbol=symbol, size_name=size_name, **given)


def _lora(name: str, symbol: str, **config: Any) -> PeftSpec:
    """Return LoRA with an option of its config that makes it a method of its own."""
    return _family(
        name,
        symbol,
        "rank",
        peft_type="LORA",
        is_lora=True,
        options=LORA_OPTIONS,
        minimums=LORA_MINIMUMS,
        fields={"alpha": "lora_alpha", "rslora": "use_rslora", "dropout": "lora_dropout"},
        config=config,
    )


_INITIALISED: Mapping[str, Any] = {"init_weights": True}


def _bases(name: str, symbol: str, size_name: str, **given: Any) -> PeftSpec:
    """Return few numbers between random matrices, which are drawn by a seed and need not be in the file."""
    config = {"save_projection": False, **given.pop("config", {})}
    return _family(name, symbol, size_name, config=config, **given)


PEFT_FAMILIES = (
    # Liu et al., "DoRA", 2024: the magnitude of each column is trained beside a LoRA of its direction.
    _lora("dora", "D", use_dora=True),
    # Meng et al., "PiSSA", 2024: LoRA that starts from the largest singular values.
    _lora("pissa", "Pi", init_lora_weights="pissa"),
    # Büyükakyüz, "OLoRA", 2024: LoRA that starts from a QR decomposition.
    _lora("olora", "Ol", init_lora_weights="olora"),
    # Zhang et al., "AdaLoRA", 2023: B·diag(E)·A, with the ranks that the configuration says. peft wants a
    # schedule, which nobody follows here.
    _family(
        "adalora",
        "Ad",
        "rank",
        size_field="init_r",
        alpha_field="lora_alpha",
        config={"total_step": 1},
        rate=3.0,
    ),
    # Hyeon-Woo et al., "FedPara", 2022: the Hadamard product of two low-rank matrices.
    _family("loha", "Lh", "rank", alpha_field="alpha", rate=3.0),
    # Yeh et al., "Navigating Text-To-Image Customization", 2024: a Kronecker product.
    _family("lokr", "Lk", "rank", alpha_field="alpha", rate=7.0),
    # Huang et al., "HiRA", 2025: the Hadamard product of the weight and a low-rank matrix.
    _family("hira", "Hi", "rank", rate=15.0),
    # Bini et al., "DeLoRA", 2025: LoRA with normalised directions and a strength.
    _family("delora", "De", "rank", rate=3.0),
    # Jung et al., "GraLoRA", 2025: a LoRA for each of 2 × 2 parts of a weight.
    _family("gralora", "Gr", "rank", sizes=(2, 64), alpha_field="alpha"),
    # Albert et al., "RandLoRA", 2025; see `autopeft.methods.sized_by_shape`.
    _bases(
        "randlora",
        "Ra",
        "bases",
        sizes=(1, 16),
        alpha_field="randlora_alpha",
        options={"scaling": 20.0},
        rate=3.0,
    ),
    # Kopiczko et al., "VeRA", 2024: vectors that scale random matrices, which all sites share.
    _bases("vera", "V", "rank", sizes=(16, 256), rate=20.0),
    # Fillioux et al., "PVeRA: Probabilistic Vector-Based Random Matrix Adaptation", 2025: VeRA with a
    # distribution in the place of what passes between the matrices.
    _bases("pvera", "Pv", "rank", sizes=(16, 256), rate=7.0),
    # Li et al., "Uni-LoRA", 2025: one vector for all sites, put in the places of a LoRA's numbers. peft draws
    # it (`init_theta_d_bound`), as gradients would vanish at zeros, so that nothing starts at the base.
    _family("unilora", "U", "length", size_field="theta_d_length", sizes=(64, 4096), rate=7.0),
    # Morris et al., "Learning to Reason in 13 Parameters", 2026: one vector for all sites.
    _bases(
        "tinylora", "T", "length", size_field="u", sizes=(4, 256), config={"weight_tying": 1.0}, rate=10.0
    ),
    # Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", 2023.
    _family("oft", "Of", "block size", size_field="oft_block_size", sizes=(2, 32), rate=5.0),
    # Yuan et al., "Bridging The Gap between Low-rank and Orthogonal Adaptation", 2024.
    _family("hra", "H", "reflections", sizes=(2, 32)),
    # Liao and Monz, "3-in-1: 2D Rotary Adaptation", 2024.
    _family("road", "Ro", None, config={"group_size": 2}, rate=10.0),
    # Wu et al., "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation", 2026: an orthogonal
    # matrix of the size between the principal parts of a weight.
    _family("psoft", "Ps", "rank", alpha_field="psoft_alpha"),
    # Nayak et al., "Sculpting Subspaces", 2025; see `autopeft.methods.sized_by_shape`.
    _family("osf", "Os", "rank", size_field="effective_rank", rate=0.15),
    # Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", 2024.
    _family(
        "fourierft",
        "Fo",
        "frequencies",
        size_field="n_frequency",
        sizes=(16, 1024),
        rate=30.0,
        config=_INITIALISED,
    ),
    # Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution", 2024; see
    # `autopeft.methods.sized_by_shape`. In peft's comparison 0.3 won, which would be a rate of 1,000; this is
    # less, and not measured.
    _family("c3a", "Cc", "blocks", size_field="block_size", sizes=(1, 16), rate=300.0, config=_INITIALISED),
    # Kang and Yin, "MiSS", 2025: one small matrix, repeated over the input.
    _family("miss", "Mi", "rank", rate=0.5),
    # Zhong et al., "PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers", 2024: a small
    # network of the weight makes its update.
    _family("peanut", "Pe", "rank"),
    # Kumar et al., "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models", 2025: an update
    # within and beside a subspace that is projected out.
    _family("deft", "Df", "rank"),
    # Chavan et al., "One-for-All: Generalized LoRA", 2023: support for weight, bias and output.
    _family("glora", "Gl", "rank"),
)
"""Every family that is a row."""

_PROMPTS = "it is put before the tokens of a whole model, not on a site"
LEFT_OUT: Mapping[str, str] = {
    "ADAMSS": "it clusters by scikit-learn as a layer is made, and what it counts depends on the clusters",
    "ADAPTION_PROMPT": "it replaces whole attention modules of Llama, Mistral and GPT-2 alone",
    "BEFT": "`bitfit` trains the same biases, of any layer",
    "BOFT": "it compiles a CUDA extension as a layer is made, and leaves CC and CXX set",
    "CARTRIDGE": _PROMPTS,
    "CPT": _PROMPTS,
    "FROD": "it decomposes all weights of a kind each time it is attached: 82 s for BERT-base on one core, "
    "where LoRA takes 0.1 s",
    "LILY": "it weighs what layers share by the mean over a batch's tokens: a prediction depends on other "
    "rows, and in a language model on the tokens to come",
    "MULTITASK_PROMPT_TUNING": _PROMPTS,
    "POLY": "it learns a mixture over several tasks",
    "PREFIX_TUNING": "`prefix` has a length of its own in every block",
    "PROMPT_TUNING": _PROMPTS,
    "P_TUNING": _PROMPTS,
    "SHADOW": "it is a second model, and peft cannot inject it",
    "SHIRA": '`sparse` trains the same numbers with the choice "random"; the memory of peft\'s cannot be '
    "counted, as a sparse tensor's gradient has no shape without data",
    "SUPERTUNING": "`sparse` trains the same numbers, the largest of each weight",
    "TRAINABLE_TOKENS": "it trains rows of the embedding, below the first block, where no site is; which is "
    "up to the tokenizer and nothing to search",
    "VBLORA": "its memory cannot be counted: a forward pass in training looks at its numbers",
    "WAVEFT": "its memory cannot be counted: how many numbers it has to place depends on their values",
    "XLORA": "it mixes adapters that are trained already",
}
"""Types of peft's that are no method here, and why."""
