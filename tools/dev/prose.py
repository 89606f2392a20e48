"""Check the language of docstrings, comments, messages and documents against a list of patterns.

    python tools/dev/prose.py [PATH ...]        # the whole tree, or some files and folders

Each finding names file, line, the words found and the reason. The exit status is 0 without findings, else 1.
`PATTERNS` (words to avoid, and what to write instead) is the one place to add a rule to. Code in documents (fenced
blocks and `inline code`) is skipped.
"""

from __future__ import annotations

import ast
import io
import math
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECKED = (
    *("megatron_cpt", "tools", "benchmarks", "examples", "tests", "docs"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "setup.py", "Makefile"),
)
MAX_SENTENCE_WORDS = 32
MAX_CELL_CHARACTERS = 120

_COUNTED = (
    "tokens|bytes|samples|seconds|[KMGT]i?B|files?|lines?|steps|FLOPs|documents|ranks|processes|GPUs|sequences|epochs|one"
    "|number|threads?|modules?|numbers?|rows?|values?|tensors?|copies|copy|once|GF|minutes|hours|checkpoints?"
)
_UNIT = (
    "second|step|rank|token|node|GPU|layer|file|worker|core|process|source|epoch|parameter|element|sample|document|day"
    "|week|hour|minute|line|stage|micro-batch|block|tensor|family|command|folder|package|dimension|block|shard|run|class"
)


DOCSTRING_START = (
    r"\A(?-i:What|Whether|Where|Which|How|When|Of|Its|Their|The same|Those|All of|As|Also|And|Not|So)\b",
    "a docstring starts with a verb (functions) or a noun (classes, attributes)",
)
PATTERNS = (
    (
        r"(?:\A|(?<=[.!;]\s))(?-i:What|Whether|Where|Which)\b(?![^.?!]*\?)",
        "a statement does not open with a question word: say the subject first",
    ),
    (
        rf"\b(?:{_COUNTED}) an? (?:{_UNIT})\b(?! (?:has|have|reads?|is|was)\b)",
        "rates and shares are written with per: tokens per second",
    ),
    (r"\b(?:go|goes|going|gone|went) on\b", "resume or continue"),
    (r"\banew\b", "again, or restart from scratch"),
    (r"\bto the (?:last )?(?:bit|byte|digit)\b", "identical bit for bit, byte for byte"),
    (r"\bequal bits\b", "identical bit for bit"),
    (r"\b(?:un)?sound(?:ness)?\b(?! like)", "valid, invalid or corrupt"),
    (r"\bbroken (?:ones?|checkpoints?|files?|lines?)\b", "corrupt or invalid, with the noun"),
    (r"\bmend(?:s|ed|ing)?\b", "fix"),
    (r"\b(?:leave|leaves|leaving|left)(?: \w+)? out\b", "skip, omit or remove"),
    (r"\b(?:hold|holds|held|holding)(?: \w+)? against\b", "compare with"),
    (r"\bmakes? room\b", "free some space"),
    (r"\bpass(?:es|ed|ing)? over\b", "skip"),
    (r"\ball the same\b", "anyway, or nothing"),
    (r"\b(?:as it is|as they are|as it stands|as it lies)\b", "unchanged, or say the state"),
    (r"\b(?:theirs|of the whole|the ones? before)\b", "say the noun"),
    (r"\b(?:those|that|these) of\b", "say the noun again: 'the losses of', not 'those of'"),
    (r"\bthe same(?=[.,;:)]|\s*\Z)", "say what is the same"),
    (r"\b(?:of|in|with|for|about) (?:it|them) all\b", "say the noun"),
    (r"\bnothing of (?:it|them)\b", "say the noun"),
    (r"\b(?:is|are|was|were) told\b", "reports, receives or prints"),
    (r"\b(?:see|sees|saw) to it\b", "ensure"),
    (r"\bway out\b", "what to do, or the fix"),
    (r"\bat once\b(?= (?:on|in) )", "at the same time"),
    (r"\bby (?:itself|themselves) alone\b", "alone"),
    (r"\b(?:is|are|be) there already\b", "already exists"),
    (r"\b(?:lies|lie|lay) (?:in|on|at|under|beside)\b", "is in, is stored in"),
    (r"\bwhatever (?:it|they|the|is|was)\b", "any, regardless of"),
    (r"\bdata sets?\b", "dataset"),
    (r"\b(?:where|if) (?:there is|there are) (?:one|none|any)\b", "say the noun"),
    (r"\b(?:has|have) to say\b", "reports"),
    (r"\bfor ever\b", "permanently"),
    (r"\bunbroken\b", "uninterrupted"),
    (r"\b(?:without a word|in silence)\b", "silently"),
    (r"\bunder way\b", "in progress, or running"),
    (r"\bafresh\b", "again, or from scratch"),
    (r"\bgive or take\b", "about, or within"),
    (r"\bin one piece\b", "complete, or as a single file"),
    (r"\b(?:held|is kept|are kept) to\b(?= (?:a|the|plain))", "limited to"),
    (
        r"\b\w*(?:initialis|quantis|normalis|summaris|vectoris|utilis|synchronis|materialis|finalis|tokenis|serialis"
        r"|optimis|recognis|organis|minimis|maximis|randomis|generalis|neighbour|catalogue|colour|behaviou?r(?<=our)|centre"
        r"|centred|honour|labelled|modelled|signalled|cancelled|favour|artefact|licence)\w*",
        "American spelling, as in torch and megatron-core",
    ),
)


# A space in a pattern also matches a line break, so wrapped phrases are found.
_DOCSTRING_START, *_COMPILED = (
    (re.compile(regex.replace(" ", r"\s+"), re.IGNORECASE), reason) for regex, reason in (DOCSTRING_START, *PATTERNS)
)
_CODE = re.compile(r"`+[^`]*`+")


@dataclass(frozen=True)
class Text:
    """A piece of prose of a file.

    Attributes:
        line: its first line, counted from 1.
        content: the words, with line breaks.
        is_docstring: True if it documents a module, class, function or field.
        max_words, max_characters: limits per sentence and of the whole text.
    """

    line: int
    content: str
    is_docstring: bool = False
    max_words: float = math.inf
    max_characters: float = math.inf


def main(arguments: list[str]) -> int:
    """Print every finding; return the exit status."""
    paths = [Path(argument) for argument in arguments] or [ROOT / name for name in CHECKED]
    count = 0
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.resolve() == Path(__file__).resolve() or "results" in file.parts or "__pycache__" in file.parts:
                continue
            for line, words, reason in check_file(file):
                print(f"{file}:{line}: {words!r}: {reason}")
                count += 1
    print(f"{count} finding{'' if count == 1 else 's'}", file=sys.stderr)
    return 1 if count else 0


def check_file(file: Path) -> Iterator[tuple[int, str, str]]:
    """Yield line, words and reason for every finding of a file."""
    if file.suffix == ".py":
        texts = list(python_texts(file.read_text(encoding="utf-8")))
    elif file.suffix == ".md":
        texts = list(markdown_texts(file.read_text(encoding="utf-8")))
    elif file.suffix in (".sh", ".sbatch", ".yaml", ".yml", ".toml") or file.name in ("Makefile", "Dockerfile"):
        lines = enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        comments = [(n, *line.partition("#")[::2]) for n, line in lines if "#" in line]
        texts = list(_joined((n, comment.strip(), not code.strip()) for n, code, comment in comments))
    else:
        return
    for text in texts:
        content = _CODE.sub(lambda found: "`" + "_" * (len(found.group()) - 2) + "`", text.content)
        for regex, reason in [_DOCSTRING_START, *_COMPILED] if text.is_docstring else _COMPILED:
            for found in regex.finditer(content):
                line = text.line + content.count("\n", 0, found.start())
                yield line, " ".join(found.group().split()), reason
        yield from _check_length(text)


def python_texts(source: str) -> Iterator[Text]:
    """Yield the comments, docstrings and other strings with a space in them of a Python file."""
    comments = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            is_whole_line = not token.line[: token.start[1]].strip()
            comments.append((token.start[0], token.string.lstrip("#: ").strip(), is_whole_line))
    yield from _joined(comments)
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            docstrings.add(id(node.body[0].value))  # type: ignore[attr-defined]
        body = getattr(node, "body", None)
        for before, after in pairwise(body if isinstance(body, list) else []):
            if isinstance(before, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
                docstrings.add(id(after.value))  # the text below a field or constant
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield Text(node.lineno, node.value, is_docstring=id(node) in docstrings)


def markdown_texts(content: str) -> Iterator[Text]:
    """Yield the paragraphs, list items, headings and table cells of a document outside fenced code."""
    is_code, lines = False, []
    for number, line in enumerate(content.splitlines(), start=1):
        stripped = line.strip()
        if stripped.startswith(("```", "~~~")):
            is_code = not is_code
        elif is_code or line.startswith("      ") or stripped.startswith("#"):
            continue  # a heading names its section, so it may well be a question
        elif stripped.startswith("|"):
            for cell in stripped.strip("|").split("|"):
                yield Text(number, cell.strip(), max_characters=MAX_CELL_CHARACTERS)
        elif stripped:
            starts_item = re.match(r"[-*>] |\d+\. ", stripped) is not None
            lines.append((number, re.sub(r"^(?:[-*>]|\d+\.)\s+", "", stripped), not starts_item))
    yield from (replace(text, max_words=MAX_SENTENCE_WORDS) for text in _joined(lines))


def _joined(lines: Iterable[tuple[int, str, bool]]) -> Iterator[Text]:
    """Yield runs of consecutive lines as one text each; a line continues the previous one if its third item is true."""
    start, content = 0, ""
    for number, line, may_continue in lines:
        if content and may_continue and number == start + content.count("\n") + 1:
            content += "\n" + line
        else:
            if content:
                yield Text(start, content)
            start, content = number, line
    if content:
        yield Text(start, content)


def _check_length(text: Text) -> Iterator[tuple[int, str, str]]:
    """Yield sentences of a document that are too long, and table cells; links count without their address."""
    content = _CODE.sub("code", re.sub(r"\]\([^)]*\)", "]", " ".join(text.content.split())))
    if len(content) > text.max_characters:
        yield text.line, f"{content[:40]}...", f"a table cell has at most {text.max_characters} characters"
    for sentence in re.split(r"(?<=[.!?:;])\s+", content):
        words = sentence.split()
        if len(words) > text.max_words:
            reason = f"a sentence of {len(words)} words; one idea per sentence, at most {text.max_words} words"
            yield text.line, " ".join(words[:6]) + " ...", reason


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
