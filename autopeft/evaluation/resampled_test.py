"""The metric on the test split, with the noise of which rows happen to be in it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from autopeft.core.configuration import Configuration
from autopeft.evaluation.evaluator import Evaluator
from autopeft.methods import attach

DRAWS = 100
"""Bootstrap samples of the test split."""


def resampled_test(
    evaluator: Evaluator, configuration: Configuration, state: Mapping[str, Tensor]
) -> list[float]:
    """Return the monitored metric on the test split, then on bootstrap samples of its batches.

    The samples are the same for every model, so that differences between models can be taken. Batches stand
    for rows: of these a task's metrics cannot be computed one by one.
    """
    loader, task, name = evaluator.data.test_dataloader(), evaluator.task, evaluator.monitor.name
    count = len(loader)
    draws = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=DRAWS)
    samples = [task.metric_collection().to(evaluator.device) for _ in range(1 + DRAWS)]
    model = evaluator.backbone.model
    with attach(evaluator.backbone, configuration, evaluator.seed) as attachment:
        attachment.load_state_dict(state)
        model.eval()
        with torch.inference_mode(), evaluator.backbone.computing_in(evaluator.training.resolved_precision()):
            for number, given in enumerate(loader):
                batch = {key: tensor.to(evaluator.device) for key, tensor in given.items()}
                output = task.forward(model, batch)
                loss = task.loss(output, batch)
                for metrics, times in zip(samples, (1, *draws[:, number]), strict=True):
                    for _ in range(times):
                        task.update_metrics(metrics, output, batch, loss)
            return [float(metrics.compute()[name]) for metrics in samples]
