"""A notebook from an empty folder, as on a notebook service: its first cell fetches the repository and installs it."""

import os
import tomllib
from pathlib import Path

import nbformat
from launch import HANG
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def first_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    return next(cell for cell in notebook.cells if cell.cell_type == "code")


def test_the_first_cell_is_the_same_everywhere():
    cells = [first_cell(nbformat.read(path, as_version=4)) for path in NOTEBOOKS]
    assert len(cells) > 3 and {cell.source for cell in cells} == {cells[0].source}
    assert not any(cell.outputs for cell in cells)


def test_a_notebook_runs_from_an_empty_folder(tmp_path):
    """The network is replaced by this checkout's last commit, and the install keeps out of this environment."""
    notebook, folder, site = nbformat.read(NOTEBOOKS[0], as_version=4), tmp_path / "empty", tmp_path / "site"
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    replacements = {
        f'"{repository}"': f'{str(ROOT)!r}, "trl-lambda"',
        '"--editable", ".[plots,peft]"': f'"--no-deps", "--no-build-isolation", "--target", {str(site)!r}, "."',
    }
    cell = first_cell(notebook)
    for old, new in replacements.items():
        assert cell.source.count(old) == 1
        cell.source = cell.source.replace(old, new)
    cell.source += "\nprint(os.getcwd())"
    folder.mkdir()
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=HANG, startup_timeout=HANG, kernel_name="python3", resources=resources)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    client.execute(env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    assert cell.outputs[-1].text.strip() == str(folder / "trl-lambda")
    assert (site / "trl_lambda" / "weights" / "__init__.py").is_file()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
