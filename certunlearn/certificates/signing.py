"""Signatures of certificates: who issued one can then be checked, which no digest tells.

Ed25519 (RFC 8032), by the `cryptography` package: `pip install "certunlearn[sign]"`. A key pair is
made with OpenSSL:

    openssl genpkey -algorithm ed25519 -out issuer.pem
    openssl pkey -in issuer.pem -pubout -out issuer.pub.pem

What is signed is the certificate's whole record, `record_digest` included, in canonical JSON
(sorted keys, no spaces, ASCII), after a line that says what it is, so that the key's signatures on
anything else are none on a certificate. The file's layout does not matter, every value in it does.
"""

import base64
import binascii
import json
import os
from pathlib import Path
from typing import Any

from certunlearn._numerics import files
from certunlearn.certificates.record import Certificate, as_record

_PURPOSE = b"certunlearn certificate signature 1\n"
_ENDING = ".sig"
# Longest file that can be a key or a signature, in bytes.
_LONGEST = 10_000


def message(certificate: Certificate) -> bytes:
    """The bytes that a signature is made of."""
    record = as_record(certificate)
    text = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return _PURPOSE + text.encode("ascii")


def sign(certificate: Certificate, private_key: bytes) -> bytes:
    """The Ed25519 signature of a certificate, 64 bytes.

    Args:
      certificate: as issued or loaded; sign it only if it verifies.
      private_key: PEM (PKCS #8), without a password.

    Raises:
      ModuleNotFoundError: if the `cryptography` package is missing.
      ValueError: if the key is not an Ed25519 private key.
    """
    return _private(private_key).sign(message(certificate))


def is_signed(certificate: Certificate, signature: bytes, public_key: bytes) -> bool:
    """Whether `signature` is that of this certificate by the owner of `public_key` (PEM).

    Raises:
      ModuleNotFoundError: if the `cryptography` package is missing.
      ValueError: if the key is not an Ed25519 public key.

    Guarantee:
      True only if the holder of the private key signed this very record, unless Ed25519 is broken.
      It says who vouches for the certificate's assumptions, not that they hold.
    """
    key = _public(public_key)
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature, message(certificate))
    except InvalidSignature:
        return False
    return True


def check_public_key(public_key: bytes) -> None:
    """Raises what `is_signed` would raise of such a key."""
    _public(public_key)


def signature_path(certificate: str | os.PathLike[str]) -> Path:
    """Where a certificate file's signature lies: beside it, under its name and `.sig`."""
    path = Path(certificate)
    return path.with_name(path.name + _ENDING)


def save_signature(path: str | os.PathLike[str], signature: bytes) -> None:
    """Writes a signature as one line of base64."""
    files.write_atomically(path, lambda file: file.write(base64.b64encode(signature) + b"\n"))


def load_signature(path: str | os.PathLike[str]) -> bytes:
    """Reads what `save_signature` wrote.

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it is not a signature.
    """
    try:
        signature = base64.b64decode(read_short(path).strip(), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{os.fspath(path)!r} is not a signature: not base64") from error
    if len(signature) != 64:
        raise ValueError(f"{os.fspath(path)!r} is not a signature: it must have 64 bytes")
    return signature


def read_short(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a key or signature file, which is a short one.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is too long for what it should be.
    """
    with open(path, "rb") as file:
        content = file.read(_LONGEST + 1)
    if len(content) > _LONGEST:
        raise ValueError(f"{os.fspath(path)!r} is too long for a key or a signature")
    return content


def _private(pem: bytes) -> Any:
    serialization, ed25519 = _library()
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except Exception as error:  # a password, another algorithm, or no key
        raise ValueError("key must be an Ed25519 private key, PEM without a password") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise ValueError(f"key must be an Ed25519 private key, got {type(key).__name__}")
    return key


def _public(pem: bytes) -> Any:
    serialization, ed25519 = _library()
    try:
        key = serialization.load_pem_public_key(pem)
    except Exception as error:  # another algorithm, or no key
        raise ValueError("public_key must be an Ed25519 public key in PEM") from error
    if not isinstance(key, ed25519.Ed25519PublicKey):
        raise ValueError(f"public_key must be an Ed25519 public key, got {type(key).__name__}")
    return key


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'signatures need cryptography: pip install "certunlearn[sign]"', name="cryptography"
        ) from error
    return serialization, ed25519
