"""Print figures of the package's structure; the exit status is 1 if one exceeds its limit.

Checked are: modules per folder, module and class names that occur twice, and imports of `rich.table` outside `views/`
and `cli/` (import-linter sees only the top level of external packages).

    python tools/dev/structure.py
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "megatron_cpt"
MAX_AVERAGE = 8.0
MAX_FILES = 16
# Names that are unambiguous inside their folder, so they may occur in several folders.
CONVENTIONAL = {"__init__", "__main__", "config", "folder", "header", "reader", "writer"}
MAY_DRAW_TABLES = ("views", "cli")


def main() -> int:
    """Print the figures and every violation; return the exit status."""
    files = sorted(PACKAGE.rglob("*.py"))
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in files}
    by_folder: dict[Path, int] = defaultdict(int)
    modules: dict[str, list[str]] = defaultdict(list)
    classes: dict[str, list[str]] = defaultdict(list)
    problems = []
    for file, tree in trees.items():
        name = str(file.relative_to(PACKAGE))
        by_folder[file.parent] += 1
        if file.stem not in CONVENTIONAL:
            modules[file.stem].append(name)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(name)
            draws = isinstance(node, ast.ImportFrom) and node.module == "rich.table"
            if draws and file.relative_to(PACKAGE).parts[0] not in MAY_DRAW_TABLES:
                problems.append(f"{name}:{node.lineno}: rich.table is for {' and '.join(MAY_DRAW_TABLES)}")
    average = len(files) / len(by_folder)
    largest = max(by_folder, key=lambda folder: by_folder[folder])
    lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
    print(f"{lines} lines, {len(files)} modules, {len(by_folder)} packages: {average:.1f} modules per package")
    print(f"largest package: {largest.relative_to(PACKAGE.parent)} with {by_folder[largest]} modules")
    if average > MAX_AVERAGE:
        problems.append(f"more than {MAX_AVERAGE:g} modules per package")
    problems += [
        f"{folder.relative_to(PACKAGE.parent)}: {count} modules, more than {MAX_FILES}"
        for folder, count in by_folder.items()
        if count > MAX_FILES
    ]
    for kind, places in (("module", modules), ("class", classes)):
        twice = {name: found for name, found in places.items() if len(found) > 1}
        print(f"{kind} names used more than once: {len(twice)}")
        problems += [f"{kind} {name}: {', '.join(found)}" for name, found in sorted(twice.items())]
    for problem in problems:
        print(f"  {problem}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
