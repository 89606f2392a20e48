"""Compare the logits of an exported model under the installed transformers and under an older release.

    pip install --no-deps --target /tmp/tf4 'transformers==4.57.*' 'tokenizers<=0.23.0' 'huggingface_hub<1.0' requests
    python tools/dev/compare_transformers.py /tmp/tf4

The source is a tiny Llama whose config.json has RoPE in the form of transformers 5 only (`rope_parameters`), which
transformers 4 ignores silently. The exit status is 1 if the export gives other logits under the older release.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from megatron_cpt.convert.exporter import export_checkpoint
from megatron_cpt.convert.importer import import_checkpoint

_TOLERANCE = 1e-5
_RUN = """
import json, sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    logits = model(torch.arange(60).reshape(2, 30) + 1).logits
torch.save(logits, sys.argv[2])
print(transformers.__version__)
"""


def main(older: str) -> int:
    """Print the largest difference of any logit, for the source and for its export."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        _write_source(work / "source")
        import_checkpoint(work / "source", work / "checkpoint")
        export_checkpoint(work / "checkpoint", work / "export")
        reference, newer = _logits(work / "source", work)
        differences = {}
        for folder in ("source", "export"):
            for path in ("", older):
                logits, version = _logits(work / folder, work, path)
                differences[folder, version] = difference = (logits - reference).abs().max().item()
                print(f"{folder} under transformers {version}: {difference:.2e} from the source under {newer}")
    return int(any(value > _TOLERANCE for (folder, _), value in differences.items() if folder == "export"))


def _write_source(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    rope = {"rope_type": "default", "rope_theta": 500000.0}
    sizes = {"vocab_size": 101, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **heads, rope_parameters=rope), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_theta", None)
    (folder / "config.json").write_text(json.dumps(config))


def _logits(folder: Path, work: Path, path: str = "") -> tuple[torch.Tensor, str]:
    """Return logits of a model, and the version of transformers that computed them."""
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", _RUN, str(folder), str(work / "logits.pt")]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return torch.load(work / "logits.pt", weights_only=True), done.stdout.strip()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: compare_transformers.py FOLDER_OF_AN_OLDER_TRANSFORMERS")
    sys.exit(main(sys.argv[1]))
