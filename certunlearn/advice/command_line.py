"""`certunlearn advise`: the options of the command, and what it prints."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from certunlearn import mechanisms
from certunlearn._numerics import files
from certunlearn.advice import measurements
from certunlearn.advice.advising import NOISE_SHARE, advise
from certunlearn.advice.answers import Advice

_EXAMPLES = """\
examples:
  a network trained from public pretrained weights, 500 of 50,000 rows to forget:
    certunlearn advise --parameters 20042 --public-start --rows 50000 --deletions 500
  a linear head on a frozen public network:
    certunlearn advise --public-features --features 513 --classes 5 --rows 22000 --deletions 10
  the trained model and its public start, as cu.certificates.save_params writes them:
    certunlearn advise --params trained.npz --center public.npz --rows 50000 --deletions 500

Leave out what you do not know: the answer names what would change it.
"""
# (option, type, metavar, help): numbers, all of them optional.
_NUMBERS = (
    ("parameters", int, "N", "number of parameters, such as 20042"),
    ("distance", float, "D", "L2 distance of the trained model from its public start, such as 5"),
    (
        "fresh-scale",
        float,
        "S",
        "standard deviation of fresh weights where it is smallest, 1/sqrt(inputs of the widest "
        "layer): typically 0.02 to 0.2",
    ),
    ("rows", int, "N", "rows of the training data, such as 50000"),
    ("features", int, "N", "features of a head, such as 513"),
    ("classes", int, "N", "classes of a head, such as 10"),
    ("deletions", int, "K", "rows to forget in a request (default: 1)"),
    ("requests", int, "N", "requests to come (default: 1)"),
    ("epsilon", float, "E", "of the guarantee, typically 0.5 to 8 (default: 1)"),
    ("delta", float, "D", "of the guarantee, well below 1/rows (default: 1e-5)"),
    ("noise-share", float, "S", f"most noise, over fresh weights (default: {NOISE_SHARE})"),
    ("epochs", float, "N", "epochs of the first training, such as 20"),
    ("epoch-seconds", float, "S", "how long an epoch takes, such as 30"),
)
# (option, help): yes or no; what is not said is unknown.
_FLAGS = (
    ("public-start", "whether there are public weights to start from"),
    ("convex", "whether the loss is convex in the parameters, as of a linear model"),
    ("public-features", "whether the model is a linear head on features of a public network"),
    ("public-rows", "whether you have unlabelled public rows like yours (default: yes)"),
    ("adaptive", "whether requests may be chosen by looking at earlier releases (default: no)"),
    ("trained", "whether the model is trained already (default: yes)"),
)


def add_parser(commands: Any) -> None:
    """Adds the command to the subparsers of `certunlearn`."""
    parser = commands.add_parser(
        "advise",
        help="what to do with your model, and what you get",
        description="What to do with your model and a request to delete:\n"
        "methods from best to worst, each with what it guarantees, what it costs and why.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=run)
    for name, kind, metavar, text in _NUMBERS:
        parser.add_argument(f"--{name}", type=kind, metavar=metavar, help=text)
    for name, text in _FLAGS:
        parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
    for name, text in (
        ("params", "trained parameters (.npz): numbers and distance are worked out from them"),
        ("center", "public start (.npz), of the same structure"),
    ):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=text)
    parser.add_argument(
        "--cost", choices=measurements.UNITS, help="what to order by (default: operations)"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="search hyperparameters of gradient clipping with coupling, too: half a minute",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Prints the advice, and returns 0."""
    given = {
        name: value
        for name, value in vars(args).items()
        if value is not None and name not in ("command", "json", "params", "center")
    }
    for name, path in (("params", args.params), ("center", args.center)):
        if path is not None:
            given[name] = files.load_params(path)
    advice = advise(**given, progress=sys.stderr.isatty())
    if args.json:
        print(json.dumps(to_record(advice), indent=2, allow_nan=False))
    else:
        print(advice)
    return 0


def to_record(advice: Advice) -> dict[str, Any]:
    """The advice as a JSON-ready dict; mechanisms as a certificate records them."""
    record = dataclasses.asdict(advice)
    for entry, option in zip(record["options"], advice.options, strict=True):
        mechanism = option.mechanism
        entry["mechanism"] = None if mechanism is None else mechanisms.to_record(mechanism)
    return record
