"""The metric on the test split, with the noise of which rows happen to be in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from autopeft.core.configuration import Configuration
from autopeft.evaluation.evaluator import Evaluator
from autopeft.methods import attach
from autopeft.tasks.base import Batch

_logger = logging.getLogger(__name__)
DRAWS = 100
"""Bootstrap samples of the test split."""
FEWEST_BATCHES = 50
"""To draw bootstrap samples from, where there are as many rows; of fewer, samples vary too little."""


def resampled_test(
    evaluator: Evaluator, configuration: Configuration, state: Mapping[str, Tensor]
) -> list[float]:
    """Return the monitored metric on the test split, then on bootstrap samples of its batches.

    The samples are the same for every model, so that differences between models can be taken. Batches stand
    for rows: of these a task's metrics cannot be computed one by one.
    """
    loader, task = in_small_batches(evaluator.data.test_dataloader()), evaluator.task
    name = evaluator.monitor.name
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


def in_small_batches(loader: DataLoader[Batch]) -> DataLoader[Batch]:
    """Return a loader of the same rows in `FEWEST_BATCHES` batches or more, or else one by one.

    A loader that makes its own batches is returned as it is, and the log says so.
    """
    if len(loader) >= FEWEST_BATCHES:
        return loader
    if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
        _logger.warning(
            f"The test split comes in {len(loader)} batches that cannot be made smaller: of so few the "
            "interval of a verdict is too narrow."
        )
        return loader
    rows = [row for batch in loader.batch_sampler for row in batch]
    size = max(1, len(rows) // FEWEST_BATCHES)
    batches = [rows[at : at + size] for at in range(0, len(rows), size)]
    return DataLoader(
        loader.dataset, batch_sampler=batches, collate_fn=loader.collate_fn, num_workers=loader.num_workers
    )
