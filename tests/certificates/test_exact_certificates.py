"""Certificates without noise: what they hold, how they are issued, verified and replayed."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from exact_certificate_helpers import (
    HEADS,
    ISSUED,
    KEPT,
    LABELS,
    RNG,
    ROWS,
    SETTINGS,
    STATS,
)

import certunlearn as cu
from certunlearn import cli, exact
from certunlearn.certificates import record_format
from certunlearn.mechanisms import ExactHead, records

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
    assert cu.verify(certificate, head, stats=kept.stats)
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
    with pytest.raises(ValueError, match=r"use certunlearn\.exact\.certify"):
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
    certificate = ISSUED["head"][0]
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
