"""Rules that decide which id ends and which id begins a document, the same for every way to name a tokenizer.

The files of a tokenizer's folder are read as transformers reads them. special_tokens_map.json overrides
tokenizer_config.json unless that file has an `added_tokens_decoder`, and `"eos_token": null` means that there is none.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_cpt.errors import UserError
from megatron_cpt.files.whole_io import is_regular_file, read_file

CONFIG_FILE = "tokenizer_config.json"
_MAP_FILE = "special_tokens_map.json"

# Ends of documents in the pretraining text of GPT-2 and Qwen, Llama 3, Llama 2 and Mistral, Gemma, and DeepSeek.
_DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>")
_TURN_ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>", "<|end|>", "<|eot|>", "<|eom_id|>", "<turn|>", "<|return|>")
# Defaults of transformers' classes, for a tokenizer_config.json without the token; other classes have none.
_OF_CLASS = {
    "GPT2Tokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "GPTNeoXTokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "CodeGenTokenizer": ("<|endoftext|>", "<|endoftext|>"),
    "Qwen2Tokenizer": ("<|endoftext|>", None),
    "LlamaTokenizer": ("</s>", "<s>"),
    "CodeLlamaTokenizer": ("</s>", "<s>"),
    "GemmaTokenizer": ("<eos>", "<bos>"),
}


@dataclass(frozen=True)
class DocumentEnd:
    """Id that ends a document.

    Attributes:
        id: None if the tokenizer has none.
        note: sentence about a choice that the tokenizer's files do not make; empty if they make it.
    """

    id: int | None
    note: str = ""


def find_document_end(folder: Path | None, find_id: Callable[[str], int | None], own: int | None = None) -> DocumentEnd:
    """Return the id that ends a document: the `eos_token`, unless that ends only a turn of a chat.

    Args:
        folder: folder with the files that name special tokens; None: there is none.
        find_id: returns the id of a token, or None if the vocabulary lacks it.
        own: id that the tokenizer's own file gives, used if the folder's files name no token.

    Raises:
        UserError: the vocabulary lacks the token that the files name, or a file is not JSON.
    """
    is_named, name = find_special_token(folder, "eos_token")
    if is_named and name is None:
        return DocumentEnd(None)
    others = ((other, find_id(other)) for other in _DOCUMENT_ENDS if other != name)
    other, other_id = next(((text, number) for text, number in others if number is not None), ("", None))
    if name is None:
        if own is not None or other_id is None:
            return DocumentEnd(own)
        return DocumentEnd(
            other_id, f"the tokenizer's files name no eos_token; a guess: {other!r} (id {other_id}) ends a document"
        )
    number = find_id(name)
    if number is None:
        if own is not None:
            return DocumentEnd(own)
        raise UserError(
            f"tokenizer {folder}: eos_token names {name!r}, but the vocabulary does not have it; correct "
            f"{CONFIG_FILE} or {_MAP_FILE}"
        )
    if name in _TURN_ENDS and other_id is not None:
        return DocumentEnd(
            other_id,
            f"documents end with {other!r} (id {other_id}); the tokenizer's eos_token {name!r} (id {number}) ends a "
            "turn of a chat",
        )
    return DocumentEnd(number)


def find_special_token(folder: Path | None, kind: Literal["eos_token", "bos_token"]) -> tuple[bool, str | None]:
    """Return whether the files of a folder decide about a special token, and the token; None: there is none.

    Raises:
        UserError: a file is not JSON.
    """
    if folder is None:
        return False, None
    config = _read_object(folder / CONFIG_FILE)
    if "added_tokens_decoder" not in config:
        config |= _read_object(folder / _MAP_FILE)
    if kind in config:
        token = config[kind]
        text = token.get("content") if isinstance(token, dict) else token
        return True, text if text and isinstance(text, str) else None  # transformers: "" is no token
    defaults = _OF_CLASS.get(str(config.get("tokenizer_class")).removesuffix("Fast"))
    return defaults is not None, defaults and defaults[0 if kind == "eos_token" else 1]


def _read_object(path: Path) -> dict[str, Any]:
    if not is_regular_file(path):
        return {}
    try:
        content: Any = json.loads(read_file(path))
        json.dumps(content, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise UserError(f"tokenizer {path}: cannot be read as JSON: {error}") from error
    return content if isinstance(content, dict) else {}
