"""The command line: `certunlearn advise`, `plan`, `demo`, `verify`, `report` and `sign`."""

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import certunlearn
from certunlearn import mechanisms, planning, reporting, sums
from certunlearn._numerics import files
from certunlearn.advice import command_line
from certunlearn.certificates import Certificate, record_format, signing, verification

# What an archive of parameters may hold: complex128 is the widest dtype, and the headers of a leaf
# have its name three times.
_MOST_BYTES_A_NUMBER = 16
_MOST_BYTES_OF_HEADERS = 1_000
# Top-level modules of the optional packages that the demo needs.
_EXAMPLES = ("flax", "sklearn", "matplotlib", "datasets", "PIL")
# Options of `plan` that are fields of `GradientClipping`. All of them have defaults.
_FIELDS = ("init_radius", "clip_norm", "learning_rate", "weight_decay", "steps", "reference")
_PLAN_EXAMPLES = """\
examples:
  certunlearn plan
  certunlearn plan --epsilon 1 --init-radius 0.1 --clip-norm 1 --learning-rate 0.01
  certunlearn plan --mechanism OutputPerturbation --set init_radius=0.1 --params 20042

`certunlearn advise` says whether to run it at all.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1 (does not verify) or 2 (bad input)."""
    args = _parser().parse_args(arguments)
    try:
        return args.command(args)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("dp_accounting", "cryptography"):
            return _fail(str(error), 2)
        if package not in _EXAMPLES:
            raise
        return _fail(f'{package} is missing: pip install "certunlearn[examples]"', 2)
    except (OSError, TypeError, ValueError) as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _plan(args: argparse.Namespace) -> int:
    shared = {
        "epsilon": args.epsilon,
        "delta": args.delta,
        "params": args.params,
        "progress": sys.stderr.isatty(),
    }
    own = {
        name: value for name, value in vars(args).items() if name in _FIELDS and value is not None
    }
    if args.mechanism is not None:
        fields = {**own, **dict(map(_field, args.set))}
        plan = planning.plan_for(_mechanism(args.mechanism, fields), **shared)
    else:
        if args.set:
            raise ValueError("--set needs --mechanism NAME, whose fields it sets")
        plan = planning.make_plan(**own, **shared)
    if args.json:
        print(json.dumps(planning.to_record(plan), indent=2, allow_nan=False))
    else:
        print(planning.to_table(plan))
    return 0


def _mechanism(name: str, fields: dict[str, Any]) -> mechanisms.Mechanism:
    """The mechanism of that name; fields that have defaults may be missing."""
    if name != mechanisms.Separations.__name__:
        return mechanisms.from_record({"name": name, **fields}, fill=True)
    if "transform" in fields:
        raise ValueError("Separations takes no transform here: a plan does not run any steps")
    return mechanisms.Separations(**fields)


def _verify(args: argparse.Namespace) -> int:
    # A bad key of the verifier's own is bad usage (code 2). Any other error is a certificate that
    # does not verify (code 1).
    public_key = None if args.public_key is None else signing.read_short(args.public_key)
    if public_key is not None:
        signing.check_public_key(public_key)
    try:
        certificate = Certificate.load(args.certificate)
        params = None if args.params is None else _released(args.params, certificate)
        stats = None if args.sums is None else sums.load(args.sums)
        verified = verification.verify(certificate, params, stats=stats)
        problems = list(verified.problems)
        if verified and public_key is not None:
            problems = _signature_problems(args.certificate, certificate, public_key)
    except (OSError, ValueError) as error:
        return _fail(str(error), 1)
    except (ArithmeticError, MemoryError, RecursionError) as error:
        return _fail(f"{args.certificate}: the claim cannot be derived ({error!r})", 1)
    if problems:
        for problem in problems:
            _fail(problem, 1)
        print("NOT VERIFIED")
        return 1
    print(verified.summary)
    issuer = "" if public_key is None else f", and {args.public_key} signed it"
    if params is None:
        words = (
            f"the recorded numbers give the claim{issuer}. --params FILE checks the released model."
        )
    else:
        words = f"the recorded numbers give the claim for {args.params}{issuer}."
    print(f"VERIFIED: {_line(words)}")
    return 0


def _report(args: argparse.Namespace) -> int:
    # An unreadable file is bad usage (code 2). One that is no certificate has a report (code 1).
    try:
        certificate = Certificate.load(args.certificate)
        params = None if args.params is None else _released(args.params, certificate)
        verified = verification.verify(certificate, params)
        report = reporting.report_of(certificate, verified, with_params=params is not None)
    except (ValueError, ArithmeticError, MemoryError, RecursionError) as error:
        report = reporting.report_of_problem(_line(str(error) or repr(error)))
    forms = {"html": reporting.to_html, "markdown": reporting.to_markdown}
    text = forms[args.format](report)
    if args.output is None:
        print(text, end="")
    else:
        files.write_atomically(args.output, lambda file: file.write(text.encode()))
        print(_line(f"{report.headline} Wrote {args.output}."))
    return 0 if report.verified else 1


def _released(path: Path, certificate: Certificate) -> dict[str, Any]:
    """The released parameters, if the file is no larger than the certificate lets them be."""
    coverage = certificate.coverage
    numbers = coverage["parameters"] + coverage["frozen_parameters"]
    leaves = coverage["leaves"] + len(coverage["frozen"])
    most = _MOST_BYTES_A_NUMBER * numbers + _MOST_BYTES_OF_HEADERS * leaves
    return files.load_params(path, max_bytes=most + record_format.MOST_BYTES)


def _signature_problems(path: Path, certificate: Certificate, public_key: bytes) -> list[str]:
    place = signing.signature_path(path)
    if not place.exists():
        return [f"{place} is missing: the certificate is not signed"]
    if signing.is_signed(certificate, signing.load_signature(place), public_key):
        return []
    return [f"{place} is not this certificate's signature by the owner of the public key"]


def _sign(args: argparse.Namespace) -> int:
    private_key = signing.read_short(args.key)
    try:
        certificate = Certificate.load(args.certificate)
    except (OSError, ValueError) as error:
        return _fail(str(error), 1)
    verified = verification.verify(certificate)
    if not verified:
        return _fail(f"{args.certificate} is not signed: {verified.problems[0]}", 1)
    place = signing.signature_path(args.certificate)
    signing.save_signature(place, signing.sign(certificate, private_key))
    print(_line(f"Wrote {place}. Publish it beside the certificate, and the public key elsewhere."))
    return 0


def _demo(args: argparse.Namespace) -> int:
    from certunlearn.demo import data, report, run

    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be from 0 to 2**32 - 1, got {args.seed}")
    args.out.mkdir(parents=True, exist_ok=True)  # before the work, so that an error comes early
    watched = sys.stderr.isatty()
    say = functools.partial(print, flush=True)
    dataset = data.load(args.dataset, args.data_dir, args.seed, progress=watched, say=say)
    result = run.run(
        dataset,
        run.SETTINGS[args.dataset],
        epsilon=args.epsilon,
        delta=args.delta,
        seed=args.seed,
        say=say,
        progress=watched,
    )
    report.write(result, args.out)
    print()
    print(report.to_text(result))
    print(f"\nWrote {', '.join(report.FILES)} to {args.out}. Next:\n")
    certificate, params = args.out / "certificate.json", args.out / "unlearned.npz"
    print(f"  certunlearn verify {certificate} --params {params}")
    print(f"  certunlearn report {certificate} --params {params} -o {args.out / 'report.html'}")
    print("  certunlearn advise")
    return 0


def _field(text: str) -> tuple[str, object]:
    """FIELD=VALUE, the value a number, a list, null or text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes FIELD=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _fail(message: str, code: int) -> int:
    print(f"certunlearn: error: {_line(' '.join(message.split()))}", file=sys.stderr)
    return code


def _line(text: str) -> str:
    """A text as one printable line: paths and records may hold anything."""
    return record_format.printable(text, most=2_000)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="certunlearn", description="Certified machine unlearning for JAX."
    )
    parser.add_argument("--version", action="version", version=certunlearn.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command_line.add_parser(commands)
    _add_plan(commands)

    demo = commands.add_parser("demo", help="train a small network and make it forget")
    demo.set_defaults(command=_demo)
    demo.add_argument("--dataset", choices=("digits", "mnist", "cifar10"), default="digits")
    demo.add_argument(
        "--data-dir",
        type=Path,
        default=os.environ.get("CERTUNLEARN_DATA_DIR") or None,
        help="folder of mnist/ or cifar10/ (default: $CERTUNLEARN_DATA_DIR, else the public hub)",
    )
    demo.add_argument("--epsilon", type=float, default=1.0, help="default: 1")
    demo.add_argument("--delta", type=float, default=1e-5, help="default: 1e-5")
    demo.add_argument("--seed", type=int, default=0, help="of everything (default: 0)")
    demo.add_argument("--out", type=Path, default=Path("certunlearn-demo"), help="folder to write")

    verify = commands.add_parser("verify", help="derive a certificate's claim again")
    verify.set_defaults(command=_verify)
    verify.add_argument("certificate", type=Path, help="certificate.json")
    verify.add_argument("--params", type=Path, metavar="FILE", help=".npz of the released model")
    verify.add_argument(
        "--sums",
        type=Path,
        metavar="FILE",
        help="private .npz of an exact head's sums: the head is computed from them again",
    )
    verify.add_argument(
        "--public-key",
        type=Path,
        metavar="FILE",
        help="the issuer's Ed25519 public key (PEM): the certificate must be signed with its pair",
    )

    _add_report(commands)

    sign = commands.add_parser("sign", help="sign a certificate: who issued it can be checked")
    sign.set_defaults(command=_sign)
    sign.add_argument(
        "certificate", type=Path, help="certificate.json; writes certificate.json.sig"
    )
    sign.add_argument(
        "--key",
        type=Path,
        required=True,
        metavar="FILE",
        help="Ed25519 private key (PEM), as from: openssl genpkey -algorithm ed25519",
    )
    return parser


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="write a certificate for people: a web page, or a section of a model card",
        description="Verifies a certificate and writes what it says for people. The exit code is "
        "1, and the first line says so, if it does not verify.",
    )
    report.set_defaults(command=_report)
    report.add_argument("certificate", type=Path, help="certificate.json")
    report.add_argument("--params", type=Path, metavar="FILE", help=".npz of the released model")
    report.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="file to write (default: print it)"
    )
    report.add_argument(
        "--format", choices=("html", "markdown"), default="html", help="default: html"
    )


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="how much noise a run needs, before it is run",
        epilog=_PLAN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    plan.set_defaults(command=_plan, epsilon=1.0, delta=1e-5)
    for name, text in (
        ("epsilon", "target, typically 0.5 to 8; smaller is stronger (default: 1)"),
        ("delta", "target, well below 1 over the number of rows (default: 1e-5)"),
        (
            "init-radius",
            "C0: radius of the ball of starts, in parameter units, typically 0.0001 to 0.1 "
            f"(default: {planning.INIT_RADIUS}); noise grows with it",
        ),
        (
            "clip-norm",
            "C1: largest norm of a gradient; only its product with the learning rate counts "
            f"(default: {planning.CLIP_NORM:g})",
        ),
        (
            "learning-rate",
            "gamma: of the noisy steps (default: radius / clip norm / "
            f"{planning.STEPS_TO_THE_RADIUS}, so that {planning.STEPS_TO_THE_RADIUS} steps go as "
            "far as the radius)",
        ),
        ("weight-decay", "lambda, towards the centre (default: 0)"),
    ):
        plan.add_argument(f"--{name}", type=float, help=text)
    plan.add_argument("--steps", type=int, help="noisy steps (default: the best number)")
    plan.add_argument("--reference", help="retrained (default) or center")
    names = ", ".join([*mechanisms.MECHANISMS, mechanisms.Separations.__name__])
    plan.add_argument("--mechanism", metavar="NAME", help=f"{names} (default: GradientClipping)")
    plan.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="a field of that mechanism, such as model_radius=0.5 or shift=[0.1,0.2]; repeatable",
    )
    plan.add_argument("--params", type=int, metavar="N", help="number of parameters, such as 20042")
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")


if __name__ == "__main__":
    sys.exit(main())
