"""The tests of the house: what keeps the package open, small and readable, each a command."""

import ast
import collections
import dataclasses
import importlib
import inspect
import pkgutil
import re
import typing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import certunlearn as cu
from certunlearn.mechanisms import MECHANISMS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "certunlearn"
FILES = sorted(PACKAGE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
# From the ground up: a room imports only rooms above it.
ROOMS = (
    "_version",
    "_numerics",
    "transforms",
    "mechanisms",
    "accounting",
    "sums",
    "models",
    "solvers",
    "certificates",
    "reporting",
    "unlearning",
    "convex",
    "exact",
    "planning",
    "advice",
    "demo",
    "cli",
)
PUBLIC = (
    cu,
    cu.accounting,
    cu.advice,
    cu.certificates,
    cu.convex,
    cu.exact,
    cu.solvers,
    cu.transforms,
    cu.unlearning,
)
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 80
# Two modules (exact heads, solvers) and two mechanisms came with the methods that need no noise, or
# none that grows with what is deleted. `advise` is where newcomers start, and `advice` has the
# types of its answer, and the search for hyperparameters.
MOST_NAMES_AT_THE_TOP = 40
MOST_PARAMETERS_OF_UNLEARN = 14
MOST_ANY = 0.05
# Where objects of other libraries are recognised by what they have.
FOREIGN = {"_numerics/foreign.py"}


def parsed(file):
    return ast.parse(file.read_text())


def short(file):
    return file.relative_to(PACKAGE).as_posix()


# ------------------------------------------------------------------------------ an open world


# fmt: off
@dataclasses.dataclass(frozen=True, kw_only=True)
class NormalizedDescent(cu.Mechanism):
    """Steps of one length along the gradient, from a ball around the centre.

    Two vectors of norm at most 1, times the step's length, are at most twice that length apart.
    """

    radius: float
    length: float
    steps: int

    uses_center = True
    tolerates_nonfinite = True  # a step of length 0 is within the separations

    @property
    def start_radius(self):
        return self.radius

    def separations(self):
        return cu.Separations(
            initial_distance=2 * self.radius,
            contraction=1.0,
            shift=2 * self.length,
            steps=self.steps,
            assumptions=("Every gradient is scaled to norm 1 at most.",),
        )

    def update(self, center):
        return optax.chain(
            optax.normalize_by_update_norm(),
            cu.clip_by_global_norm(1.0),
            optax.scale(-self.length),
        )
# fmt: on


def test_the_mechanism_from_outside_is_short():
    assert len(inspect.getsource(NormalizedDescent).splitlines()) <= 40


X = jax.random.normal(jax.random.key(0), (60, 4))
DATA = {"x": X, "y": X @ jnp.arange(4.0)}
TRAINED = {"w": jnp.arange(4.0)}


def loss(params, batch):
    return jnp.mean((batch["x"] @ params["w"] - batch["y"]) ** 2)


OWN = NormalizedDescent(radius=1.0, length=0.05, steps=4)
PLAIN = cu.Separations(
    initial_distance=2.0,
    contraction=[1.0, 0.9, 1.0, 0.5],
    shift=[0.1, 0.0, 0.2, 0.1],
    noisy=[True, True, False, True],
    assumptions=["As theorem 1 of the paper says."],
)


@pytest.mark.parametrize("mechanism", [OWN, PLAIN], ids=["own class", "plain numbers"])
def test_a_method_of_ones_own_runs_through_everything(mechanism, tmp_path):
    claim = {"delta": 1e-5, "accountant": "interpolation"}
    sigma = cu.noise_scale(mechanism, epsilon=1.0, **claim)
    assert 0.9 < cu.epsilon(mechanism, noise_scale=sigma, **claim) <= 1
    assert cu.delta(mechanism, noise_scale=sigma, epsilon=1.0, accountant="interpolation") <= 1e-5
    assert cu.supported_accountants(mechanism)["coupling"] is None

    key = cu.split_key(jax.random.key(1)).noise
    tx = cu.noisy_sgd(mechanism, sigma, key=key)
    params = mechanism.start(TRAINED, None, key)
    assert float(jnp.linalg.norm(params["w"])) <= 1
    state = tx.init(params)
    for _ in range(mechanism.steps):
        updates, state = tx.update(jax.grad(loss)(params, DATA), state, params)
        params = optax.apply_updates(params, updates)
    released = cu.certify(
        mechanism, noise_scale=sigma, **claim, params=params, state=state, retain_size=60
    )
    assert cu.verify(released, params)

    result = cu.unlearn(
        loss, TRAINED, DATA, mechanism, epsilon=1.0, **claim, batch_size=20, progress=False
    )
    path = tmp_path / "certificate.json"
    result.certificate.save(path)
    certificate = cu.Certificate.load(path)
    assert cu.verify(certificate, result.params)
    assert certificate.epsilon == pytest.approx(released.epsilon, rel=1e-9)
    assert certificate.mechanism["name"] == type(mechanism).__name__


def test_whoever_lacks_the_class_is_told_what_is_taken_on_trust():
    params = {"w": jnp.zeros(4)}
    released = cu.certify(
        OWN,
        noise_scale=20.0,
        delta=1e-5,
        params=params,
        steps_run=4,
        accountant="interpolation",
    )
    trust = released.assumptions[-1]
    assert "NormalizedDescent" in trust
    assert "issuer's word" in trust
    assert "Every gradient is scaled to norm 1 at most." in released.assumptions
    assert "on trust" in cu.verify(released, params).summary


# ------------------------------------------------------------------------------ dispatch


@pytest.mark.parametrize("file", FILES, ids=short)
def test_no_type_of_mechanism_is_asked_for_outside_their_room(file):
    if short(file).startswith("mechanisms/"):
        return
    for node in ast.walk(parsed(file)):
        tested = None
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
            tested = node.args[1]
        elif isinstance(node, ast.MatchClass):
            tested = node.cls
        elif isinstance(node, ast.Compare) and "type(" in ast.unparse(node):
            tested = node
        if tested is not None:
            asked = set(re.findall(r"\w+", ast.unparse(tested)))
            assert not asked & {*MECHANISMS, "Mechanism", "Contracting"}, ast.unparse(node)


@pytest.mark.parametrize("file", FILES, ids=short)
def test_nothing_guesses_by_attributes(file):
    if short(file) in FOREIGN:
        return
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            text = ast.unparse(node)
            assert node.func.id != "hasattr", text
            if node.func.id == "getattr":  # of a field that a loop names
                assert len(node.args) == 2, text
                assert not isinstance(node.args[1], ast.Constant), text
        if isinstance(node, ast.FunctionDef):
            assert node.name != "_any"


# ------------------------------------------------------------------------------ public names


def test_the_top_shows_what_is_public_and_nothing_else():
    assert dir(cu) == sorted(cu.__all__)
    assert len(dir(cu)) <= MOST_NAMES_AT_THE_TOP
    assert not [name for name in dir(cu) if name.startswith("_")]


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_every_public_name_is_there_and_documented(module):
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert inspect.getdoc(getattr(module, name)), name
        assert name == "__version__" or not name.startswith("_")


def public_functions():
    """Public functions, classes and their methods, by name, each once."""
    found = {}
    for module in PUBLIC:
        for name in module.__all__:
            thing = getattr(module, name)
            if inspect.isclass(thing):
                found[f"{name}.__init__"] = thing.__init__
                for method, value in vars(thing).items():
                    if inspect.isfunction(value) and not method.startswith("_"):
                        found[f"{name}.{method}"] = value
            elif inspect.isfunction(thing):
                found[name] = thing
    return found


def test_few_public_parameters_are_any():
    parameters, untyped = 0, []
    for name, function in public_functions().items():
        for parameter in inspect.signature(function).parameters.values():
            if parameter.name in ("self", "cls", "args", "kwargs"):
                continue
            parameters += 1
            if parameter.annotation in (typing.Any, "Any", inspect.Parameter.empty):
                untyped.append(f"{name}({parameter.name})")
    assert parameters > 200
    assert len(untyped) < MOST_ANY * parameters, untyped


def test_unlearn_has_few_parameters():
    assert len(inspect.signature(cu.unlearn).parameters) <= MOST_PARAMETERS_OF_UNLEARN


def test_modules_have_names_of_their_own():
    names = [file.stem for file in FILES if file.stem not in ("__init__", "__main__")]
    assert [n for n, count in collections.Counter(names).items() if count > 1] == []
    tests = [file.stem for file in TESTS]
    assert [n for n, count in collections.Counter(tests).items() if count > 1] == []


def test_no_name_stands_for_two_things():
    modules = {file.stem for file in FILES}
    things = {name for module in PUBLIC for name in module.__all__} - {m.__name__ for m in PUBLIC}
    things -= {"accounting", "advice", "certificates", "convex", "exact", "solvers", "transforms"}
    things -= {"unlearning"}
    fields = {
        field.name
        for module in PUBLIC
        for name in module.__all__
        if dataclasses.is_dataclass(thing := getattr(module, name))
        for field in dataclasses.fields(thing)
    }
    assert len(fields) > 50
    assert not modules & things
    assert not modules & fields
    # A field may hold what the function of that name returns, and is no class's name.
    classes = {n for m in PUBLIC for n in m.__all__ if inspect.isclass(getattr(m, n))}
    assert not classes & fields


# ------------------------------------------------------------------------------ size and order


@pytest.mark.parametrize("file", [*FILES, *TESTS], ids=lambda file: file.stem)
def test_files_are_short(file):
    assert len(file.read_text().splitlines()) <= MOST_LINES_OF_A_FILE


@pytest.mark.parametrize("file", FILES, ids=short)
def test_functions_are_short(file):
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.FunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            assert lines <= MOST_LINES_OF_A_FUNCTION, node.name


@pytest.mark.parametrize("file", FILES, ids=short)
def test_imports_go_one_way(file):
    room = short(file).split("/")[0].removesuffix(".py")
    if room in ("__init__", "__main__"):
        return
    allowed = ROOMS[: ROOMS.index(room) + 1]
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("certunlearn"):
            parts = node.module.split(".")
            rooms = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            assert set(rooms) <= set(allowed), ast.unparse(node)


def test_every_room_is_in_the_list():
    rooms = {short(file).split("/")[0].removesuffix(".py") for file in FILES}
    assert rooms - {"__init__", "__main__"} == set(ROOMS)


def test_private_subfolders_stay_private():
    for file in FILES:
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.ImportFrom) and "._" in (node.module or ""):
                owner = node.module.split("._")[0].removeprefix("certunlearn").strip(".")
                assert not owner or short(file).startswith(owner.replace(".", "/")), (file, owner)


def test_every_module_says_what_it_is_for():
    for module in pkgutil.walk_packages([str(PACKAGE)], "certunlearn."):
        if not module.name.startswith("certunlearn.demo"):
            assert importlib.import_module(module.name).__doc__, module.name


def test_importing_flips_no_switch():
    assert not jax.config.jax_enable_x64
    assert np.dtype(jnp.zeros(1).dtype) == np.float32
