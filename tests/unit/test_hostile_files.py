"""Files that may come from others, damaged in many ways: each is read, or refused with an error made for a person.

Every kind of file starts from whole ones; each input changes one of them a little, in a way drawn from a fixed seed.
`--inputs N` says how many each kind gets.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_lite.arguments.command_line import GROUPS
from megatron_lite.arguments.yaml_file import read_yaml
from megatron_lite.checkpoint import CheckpointError, read_common, read_tracker
from megatron_lite.checkpoint.checksums import CHECKSUMS, as_json, read_checksums
from megatron_lite.checkpoint.common import COMMON, FORMAT, FORMAT_VERSION
from megatron_lite.checkpoint.megatron import MegatronCheckpoint, architecture_of_run, find_megatron
from megatron_lite.checkpoint.megatron.folder import COMMON as COMMON_OF_MEGATRON
from megatron_lite.checkpoint.megatron.folder import COMMON_STATE, stored_bytes
from megatron_lite.checkpoint.safe_reader import METADATA, read_metadata
from megatron_lite.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron_lite.errors import ConfigError
from megatron_lite.tokenizers import TokenizerConfig, build_tokenizer
from tests.e2e.commands import REPOSITORY
from tests.unit.tokenizers import test_tokenizers as samples

TEXT = "def f(x):\n    return x  # é\n"
NUMBERS = [b"-1", b"0", b"1e999", b"99999999999999999999", b"null", b"[]", b"{}", b'""', b"true", b"NaN", b"\xff\xfe"]


def damaged(content: bytes, generator: np.random.Generator) -> bytes:
    """The bytes with one to three changes: bits flipped, bytes cut, doubled, overwritten, or a value put in."""
    changed = bytearray(content)
    for _ in range(generator.integers(1, 4)):
        where = int(generator.integers(len(changed) + 1))
        until = min(len(changed), where + int(generator.integers(1, 17)))
        kind = generator.integers(6)
        if kind == 0 and where < len(changed):
            changed[where] ^= 1 << int(generator.integers(8))
        elif kind == 1:
            del changed[where:]
        elif kind == 2:
            del changed[where:until]
        elif kind == 3:
            changed[where:where] = changed[where:until]
        elif kind == 4:
            changed[where:until] = bytes([int(generator.choice([0, 255, 128]))]) * (until - where)
        else:
            changed[where:until] = NUMBERS[generator.integers(len(NUMBERS))]
    return bytes(changed)


def an_index(folder: Path) -> tuple[Path, Callable[[], object]]:
    builder = IndexedDatasetBuilder(str(folder / "data.bin"), np.uint16)
    for length in (3, 0, 7, 2):
        builder.add_document(np.arange(length), [length])
    builder.finalize(str(folder / "data.idx"))

    def read() -> None:
        dataset = IndexedDataset(str(folder / "data"))
        for position in range(len(dataset)):
            dataset[position]

    return folder / "data.idx", read


def metadata(folder: Path) -> tuple[Path, Callable[[], object]]:
    import torch

    from tests.unit.checkpoint.test_safe_reader import save

    save(folder / "saved", {"a": torch.arange(6.0).view(2, 3), "b": torch.ones((), dtype=torch.bfloat16)})
    return folder / "saved" / METADATA, lambda: read_metadata(folder / "saved")


def of_megatron(file: str, folder: Path) -> tuple[Path, Callable[[], object]]:
    """A checkpoint that Megatron-LM has written; the state of the run in a file of its own, as older versions did."""
    source = find_megatron(REPOSITORY / "tests" / "data" / "megatron" / "learned")
    theirs = Path(shutil.copytree(source, folder / "it"))
    state = stored_bytes(theirs, read_metadata(theirs, with_bytes=True), MetadataIndex(COMMON_STATE))
    (theirs / COMMON_OF_MEGATRON).write_bytes(state)
    metadata = (theirs / METADATA).read_bytes()
    if file == COMMON_OF_MEGATRON:
        (theirs / METADATA).write_bytes(metadata.replace(COMMON_STATE.encode(), b"x" * len(COMMON_STATE)))

    def read() -> None:
        checkpoint = MegatronCheckpoint(theirs)
        architecture_of_run(checkpoint)
        for name, shape in checkpoint.weights.shapes.items():
            checkpoint.weights.read(name, tuple(slice(0, length) for length in shape))

    return theirs / file, read


def common(folder: Path) -> tuple[Path, Callable[[], object]]:
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "iteration": 3,
        "layout": {"tensor_model_parallel_size": 2},
        "extra": {"consumed_train_samples": 12},
        "config": {"lr": 1e-4},
    }
    (folder / COMMON).write_text(json.dumps(content))
    return folder / COMMON, lambda: read_common(folder)


def checksums(folder: Path) -> tuple[Path, Callable[[], object]]:
    (folder / CHECKSUMS).write_text(as_json({"__0_0.distcp": (12, "ab" * 32), COMMON: (3, "cd" * 32)}))
    return folder / CHECKSUMS, lambda: read_checksums(folder)


def tracker(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "latest_checkpointed_iteration.txt"
    path.write_text("100")
    return path, lambda: read_tracker(folder)


def settings(folder: Path) -> tuple[Path, Callable[[], object]]:
    path = folder / "preset.yaml"
    path.write_text(
        "# a preset\ntransformer:\n  num_layers: 2\n  hidden_size: 64 # channels\n  window_size: [3, 0]\n"
        "optimizer:\n  lr: 1.0e-4\n  use: true\n  nothing: null\n  day: !!timestamp 2001-12-14\n"
        "  data_path: &a [a, b]\n  split: *a\n"
    )
    return path, lambda: read_yaml(str(path), GROUPS)


def a_tokenizer(kind: str, file: str, folder: Path) -> tuple[Path, Callable[[], object]]:
    fields: dict[str, object] = {}
    if kind == "GPT2BPETokenizer":
        fields["vocab_file"], fields["merge_file"], _ = samples.gpt2_files(folder)
    elif kind == "HuggingFaceTokenizer":
        fields["tokenizer_model"] = samples.huggingface_folder(folder)
    elif kind == "TikTokenizer":
        pytest.importorskip("tiktoken")
        fields["tokenizer_model"] = samples.tiktoken_file(folder)
    else:
        fields["tokenizer_model"] = samples.sentencepiece_model(folder)
    config = TokenizerConfig(tokenizer_type=kind, **fields)

    def read() -> None:
        build_tokenizer(config).tokenize(TEXT)

    return folder / file, read


KINDS: dict[str, Callable[[Path], tuple[Path, Callable[[], object]]]] = {
    ".idx": an_index,
    ".metadata": metadata,
    ".metadata of Megatron-LM": lambda folder: of_megatron(METADATA, folder),
    "common.pt of Megatron-LM": lambda folder: of_megatron(COMMON_OF_MEGATRON, folder),
    "common.json": common,
    "checksums.json": checksums,
    "tracker": tracker,
    "YAML": settings,
    "GPT-2 vocabulary": lambda folder: a_tokenizer("GPT2BPETokenizer", "vocab.json", folder),
    "GPT-2 merges": lambda folder: a_tokenizer("GPT2BPETokenizer", "merges.txt", folder),
    "tokenizer.json": lambda folder: a_tokenizer("HuggingFaceTokenizer", "tokenizer.json", folder),
    "tokenizer_config.json": lambda folder: a_tokenizer("HuggingFaceTokenizer", "tokenizer_config.json", folder),
    "tiktoken": lambda folder: a_tokenizer("TikTokenizer", "vocab.json", folder),
    "SentencePiece": lambda folder: a_tokenizer("SentencePieceTokenizer", "sp.model", folder),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused_in_words(kind: str, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    path, read = KINDS[kind](tmp_path)
    read()
    shutil.copy(path, tmp_path / "whole")
    content = path.read_bytes()
    refused, inputs = 0, pytestconfig.getoption("--inputs")
    for seed in range(inputs):
        path.write_bytes(damaged(content, np.random.default_rng(seed)))
        try:
            read()
        except (ConfigError, CheckpointError) as error:
            refused += len(str(error)) > len(str(path))  # in words, of which the path is only one
        except Exception as error:
            raise AssertionError(f"input {seed} of {kind}: {path.read_bytes()[:200]!r}") from error
    assert refused > inputs // 20, "the damage should be noticed now and then"


def test_aliases_of_yaml_cannot_grow_without_bound(tmp_path: Path) -> None:
    lines = ["l0: &l0 [x, x]", *(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 40))]
    (tmp_path / "bomb.yaml").write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"bomb\.yaml"):
        read_yaml(str(tmp_path / "bomb.yaml"), GROUPS)


@pytest.mark.parametrize(
    "line", ["lr: !!int x", "lr: !!bool maybe", "lr: !!timestamp never", "? [[a]]\n: 1", "!!int x: 1"]
)
def test_tags_and_keys_that_do_not_fit_are_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "preset.yaml").write_text(line + "\n")
    with pytest.raises(ConfigError, match=r"preset\.yaml:1"):
        read_yaml(str(tmp_path / "preset.yaml"), GROUPS)
