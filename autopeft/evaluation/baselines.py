"""What a front is to be compared with: every weight trained, and the head alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autopeft.core.configuration import Configuration
from autopeft.core.evaluation import Evaluation
from autopeft.evaluation.evaluator import Evaluator
from autopeft.methods import Attachment, FullFineTuning

FULL_LEARNING_RATES = (5e-5, 1e-4, 3e-4)
HEAD_LEARNING_RATES = (1e-3, 5e-3, 2e-2)


@dataclass(frozen=True)
class Baseline:
    """A baseline's best evaluation over its learning rates.

    Attributes:
        name: "full fine-tuning" or "head alone".
        evaluation: The evaluation with the best metric in validation.
        tried: Number of learning rates tried.
    """

    name: str
    evaluation: Evaluation
    tried: int


def full_fine_tuning(evaluator: Evaluator, learning_rates: Sequence[float] = FULL_LEARNING_RATES) -> Baseline:
    """Train every weight under the search's training settings, once a learning rate.

    Raises:
        RuntimeError: Not one of the trainings completed.
    """
    return _best("full fine-tuning", evaluator, learning_rates, FullFineTuning)


def head_alone(evaluator: Evaluator, learning_rates: Sequence[float] = HEAD_LEARNING_RATES) -> Baseline:
    """Train the head on the frozen backbone under the search's settings, once a learning rate.

    Raises:
        RuntimeError: Not one of the trainings completed.
    """
    return _best("head alone", evaluator, learning_rates, Attachment)


def _best(
    name: str, evaluator: Evaluator, learning_rates: Sequence[float], attachment: type[Attachment]
) -> Baseline:
    evaluations = [
        evaluator.train(Configuration(learning_rate=rate), attachment=attachment).evaluation
        for rate in learning_rates
    ]
    complete = [one for one in evaluations if one.status == "complete"]
    if not complete:
        raise RuntimeError(f"The baseline {name} failed: {evaluations[-1].reason}.")
    best = max(complete, key=lambda one: one.values[evaluator.monitor])
    return Baseline(name, best, len(evaluations))
