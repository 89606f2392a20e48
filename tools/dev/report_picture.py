"""Take the picture of a report for the README; needs Chromium (apt-get install chromium) and Pillow.

make demo
python tools/dev/report_picture.py runs/quickstart/report.html docs/images/report.png
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

CHROMIUM = "chromium"
COLORS = 128  # of a palette: charts and text need few, and the file stays small


def main() -> None:
    """Write the top of a page as a PNG file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1120)
    parser.add_argument("--height", type=int, default=1385)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        size = f"--window-size={options.width},{options.height}"
        command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", size]
        command += [f"--user-data-dir={folder}/profile", f"--screenshot={shot}", options.page.resolve().as_uri()]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL, timeout=300)
        options.picture.parent.mkdir(parents=True, exist_ok=True)
        Image.open(shot).convert("RGB").quantize(COLORS).save(options.picture, optimize=True)
    print(f"{options.picture}: {options.picture.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
