"""The scores there are: what each needs, what it costs, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class ScoreSpec:
    """What a score's name stands for.

    Attributes:
        name: The name to ask for it by.
        formula: The formula. W is a weight (out, in), G the loss' gradient with respect to it on one
            batch, Ḡ the mean of G over the batches.
        citation: Where it was proposed.
        cheap: Whether it costs at most one forward and backward pass a batch, shared by all scores.
        needs_batches: Whether it looks at batches of training data.
    """

    name: str
    formula: str
    citation: str
    cheap: bool = True
    needs_batches: bool = True


_SPECS = (
    ScoreSpec("gradient_norm", "mean over batches of ‖G‖_F", "SPEFT (Liu et al., arXiv:2412.13488)"),
    ScoreSpec(
        "fisher",
        "mean over batches and over the entries of G²",
        "On Surgical Fine-tuning for Language Encoders (Lodha et al., EMNLP Findings 2023)",
    ),
    ScoreSpec("snip", "mean over batches of Σ |W ⊙ G|", "SNIP (Lee et al., ICLR 2019, arXiv:1810.02340)"),
    ScoreSpec(
        "taylor2",
        "mean over batches of Σ (W ⊙ G)²",
        "Taylor-FO (Molchanov et al., CVPR 2019, arXiv:1906.10771), as used by SPEFT",
    ),
    ScoreSpec("gora", "mean over the entries of |W ⊙ Ḡ|", "GoRA (He et al., arXiv:2502.12171)"),
    ScoreSpec(
        "gradient_spectrum",
        "sqrt(Σ_{i≤r} σ_i(Ḡ)²)",
        "LoRA-GA (Wang et al., arXiv:2407.05000); gradient projection score of EvoLo-MOEAD",
    ),
    ScoreSpec(
        "explained_variance",
        "sum of the r largest explained-variance ratios of the layer's inputs",
        "EVA (Paischer et al., arXiv:2410.07170)",
    ),
    ScoreSpec("condition_number", "1 / κ(W) = σ_min(W) / σ_1(W)", "KappaTune", needs_batches=False),
    ScoreSpec(
        "synflow",
        "Σ |W ⊙ ∂R/∂W|, R the summed logits with |parameters| and embeddings of ones",
        "SynFlow (Tanaka et al., NeurIPS 2020, arXiv:2006.05467), as used by SPEFT",
    ),
    ScoreSpec(
        "grasp",
        "Σ W ⊙ (H Ḡ), H the Hessian with respect to all scored weights",
        "GraSP (Wang et al., ICLR 2020, arXiv:2002.07376), with the sign of SPEFT",
        cheap=False,
    ),
    ScoreSpec(
        "hessian",
        "½ Σ h_ii w_ii², h the Hessian's diagonal by Hutchinson's estimate",
        "Sensitivity-LoRA; the estimate: Bekas et al., Applied Numerical Mathematics 2007",
        cheap=False,
    ),
    ScoreSpec(
        "leave_one_out",
        "validation score after training an adapter on the site alone",
        "NASPEFT",
        cheap=False,
        needs_batches=False,
    ),
    ScoreSpec("random", "uniform in [0, 1), drawn anew for every seed", "a control", needs_batches=False),
    ScoreSpec("uniform", "1", "a control", needs_batches=False),
)

SCORES: Mapping[str, ScoreSpec] = MappingProxyType({spec.name: spec for spec in _SPECS})
"""Every score, by name."""

CHEAP_SCORES: tuple[str, ...] = tuple(name for name, spec in SCORES.items() if spec.cheap)
"""The scores computed unless others are asked for."""
