"""Exact sums over examples, from which an example is removed without a trace."""

from certunlearn.sums.collecting import add, collect, empty, merge, remove, sums_of
from certunlearn.sums.fixed_point import Settings
from certunlearn.sums.saving import load, save
from certunlearn.sums.scaling import Standardization, standardization
from certunlearn.sums.statistics import Statistics, digest
from certunlearn.sums.wide_integers import WideIntegers

__all__ = [
    "Settings",
    "Standardization",
    "Statistics",
    "WideIntegers",
    "add",
    "collect",
    "digest",
    "empty",
    "load",
    "merge",
    "remove",
    "save",
    "standardization",
    "sums_of",
]
