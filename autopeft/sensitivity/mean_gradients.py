"""Gradients of the scored weights averaged over the batches, of as many sites at a time as there is room for.

Averaging before a reduction that is not linear takes an accumulator of the size of the weights. It lies on
the GPU where that has room, else in a temporary file. Where the budget for the file does not suffice for all
sites, they are scored in groups, each with a pass over the batches.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from autopeft.sensitivity.layer_gradients import LayerGradient
from autopeft.sensitivity.scored_matrices import MatrixSite

_BYTES = 4
_CHUNK = 2**24
_SHARE_OF_FREE = 0.5
_Totals = np.memmap[tuple[int], np.dtype[np.float32]]
_logger = logging.getLogger(__name__)


def mean_gradient_groups(sites: Sequence[MatrixSite], budget: int) -> list[Sequence[MatrixSite]]:
    """Return the sites in groups whose mean gradients are kept at the same time.

    That is all of them where they fit on their GPU. Else a group's file keeps within a budget of bytes and
    within half of what is free on the disk; a single site may take more.
    """
    if _fit_on_device(sites):
        return [sites]
    folder = tempfile.gettempdir()
    room = min(budget, int(_SHARE_OF_FREE * shutil.disk_usage(folder).free))
    groups: list[list[MatrixSite]] = [[]]
    for site in sites:
        if groups[-1] and bytes_of([*groups[-1], site]) > room:
            groups.append([])
        groups[-1].append(site)
    _logger.info(
        "Mean gradients of %d sites take %.1f MiB: %d passes over the batches with at most %.1f MiB in %s.",
        len(sites),
        bytes_of(sites) / 2**20,
        len(groups),
        max(map(bytes_of, groups)) / 2**20,
        folder,
    )
    return list(groups)


class MeanGradients:
    """Sums of gradients in single precision, on the GPU or in a temporary file.

    The file lies in the folder for temporary files (`TMPDIR`), takes 4 bytes an entry of the sites' weights
    and has no name: it is gone with this object or the process. It is mapped, so that a gradient is added
    where the sum lies. An OSError is raised where the disk has no room for it.
    """

    def __init__(self, sites: Sequence[MatrixSite], batches: int) -> None:
        self._sites = sites
        self._batches = batches
        ends = np.cumsum([0, *(math.prod(matrix.size) for matrix in sites)]).tolist()
        self._places = {matrix.site: slice(*ends[index : index + 2]) for index, matrix in enumerate(sites)}
        self._on_device = _fit_on_device(sites)
        device = sites[0].stored.device
        self._totals = torch.zeros(ends[-1], device=device) if self._on_device else _zeros_on_disk(ends[-1])

    def add(self, layer: LayerGradient) -> None:
        """Add the gradient of one layer on one batch; nothing where its site is not among the sites."""
        place = self._places.get(layer.site.site)
        if place is not None:
            gradient = layer.gradient.reshape(-1)
            total = self._totals[place]
            total += gradient if self._on_device else gradient.cpu().numpy()

    def mean(self, matrix: MatrixSite) -> Tensor:
        """Return Ḡ of a site, (out, in) in single precision, on the weight's device; 0 without gradients."""
        mean = torch.as_tensor(self._totals[self._places[matrix.site]]) / self._batches
        return mean.view(matrix.size).to(matrix.stored.device)

    def means(self) -> Iterator[tuple[MatrixSite, Tensor]]:
        """Yield every site with its Ḡ, one after another."""
        for matrix in self._sites:
            yield matrix, self.mean(matrix)


def bytes_of(sites: Sequence[MatrixSite]) -> int:
    """Return how many bytes the mean gradients of some sites take."""
    return _BYTES * sum(math.prod(matrix.size) for matrix in sites)


def _zeros_on_disk(entries: int) -> _Totals:
    """Map a temporary file. Zeros are written first: a mapped page without room on the disk is fatal."""
    with tempfile.TemporaryFile() as file:
        for start in range(0, _BYTES * entries, _CHUNK):
            file.write(bytes(min(_CHUNK, _BYTES * entries - start)))
        file.flush()
        return np.memmap(file, dtype=np.float32, mode="r+", shape=(entries,))


def _fit_on_device(sites: Sequence[MatrixSite]) -> bool:
    device, *others = {matrix.stored.device for matrix in sites}
    if others or device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return bytes_of(sites) <= _SHARE_OF_FREE * free
