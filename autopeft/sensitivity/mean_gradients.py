"""Gradients of the scored weights averaged over the batches, of as many sites at a time as there is room for.

Averaging before a reduction that is not linear takes an accumulator of the size of the weights. It lies on
the GPU where that has room, else in a temporary file. Where the budget for the file does not suffice for all
sites, they are scored in groups, each with a pass over the batches.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from functools import cached_property
from types import TracebackType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from autopeft.sensitivity.layer_gradients import LayerGradient
from autopeft.sensitivity.scored_matrices import MatrixSite

_BYTES = 4
_CHUNK = bytes(2**24)
_SHARE_OF_FREE = 0.5
_Totals = np.memmap[tuple[int], np.dtype[np.float32]]
_logger = logging.getLogger(__name__)


def mean_gradient_groups(sites: Sequence[MatrixSite], budget: int) -> list[Sequence[MatrixSite]]:
    """Return the sites in groups whose mean gradients are kept at the same time.

    Args:
        sites: The sites, from the input to the output.
        budget: Most bytes that the temporary file may take; a single site may take more.

    Returns:
        All sites in one group where they fit on their GPU; else groups that keep within the budget and within
        half of what is free on the disk.
    """
    needed = sum(map(_bytes_of, sites))
    if _fit_on_device(sites):
        return [sites]
    room = min(budget, int(_SHARE_OF_FREE * shutil.disk_usage(tempfile.gettempdir()).free))
    groups: list[list[MatrixSite]] = [[]]
    taken = 0
    for site in sites:
        if groups[-1] and taken + _bytes_of(site) > room:
            groups.append([])
            taken = 0
        groups[-1].append(site)
        taken += _bytes_of(site)
    _logger.info(
        "The mean gradients of %d sites take %s: %d passes over the batches with at most %s in %s.",
        len(sites),
        format_bytes(needed),
        len(groups),
        format_bytes(max(sum(map(_bytes_of, group)) for group in groups)),
        tempfile.gettempdir(),
    )
    return list(groups)


def format_bytes(count: int) -> str:
    """Return a number of bytes for people."""
    return f"{count / 2**20:,.1f} MiB"


class MeanGradients:
    """Sums of gradients in single precision, on the GPU or in a temporary file; use it in a `with` block.

    The file lies in the folder for temporary files (`TMPDIR`), takes 4 bytes an entry of the sites' weights
    and has no name: it is gone whenever the process is. It is mapped, so that a gradient is added where the
    sum lies.

    Args:
        sites: The sites whose gradients are kept.
        batches: Number of batches the mean is over.

    Raises:
        OSError: The disk has no room for the file, which is written when it is first used.
    """

    def __init__(self, sites: Sequence[MatrixSite], batches: int) -> None:
        self._sites = sites
        self._batches = batches
        self._on_device = _fit_on_device(sites)
        ends = np.cumsum([matrix.weight.numel() for matrix in sites]).tolist()
        starts = [0, *ends]
        self._places = {
            matrix.site: slice(*place) for matrix, *place in zip(sites, starts, ends, strict=False)
        }
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__

    @property
    def _entries(self) -> int:
        return sum(matrix.weight.numel() for matrix in self._sites)

    @cached_property
    def _device_totals(self) -> Tensor:
        return torch.zeros(self._entries, device=self._sites[0].weight.device)

    @cached_property
    def _totals(self) -> _Totals:
        """The sums of all sites. Zeros are written first: a mapped page without room on the disk is fatal."""
        whole, rest = divmod(_BYTES * self._entries, len(_CHUNK))
        for _ in range(whole):
            self._file.write(_CHUNK)
        self._file.write(_CHUNK[:rest])
        self._file.flush()
        return np.memmap(self._file, dtype=np.float32, mode="r+", shape=(self._entries,))

    def add(self, layer: LayerGradient) -> None:
        """Add the gradient of one layer on one batch; nothing where its site is not among the sites."""
        place = self._places.get(layer.site.site)
        if place is None:
            return
        if self._on_device:
            self._device_totals[place].add_(layer.gradient.reshape(-1))
        else:
            total = self._totals[place]
            total += layer.gradient.cpu().numpy().reshape(-1)

    def mean(self, matrix: MatrixSite) -> Tensor:
        """Return Ḡ of a site, (out, in) in single precision, on the weight's device; 0 without gradients."""
        weight, place = matrix.weight, self._places[matrix.site]
        if self._on_device:
            return self._device_totals[place].view(weight.shape) / self._batches
        total = torch.from_numpy(np.array(self._totals[place]))
        return total.view(weight.shape).to(weight.device).div_(self._batches)

    def means(self) -> Iterator[tuple[MatrixSite, Tensor]]:
        """Yield every site with its Ḡ, one after another."""
        for matrix in self._sites:
            yield matrix, self.mean(matrix)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.__dict__.pop("_totals", None)
        self.__dict__.pop("_device_totals", None)
        self._file.close()


def _bytes_of(matrix: MatrixSite) -> int:
    return _BYTES * matrix.weight.numel()


def _fit_on_device(sites: Sequence[MatrixSite]) -> bool:
    devices = {matrix.weight.device for matrix in sites}
    device = next(iter(devices))
    if len(devices) > 1 or device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return sum(map(_bytes_of, sites)) <= _SHARE_OF_FREE * free
