"""Notebooks from an empty folder, as on a notebook service: their first cell fetches the repository and installs."""

import os
import tomllib

import nbformat
import pytest
from launch import HANG
from nbclient import NotebookClient
from test_notebooks import FIGURES, FOLDER, NOTEBOOKS, figures, name, read

ROOT = FOLDER.parent


def first_cell(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    return next(cell for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_the_first_cell_is_the_same_everywhere(path):
    notebook = read(path)
    assert first_cell(notebook).source == first_cell(read(NOTEBOOKS[0])).source
    assert first_cell(notebook) is notebook.cells[1] and first_cell(notebook).outputs == []


def test_a_notebook_runs_from_an_empty_folder(tmp_path):
    path = NOTEBOOKS[0]
    notebook = read(path)
    repository = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
    site = tmp_path / "site"
    # The network is replaced by this checkout's last commit, and the install keeps out of this environment.
    replacements = {
        f'"{repository}"': f'{str(ROOT)!r}, "trl-lambda"',
        '"--editable", ".[plots,peft]"': f'"--no-deps", "--no-build-isolation", "--target", {str(site)!r}, "."',
    }
    cell = first_cell(notebook)
    for old, new in replacements.items():
        assert cell.source.count(old) == 1
        cell.source = cell.source.replace(old, new)
    cell.source += "\nprint(os.getcwd())"
    (folder := tmp_path / "empty").mkdir()
    place = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=HANG, startup_timeout=HANG, kernel_name="python3", resources=place)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    client.execute(env=environment | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    assert cell.outputs[-1].text.strip() == str(folder / "trl-lambda")
    assert (site / "trl_lambda" / "weights" / "__init__.py").is_file()
    assert len(figures(notebook)) == FIGURES[path.stem]
