"""MeanGradientFile: the mean gradient of every scored weight, on disk.

Averaging before a reduction that is not linear takes an accumulator of the size of the weights. Kept on the
device it would cost as much memory as full fine-tuning's gradients; here one layer's at a time is in memory.
"""

from __future__ import annotations

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
_Totals = np.memmap[tuple[int], np.dtype[np.float32]]


class MeanGradientFile:
    """Sums of gradients in single precision in a temporary file; use it in a `with` block.

    The file lies in the folder for temporary files (`TMPDIR`), takes 4 bytes an entry of the scored weights
    (about the size of the model in single precision) and has no name: it is gone whenever the process is. It
    is mapped, so that a gradient is added where the sum lies.

    Args:
        sites: The sites whose gradients are kept.
        batches: Number of batches the mean is over.

    Raises:
        OSError: The disk has no room for the file, which is written when it is first used.
    """

    def __init__(self, sites: Sequence[MatrixSite], batches: int) -> None:
        self._sites = sites
        self._batches = batches
        ends = np.cumsum([one.weight.numel() for one in sites]).tolist()
        starts = [0, *ends]
        self._places = {one.site: slice(*place) for one, *place in zip(sites, starts, ends, strict=False)}
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__

    @cached_property
    def _totals(self) -> _Totals:
        """The sums of all sites. Zeros are written first: a mapped page without room on the disk is fatal."""
        entries = max(place.stop for place in self._places.values())
        whole, rest = divmod(_BYTES * entries, len(_CHUNK))
        for _ in range(whole):
            self._file.write(_CHUNK)
        self._file.write(_CHUNK[:rest])
        self._file.flush()
        return np.memmap(self._file, dtype=np.float32, mode="r+", shape=(entries,))

    def add(self, layer: LayerGradient) -> None:
        """Add the gradient of one layer on one batch."""
        total = self._totals[self._places[layer.site.site]]
        total += layer.gradient.cpu().numpy().reshape(-1)

    def mean(self, matrix: MatrixSite) -> Tensor:
        """Return Ḡ of a site, (out, in) in single precision, on the weight's device; 0 without gradients."""
        weight = matrix.weight
        total = torch.from_numpy(np.array(self._totals[self._places[matrix.site]]))
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
        self._file.close()
