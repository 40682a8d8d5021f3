import dataclasses
import json
import os
import re

import jax
import matplotlib.image
import numpy as np
import pytest
import scipy.stats

import certunlearn as cu
from certunlearn import accounting, cli
from certunlearn.demo import data, image_halves, membership, network, report, run

NAMES = [
    "original",
    "retrained from scratch",
    "started from the centre",
    "unlearned, after the noisy phase",
    "unlearned and fine-tuned",
    "retrained, stopped when as good",
    "linear: exact head",
    "linear: certified minimiser",
]


def test_auc_on_known_distributions():
    rng = np.random.default_rng(0)
    members, others = rng.normal(size=40_000), rng.normal(size=40_000)
    assert membership.auc(members, others) == pytest.approx(0.5, abs=0.01)
    truth = scipy.stats.norm.cdf(1 / np.sqrt(2))
    assert membership.auc(members, others + 1) == pytest.approx(truth, abs=0.01)
    assert membership.auc(members + 1, others) == pytest.approx(1 - truth, abs=0.01)
    assert membership.auc(np.zeros(3), np.ones(4)) == 1.0
    assert membership.auc(np.zeros(3), np.zeros(4)) == 0.5


def test_calibration_sees_members_among_examples_of_every_difficulty():
    rng = np.random.default_rng(0)
    difficulty = rng.normal(scale=3, size=(2, 4000))
    reference = np.exp(difficulty + rng.normal(scale=0.5, size=(2, 4000)))
    model = np.exp(difficulty + rng.normal(scale=0.5, size=(2, 4000)) - [[1.0], [0.0]])
    scores = membership.calibrated(model, reference)
    plain, better = membership.auc(*model), membership.auc(*scores)
    assert plain < 0.65
    assert better == pytest.approx(scipy.stats.norm.cdf(1.0), abs=0.02)


def test_chance_error_is_the_spread_of_the_auc():
    rng = np.random.default_rng(0)
    seen = [membership.auc(rng.normal(size=50), rng.normal(size=80)) for _ in range(400)]
    assert membership.chance_error(50, 80) == pytest.approx(np.std(seen), rel=0.15)


@pytest.mark.slow
def test_losses_are_the_cross_entropy_and_do_not_round_to_zero():
    net = network.MLP(4)
    params = network.init(net, 0, 6)
    pixels = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    batch = {"x": pixels, "y": np.arange(5)}
    logits = np.asarray(net.apply(params, batch["x"]), np.float64)
    expected = scipy.special.logsumexp(logits, axis=1) - logits[np.arange(5), np.arange(5)]
    losses, correct = network.losses(net, params, batch)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_array_equal(correct, np.argmax(logits, axis=1) == np.arange(5))
    steep = jax.tree.map(lambda x: x * 0, params)
    last = max(steep["params"], key=lambda name: steep["params"][name]["bias"].size)
    steep["params"][last]["bias"] = np.eye(10, dtype=np.float32)[0] * 50
    loss = network.losses(net, steep, {"x": batch["x"], "y": np.zeros(5, int)})[0]
    np.testing.assert_allclose(loss, 9 * np.exp(-50.0), rtol=1e-4)


def test_split_is_a_partition_by_seed():
    train = {"x": np.arange(50.0)[:, None], "y": np.arange(50)}
    retain, forget = data.split_forget(train, 0.1, seed=3)
    assert len(forget["y"]) == 5
    assert sorted([*retain["y"], *forget["y"]]) == list(range(50))
    np.testing.assert_array_equal(retain["x"][:, 0], retain["y"])
    np.testing.assert_array_equal(forget["y"], data.split_forget(train, 0.1, seed=3)[1]["y"])
    assert set(forget["y"]) != set(data.split_forget(train, 0.1, seed=4)[1]["y"])


def test_digits_are_split_into_train_and_test():
    digits = data.digits(0)
    assert digits.train["x"].shape == (1438, 64)
    assert digits.test["x"].shape == (359, 64)
    assert digits.train["x"].dtype == np.float32
    assert (digits.train["x"].min(), digits.train["x"].max()) == (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "epsilon"), [("mnist", 1.0), ("digits", 8.0)])
def test_the_mechanism_puts_the_stated_noise_into_the_start_of_fine_tuning(name, epsilon):
    settings = run.SETTINGS[name]
    mechanism, sigma = run.make_mechanism(settings, epsilon, 1e-5)
    found = accounting.epsilon(mechanism, noise_scale=sigma, delta=1e-5)
    assert 0.97 * epsilon < found <= epsilon
    noise = mechanism.total_noise_scale(sigma)
    assert noise == pytest.approx(settings.total_noise, rel=0.06)  # two digits of the radius
    assert accounting.best_steps(mechanism) == pytest.approx(settings.noisy_steps, abs=1)


def check_files(folder, noisy_steps, total_steps):
    assert sorted(path.name for path in folder.iterdir()) == sorted(report.FILES)
    certificate = cu.Certificate.load(folder / "certificate.json")
    assert cu.verify(certificate, cu.certificates.load_params(folder / "unlearned.npz"))
    assert "experiments only" in certificate.key_source
    height, width = matplotlib.image.imread(folder / "report.png").shape[:2]
    assert (width, height) == (1200, 450)
    results = json.loads((folder / "results.json").read_text())
    rows = results["rows"]
    assert [row["name"] for row in rows] == NAMES
    original, retrained, centre, noisy, unlearned, cheapest, exact, minimizer = rows
    assert original["forget"] > 0.99
    assert retrained["steps"] == centre["steps"] == unlearned["steps"] == total_steps
    assert noisy["steps"] == noisy_steps
    assert retrained["certified"] == centre["certified"] == [0, 0]
    assert original["certified"] is None
    assert unlearned["certified"] == [certificate.epsilon, certificate.delta]
    assert 0.97 < certificate.epsilon <= 1.0
    assert certificate.delta == 1e-5
    assert 0.5 < results["epsilon_lower_bound"] == certificate.epsilon_lower_bound < 1.0
    assert unlearned["test"] >= retrained["test"] - 0.02
    assert 0 < noisy["seconds"] < unlearned["seconds"]
    assert original["auc"] > max(retrained["auc"], unlearned["auc"])
    assert cheapest["certified"] == exact["certified"] == [0, 0]
    assert cheapest["retain"] >= unlearned["retain"] or cheapest["steps"] == total_steps
    assert cheapest["steps"] <= total_steps
    assert 0.97 < minimizer["certified"][0] <= 1.0
    assert 0 < exact["seconds"] < minimizer["seconds"]
    for row in (retrained, centre, unlearned, cheapest, exact, minimizer):
        assert abs(row["auc"] - 0.5) < 4 * results["auc_error"]
    table = (folder / "table.md").read_text()
    assert all(f"| {name} " in table for name in NAMES)
    return results


@pytest.mark.slow
def test_digits_end_to_end_from_the_command_line(tmp_path, capsys):
    assert cli.main(["demo", "--out", str(tmp_path / "new" / "out")]) == 0
    printed = capsys.readouterr().out
    settings = run.SETTINGS["digits"]
    total = settings.noisy_steps + settings.finetune_steps
    results = check_files(tmp_path / "new" / "out", settings.noisy_steps, total)
    assert [point["step"] for point in results["curve"]] == list(range(0, total + 1, 20))
    words = " ".join(printed.split())
    shown = float(re.search(r"by more than (\S+); so", words)[1])
    assert results["total_variation"] <= shown <= 0.107  # theory: (1, 1e-5)
    shown = float(re.search(r"between (\S+) \(an attack reaches it\) and", words)[1])
    assert 0 <= results["epsilon_lower_bound"] - shown < 1e-3
    assert "Not promised: that the old accuracy is kept" in printed
    assert "leave key=None" in printed
    commands = [line.split() for line in printed.strip().splitlines()[-3:]]
    assert [words[1] for words in commands] == ["verify", "report", "advise"]
    assert all(words[0] == "certunlearn" and cli.main(words[1:]) == 0 for words in commands)
    assert (tmp_path / "new" / "out" / "report.html").exists()


def run_short(dataset=None):
    settings = dataclasses.replace(
        run.SETTINGS["digits"], train_steps=60, noisy_steps=5, finetune_steps=30, evaluate_every=10
    )
    said = []
    dataset = dataset or data.digits(1)
    result = run.run(dataset, settings, epsilon=2.0, delta=1e-6, seed=1, say=said.append)
    assert len(said) == 7
    return result


@pytest.fixture(scope="module")
def short():
    return run_short()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_model(short):
    again = run_short()
    assert cu.certificates.params_digest(short.params) == cu.certificates.params_digest(
        again.params
    )
    without_time = [dataclasses.replace(row, seconds=0) for row in short.rows]
    assert without_time == [dataclasses.replace(row, seconds=0) for row in again.rows]


@pytest.mark.slow
def test_the_run_from_the_centre_draws_other_noise(short):
    assert dataclasses.replace(short.rows[2], name="") != dataclasses.replace(
        short.rows[4], name="", certified=(0, 0), seconds=short.rows[2].seconds
    )


@pytest.mark.slow
def test_files_are_overwritten(short, tmp_path):
    for name in report.FILES:
        (tmp_path / name).write_text("old")
    report.write(short, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(report.FILES)
    assert (tmp_path / "table.md").read_text() == f"{report.to_text(short)}\n"
    assert cu.verify(
        cu.Certificate.load(tmp_path / "certificate.json"),
        cu.certificates.load_params(tmp_path / "unlearned.npz"),
    )


@pytest.mark.slow
def test_table_lines_are_aligned(short):
    lines = report.table(short.rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 2 + len(NAMES)
    assert "0, 0 (never saw it)" in lines[3]
    shown = float(re.search(r"([\d.]+), 1e-06", lines[6])[1])
    assert 0 <= shown - short.certificate.epsilon < 1e-3


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("CERTUNLEARN_DATA_DIR"), reason="no CERTUNLEARN_DATA_DIR")
def test_mnist_end_to_end(tmp_path):
    assert cli.main(["demo", "--dataset", "mnist", "--out", str(tmp_path)]) == 0
    settings = run.SETTINGS["mnist"]
    total = settings.noisy_steps + settings.finetune_steps
    check_files(tmp_path, settings.noisy_steps, total)


@pytest.mark.slow
def test_features_depend_on_no_private_image_but_their_own():
    halves = image_halves.synthetic(600, 200)
    said = []
    dataset = data.of_halves("synthetic", halves, said.append)
    assert len(said) == 1
    size = len(halves.private.labels)
    assert dataset.train["x"].shape == (size, 257)
    assert np.linalg.norm(dataset.train["x"], axis=1).max() <= 1
    pixels = halves.private.pixels.copy()
    pixels[3] = 255 - pixels[3]
    other = halves._replace(private=halves.private._replace(pixels=pixels))
    changed = data.of_halves("synthetic", other, said.append)
    differ = np.any(dataset.train["x"] != changed.train["x"], axis=1)
    np.testing.assert_array_equal(np.flatnonzero(differ), [3])
    np.testing.assert_array_equal(dataset.test["x"], changed.test["x"])
    result = run_short(dataset)
    assert [row.name for row in result.rows] == NAMES
    assert f"trained on {len(halves.public.labels)} public" in report.notes(result)


def test_pictures_of_half_the_size_are_means_of_squares():
    pixels = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
    small = image_halves.half_size(image_halves.Images(pixels, np.zeros(1, np.int32)))
    assert small.pixels.shape == (1, 2, 2, 3)
    exact = pixels.reshape(2, 2, 2, 2, 3).mean(axis=(1, 3))  # each ends in a half
    assert np.all(np.abs(small.pixels[0] - exact) == 0.5)
    white = image_halves.Images(np.full((1, 4, 4, 3), 255, np.uint8), np.zeros(1, np.int32))
    assert np.all(image_halves.half_size(white).pixels == 255)


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("CERTUNLEARN_DATA_DIR"), reason="no CERTUNLEARN_DATA_DIR")
def test_the_halves_of_cifar10_share_no_class():
    halves = image_halves.cifar10(os.environ["CERTUNLEARN_DATA_DIR"])
    assert [len(part.labels) for part in halves] == [25000, 25000, 5000]
    assert not set(image_halves.PUBLIC_CLASSES) & set(image_halves.PRIVATE_CLASSES)
    for part in halves:
        assert set(part.labels) == set(range(5))
