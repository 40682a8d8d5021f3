"""What CI compares of a notebook: its stored outputs with those of a run."""

import importlib.util
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("ci_notebooks", ROOT / ".ci" / "notebooks.py")
ci_notebooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(ci_notebooks)


@pytest.mark.parametrize(
    ("stored", "found", "same"),
    [
        ("noise 0.0236, 10 steps", "noise 0.0236, 10 steps", True),
        ("noise 0.0236", "noise 0.0145", False),  # another accountant's
        ("delta 1.95e-05", "delta 1.97e-05", False),
        ("delta 1.950e-05", "delta 1.951e-05", True),
        ("accuracy 0.972", "accuracy 0.969", True),  # one image of 360
        ("accuracy 0.972", "accuracy 0.940", False),
        ("noise 0.004", "noise 0.014", False),
        ("reference 'retrained'", "reference 'center'", False),
        ("one 1.0", "one 1.0 2.0", False),
        ("a  | 1.0", "a | 1.0", True),  # a table's padding follows its numbers
    ],
)
def test_texts_are_the_same_up_to_rounding(stored, found, same):
    assert ci_notebooks.same(stored, found) is same


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_notebook_stores_what_it_prints(path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert any(ci_notebooks.printed(cell) for cell in cells)


@pytest.mark.slow
def test_a_notebook_with_an_old_output_fails(tmp_path):
    notebook = nbformat.v4.new_notebook()
    cell = nbformat.v4.new_code_cell("print('noise', 1 / 8)")
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text="noise 0.25\n")]
    notebook.cells = [cell]
    path = tmp_path / "old.ipynb"
    nbformat.write(notebook, path)
    found = ci_notebooks.differences(path, update=False)
    assert len(found) == 1
    assert "-noise 0.25" in found[0]
    assert "+noise 0.125" in found[0]
    assert ci_notebooks.differences(path, update=True)
    assert ci_notebooks.differences(path, update=False) == []
