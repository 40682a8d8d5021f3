"""Signatures: who issued a certificate."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, x25519

import certunlearn as cu
from certunlearn import cli
from certunlearn.certificates import signing
from certunlearn.certificates.record import record_digest

PARAMS = {"w": np.ones(3, np.float32)}


def certificate(noise_scale=8.0):
    mechanism = cu.OutputPerturbation(init_radius=1.0)
    return cu.certify(
        mechanism, noise_scale=noise_scale, delta=1e-5, params=PARAMS, steps_run=1, epsilon=None
    )


def pair(seed, kind=ed25519.Ed25519PrivateKey):
    """A private and a public key in PEM, from 32 bytes."""
    key = kind.from_private_bytes(bytes([seed]) * 32)
    return (
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
    )


ISSUER, OTHER = pair(1), pair(2)


def test_a_signature_is_for_one_record_and_by_one_key():
    mine = certificate()
    signature = signing.sign(mine, ISSUER[0])
    assert len(signature) == 64
    assert signing.is_signed(mine, signature, ISSUER[1])
    assert not signing.is_signed(mine, signature, OTHER[1])
    assert not signing.is_signed(mine, signing.sign(mine, OTHER[0]), ISSUER[1])
    assert not signing.is_signed(mine, signature[::-1], ISSUER[1])
    assert not signing.is_signed(mine, b"", ISSUER[1])


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(cu.Certificate)])
def test_no_field_can_change_under_a_signature(name):
    mine = certificate()
    signature = signing.sign(mine, ISSUER[0])
    changed = dataclasses.replace(mine, **{name: "changed"})
    assert not signing.is_signed(changed, signature, ISSUER[1])


def test_the_layout_of_the_file_does_not_matter(tmp_path):
    mine = certificate()
    mine.save(tmp_path / "c.json")
    text = (tmp_path / "c.json").read_text()
    (tmp_path / "c.json").write_text(text.replace("\n", "\r\n    "))
    loaded = cu.Certificate.load(tmp_path / "c.json")
    assert signing.is_signed(loaded, signing.sign(mine, ISSUER[0]), ISSUER[1])


def test_what_is_signed_names_its_purpose_and_holds_the_record():
    message = signing.message(certificate())
    assert message.startswith(b"certunlearn certificate signature 1\n{")
    assert certificate().params_digest.encode() in message


@pytest.mark.parametrize(
    "key",
    [b"", b"not a key", ISSUER[1], pair(1, x25519.X25519PrivateKey)[0], ISSUER[0][:60]],
)
def test_odd_private_keys_are_refused_without_their_text(key):
    with pytest.raises(ValueError, match="Ed25519 private key") as caught:
        signing.sign(certificate(), key)
    assert len(key) < 10 or key.decode()[-20:] not in str(caught.value)


@pytest.mark.parametrize("key", [b"", ISSUER[0], pair(1, x25519.X25519PrivateKey)[1]])
def test_odd_public_keys_are_refused(key):
    with pytest.raises(ValueError, match="Ed25519 public key"):
        signing.is_signed(certificate(), bytes(64), key)


@pytest.fixture
def issued(tmp_path):
    certificate().save(tmp_path / "c.json")
    cu.certificates.save_params(tmp_path / "p.npz", PARAMS)
    for name, (private, public) in (("issuer", ISSUER), ("other", OTHER)):
        (tmp_path / f"{name}.pem").write_bytes(private)
        (tmp_path / f"{name}.pub.pem").write_bytes(public)
    return tmp_path


def verify(folder, key="issuer.pub.pem"):
    arguments = ["--params", str(folder / "p.npz"), "--public-key", str(folder / key)]
    return cli.main(["verify", str(folder / "c.json"), *arguments])


def sign(folder, key="issuer.pem"):
    return cli.main(["sign", str(folder / "c.json"), "--key", str(folder / key)])


def test_sign_and_verify_on_the_command_line(issued, capsys):
    assert verify(issued) == 1  # not signed yet
    assert "c.json.sig is missing" in capsys.readouterr().err
    assert sign(issued) == 0
    assert "c.json.sig" in capsys.readouterr().out
    assert verify(issued) == 0
    assert "issuer.pub.pem signed it" in capsys.readouterr().out
    assert verify(issued, "other.pub.pem") == 1
    assert "not this certificate's signature" in capsys.readouterr().err


def test_a_certificate_changed_after_signing_is_refused(issued, capsys):
    assert sign(issued) == 0
    certificate(noise_scale=9.0).save(issued / "c.json")
    assert verify(issued) == 1
    assert "VERIFIED:" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"*", b"AAAA", b"A" * 20_000, b"\xff" * 88])
def test_broken_signature_files_are_refused(issued, content):
    (issued / "c.json.sig").write_bytes(content)
    assert verify(issued) == 1


def test_what_does_not_verify_is_not_signed(issued):
    mine = dataclasses.replace(certificate(), epsilon=0.1)
    mine = dataclasses.replace(mine, record_digest=record_digest(dataclasses.asdict(mine)))
    mine.save(issued / "c.json")
    assert sign(issued) == 1
    assert not (issued / "c.json.sig").exists()


def test_bad_keys_are_bad_usage(issued, capsys):
    assert sign(issued, "missing.pem") == 2
    assert sign(issued, "issuer.pub.pem") == 2
    assert verify(issued, "issuer.pem") == 2
    assert verify(issued, "missing.pem") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_missing_package_is_named():
    code = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from certunlearn.certificates import signing\n"
        "try: signing.sign(None, b'')\n"
        "except ModuleNotFoundError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert 'pip install "certunlearn[sign]"' in done.stdout
