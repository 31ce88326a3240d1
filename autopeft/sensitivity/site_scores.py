"""SiteScores: what one score says of every site of a backbone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autopeft.core.adapter import Site


@dataclass(frozen=True, kw_only=True)
class SiteScores:
    """One number a site: how much adapting the site promises.

    Args:
        name: The score, one of `SCORES`.
        values: One finite number a site; higher is more worth adapting. Numbers of different scores
            have different units and cannot be compared.
        spectra: Where the score has them, numbers in descending order a site: the leading singular
            values of the mean gradient (`gradient_spectrum`), or the leading explained-variance ratios
            (`explained_variance`). The i-th says what the i-th rank of an adapter there adds.

    Raises:
        ValueError: There are no values or a number is not finite.
    """

    name: str
    values: Mapping[Site, float]
    spectra: Mapping[Site, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError(f"The score {self.name!r} has no values.")
        for site, value in self.values.items():
            if not all(map(math.isfinite, (value, *self.spectra.get(site, ())))):
                raise ValueError(f"The score {self.name!r} of {site} is not finite ({value}).")
        object.__setattr__(self, "values", {site: float(self.values[site]) for site in sorted(self.values)})
        spectra = {site: tuple(map(float, self.spectra[site])) for site in sorted(self.spectra)}
        object.__setattr__(self, "spectra", spectra)

    def ranking(self) -> tuple[Site, ...]:
        """Return the sites, the one most worth adapting first; equal values in the sites' own order."""
        return tuple(sorted(self.values, key=lambda site: (-self.values[site], site)))

    def __or__(self, other: SiteScores) -> SiteScores:
        """Return the same score of this and of another group of sites."""
        spectra = {**self.spectra, **other.spectra}
        return SiteScores(name=self.name, values={**self.values, **other.values}, spectra=spectra)

    def weighted(self, weights: Mapping[Site, float]) -> SiteScores:
        """Return the scores times weights; a site without one keeps its score."""
        return SiteScores(
            name=self.name,
            values={site: value * weights.get(site, 1.0) for site, value in self.values.items()},
            spectra={
                site: tuple(value * weights.get(site, 1.0) for value in spectrum)
                for site, spectrum in self.spectra.items()
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the scores as plain data, fit for JSON."""
        data: dict[str, Any] = {"name": self.name}
        data["values"] = {str(site): value for site, value in self.values.items()}
        if self.spectra:
            data["spectra"] = {str(site): list(spectrum) for site, spectrum in self.spectra.items()}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SiteScores:
        """Read scores from what `to_dict` returned."""
        values, spectra = (
            {Site.parse(text): found for text, found in data.get(key, {}).items()}
            for key in ("values", "spectra")
        )
        return cls(name=data["name"], values=values, spectra=spectra)

    def __repr__(self) -> str:
        best = self.ranking()[0]
        return f"SiteScores({self.name}; {len(self.values)} sites; best {best} {self.values[best]:.3g})"
