import json
import shlex

import numpy as np
import pytest

import certunlearn as cu
from certunlearn import cli, planning
from certunlearn.advice import command_line


def test_advise_prints_the_advice(capsys):
    arguments = "advise --parameters 20042 --public-start --rows 50000 --deletions 500"
    assert cli.main(arguments.split()) == 0
    said = {"parameters": 20_042, "public_start": True, "rows": 50_000, "deletions": 500}
    assert capsys.readouterr().out == f"{cu.advise(**said)}\n"


def test_every_argument_has_an_option(capsys):
    arguments = (
        "advise --parameters 99 --distance 2 --fresh-scale 0.1 --no-convex --no-public-features "
        "--no-public-rows --rows 9000 --features 5 --classes 2 --deletions 3 --requests 2 "
        "--adaptive --no-trained --epsilon 2 --delta 1e-6 --noise-share 0.2 --epochs 3 "
        "--epoch-seconds 4 --cost seconds --public-start"
    )
    assert cli.main([*arguments.split(), "--json"]) == 0
    advice = cu.advise(
        parameters=99, distance=2.0, fresh_scale=0.1, convex=False, public_features=False,
        public_rows=False, rows=9000, features=5, classes=2, deletions=3, requests=2,
        adaptive=True, trained=False, epsilon=2.0, delta=1e-6, noise_share=0.2, epochs=3.0,
        epoch_seconds=4.0, cost="seconds", public_start=True,
    )  # fmt: skip
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads(json.dumps(command_line.to_record(advice)))
    assert shown["options"][-1]["mechanism"]["name"] == "GradientClipping"


def test_advise_reads_models(tmp_path, capsys):
    center = {"layer": {"w": np.full((4, 5), 0.2, np.float32)}}
    trained = {"layer": {"w": np.full((4, 5), 0.3, np.float32)}}
    for name, params in (("trained", trained), ("public", center)):
        cu.certificates.save_params(tmp_path / f"{name}.npz", params)
    paths = ["--params", str(tmp_path / "trained.npz"), "--center", str(tmp_path / "public.npz")]
    assert cli.main(["advise", *paths]) == 0
    assert capsys.readouterr().out == f"{cu.advise(params=trained, center=center)}\n"
    assert cli.main(["advise", "--params", str(tmp_path / "none.npz")]) == 2
    assert "none.npz" in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [["--epsilon", "0"], ["--distance", "-1"], ["--rows", "5", "--deletions", "5"]]
)
def test_advise_refuses_bad_numbers_with_code_2(capsys, wrong):
    assert cli.main(["advise", *wrong]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("command", "text"), [("advise", command_line._EXAMPLES), ("plan", cli._PLAN_EXAMPLES)]
)
def test_help_has_examples_that_can_be_typed_and_typical_values(capsys, command, text):
    examples = [
        line.strip()
        for line in text.splitlines()
        if f"certunlearn {command}" in line and "`" not in line
    ]
    assert len(examples) == 3
    for example in examples:
        cli._parser().parse_args(shlex.split(example)[1:])
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "typically 0.5 to 8" in shown
    assert " ".join(examples[0].split()) in shown


def test_a_plan_needs_no_number():
    """The defaults: four steps go as far as the radius, and are the best number."""
    args = cli._parser().parse_args(["plan"])
    assert (args.epsilon, args.delta) == (1.0, 1e-5)
    assert all(vars(args)[name] is None for name in cli._FIELDS)
    plan = planning.make_plan(epsilon=1, delta=1e-5, accountants=("interpolation",))
    m = plan.mechanism
    assert (m.init_radius, m.clip_norm, m.steps) == (0.001, 1.0, 4)
    assert m.learning_rate == pytest.approx(0.00025)
    assert plan.best_steps == 4
    clipped = planning.make_plan(
        epsilon=1, delta=1e-5, clip_norm=5.0, accountants=("interpolation",)
    )
    assert clipped.mechanism.learning_rate == pytest.approx(0.00005)
    assert clipped.accountants[0].noise_scale == pytest.approx(plan.accountants[0].noise_scale)


def test_a_plan_sets_fields_of_a_named_mechanism_only(capsys):
    assert cli.main(["plan", "--set", "init_radius=1"]) == 2
    assert "--set needs --mechanism NAME" in capsys.readouterr().err
