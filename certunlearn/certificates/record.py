"""The public record of an unlearning run.

A certificate holds nothing that depends on the private run except the digest of the released
parameters: it can be published beside the model. Everything it claims follows from the numbers it
records, so whoever holds it can derive the claim again without trusting whoever issued it.
"""

import dataclasses
import hashlib
import json
import os
from typing import Any

from certunlearn._numerics import files
from certunlearn.certificates import record_format, strict_json

# Absent from certificates issued before there were such fields; absent is None.
_OPTIONAL = ("epsilon_lower_bound", "evidence", "separations", "sums_digest")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certificate:
    """What was done, what it guarantees, and what that rests on.

    Guarantee:
      If every sentence of `assumptions` holds, the released parameters are (epsilon, delta)-
      indistinguishable, in both directions, from those of the reference process, which never saw
      the forget set: for every event E, P(E) <= e^epsilon * P_reference(E) + delta and the other
      way round.

    Attributes:
      schema: version of this record's format.
      mechanism: the mechanism's name and all its parameters, schedules as lists, for the whole
        plan; `steps_run` of its steps were run.
      separations: of a mechanism that is not the package's: the numbers that the claim is derived
        from, and the user's assumptions on them; else None. That the mechanism has them is the
        issuer's word, which `assumptions` says.
      noise_scale: standard deviation of the noise in every coordinate, in parameter units, one
        number or one for each planned step; 0 for an exact mechanism, as are epsilon, delta, mu,
        total_variation and steps_run.
      epsilon: the claim's epsilon, for the steps that were run.
      epsilon_lower_bound: no claim, but how loose the claim may be: an attack on such a run, with a
        loss and data of its own choice, reaches that much, so the true epsilon lies between this
        and `epsilon`. None if it is not known, as for more than 2,000 steps.
      delta: the claim's delta.
      mu: Gaussian-DP parameter of the run by shifted interpolation; None for DP-SGD, which is no
        pair of runs with separations.
      total_variation: no event is more likely than under the reference by more than this.
      accountant: which accountant derived epsilon and total_variation.
      steps_run: number of noisy steps that were run.
      evidence: how the issuer knows `steps_run`: `"optimizer state"` if the count in the
        optimizer's state was compared with it, or `"word of the issuer"`.
      sums_digest: of a head of integer sums: SHA-256 of the sums, as `exact.digest` computes it;
        else None, and absent from the file.
      coverage: how many parameters and leaves the guarantee covers, their dtypes, and the paths
        and number of the frozen ones, which it does not.
      assumptions: what the claim rests on, in sentences.
      key_source: how the noise key was drawn; never the key.
      versions: of the software that ran.
      retain_size: number of retain examples, or None if not said; always None for DP-SGD.
      forget_size: number of forget examples, or None if not said.
      finetune_steps: noiseless steps after the noisy ones (free: post-processing).
      created: when, in UTC (ISO 8601).
      params_digest: SHA-256 of the released parameters, as `params_digest` computes it.
      record_digest: SHA-256 of all other fields. It catches accidents and careless edits; it is
        no signature, so it does not say *who* issued the certificate: see `certificates.signing`.

    Why it may be published:
      No field may tell a run that saw the forget set from the reference. The mechanism, the noise,
      delta and the counts of steps were fixed without looking at the model (an assumption);
      epsilon, its bounds, mu and total variation follow from them; coverage is the architecture;
      the digest is a function of what is released. The digest of sums is one of the retain data
      alone, in both runs. `retain_size` is the same in both runs, which
      use the same retain data. The reference of DP-SGD lacks examples, so there it is absent.
      `forget_size` is the request's, which both runs are given. Time and versions are the
      operator's.
    """

    schema: str
    mechanism: dict[str, Any]
    noise_scale: float | list[float]
    epsilon: float
    epsilon_lower_bound: float | None = None
    delta: float
    mu: float | None
    total_variation: float
    accountant: str
    steps_run: int
    evidence: str | None = None
    separations: dict[str, Any] | None = None
    coverage: dict[str, Any]
    assumptions: list[str]
    key_source: str
    versions: dict[str, str]
    retain_size: int | None
    forget_size: int | None
    finetune_steps: int
    created: str
    params_digest: str
    sums_digest: str | None = None
    record_digest: str

    @property
    def reference(self) -> str:
        """What the claim compares with: `"retrained"`, `"center"` or `"minimizer"`."""
        stated = self.mechanism if self.separations is None else self.separations
        return stated.get("reference", "retrained")

    def to_json(self) -> str:
        """The certificate as its file holds it."""
        return json.dumps(as_record(self), indent=2, allow_nan=False) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the certificate as JSON; `path` is replaced whole or not at all."""
        text = self.to_json()
        files.write_atomically(path, lambda file: file.write(text.encode()))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Certificate":
        """Reads a certificate and checks its format; `verify` checks what it claims.

        One of format 1 is read too, but no longer verifies.

        Raises:
          OSError: if the file cannot be read.
          TypeError: if `path` is no path.
          ValueError: if it is not a well-formed certificate, saying what is wrong.
        """
        with open(os.fspath(path), "rb") as file:  # not a number, which would be an open file
            # No more is read than an honest certificate has.
            content = file.read(record_format.MOST_BYTES + 1)
        try:
            record = strict_json.parse(content)
            problems = record_format.problems(record)
        except ValueError as error:
            problems = [str(error)]
        if problems:
            name = record_format.printable(os.fspath(path), most=1_000)
            raise ValueError(f"{name!r} is not a certificate: {problems[0]}")
        return cls(**record)


def as_record(certificate: Certificate) -> dict[str, Any]:
    """What a certificate's file and signature hold: without a digest of sums where there is none.

    So the signatures of certificates that were issued before there was such a field stay valid.
    """
    record = dataclasses.asdict(certificate)
    if record["sums_digest"] is None:
        del record["sums_digest"]
    return record


def record_digest(record: dict[str, Any]) -> str:
    """SHA-256 of every field but `record_digest`, and of no absent one, in canonical JSON."""
    absent = {"record_digest", *(name for name in _OPTIONAL if record.get(name) is None)}
    content = {name: value for name, value in record.items() if name not in absent}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
