"""
The notebooks run from top to bottom, offline, and are kept with the outputs of such a run.

    PYTHONPATH=tests/support python tests/test_notebooks.py    # keeps the outputs; seconds of one core for each
"""

import os
import re
from pathlib import Path

import nbformat
import pytest
from launch import HANG
from nbclient import NotebookClient
from stand_ins import write_model

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
FIGURES = {
    "01_one_formula": 4,
    "02_swap_the_trainer": 1,
    "03_read_a_run": 4,
    "04_weights_and_tools": 3,
    "05_same_accuracy_fewer_tokens": 1,
    "06_a_real_model": 2,
}


def name(path: Path) -> str:
    return path.stem


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def execute(path: Path, **variables: str) -> nbformat.NotebookNode:
    """The notebook after a run in a fresh kernel, offline, on one thread: tests share two cores."""
    notebook = read(path)
    folder = {"metadata": {"path": str(FOLDER)}}
    client = NotebookClient(
        notebook,
        timeout=HANG,
        startup_timeout=HANG,
        kernel_name="python3",
        resources=folder,
        coalesce_streams=True,
        record_timing=False,
    )
    client.execute(env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | variables)
    return notebook


def figures(notebook: nbformat.NotebookNode) -> list[str]:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]


def test_the_notebooks_are_these():
    assert {path.stem for path in NOTEBOOKS} == FIGURES.keys()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebook_runs_as_it_stands(path: Path, tmp_path):
    # A stand-in takes the place of the pretrained model, which is no part of this repository.
    variables = {"MODEL": write_model(tmp_path), "STEPS": "4"} if path.stem == "06_a_real_model" else {}
    notebook = execute(path, **variables)  # a cell whose assert fails raises here
    assert len(figures(notebook)) == FIGURES[path.stem]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebook_is_kept_as_it_was_executed(path: Path):
    notebook = read(path)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))  # once, in order
    assert len(figures(notebook)) == FIGURES[path.stem]
    assert sum("assert " in cell.source for cell in code) >= 3
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"/(tmp|home|root|work|Users)/", text), "an output holds a path of the machine it was made on"
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert path.stat().st_size < 1_000_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_a_notebooks_links_lead_somewhere(path: Path):
    prose = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", prose)
    assert links
    assert all((FOLDER / link).exists() for link in links if "://" not in link)


if __name__ == "__main__":
    for path in NOTEBOOKS:
        before = os.times()
        executed = execute(path)
        after = os.times()
        # Of a core rather than of a clock, which other work on this machine would stretch; a minute is the aim.
        seconds = after.children_user + after.children_system - before.children_user - before.children_system
        print(f"{path.name}: {seconds:.0f} s", flush=True)
        executed.metadata["language_info"] = {"name": "python"}  # and not this machine's version of it
        nbformat.write(executed, path)
