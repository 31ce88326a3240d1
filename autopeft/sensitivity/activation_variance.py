"""What the inputs of layers are like: their principal components (EVA's score), their second moment."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import cosine_similarity, normalize

from autopeft.core.adapter import Site
from autopeft.sensitivity.scored_matrices import MatrixSite, forward_hooks
from autopeft.sensitivity.site_scores import SiteScores

# Up to this many times the components wanted, what is exact costs no more than what is not: a matrix of all
# covariances no more memory, an eigendecomposition no more time than a randomised one. Beyond, that one's
# error is negligible with a few components and iterations to spare (Halko et al., SIAM Review 2011).
_EXACT_UP_TO = 8
_SPARE_COMPONENTS = 8
_ITERATIONS = 4


class IncrementalVariance:
    """Principal components of vectors that come in batches.

    Narrow vectors (up to 8 times as wide as components are kept) add to the matrix of their covariances,
    which is exact and decomposed once, at the end. For wide ones that would be too large; there the leading
    components so far, scaled by their singular values, stand for all vectors seen (Ross et al., "Incremental
    Learning for Robust Visual Tracking", IJCV 2008), exact while the vectors' rank does not exceed them.

    A shallow copy is independent of its original: tensors are replaced, never changed.

    Args:
        components: How many components to keep.
        leading: How many of them have to converge.
        convergence: Wide vectors are ignored once each leading component's cosine similarity to itself one
            batch before is above this; None for never.
    """

    def __init__(self, components: int, *, leading: int = 1, convergence: float | None = None) -> None:
        self._components = components
        self._leading = leading
        self._convergence = convergence
        self._converged = False
        self._seen = 0
        self._variance: Tensor | float = 0.0
        self._mean: Tensor | None = None
        self._covariances: Tensor | None = None
        self._scaled: Tensor | None = None

    def add(self, vectors: Tensor) -> None:
        """Add vectors (count, width); no vectors are nothing new."""
        count, width = vectors.shape
        if not count or self._converged:
            return
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        mean = vectors.mean(0)
        rows = vectors - mean
        seen = self._seen + count
        if self._mean is not None:
            # Both parts are centred at their own mean: one more row makes up for the difference.
            shift = (self._seen * count / seen) ** 0.5 * (self._mean - mean)
            rows = torch.vstack((rows, shift))
            mean = (self._seen * self._mean + count * mean) / seen
        self._variance = self._variance + vector_norm(rows).square()
        self._mean, self._seen = mean, seen
        if width > _EXACT_UP_TO * self._components:
            self._merge(rows)
        elif self._covariances is None:
            self._covariances = rows.mT @ rows
        else:
            self._covariances = torch.addmm(self._covariances, rows.mT, rows)

    def _merge(self, rows: Tensor) -> None:
        before = self._scaled
        self._scaled = _principal(rows if before is None else torch.vstack((before, rows)), self._components)
        if self._convergence is not None and before is not None and len(before) >= self._leading:
            similarity = cosine_similarity(before[: self._leading], self._scaled[: self._leading]).abs()
            self._converged = bool((similarity > self._convergence).all())

    def ratios(self) -> tuple[float, ...]:
        """Return the explained-variance ratios, in descending order; zeros where nothing varies."""
        if self._scaled is not None:
            squares = vector_norm(self._scaled, dim=1).double().square()
        elif self._covariances is not None:
            squares = torch.linalg.eigvalsh(self._covariances.double()).clamp(min=0).flip(0)
            squares = squares[: min(self._components, self._seen)]
        else:
            return (0.0,)
        variance = float(self._variance)
        return tuple((squares / variance).tolist() if variance else torch.zeros_like(squares).tolist())

    def directions(self) -> Tensor | None:
        """Return the leading components (count, width) in single precision, each of length 1.

        They are fewer than asked for where the vectors were, or are not that wide; None without vectors.
        """
        if self._scaled is not None:
            return normalize(self._scaled.float())
        if self._covariances is None:
            return None
        vectors: Tensor = torch.linalg.eigh(self._covariances.double()).eigenvectors
        return vectors.flip(1).mT[: self._components].float()


class SecondMoment:
    """The sum of xxᵀ over vectors that come in batches, in main memory.

    For a shallow copy see `IncrementalVariance`.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, vectors: Tensor) -> None:
        """Add vectors (count, width)."""
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        product = (vectors.mT @ vectors).cpu()
        self.total = product if self.total is None else self.total + product


def _principal(rows: Tensor, components: int) -> Tensor:
    """Return the leading right singular vectors of wide rows, scaled by their singular values."""
    if rows.shape[0] > _EXACT_UP_TO * components:
        _, singular_values, right = torch.svd_lowrank(
            rows, q=components + _SPARE_COMPONENTS, niter=_ITERATIONS
        )
        return singular_values[:components, None] * right.mT[:components]
    left: Tensor = torch.linalg.eigh(rows @ rows.mT).eigenvectors
    return left[:, -components:].flip(1).mT @ rows


class _State(Protocol):
    def add(self, vectors: Tensor) -> None: ...


_StateT = TypeVar("_StateT", bound=_State)


class WatchedInputs(Generic[_StateT]):
    """Add what sites are given to a state of each, while forward passes run.

    Sites whose inputs were the very same tensors so far (query, key and value; gate and up) share one state;
    all begin with one that has seen nothing. A ValueError is raised where inputs are not finite.
    """

    def __init__(self, sites: Sequence[MatrixSite], state: _StateT) -> None:
        self._sites = sites
        # Of each site; experts, of which each has inputs of its own, have none.
        self.states: dict[Site, _StateT] = {matrix.site: state for matrix in sites if not matrix.is_fused}

    @contextmanager
    def watch(self, mask_of: Callable[[Site], Tensor | None]) -> Iterator[None]:
        """Add the inputs of every site during one forward pass inside.

        Where a site's mask (rows, positions) is 0, a token is left out; inputs of other dimensions are taken
        whole, and so are patches and frames, which have no mask.
        """
        # What a state became by a tensor with a sum. A tensor that is gone, or was changed since, is another.
        known: WeakKeyDictionary[_StateT, list[tuple[ref[Tensor], Tensor, _StateT]]]
        known = WeakKeyDictionary()

        def add(matrix: MatrixSite, given: Tensor, _: Tensor) -> None:
            state = self.states[matrix.site]
            successors, total = known.setdefault(state, []), given.detach().sum(dtype=torch.float64)
            for tensor, before, successor in successors:
                if tensor() is given and torch.equal(before, total):
                    self.states[matrix.site] = successor
                    return
            vectors = _vectors(given.detach(), mask_of(matrix.site))
            if not bool(vectors.isfinite().all()):
                raise ValueError(
                    f"The input of {matrix.site} ({matrix.shape.module}) is not finite. Check the data and "
                    "the precision of the model."
                )
            moved = copy.copy(state)
            with torch.no_grad():
                moved.add(vectors)
            successors.append((ref(given), total, moved))
            self.states[matrix.site] = moved

        with forward_hooks(self._sites, add):
            yield


def explained_variance_scores(states: Mapping[Site, IncrementalVariance], rank: int) -> SiteScores:
    """Return the sum of the `rank` largest explained-variance ratios of each site's inputs.

    The ratios themselves are the spectra. Sites that share their input score alike.
    """
    ratios = {state: state.ratios() for state in dict.fromkeys(states.values())}
    spectra = {site: ratios[state] for site, state in states.items()}
    values = {site: sum(spectrum[:rank]) for site, spectrum in spectra.items()}
    return SiteScores(name="explained_variance", values=values, spectra=spectra)


def _vectors(given: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is not None and given.shape[:-1] == attention_mask.shape:
        given = given[attention_mask.to(given.device).bool()]
    return given.reshape(-1, given.shape[-1])
