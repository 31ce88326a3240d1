"""Learn which ranks of a LoRA are needed: SoRA."""

from __future__ import annotations

from autopeft.callbacks.proximal_gates import ProximalGates


class SoRA(ProximalGates):
    """Learn a gate for every rank, and drop the ranks whose gate falls to exactly 0.

    Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models" (SoRA), 2023:
    y = W·x + s·B·(g ⊙ A·x), and after each step g ← T_ηλ(g − η·∂L/∂g) with
    T_ξ(x) = sign(x)·max(|x| − ξ, 0). Gates start at 1, that is, as an ordinary LoRA. A gate at 0
    comes back where |∂L/∂g| exceeds λ.

    Args:
        penalty: λ ≥ 0: a gate dies where its gradient stays below it. 0 learns gates without pruning.
        learning_rate: η > 0 of the gates. The shrinkage a step is η·λ.

    Raises:
        ValueError: See `ProximalGates` and `RankGates`.
    """

    def __init__(self, penalty: float, *, learning_rate: float = 0.1) -> None:
        super().__init__(penalty, learning_rate=learning_rate)
