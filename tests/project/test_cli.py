import json
import re
import subprocess
import sys

import numpy as np
import pytest

import certunlearn as cu
from certunlearn import accounting, cli, mechanisms

PLAN = [
    "plan",
    "--epsilon",
    "1",
    "--delta",
    "1e-5",
    "--init-radius",
    "1",
    "--clip-norm",
    "1",
    "--learning-rate",
    "0.1",
]
MECHANISM = cu.GradientClipping(init_radius=1.0, clip_norm=1.0, learning_rate=0.1, steps=10)
EXACT = {"accountant": "interpolation"}
PARAMS = {"layer": {"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)}}


def command(*arguments, **options):
    """Runs the command line as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "certunlearn.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


def assert_one_line_error(code, captured, expected_code):
    assert code == expected_code
    assert len(captured.err.strip().splitlines()) == 1
    assert captured.err.startswith("certunlearn: error: ")
    assert captured.out == ""


@pytest.fixture
def released(tmp_path):
    sigma = cu.noise_scale(MECHANISM, epsilon=1.0, delta=1e-5, **EXACT)
    certificate = cu.certify(
        MECHANISM,
        noise_scale=sigma,
        delta=1e-5,
        epsilon=1.0,
        params=PARAMS,
        steps_run=10,
        retain_size=90,
        **EXACT,
    )
    certificate.save(tmp_path / "certificate.json")
    cu.certificates.save_params(tmp_path / "unlearned.npz", PARAMS)
    return tmp_path


def test_version():
    done = command("--version")
    assert (done.returncode, done.stdout.strip()) == (0, cu.__version__)


@pytest.mark.slow
def test_plan_prints_a_table():
    done = command(*PLAN, "--steps", 2, "--params", 4810)
    assert (done.returncode, done.stderr) == (0, "")
    sigma = cu.noise_scale(MECHANISM.first(2), epsilon=1.0, delta=1e-5, **EXACT)
    shown = [float(word) for word in re.findall(r"\b\d\.\d+\b", done.stdout)]
    assert any(0 <= number - sigma < 1e-5 * sigma for number in shown)  # never less noise
    for words in (
        *accounting.supported_names(MECHANISM),
        "TV limit",
        "true epsilon",
        "best number of steps",
        "N = 4810",
    ):
        assert words in done.stdout


@pytest.mark.slow
def test_plan_prints_json_that_agrees_with_the_accountants():
    done = command(*PLAN, "--steps", 2, "--weight-decay", 0.5, "--reference", "center", "--json")
    assert done.returncode == 0
    plan = json.loads(done.stdout)
    mechanism = cu.GradientClipping(
        init_radius=1.0,
        clip_norm=1.0,
        learning_rate=0.1,
        weight_decay=0.5,
        steps=2,
        reference="center",
    )
    sigma = cu.noise_scale(mechanism, epsilon=1.0, delta=1e-5, **EXACT)
    shown = plan["accountants"]["interpolation"]
    assert shown["noise_scale"] == sigma
    assert shown["total_variation"] == cu.accounting.total_variation(
        mechanism, noise_scale=sigma, **EXACT
    )
    assert plan["accountants"]["coupling"]["noise_scale"] < sigma
    assert plan["best_steps"] == cu.accounting.best_steps(mechanism)


def test_plan_shows_what_an_accountant_refuses(capsys):
    arguments = [*PLAN[:2], "20", *PLAN[3:], "--steps", "1", "--json"]
    assert cli.main(arguments) == 0
    refused = json.loads(capsys.readouterr().out)["accountants"]["closed-form"]
    assert refused["noise_scale"] is None
    assert "unsound" in refused["refused"]


OTHER = ["plan", "--epsilon", "1", "--delta", "1e-5", "--mechanism"]


@pytest.mark.slow
def test_plan_of_another_mechanism(capsys):
    fields = ["--set", "model_radius=0.5", "--set", "clip_norm=null", "--init-radius", "1"]
    arguments = [*OTHER, "ModelClipping", *fields, "--learning-rate", "0.1", "--steps", "3"]
    assert cli.main([*arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    mechanism = cu.ModelClipping(init_radius=1.0, model_radius=0.5, learning_rate=0.1, steps=3)
    assert mechanisms.from_record(plan["mechanism"]) == mechanism
    sigma = cu.noise_scale(mechanism, epsilon=1.0, delta=1e-5)
    assert plan["accountants"]["product"]["noise_scale"] == sigma
    assert plan["best_steps"] is None
    assert cli.main([*OTHER, "OutputPerturbation", "--init-radius", "1", "--params", "9"]) == 0
    shown = capsys.readouterr().out
    assert "1 noisy step, reference 'retrained'" in shown
    assert "coupling" not in shown  # interpolation is exact there
    convex = ["initial_distance=0.5", "strong_convexity=0.1", "smoothness=1", "learning_rate=1"]
    fields = [part for field in convex for part in ("--set", field)]
    assert cli.main([*OTHER, "DescentToDelete", *fields, "--steps", "4"]) == 0
    shown = capsys.readouterr().out
    assert "4 steps and noise after the last" in shown
    assert "strongly convex" in shown


def test_plan_of_plain_numbers(capsys):
    fields = ["initial_distance=1", "contraction=[0,1]", "shift=0.1", "noisy=[false,true]"]
    arguments = [part for field in fields for part in ("--set", field)]
    assert cli.main([*OTHER, "Separations", *arguments, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    stated = cu.Separations(
        initial_distance=1.0, contraction=[0.0, 1.0], shift=0.1, noisy=[False, True]
    )
    sigma = cu.noise_scale(stated, epsilon=1.0, delta=1e-5, **EXACT)
    assert plan["accountants"]["interpolation"]["noise_scale"] == sigma
    assert plan["mechanism"]["contraction"] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Nonsense"], "mechanism name must be one of"),
        (["Separations", "--set", "transform=1"], "Separations takes no transform here"),
        (["Separations", "--set", "speed=1"], "unexpected keyword argument 'speed'"),
        (["OutputPerturbation"], "missing or unknown fields: ['init_radius']"),
        (["OutputPerturbation", "--set", "init_radius"], "FIELD=VALUE"),
        (["OutputPerturbation", "--set", "init_radius=far"], "init_radius must be one real number"),
        (["OutputPerturbation", "--init-radius", "1", "--steps", "3"], "unknown fields: ['steps']"),
    ],
)
def test_plan_refuses_what_is_no_mechanism(capsys, arguments, message):
    code = cli.main([*OTHER, *arguments])
    captured = capsys.readouterr()
    assert message in captured.err
    assert_one_line_error(code, captured, 2)


def test_plan_says_what_to_install_for_private_training(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    fields = ["clip_norm=1", "sampling_rate=0.1", "batch_size=7", "deletions=1", "learning_rate=1"]
    arguments = [part for field in fields for part in ("--set", field)]
    code = cli.main([*OTHER, "DPSGD", *arguments, "--steps", "3"])
    captured = capsys.readouterr()
    assert 'pip install "certunlearn[dp]"' in captured.err
    assert_one_line_error(code, captured, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--steps", "0"],
        ["--epsilon", "-1"],
        ["--epsilon", "nan"],
        ["--delta", "1"],
        ["--clip-norm", "0"],
        ["--weight-decay", "11"],
        ["--params", "0"],
        ["--reference", "nothing"],
    ],
)
def test_plan_refuses_bad_numbers_with_code_2(capsys, wrong):
    assert_one_line_error(cli.main([*PLAN, *wrong]), capsys.readouterr(), 2)


@pytest.mark.parametrize("arguments", [[], ["nonsense"], [*PLAN, "--epsilon", "one"], ["verify"]])
def test_bad_usage_has_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_bad_input_shows_no_traceback():
    done = command(*PLAN, "--steps", -3)
    assert done.returncode == 2
    assert done.stderr == "certunlearn: error: steps must be at least 1, got -3\n"


def test_verify_accepts_what_was_issued(released):
    done = command("verify", released / "certificate.json", "--params", released / "unlearned.npz")
    assert (done.returncode, done.stderr) == (0, "")
    assert "(1, 1e-05)-unlearning" in done.stdout
    assert "true epsilon        between 0.5" in done.stdout
    assert "VERIFIED" in done.stdout


def test_verify_without_parameters_says_so(released, capsys):
    assert cli.main(["verify", str(released / "certificate.json")]) == 0
    assert "--params FILE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "value"), [("epsilon", 0.5), ("noise_scale", 9.0), ("forget_size", 3)]
)
def test_verify_catches_an_altered_number(released, capsys, field, value):
    path = released / "certificate.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert cli.main(["verify", str(path)]) == 1
    captured = capsys.readouterr()
    assert "altered" in captured.err
    assert captured.out == "NOT VERIFIED\n"


def test_verify_catches_other_parameters(released, capsys):
    other = released / "other.npz"
    cu.certificates.save_params(
        other, {"layer": {"w": PARAMS["layer"]["w"] + 1e-6, "b": np.zeros(3)}}
    )
    arguments = ["verify", str(released / "certificate.json"), "--params", str(other)]
    assert cli.main(arguments) == 1
    assert "not the released ones" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe", b"{}", b"[1]", b"[" * 100_000, "half"])
def test_verify_reports_what_cannot_be_read(released, capsys, content):
    path = released / "certificate.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:300] if content == "half" else content)
    assert_one_line_error(cli.main(["verify", str(path)]), capsys.readouterr(), 1)


def test_verify_reports_parameters_that_cannot_be_read(released, capsys):
    arguments = ["verify", str(released / "certificate.json"), "--params"]
    assert_one_line_error(cli.main([*arguments, "none.npz"]), capsys.readouterr(), 1)
    broken = released / "broken.npz"
    broken.write_bytes((released / "unlearned.npz").read_bytes()[:100])
    assert_one_line_error(cli.main([*arguments, str(broken)]), capsys.readouterr(), 1)


@pytest.mark.slow
def test_verify_reads_many_small_leaves_but_not_what_is_too_large(released, capsys):
    params = {f"layer{i}/bias": np.ones(1, np.float32) for i in range(6_000)}
    path, saved = released / "many.json", released / "many.npz"
    sigma = cu.noise_scale(MECHANISM, epsilon=1.0, delta=1e-5, **EXACT)
    cu.certify(MECHANISM, noise_scale=sigma, delta=1e-5, params=params, steps_run=10, **EXACT).save(
        path
    )
    cu.certificates.save_params(saved, params)
    assert saved.stat().st_size > 1_000_000  # most of it headers
    assert cli.main(["verify", str(path), "--params", str(saved)]) == 0
    capsys.readouterr()
    cu.certificates.save_params(saved, {"w": np.ones(10**6)})
    arguments = ["verify", str(released / "certificate.json"), "--params", str(saved)]
    code = cli.main(arguments)
    captured = capsys.readouterr()
    assert "bytes, more than the" in captured.err
    assert_one_line_error(code, captured, 1)


def test_verify_reports_a_claim_too_large_to_derive(released, capsys):
    path = released / "certificate.json"
    record = json.loads(path.read_text())
    record["mechanism"]["steps"] = record["steps_run"] = 10**15
    path.write_text(json.dumps(record))
    assert cli.main(["verify", str(path)]) == 1
    assert capsys.readouterr().err.startswith("certunlearn: error: ")


def test_demo_names_the_extra_when_a_package_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    for name in ("membership", "network", "run", "report"):
        monkeypatch.delitem(sys.modules, f"certunlearn.demo.{name}", raising=False)
    code = cli.main(["demo", "--out", str(tmp_path)])
    captured = capsys.readouterr()
    assert_one_line_error(code, captured, 2)
    assert 'sklearn is missing: pip install "certunlearn[examples]"' in captured.err


@pytest.mark.parametrize("dataset", ["mnist", "cifar10"])
def test_demo_refuses_a_folder_without_the_data(tmp_path, capsys, dataset):
    arguments = ["demo", "--dataset", dataset, "--data-dir", str(tmp_path), "--out"]
    code = cli.main([*arguments, str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert_one_line_error(code, captured, 2)
    assert f"no {dataset} in" in captured.err


@pytest.mark.parametrize(
    "wrong", [["--epsilon", "-1"], ["--delta", "2"], ["--seed", "-1"], ["--seed", str(2**40)]]
)
def test_demo_refuses_bad_numbers_before_training(tmp_path, capsys, wrong):
    code = cli.main(["demo", *wrong, "--out", str(tmp_path / "out")])
    assert_one_line_error(code, capsys.readouterr(), 2)


def test_demo_refuses_a_file_as_its_folder(tmp_path, capsys):
    (tmp_path / "out").write_text("in the way")
    code = cli.main(["demo", "--out", str(tmp_path / "out")])
    assert_one_line_error(code, capsys.readouterr(), 2)
