"""Certificates without noise: what they hold, and that forged ones of each kind do not verify."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import certunlearn as cu
from certunlearn import cli, exact
from certunlearn.certificates import record_format
from certunlearn.certificates.record import record_digest
from certunlearn.mechanisms import ExactHead, records

RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(40, 5)) / 3
LABELS = np.arange(40) % 3
SETTINGS = {"feature_norm": 1.0, "bits": 12}
KEPT = np.arange(40) >= 3
PARAMS = {"w": np.arange(3, dtype=np.float32)}

STATS = exact.remove(exact.collect(ROWS, LABELS, **SETTINGS), ROWS[~KEPT], LABELS[~KEPT])
HEADS = {"ridge": exact.ridge(STATS, 1e-2), "lda": exact.lda(STATS, 1e-2)}
NOISY = cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=3)
MINIMIZER = cu.PerturbedMinimizer(gradient_norm=1e-3, strong_convexity=0.1)


def certificates():
    head = HEADS["ridge"]
    noise = cu.noise_scale(MINIMIZER, epsilon=1.0, delta=1e-5)
    return {
        "retraining": (cu.certify(cu.Retraining(), params=PARAMS, retain_size=9), PARAMS),
        "head": (exact.certify(STATS, head, forget_size=3), head),
        "minimizer": (
            cu.certify(MINIMIZER, noise_scale=noise, delta=1e-5, params=PARAMS, steps_run=1),
            PARAMS,
        ),
        "noisy": (
            cu.certify(
                NOISY,
                noise_scale=9.0,
                delta=1e-5,
                params=PARAMS,
                steps_run=3,
                accountant="interpolation",
            ),
            PARAMS,
        ),
    }


ISSUED = certificates()
# What a certificate says on the issuer's word, which no recorded number contradicts.
WORD = {"created", "evidence", "finetune_steps", "forget_size", "key_source", "retain_size"}
WORD |= {"versions"}


def forged(name, **changes):
    """The certificate with other fields and a digest to match, as a careful forger makes it."""
    record = dataclasses.asdict(ISSUED[name][0]) | changes
    record["record_digest"] = record_digest(record)
    return cu.Certificate(**record)


def other_mechanism(name, **changes):
    return forged(name, mechanism=ISSUED[name][0].mechanism | changes)


# ------------------------------------------------------------------------------ what is issued


@pytest.mark.parametrize("name", ISSUED)
def test_what_is_issued_verifies_and_is_read_back(name, tmp_path):
    certificate, params = ISSUED[name]
    assert cu.verify(certificate, params)
    assert certificate.schema == record_format.SCHEMA == "certunlearn.certificate/4"
    certificate.save(tmp_path / "certificate.json")
    assert cu.Certificate.load(tmp_path / "certificate.json") == certificate
    held = json.loads((tmp_path / "certificate.json").read_text())
    assert ("sums_digest" in held) == (name == "head")


def test_a_head_s_certificate_names_its_sums_and_how_it_was_made():
    certificate, head = ISSUED["head"]
    assert certificate.sums_digest == exact.digest(STATS)
    assert certificate.epsilon == certificate.delta == certificate.noise_scale == 0
    assert certificate.mechanism == {
        "name": "ExactHead",
        "kind": "ridge",
        "l2": 1e-2,
        "num_features": 5,
        "feature_norm": 1.0,
        "bits": 12,
        "outputs": None,
        "classes": 3,
        "target_norm": 1024.0,
        "class_weights": None,
        "indexed": True,
    }
    assert certificate.retain_size == 37
    assert certificate.forget_size == 3
    summary = cu.verify(certificate, head, stats=STATS).summary
    assert "same function of the same integers" in summary
    assert certificate.sums_digest in summary
    assert "noise scale" not in summary


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("weights", [None, (1, 2, 5)])
def test_heads_of_both_kinds_are_certified_verified_and_replayed(kind, weights):
    kept = exact.collect(ROWS[KEPT], LABELS[KEPT], class_weights=weights, index=False, **SETTINGS)
    head = exact.ridge(kept) if kind == "ridge" else exact.lda(kept)
    certificate = exact.certify(kept, head)
    assert cu.verify(certificate, head, stats=kept)
    assert cu.verify(certificate, stats=kept)
    assert exact.replay(certificate, (ROWS[KEPT], LABELS[KEPT]))
    assert any("without an index that is the issuer's word" in s for s in certificate.assumptions)


def test_a_regression_and_what_keep_made_are_certified_too():
    targets = RNG.normal(size=(40, 2))
    stats = exact.collect(ROWS, targets)
    kept = exact.keep(stats, 1e-2)
    kept = exact.remove(kept, ROWS[~KEPT], targets[~KEPT])
    head = exact.ridge(kept)
    certificate = exact.certify(kept, head)
    assert cu.verify(certificate, head, stats=kept)
    assert cu.verify(certificate, head, stats=kept.statistics)
    batches = ((ROWS[at : at + 7], targets[at : at + 7]) for at in range(3, 40, 7))
    assert exact.replay(certificate, batches)
    order = RNG.permutation(np.flatnonzero(KEPT))
    assert exact.replay(certificate, [ROWS[order], targets[order]])
    wrong = exact.replay(certificate, (ROWS[1:], targets[1:]))
    assert not wrong
    assert "SHA-256" in wrong.problems[0]


def test_a_history_of_deletions_leaves_the_certificate_of_retraining():
    fresh = exact.collect(ROWS[KEPT], LABELS[KEPT], **SETTINGS)
    mine, theirs = (exact.certify(stats, exact.ridge(stats)) for stats in (STATS, fresh))
    told = {"created", "record_digest"}
    pairs = (dataclasses.asdict(each) for each in (mine, theirs))
    first, second = ({k: v for k, v in pair.items() if k not in told} for pair in pairs)
    assert first == second


# ------------------------------------------------------------------------------ what is refused


def test_a_head_of_other_sums_is_not_certified():
    whole = exact.collect(ROWS, LABELS, **SETTINGS)
    with pytest.raises(ValueError, match="head must be that of these sums"):
        exact.certify(whole, HEADS["ridge"])
    nudged = type(HEADS["ridge"]).of(np.nextafter(HEADS["ridge"], 9), HEADS["ridge"].recipe)
    with pytest.raises(ValueError, match="bit for bit"):
        exact.certify(STATS, nudged)
    swapped = type(HEADS["ridge"]).of(HEADS["ridge"], exact.Recipe("ridge", 2e-2))
    with pytest.raises(ValueError, match="bit for bit"):
        exact.certify(STATS, swapped)


@pytest.mark.parametrize("head", [np.zeros((5, 3)), HEADS["ridge"] + 0, None, {"w": 1}])
def test_a_head_without_its_recipe_is_not_certified(head):
    with pytest.raises(TypeError, match="which knows its recipe"):
        exact.certify(STATS, head)


def test_sums_must_be_sums():
    with pytest.raises(TypeError, match="stats must be sums"):
        exact.certify({"gram": 1}, HEADS["ridge"])
    with pytest.raises(TypeError, match="stats must be sums"):
        cu.verify(ISSUED["head"][0], stats=HEADS["ridge"])
    with pytest.raises(TypeError, match="data must be"):
        exact.replay(ISSUED["head"][0], 3)


def test_other_doors_to_a_head_s_certificate_are_closed():
    mechanism = records.from_record(ISSUED["head"][0].mechanism)
    with pytest.raises(ValueError, match="use certunlearn.exact.certify"):
        cu.certify(mechanism, params=HEADS["ridge"])
    with pytest.raises(ValueError, match="mechanism must be one that unlearn runs, got ExactHead"):
        cu.unlearn(
            lambda w, batch: jnp.sum(w),
            np.zeros(3, np.float32),
            (np.zeros((4, 3)),),
            mechanism,
            center=np.zeros(3),
            batch_size=2,
        )


@pytest.mark.parametrize("name", ["retraining", "minimizer", "noisy"])
def test_sums_and_replay_are_for_heads_alone(name):
    certificate, params = ISSUED[name]
    found = cu.verify(certificate, params, stats=STATS)
    assert "no head of integer sums" in found.problems[0]
    found = exact.replay(certificate, (ROWS, LABELS))
    assert "nothing to replay" in found.problems[0]


# ------------------------------------------------------------------------------ forgeries

ZEROS = ("noise_scale", "epsilon", "delta", "mu", "total_variation", "steps_run")
EXACT_CLAIM = {**dict.fromkeys(ZEROS, 0), "accountant": "exact", "evidence": "word of the issuer"}


@pytest.mark.parametrize("name", ["minimizer", "noisy"])
@pytest.mark.parametrize(
    "changes",
    [
        EXACT_CLAIM,
        EXACT_CLAIM | {"epsilon_lower_bound": None},
        {"noise_scale": 0.0},
        {"noise_scale": 0.0, "accountant": "exact"},
        {"delta": 0.0},
        {"epsilon": 0.0},
        {"steps_run": 0},
        {"mu": 0.0, "total_variation": 0.0, "epsilon": 0.0},
        {"accountant": "exact"},
        {"sums_digest": "0" * 64},
    ],
)
def test_no_noisy_mechanism_claims_what_only_exact_ones_may(name, changes):
    assert not cu.verify(forged(name, **changes))


@pytest.mark.parametrize("name", ["retraining", "head"])
@pytest.mark.parametrize(
    "changes",
    [
        *({field: value} for field in ZEROS for value in (1e-300, 1, -1, None, True, [0.0])),
        *({"accountant": other} for other in ("interpolation", "dp-accounting", None)),
        {"epsilon_lower_bound": 0.0},
        {"evidence": "optimizer state"},
        {"separations": {"initial_distance": 0.0}},
        {"assumptions": ["All is well."]},
        {"schema": record_format.THIRD_SCHEMA},
        {"schema": record_format.SECOND_SCHEMA},
        {"mechanism": {"name": "GradientClipping"}},
    ],
)
def test_an_exact_claim_is_zero_everywhere(name, changes):
    assert not cu.verify(forged(name, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"sums_digest": None},
        {"sums_digest": "0" * 64},
        {"sums_digest": exact.digest(STATS).upper()},
        {"params_digest": "0" * 64},
        {"retain_size": 36},
        {"mechanism": {"name": "Retraining"}, "sums_digest": None},
    ],
)
def test_a_head_s_digests_are_those_of_its_sums(changes):
    assert not cu.verify(forged("head", **changes), HEADS["ridge"], stats=STATS)


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "lda"},
        {"kind": "mean"},
        {"l2": 2e-2},
        {"l2": 0.0},
        {"bits": 13},
        {"bits": 21},
        {"feature_norm": 2.0},
        {"num_features": 6},
        {"classes": 4},
        {"classes": None, "outputs": 3},
        {"target_norm": 1.0},
        {"class_weights": [1, 2, 1]},
        {"class_weights": [1, 1]},
    ],
)
def test_a_head_s_recipe_and_settings_are_those_of_its_sums(changes):
    certificate = other_mechanism("head", **changes)
    assert not cu.verify(certificate, HEADS["ridge"], stats=STATS)
    assert not exact.replay(certificate, (ROWS[KEPT], LABELS[KEPT]))


def test_an_index_that_was_not_kept_is_not_claimed_by_other_sentences():
    assert not cu.verify(other_mechanism("head", indexed=False))


def test_a_head_of_other_sums_does_not_verify():
    whole = exact.collect(ROWS, LABELS, **SETTINGS)
    theirs = exact.certify(whole, exact.ridge(whole, 1e-2))
    assert not cu.verify(theirs, exact.ridge(whole, 1e-2), stats=STATS)
    assert not cu.verify(theirs, HEADS["ridge"])
    # With the digests of one put into the other, the claim holds by itself: only sums, or the
    # retain data, tell. They do.
    mixed = forged("head", params_digest=theirs.params_digest)
    assert cu.verify(mixed)
    found = cu.verify(mixed, stats=STATS)
    assert "the head of these sums has the SHA-256" in found.problems[0]
    assert not exact.replay(mixed, (ROWS[KEPT], LABELS[KEPT]))
    mixed = forged("head", sums_digest=theirs.sums_digest)
    found = cu.verify(mixed, HEADS["ridge"], stats=STATS)
    assert "stats are not the certified ones" in found.problems[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"reference": "retrained"},
        {"reference": "center"},
        {"gradient_norm": 1e-4},
        {"gradient_norm": 0.0},
        {"strong_convexity": 1.0},
        {"strong_convexity": None},
    ],
)
def test_a_minimiser_s_tolerance_and_reference_decide_its_claim(changes):
    assert not cu.verify(other_mechanism("minimizer", **changes))


def test_a_reference_that_is_swapped_with_its_sentences_still_has_too_little_noise():
    swapped = dataclasses.replace(MINIMIZER, reference="retrained")
    certificate = forged(
        "minimizer",
        mechanism=ISSUED["minimizer"][0].mechanism | {"reference": "retrained"},
        assumptions=list(swapped.assumptions),
    )
    found = cu.verify(certificate)
    assert "mu is recorded as" in found.problems[0]


@pytest.mark.parametrize("name", ["retraining", "head", "minimizer"])
def test_every_field_that_is_changed_alone_is_noticed(name):
    certificate, params = ISSUED[name]
    stats = STATS if name == "head" else None
    for field, value in dataclasses.asdict(certificate).items():
        for other in (None, 0.5, 2, "x", [], {}, not value):
            if other == value and type(other) is type(value):
                continue
            record = dataclasses.asdict(certificate) | {field: other}
            assert not cu.verify(cu.Certificate(**record), params, stats=stats), (field, other)
            if field not in {*WORD, "record_digest", "epsilon_lower_bound"}:
                found = cu.verify(forged(name, **{field: other}), params, stats=stats)
                assert not found, (field, other)


# ------------------------------------------------------------------------------ older formats


def test_format_3_verifies_by_its_own_rules():
    current = ISSUED["noisy"][0]
    old = forged("noisy", schema=record_format.THIRD_SCHEMA)
    assert cu.verify(old)
    assert record_digest(dataclasses.asdict(current)) == current.record_digest
    # It had no mechanisms without noise, and none that minimises: a user's class may have had
    # their names.
    for name in ("retraining", "head", "minimizer"):
        found = cu.verify(forged(name, schema=record_format.THIRD_SCHEMA))
        assert not found
    own = dataclasses.make_dataclass(
        "PerturbedMinimizer",
        [("steps", int, 3)],
        bases=(cu.Mechanism,),
        namespace={
            "separations": lambda self: cu.Separations(
                initial_distance=1.0, contraction=1.0, shift=0.1, steps=3
            ),
            "update": lambda self, center: None,
        },
        frozen=True,
    )
    with pytest.raises(ValueError, match="class name of its own"):
        cu.certify(own(), noise_scale=5.0, delta=1e-5, params=PARAMS, steps_run=3)
    issued = cu.certify(
        type("Mine", (own,), {})(),
        noise_scale=5.0,
        delta=1e-5,
        params=PARAMS,
        steps_run=3,
        accountant="interpolation",
    )
    record = dataclasses.asdict(issued)
    record["mechanism"] = record["mechanism"] | {"name": "PerturbedMinimizer"}
    record["assumptions"][-1] = record["assumptions"][-1].replace("Mine", "PerturbedMinimizer")
    for schema, holds in ((record_format.THIRD_SCHEMA, True), (record_format.SCHEMA, False)):
        record["schema"] = schema
        record["record_digest"] = record_digest(record)
        assert cu.verify(cu.Certificate(**record)).ok is holds


# ------------------------------------------------------------------------------ the command line


def test_the_command_line_prints_each_kind(tmp_path, capsys):
    for name in ("retraining", "head", "minimizer"):
        certificate, params = ISSUED[name]
        certificate.save(tmp_path / "c.json")
        cu.certificates.save_params(tmp_path / "p.npz", params)
        code = cli.main(["verify", str(tmp_path / "c.json"), "--params", str(tmp_path / "p.npz")])
        shown = capsys.readouterr().out
        assert code == 0, shown
        assert "VERIFIED" in shown
        words = {
            "retraining": "trained from a public start on retain data only",
            "head": "the same function of the same integers",
            "minimizer": "reference 'minimizer'",
        }
        assert words[name] in shown


def test_the_command_line_checks_the_sums(tmp_path, capsys):
    certificate, head = ISSUED["head"]
    certificate.save(tmp_path / "c.json")
    paths = {}
    for name, stats in (("right", STATS), ("wrong", exact.collect(ROWS, LABELS, **SETTINGS))):
        paths[name] = tmp_path / f"{name}.private.npz"
        exact.save(paths[name], stats)
    for name, code in (("right", 0), ("wrong", 1)):
        found = cli.main(["verify", str(tmp_path / "c.json"), "--sums", str(paths[name])])
        assert found == code, capsys.readouterr()
    assert "stats are not the certified ones" in capsys.readouterr().err


# ------------------------------------------------------------------------------ the mechanism


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "svm"}, "kind"),
        ({"bits": 1}, "bits must be from 2 to 20"),
        ({"classes": None}, "one number for each of None classes|classes must be given"),
        ({"classes": 1}, "classes must be at least 2"),
        ({"outputs": 2}, "without outputs"),
        ({"class_weights": (1, 2)}, "for each of 3 classes"),
        ({"class_weights": (1, 2, 256)}, "at most 255"),
        ({"class_weights": (1, 2, 0)}, "class_weights"),
        ({"l2": 0.0}, "l2 must be positive"),
        ({"num_features": 0}, "num_features"),
    ],
)
def test_the_mechanism_checks_its_fields(changes, words):
    fields = {"kind": "lda", "l2": 0.1, "num_features": 4, "classes": 3, **SETTINGS}
    made = ExactHead(**fields, class_weights=[1, 2, 3])
    assert made.class_weights == (1, 2, 3)
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(made, **changes)
