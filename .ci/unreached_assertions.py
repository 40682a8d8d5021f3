"""Lists the assertions of tests that never ran, or that cannot fail.

    coverage run --data-file=FILE --include='tests/*' -m pytest -n 0 -q -m "slow or not slow" tests
    python .ci/unreached_assertions.py FILE

prints `path:line: what` for every assert statement, call of an assert function and body of a
`pytest.raises` in tests/ that the run did not reach, and for every assertion that is true whatever
the code does. Exits 1 if there is any. Processes that tests start are not traced, hence `-n 0`.
"""

import ast
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from coverage import CoverageData

ROOT = Path(__file__).resolve().parent.parent
# Calls that assert by themselves.
ASSERTING = ("np.testing.", "numpy.testing.", "chex.assert", "assert_", "pytest.fail")


def name_of(node: ast.expr) -> str:
    """The dotted name of what is called, or nothing."""
    try:
        return ast.unparse(node.func) if isinstance(node, ast.Call) else ""
    except ValueError:
        return ""


def helpers(trees: Iterable[ast.AST]) -> set[str]:
    """Functions of the tests' own that assert something."""
    return {
        node.name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("test_")
        if any(True for _ in assertions(node, set()))
    }


def assertions(tree: ast.AST, own: set[str]) -> Iterator[tuple[ast.stmt, str]]:
    """Statements that assert something, and what they are; `own` names asserting functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node, "assert"
        elif isinstance(node, ast.Expr):
            name = name_of(node.value)
            if name.startswith(ASSERTING) or name.split(".")[-1] in own:
                yield node, name
        elif isinstance(node, ast.With) and any(
            name_of(item.context_expr) in ("pytest.raises", "pytest.warns") for item in node.items
        ):
            yield from ((line, "body of pytest.raises") for line in node.body)


def cannot_fail(tree: ast.AST) -> Iterator[tuple[ast.stmt | ast.expr, str]]:
    """Assertions that hold whatever the code does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            test = node.test
            parts = (
                test.values
                if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.Or)
                else [test]
            )
            for part in parts:
                if isinstance(part, ast.Constant) and part.value:
                    yield node, "assert of a constant"
                if isinstance(
                    part, ast.Tuple | ast.List | ast.Lambda | ast.GeneratorExp | ast.JoinedStr
                ):
                    yield node, f"assert of a {type(part).__name__.lower()}"
                if isinstance(part, ast.Compare) and any(
                    map(is_nan, [part.left, *part.comparators])
                ):
                    yield node, "comparison with NaN"
                if (
                    isinstance(part, ast.Compare)
                    and ast.dump(part.left) == ast.dump(part.comparators[0])
                    and not any(isinstance(inside, ast.Call) for inside in ast.walk(part))
                ):
                    yield node, "comparison of a thing with itself"
        if isinstance(node, ast.Call):
            wide = [k.arg for k in node.keywords if k.arg and is_infinite(k.value)]
            if name_of(node).endswith(("approx", "allclose", "isclose")) and set(wide) & TOLERANCES:
                yield node, f"{name_of(node)} with an infinite tolerance"


TOLERANCES = {"rel", "abs", "rtol", "atol", "rel_tol", "abs_tol"}


def is_nan(node: ast.expr) -> bool:
    """Whether an expression is NaN, as it is spelt in tests."""
    return ast.unparse(node) in ("math.nan", "np.nan", "jnp.nan", "float('nan')")


def is_infinite(node: ast.expr) -> bool:
    """Whether an expression is infinity, or a number so large that anything is near."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return not math.isfinite(node.value) or node.value >= 1e9
    return ast.unparse(node) in ("math.inf", "np.inf", "jnp.inf", "float('inf')")


def main(data_file: str) -> int:
    """Prints what is wrong; 1 if anything is."""
    data = CoverageData(data_file)
    data.read()
    seen = {Path(path).name: set(data.lines(path) or ()) for path in data.measured_files()}
    trees = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "tests").glob("*.py"))}
    own, wrong = helpers(trees.values()), 0
    for path, tree in trees.items():
        found: list[tuple[ast.stmt | ast.expr, str]] = list(cannot_fail(tree))
        lines = seen.get(path.name, set())
        for statement, what in assertions(tree, own):
            last = statement.end_lineno or statement.lineno
            if not lines.intersection(range(statement.lineno, last + 1)):
                found.append((statement, f"never reached: {what}"))
        for node, what in sorted(found, key=lambda pair: pair[0].lineno):
            print(f"{path.relative_to(ROOT)}:{node.lineno}: {what}")
            wrong += 1
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ".coverage"))
