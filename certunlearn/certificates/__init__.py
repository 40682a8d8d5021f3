"""The record of a run, its file, its check and its signature."""

from certunlearn._numerics.files import load_params, params_digest, save_params
from certunlearn.certificates.issuing import certify
from certunlearn.certificates.record import Certificate
from certunlearn.certificates.verification import Verification, verify

__all__ = [
    "Certificate",
    "Verification",
    "certify",
    "load_params",
    "params_digest",
    "save_params",
    "verify",
]
