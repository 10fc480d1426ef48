"""The files of a tokenizer, which travel with the weights."""

import json
import shutil
from pathlib import Path
from typing import Any

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
GENERATION = "generation_config.json"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def copy_tokenizer(source: str | Path, target: str | Path) -> bool:
    """Copy what there is of a tokenizer, and how to generate; says whether a tokenizer is among it."""
    source, target = Path(source), Path(target)
    source = source if source.is_dir() else source.parent
    found = [name for name in (*TOKENIZER_FILES, GENERATION) if (source / name).is_file()]
    if found:
        target.mkdir(parents=True, exist_ok=True)
    for name in found:
        shutil.copyfile(source / name, target / name)
    return any(name in found for name in _VOCABULARIES)


def tokenizer_in(folder: str | Path) -> tuple[str, str] | None:
    """The --tokenizer-type and --tokenizer-model of a folder; None where it holds no tokenizer.

    A SentencePiece model that nothing is said of, as in an export of ours, is taken as it is.
    """
    folder = Path(folder)
    found = [name for name in _VOCABULARIES if (folder / name).is_file()]
    if found == ["tokenizer.model"] and not (folder / "tokenizer_config.json").is_file():
        return "SentencePieceTokenizer", str(folder / "tokenizer.model")
    return ("HuggingFaceTokenizer", str(folder)) if found else None


def special_tokens(folder: str | Path) -> dict[str, Any]:
    """The ids of special tokens that a folder's generation_config.json names, null for others.

    A config.json without them would stand for those that its family has by default.
    """
    try:
        values = json.loads((Path(folder) / GENERATION).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        values = {}
    return {name: values.get(name) if isinstance(values, dict) else None for name in _SPECIAL}
