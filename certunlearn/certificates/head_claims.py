"""Exact heads and what certificates say of them: the same sums, settings and bits, or a problem."""

import dataclasses
from typing import Any

from certunlearn._numerics import checks, files
from certunlearn.certificates import claims
from certunlearn.certificates.record import Certificate
from certunlearn.mechanisms import ExactHead
from certunlearn.sums import heads, statistics
from certunlearn.sums.fixed_point import Settings
from certunlearn.sums.heads import Head, LinearDiscriminants, Recipe
from certunlearn.sums.kept import Kept
from certunlearn.sums.statistics import Statistics

# Of `ExactHead`: what it has beside the settings of the sums.
_BESIDE = ("kind", "l2", "indexed")


def statistics_of(stats: Statistics | Kept) -> Statistics:
    """The sums themselves, or TypeError if there are none."""
    if isinstance(stats, Kept):
        return stats.stats
    if not isinstance(stats, Statistics):
        raise TypeError(
            f"stats must be sums of certunlearn.exact.collect or keep, got {checks.shown(stats)}"
        )
    return stats


def recipe_of(head: Head | LinearDiscriminants) -> Recipe:
    """Which function of the sums a head is, or TypeError if it does not know."""
    parts = tuple(head) if isinstance(head, LinearDiscriminants) else (head,)
    recipes = {part.recipe for part in parts if isinstance(part, Head)}
    if not all(isinstance(part, Head) for part in parts) or None in recipes or len(recipes) != 1:
        raise TypeError(
            "head must be what certunlearn.exact.ridge or lda returned, which knows its recipe, "
            f"got {checks.shown(head)}: a copy, a slice or a loaded file does not; compute it from "
            "the sums again"
        )
    (recipe,) = recipes
    assert recipe is not None
    return recipe


def mechanism_of(stats: Statistics, recipe: Recipe) -> ExactHead:
    """What a certificate of such a head records."""
    settings = dataclasses.asdict(stats.settings)
    return ExactHead(kind=recipe.kind, l2=recipe.l2, indexed=stats.index is not None, **settings)


def settings_in(mechanism: ExactHead) -> Settings:
    """The settings of the sums that a recorded mechanism is of; ValueError if none can be."""
    fields = dataclasses.asdict(mechanism)
    return Settings(**{name: value for name, value in fields.items() if name not in _BESIDE})


def head_of(stats: Statistics | Kept, recipe: Recipe) -> Head | LinearDiscriminants:
    """The head of these sums, computed."""
    if recipe.kind == "lda":
        return heads.lda(statistics_of(stats), recipe.l2)
    if isinstance(stats, Kept) and stats.l2 != recipe.l2:
        stats = stats.stats
    return heads.ridge(stats, recipe.l2)


def recorded(certificate: Certificate) -> ExactHead | None:
    """The recorded mechanism if it is of sums, else None."""
    planned: Any = claims.basis_in(certificate).planned
    return planned if planned.of_sums else None


def stats_problems(certificate: Certificate, stats: Statistics | Kept) -> list[str]:
    """Whether a certificate is for the head of these sums: the first problem, the cheap ones first.

    Raises:
      TypeError: if `stats` are no sums.
    """
    sums = statistics_of(stats)
    try:
        planned = recorded(certificate)
        if planned is None:
            name = certificate.mechanism["name"]
            return [f"stats are given, but {name} is no head of integer sums"]
        if sums.settings != settings_in(planned):
            return ["stats have other settings than those that are recorded"]
        found = statistics.digest(sums)
        if found != certificate.sums_digest:
            return [
                f"stats are not the certified ones: their SHA-256 is {found}, the certificate is "
                f"for {certificate.sums_digest}"
            ]
        if certificate.retain_size not in (None, sums.rows):
            return [
                f"retain_size is recorded as {certificate.retain_size}, but stats have "
                f"{sums.rows} rows"
            ]
        head = head_of(stats, Recipe(planned.kind, planned.l2))
        made = files.params_digest(head)
    except (ValueError, ArithmeticError, MemoryError) as error:
        return [f"the head of these sums cannot be computed: {error}"]
    if made != certificate.params_digest:
        return [
            f"the head of these sums has the SHA-256 {made}, but the certificate is for "
            f"{certificate.params_digest}"
        ]
    return []
