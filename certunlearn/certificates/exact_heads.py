"""Certificates of exact heads: issued from the sums, and replayed by whoever holds the rows."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jax.typing import ArrayLike

from certunlearn._numerics import files
from certunlearn.certificates import head_claims, issuing, verification
from certunlearn.certificates.record import Certificate
from certunlearn.certificates.verification import Verification
from certunlearn.sums import collecting, statistics
from certunlearn.sums.heads import Head, LinearDiscriminants
from certunlearn.sums.kept import Kept
from certunlearn.sums.statistics import Statistics

Batch = tuple[ArrayLike, ArrayLike]


def certify(
    stats: Statistics | Kept,
    head: Head | LinearDiscriminants,
    *,
    forget_size: int | None = None,
) -> Certificate:
    """Issues the certificate of an exact head: epsilon = delta = 0.

    The head is computed from the sums again. The certificate records how (`ExactHead`), the digests
    of the sums and of the head, and what it rests on.

    Args:
      stats: the sums after the deletions, or what `keep` made of them. Private.
      head: what `ridge` or `lda` returned for them.
      forget_size: number of examples that were removed, for the record.

    Raises:
      TypeError: if `stats` are no sums, or `head` does not know its recipe.
      ValueError: if the head is not that of these sums, bit for bit.

    Guarantee:
      The certificate claims that the head is the function of the sums that it names, which has just
      been computed again. That the sums are those of the retain data is the issuer's word, listed
      in `assumptions`; `replay` checks it with the data.

    >>> import numpy as np
    >>> from certunlearn import exact
    >>> rows, targets = np.eye(4, 3), np.array([0.5, -1.0, 2.0, 0.0])
    >>> stats = exact.remove(exact.collect(rows, targets), rows[:1], targets[:1])
    >>> head = exact.ridge(stats, l2=0.1)
    >>> certificate = exact.certify(stats, head)
    >>> certificate.epsilon, certificate.delta, certificate.retain_size
    (0.0, 0.0, 3)
    >>> bool(exact.verify(certificate, head, stats=stats))
    True
    """
    sums, recipe = head_claims.statistics_of(stats), head_claims.recipe_of(head)
    if files.params_digest(head_claims.head_of(stats, recipe)) != files.params_digest(head):
        raise ValueError(
            "head must be that of these sums, bit for bit, and it is not: compute it from the sums "
            "that are left after the deletions, and certify it with them"
        )
    return issuing.issue(
        head_claims.mechanism_of(sums, recipe),
        noise_scale=None,
        delta=None,
        params=head,
        state=None,
        steps_run=None,
        epsilon=None,
        accountant=None,
        frozen=(),
        key_source="not said",
        retain_size=sums.rows,
        forget_size=forget_size,
        finetune_steps=0,
        sums_digest=statistics.digest(sums),
    )


def replay(certificate: Certificate, data: Batch | Iterable[Batch]) -> Verification:
    """Computes sums and head from the retain data, and compares their digests with the recorded.

    Args:
      certificate: of an exact head.
      data: `(features, targets)`, the retained rows in any order, features as they were collected
        (after the public map); or an iterable of such batches.

    Returns:
      A `Verification`: true only if the certificate verifies, and the sums and the head of these
      rows are the certified ones, bit for bit.

    Raises:
      TypeError: if an argument is not of the right kind.

    Guarantee:
      True means that the certified head is the function of exactly these rows that the certificate
      names, up to collisions of SHA-256, on whatever machine it was computed.

    >>> import numpy as np
    >>> from certunlearn import exact
    >>> rows, targets = np.eye(4, 3), np.array([0.5, -1.0, 2.0, 0.0])
    >>> stats = exact.remove(exact.collect(rows, targets), rows[:1], targets[:1])
    >>> certificate = exact.certify(stats, exact.ridge(stats))
    >>> bool(replay(certificate, (rows[1:], targets[1:])))
    True
    >>> bool(replay(certificate, (rows, targets)))
    False
    """
    verified = verification.verify(certificate)
    if not verified:
        return verified
    planned = head_claims.recorded(certificate)
    if planned is None:
        name = certificate.mechanism["name"]
        return verification.outcome(certificate, [f"{name} is no head of sums: nothing to replay"])
    try:
        settings = head_claims.settings_in(planned)
        sums = collecting.sums_of(settings, *_rows(data))
    except (ValueError, ArithmeticError, MemoryError) as error:
        return verification.outcome(certificate, [f"the data cannot be replayed: {error}"])
    return verification.outcome(certificate, head_claims.stats_problems(certificate, sums))


def _rows(data: Any) -> tuple[Any, ...]:
    """Features and targets, or an iterator of batches."""
    if isinstance(data, tuple) and len(data) == 2:
        return data
    if isinstance(data, Sequence) and len(data) == 2 and not isinstance(data[0], tuple | list):
        return tuple(data)
    if not isinstance(data, Iterable) or isinstance(data, str | bytes | dict):
        raise TypeError(
            "data must be (features, targets) or an iterable of such batches, got a "
            f"{type(data).__name__}"
        )
    batches: Iterator[Any] = iter(data)
    return (batches,)
