"""Exact unlearning: heads that are functions of integer sums, from which rows are subtracted.

A linear head on public features is the same function of the same integers as one that never saw the
deleted rows: epsilon = delta = 0, bit for bit, for any number of deletions, in any order, chosen by
looking at earlier releases or not. `collect` makes the sums, `remove` deletes, `ridge` and `lda`
compute the head, `certify` records it, `certunlearn.verify(certificate, head, stats=stats)` checks
it, and `replay` does so from the retain data alone.

Sums are private: they hold a row's traces until it is removed. Whatever is computed from a head is
redone after a deletion (docs/sharp-edges.md).
"""

from certunlearn.certificates.exact_heads import certify, replay
from certunlearn.certificates.verification import verify
from certunlearn.sums import (
    Head,
    Kept,
    LinearDiscriminants,
    Recipe,
    Settings,
    Standardization,
    Statistics,
    add,
    collect,
    digest,
    empty,
    keep,
    lda,
    load,
    merge,
    remove,
    ridge,
    save,
    standardization,
)

__all__ = [
    "Head",
    "Kept",
    "LinearDiscriminants",
    "Recipe",
    "Settings",
    "Standardization",
    "Statistics",
    "add",
    "certify",
    "collect",
    "digest",
    "empty",
    "keep",
    "lda",
    "load",
    "merge",
    "remove",
    "replay",
    "ridge",
    "save",
    "standardization",
    "verify",
]
