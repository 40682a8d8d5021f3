"""Certificates of mechanisms that are not the package's, and of formats that came before."""

import dataclasses
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import certunlearn as cu
from certunlearn.certificates import record_format
from certunlearn.certificates.record import record_digest

FORMAT_2 = Path(__file__).parents[1] / "vectors" / "format-2"
PARAMS = {"w": jnp.arange(4.0)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation(cu.Mechanism):
    """Steps that turn the parameters around, and move them by at most `length`."""

    length: float
    rates: tuple[float, ...]
    steps: int
    rotate: object = None

    def separations(self):
        return cu.Separations(
            initial_distance=2.0,
            contraction=1.0,
            shift=[2 * self.length * rate for rate in self.rates],
            assumptions=("Rotations keep distances.",),
        )

    def update(self, center):
        return optax.scale(-self.length)


OWN = Rotation(length=0.1, rates=(1.0, 0.5, 0.25), steps=3, rotate=math.sin)


def issue(mechanism=OWN, **changes):
    claim = {"noise_scale": 3.0, "delta": 1e-5, "params": PARAMS, "steps_run": 3}
    return cu.certify(mechanism, **claim | changes)


def forged(certificate, **changes):
    record = dataclasses.asdict(certificate) | changes
    record["record_digest"] = record_digest(record)
    return cu.Certificate(**record)


def problem(certificate, **arguments):
    outcome = cu.verify(certificate, **arguments)
    assert not outcome
    return outcome.problems[0]


def test_it_says_what_the_claim_is_derived_from_and_what_is_trusted():
    certificate = issue()
    assert certificate.schema == "certunlearn.certificate/4"
    # What JSON cannot hold is left out of the fields; the claim does not need it.
    assert certificate.mechanism == {
        "name": "Rotation",
        "length": 0.1,
        "rates": [1.0, 0.5, 0.25],
        "steps": 3,
    }
    assert certificate.separations["shift"] == [0.2, 0.1, 0.05]
    assert certificate.separations["assumptions"] == ["Rotations keep distances."]
    assert certificate.assumptions[-1].startswith("That Rotation has the recorded separations")
    assert certificate.reference == "retrained"
    stated = OWN.separations()
    assert certificate.epsilon == cu.epsilon(stated, noise_scale=3.0, delta=1e-5)
    verified = cu.verify(certificate, PARAMS)
    assert verified
    assert "Rotation (the issuer's own: separations on trust), 3 of 3 steps" in verified.summary


def test_a_file_of_it_is_read_again(tmp_path):
    path = tmp_path / "c.json"
    issue().save(path)
    loaded = cu.Certificate.load(path)
    assert loaded == issue(**{}) or loaded.record_digest == record_digest(
        dataclasses.asdict(loaded)
    )
    assert cu.verify(loaded, PARAMS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s | {"initial_distance": 1.0}, "assumptions are not those"),
        (lambda s: s | {"shift": [0.2, 0.1, 0.01]}, "epsilon|mu"),
        (lambda s: s | {"assumptions": ["Anything."]}, "assumptions are not those"),
        (lambda s: s | {"assumptions": []}, "assumptions are not those"),
        (lambda s: s | {"memoryless": False}, "cannot be derived|assumptions|epsilon"),
        (lambda s: s | {"steps": 4}, "shift must have 4 numbers"),
        (lambda s: s | {"transform": None}, "unknown fields"),
        (lambda s: s | {"contraction": "1"}, "contraction must be"),
        (lambda s: s | {"contraction": 1e300}, "numbers that are 0 or between"),
        (lambda s: s | {"noisy": [True, False, False]}, "epsilon|mu|assumptions"),
        (lambda s: {k: v for k, v in s.items() if k != "shift"}, "unknown fields"),
        (lambda s: None, "separations are missing"),
        (lambda s: [], "separations must be None or the separations"),
    ],
)
def test_other_separations_do_not_verify(change, words):
    certificate = issue()
    found = problem(forged(certificate, separations=change(certificate.separations)))
    assert any(word in found for word in words.split("|")), found


def test_the_trust_cannot_be_left_out():
    certificate = issue()
    short = forged(certificate, assumptions=certificate.assumptions[:-1])
    assert "assumptions" in problem(short)
    # Nor by a name of the package's with separations that are not its own,
    named = certificate.mechanism | {"name": "GradientClipping"}
    assert (
        "must be None for the mechanism"
        in cu.verify(forged(certificate, mechanism=named)).problems[0]
    )
    # nor by plain numbers in place of a class.
    plain = {"name": "Separations", **certificate.separations}
    found = problem(forged(certificate, mechanism=plain, separations=None))
    assert "assumptions" in found


@pytest.mark.parametrize("name", ["Rotation ", "", "a" * 101, "Rot\u0430tion", "Ro tation", 3])
def test_names_are_plain_words(name):
    certificate = issue()
    outcome = cu.verify(forged(certificate, mechanism=certificate.mechanism | {"name": name}))
    assert "mechanism must be a mechanism's name and fields" in outcome.problems[0]


def test_a_class_at_hand_is_compared():
    certificate = issue()
    assert cu.verify(certificate, mechanisms=[Rotation])

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Other(Rotation):
        def separations(self):
            return cu.Separations(initial_distance=4.0, contraction=1.0, shift=[0.2, 0.1, 0.05])

    Other.__name__ = "Rotation"
    outcome = cu.verify(certificate, mechanisms=[Other])
    assert "separations are not those that Rotation states" in outcome.problems[0]

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Renamed(cu.OutputPerturbation):
        pass

    Renamed.__name__ = "Rotation"
    assert (
        "not what its class can be made from"
        in cu.verify(certificate, mechanisms=[Renamed]).problems[0]
    )
    # One of another name is not asked.
    assert cu.verify(certificate, mechanisms=[cu.OutputPerturbation])


def test_a_class_may_not_bear_a_name_of_the_packages():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class GradientClipping(Rotation):
        pass

    fields = {"length": 0.1, "rates": (1.0, 1.0, 1.0), "steps": 3}
    with pytest.raises(ValueError, match="class name of its own, got 'GradientClipping'"):
        issue(GradientClipping(**fields))


def test_a_subclass_of_the_packages_is_not_the_packages():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Bolder(cu.OutputPerturbation):
        @property
        def initial_distance(self):
            return 0.1 * self.init_radius

    certificate = issue(Bolder(init_radius=1.0), steps_run=1)
    assert certificate.separations["initial_distance"] == 0.1
    assert "That Bolder has the recorded separations" in certificate.assumptions[-1]


def test_without_separations_there_is_no_certificate():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Vague(Rotation):
        def separations(self):
            return None

        def rests_on(self):
            return ("Trust me.",)

    with pytest.raises(ValueError, match="Vague must state separations to be certified"):
        issue(Vague(length=0.1, rates=(1.0, 1.0, 1.0), steps=3))


def test_a_lower_bound_is_for_methods_that_attain_their_separations():
    assert issue().epsilon_lower_bound is None
    plain = issue(OWN.separations())
    assert 0 < plain.epsilon_lower_bound < plain.epsilon
    assert cu.verify(plain)


def test_an_accountant_of_the_users_certifies_nothing():
    with pytest.raises(
        ValueError, match="accountant must be one of certunlearn's for a certificate"
    ):
        issue(accountant=object())
    certificate = issue()
    assert (
        "accountant must be one of" in cu.verify(forged(certificate, accountant="mine")).problems[0]
    )


def test_a_stopped_run_is_certified_for_the_steps_that_were_run():
    certificate = issue(steps_run=2)
    first = OWN.separations().first(2)
    assert certificate.epsilon == cu.epsilon(first, noise_scale=3.0, delta=1e-5)
    assert cu.verify(certificate)


@pytest.mark.slow
@pytest.mark.parametrize("demo", ["digits", "mnist"])
def test_certificates_of_format_2_still_verify(demo):
    old, params = cu.Certificate.load(FORMAT_2 / f"{demo}.json"), FORMAT_2 / f"{demo}.npz"
    record = dataclasses.asdict(old)
    assert old.schema == record_format.SECOND_SCHEMA
    assert cu.verify(old, cu.certificates.load_params(params) if params.exists() else None)
    with_more = record | {"separations": issue().separations}
    with_more["record_digest"] = record_digest(with_more)
    assert "separations must be None" in problem(cu.Certificate(**with_more))


def test_a_record_too_costly_or_too_large_is_refused_before_any_step():
    steps = 30_000
    varied = cu.Separations(
        initial_distance=1.0,
        contraction=np.linspace(0.5, 1, steps),
        shift=np.linspace(0.1, 0.2, steps),
    )
    with pytest.raises(ValueError, match="1000000 bytes"):
        cu.unlearn(
            lambda p, b: jnp.sum(p["w"]),
            PARAMS,
            jnp.zeros((4, 1)),
            varied,
            noise_scale=1.0,
            delta=1e-5,
            batch_size=2,
            progress=False,
        )
