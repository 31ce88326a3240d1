"""Gradients of the scored weights averaged over the batches, of as many sites at a time as there is room for.

Averaging before a reduction that is not linear takes an accumulator of the size of the weights. It lies on
the GPU where that has room, else in a temporary file, of which one site's part is in memory at a time. Where
the budget for the file does not suffice for all sites, they are scored in groups, each with a pass over the
batches.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from autopeft.core.atomic_files import naming_file
from autopeft.sensitivity.layer_gradients import LayerGradient
from autopeft.sensitivity.scored_matrices import MatrixSite, groups_within

_BYTES = 4
_SHARE_OF_FREE = 0.5
_logger = logging.getLogger(__name__)


def mean_gradient_groups(
    sites: Sequence[MatrixSite], budget: int, *, in_file: bool = False
) -> list[Sequence[MatrixSite]]:
    """Return the sites in groups whose mean gradients are kept at the same time.

    That is all of them where they fit on their GPU, unless they are to be in a file. A group's file keeps
    within a budget of bytes and within half of what is free on the disk; a single site may take more.
    """
    if not in_file and _fit_on_device(sites):
        return [sites]
    folder = tempfile.gettempdir()
    room = min(budget, int(_SHARE_OF_FREE * shutil.disk_usage(folder).free))
    groups = groups_within(room, sites, lambda matrix: bytes_of([matrix]))
    whole, largest = bytes_of(sites) / 2**20, max(map(bytes_of, groups)) / 2**20
    _logger.info(
        f"Mean gradients of {len(sites)} sites take {whole:.1f} MiB: {len(groups)} passes over the batches "
        f"with at most {largest:.1f} MiB in {folder}."
    )
    return groups


class MeanGradients:
    """Sums of gradients in single precision, on the GPU or in a file.

    The file is read and written a site at a time: the pages of a mapped one would all count as this process'
    memory. An OSError is raised where the disk has no room for it.

    Args:
        sites: The sites.
        batches: Number of batches.
        file: An empty file, of which 4 bytes an entry of the sites' weights are used.
        in_file: Whether the sums are in the file even where the GPU has room.
    """

    def __init__(
        self, sites: Sequence[MatrixSite], batches: int, file: IO[bytes], *, in_file: bool = False
    ) -> None:
        self._sites = sites
        self._batches = batches
        self._file = file
        ends = list(accumulate((math.prod(matrix.size) for matrix in sites), initial=0))
        self._places = {matrix.site: slice(*ends) for matrix, ends in zip(sites, pairwise(ends), strict=True)}
        self._on_device: Tensor | None = None
        if not in_file and _fit_on_device(sites):
            self._on_device = torch.zeros(ends[-1], device=sites[0].stored.device)
        else:
            with _naming_folder():
                file.truncate(_BYTES * ends[-1])  # reads as zeros

    def add(self, layer: LayerGradient) -> None:
        """Add the gradient of one layer on one batch; nothing where its site is not among the sites."""
        place = self._places.get(layer.site.site)
        if place is not None:
            total = self._total(place)
            total += layer.gradient.reshape(-1).to(total.device)
            if self._on_device is None:
                with _naming_folder():
                    self._file.seek(_BYTES * place.start)
                    self._file.write(total.numpy().data)

    def mean(self, matrix: MatrixSite) -> Tensor:
        """Return Ḡ of a site, (out, in) in single precision, on the weight's device; 0 without gradients."""
        mean = self._total(self._places[matrix.site]) / self._batches
        return mean.view(matrix.size).to(matrix.stored.device)

    def _total(self, place: slice) -> Tensor:
        """Return the sum of a site so far: on the GPU a view, else a copy."""
        if self._on_device is not None:
            return self._on_device[place]
        total = torch.empty(place.stop - place.start)
        with _naming_folder():  # it may still have to be written
            self._file.seek(_BYTES * place.start)
            self._file.readinto(total.numpy().data)  # type: ignore[attr-defined]
        return total

    def means(self) -> Iterator[tuple[MatrixSite, Tensor]]:
        """Yield every site with its Ḡ, one after another."""
        for matrix in self._sites:
            yield matrix, self.mean(matrix)


def _naming_folder() -> AbstractContextManager[None]:
    """Have errors name the folder of temporary files, which themselves have no name."""
    return naming_file(Path(tempfile.gettempdir()))


def bytes_of(sites: Sequence[MatrixSite]) -> int:
    """Return how many bytes the mean gradients of some sites take."""
    return _BYTES * sum(math.prod(matrix.size) for matrix in sites)


def _fit_on_device(sites: Sequence[MatrixSite]) -> bool:
    device, *others = {matrix.stored.device for matrix in sites}
    if others or device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return bytes_of(sites) <= _SHARE_OF_FREE * free
