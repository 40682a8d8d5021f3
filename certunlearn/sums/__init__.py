"""Exact sums over examples, from which an example is removed without a trace, and their heads."""

from certunlearn.sums.collecting import collect, empty, merge, sums_of
from certunlearn.sums.fixed_point import Settings
from certunlearn.sums.heads import Head, LinearDiscriminants, Recipe, lda, ridge
from certunlearn.sums.kept import Kept, add, keep, remove
from certunlearn.sums.saving import load, save
from certunlearn.sums.scaling import Standardization, standardization
from certunlearn.sums.statistics import Statistics, digest
from certunlearn.sums.wide_integers import WideIntegers

__all__ = [
    "Head",
    "Kept",
    "LinearDiscriminants",
    "Recipe",
    "Settings",
    "Standardization",
    "Statistics",
    "WideIntegers",
    "add",
    "collect",
    "digest",
    "empty",
    "keep",
    "lda",
    "load",
    "merge",
    "remove",
    "ridge",
    "save",
    "standardization",
    "sums_of",
]
