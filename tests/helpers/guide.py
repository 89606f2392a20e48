"""Collect the files and commands of a documentation page, so that tests can run them.

A page may hold three kinds of fenced blocks:

- ```` ```yaml title="run.yaml" ````: a file, written to the working directory before the commands that follow it;
- ```` ```console ````: each line that starts with `$ ` is a command; `# exits with 2` at its end names its exit status;
- a console block below `<!-- not run: REASON -->`: shown to the reader, not run here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r'(?:^<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w+)(?: title="(?P<title>[^"]+)")?\n(?P<body>.*?)^```$',
    re.MULTILINE | re.DOTALL,
)
_STATUS = re.compile(r"\s*# exits with (\d+)$")


@dataclass(frozen=True)
class GuideFile:
    """File that a page shows in full."""

    name: str
    content: str


@dataclass(frozen=True)
class GuideCommand:
    """Command of a console block.

    Attributes:
        text: command line, for a shell.
        status: expected exit status.
        skip_reason: reason in the marker above the block; None if the command is run.
    """

    text: str
    status: int
    skip_reason: str | None


def guide_steps(page: Path) -> list[GuideFile | GuideCommand]:
    """Return the files and commands of a page in reading order."""
    steps: list[GuideFile | GuideCommand] = []
    for block in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        if block["title"]:
            steps.append(GuideFile(block["title"], block["body"]))
        elif block["language"] == "console":
            for line in block["body"].splitlines():
                if line.startswith("$ "):
                    status = _STATUS.search(line)
                    text = _STATUS.sub("", line.removeprefix("$ "))
                    steps.append(GuideCommand(text, int(status[1]) if status else 0, block["reason"]))
    return steps
