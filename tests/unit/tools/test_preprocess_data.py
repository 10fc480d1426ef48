"""tools/preprocess_data.py: the same bytes however it is run, and mistakes told by file and line."""

import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_lite.datasets.indexed_dataset import IndexedDataset
from megatron_lite.datasets.preprocessing import PreprocessConfig, preprocess
from megatron_lite.datasets.text_files import read_batches
from megatron_lite.errors import ConfigError
from megatron_lite.tokenizers import TokenizerConfig
from tests.unit.tokenizers.test_tokenizers import tiktoken_file
from tools.preprocess_data import main

TOOL = Path(__file__).parents[3] / "tools" / "preprocess_data.py"


def texts(number=200):
    generator = random.Random(0)
    return ["".join(generator.choices("abc é\n🎉", k=generator.randint(1, 60))) for _ in range(number)]


def write_lines(path, documents, opener=open):
    with opener(path, "wb") as file:
        for document in documents:
            file.write(json.dumps(document).encode() + b"\n")
    return str(path)


@pytest.fixture
def corpus(tmp_path):
    """200 documents."""
    return write_lines(tmp_path / "corpus.jsonl", [{"text": text, "n": n} for n, text in enumerate(texts())])


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Many batches, so that several processes have something to do."""
    monkeypatch.setattr(read_batches, "__defaults__", (*read_batches.__defaults__[:-1], 500))


def run(inputs, prefix, **changes):
    settings = {"tokenizer": TokenizerConfig(tokenizer_type="ByteLevelTokenizer"), "append_eod": True} | changes
    return preprocess(PreprocessConfig(inputs, str(prefix), **settings))


def contents(prefix):
    return [Path(f"{prefix}_text_document{extension}").read_bytes() for extension in (".bin", ".idx")]


def test_documents_come_back(corpus, tmp_path):
    summary = run([corpus], tmp_path / "out")
    dataset = IndexedDataset(f"{tmp_path}/out_text_document")
    assert dataset.index.dtype == np.uint16
    assert [bytes(tokens[:-1].tolist()).decode() for tokens in dataset[:]] == texts()
    assert all(tokens[-1] == 256 for tokens in dataset[:])
    assert summary.documents == len(dataset) == 200
    assert summary.tokens == {"text": sum(len(tokens) for tokens in dataset[:])}
    assert summary.text_bytes == summary.file_bytes == os.path.getsize(corpus)
    assert summary.outputs == [f"{tmp_path}/out_text_document{extension}" for extension in (".bin", ".idx")]


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_no_byte(corpus, tmp_path, workers):
    run([corpus], tmp_path / "one")
    run([corpus], tmp_path / "many", workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_compressed_input(corpus, tmp_path):
    zstandard = pytest.importorskip("zstandard")
    run([corpus], tmp_path / "plain")
    data = Path(corpus).read_bytes()
    half = data.index(b"\n", len(data) // 2) + 1
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(data[:half]) + gzip.compress(data[half:]))
    compress = zstandard.ZstdCompressor().compress
    (tmp_path / "c.jsonl.zst").write_bytes(compress(data[:half]) + compress(data[half:]))
    for name in ("c.jsonl.gz", "c.jsonl.zst"):
        summary = run([str(tmp_path / name)], tmp_path / "out")
        assert contents(tmp_path / "out") == contents(tmp_path / "plain")
        assert summary.text_bytes == len(data)
        assert summary.file_bytes == os.path.getsize(tmp_path / name)


def test_same_bytes_as_megatron(tmp_path):
    """Sentences, texts without tokens and ends of documents; hashes of what Megatron-LM's tool wrote."""
    documents = [{"text": ["1 2 3", "4"]}, {"text": "5 6"}, {"text": []}, {"text": ["7", "8 9 10"]}]
    corpus = write_lines(tmp_path / "c.jsonl", documents)
    tokenizer = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=100)
    run([corpus], tmp_path / "out", tokenizer=tokenizer)
    found = [hashlib.sha256(content).hexdigest()[:16] for content in contents(tmp_path / "out")]
    assert found == ["d2923d4130208302", "3b220980874bab87"]


def test_several_keys_and_files(tmp_path):
    first = write_lines(tmp_path / "a.jsonl", [{"text": "a", "title": "A"}])
    second = write_lines(tmp_path / "b.jsonl", [{"text": "bb", "title": "B"}])
    run([first, second], tmp_path / "out", json_keys=["text", "title"], append_eod=False)
    assert [tokens.tolist() for tokens in IndexedDataset(f"{tmp_path}/out_text_document")[:]] == [[97], [98, 98]]
    assert [tokens.tolist() for tokens in IndexedDataset(f"{tmp_path}/out_title_document")[:]] == [[65], [66]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "no JSON: Expecting .* in '.*each line must be one JSON object"),
        (b'["a"]', r"expected a JSON object .*, found \[\"a\"\] \(list\)"),
        (b'{"txt": "a", "n": 1}', "no member 'text', only 'txt', 'n'; name another with --json-keys"),
        (b'{"text": 3}', r"must be a text or a list of texts, but is or holds 3 \(int\)"),
        (b'{"text": null}', r"holds null \(NoneType\)"),
        (b'{"text": {"a": "%s"}}' % (b"x" * 99), r"holds \{.{39}\.\.\. \(dict\)"),
        (b'{"text": ["a", 3]}', r"holds 3 \(int\)"),
        (b'{"text": "\xff"}', r"byte 10, b'\\xff', is no UTF-8 .*convert"),
        (b'{"text": "a\xed\xa0\xbd"}', "is no UTF-8"),
        (b'{"text": "ab\\ud83d"}', r"character 2 of the member 'text' is '\\ud83d', half a surrogate pair.*write both"),
        (b'{"text": ["a", "\\ude00\\ud83d"]}', "character 0 .*half a surrogate pair"),
        (b'{"text": "a\x00"}', "no JSON: Invalid control character"),
        (b"\x00" * 9, "no JSON"),
        (b"[" * 100000, "recursion|Stack overflow|Expecting|nest"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_lines(tmp_path, line, message, workers):
    good = [json.dumps({"text": text}).encode() for text in texts(50)]
    path = tmp_path / "c.jsonl"
    path.write_bytes(b"\n".join([*good[:30], line, b"", *good[30:]]))
    with pytest.raises(ConfigError, match=rf"c\.jsonl:31: .*({message}).*--skip-bad-lines"):
        run([str(path)], tmp_path / "out", workers=workers)
    assert os.listdir(tmp_path) == ["c.jsonl"], "nothing half-written stays"
    summary = run([str(path)], tmp_path / "out", workers=workers, skip_bad_lines=True)
    assert (summary.documents, summary.bad_lines) == (50, 1)
    assert "c.jsonl:31" in summary.bad_lines_shown[0]


@pytest.mark.parametrize("text", ["3 10", "-1", "9" * 30])
def test_ids_outside_the_vocabulary_are_told_by_line(tmp_path, text):
    corpus = write_lines(tmp_path / "c.jsonl", [{"text": "9"}, {"text": text}])
    tokenizer = TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=10)
    with pytest.raises(
        ConfigError, match=rf"c\.jsonl:2: .*the id {text[-30:].split()[-1]} .*ends at 9; .*--vocab-size"
    ):
        run([corpus], tmp_path / "out", tokenizer=tokenizer)


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_tokenizer_cannot_take_is_told_by_line(tmp_path, workers):
    """tiktoken's expressions run out of stack at a million spaces, and other libraries raise bare Exceptions."""
    pytest.importorskip("tiktoken")
    corpus = write_lines(tmp_path / "c.jsonl", [{"text": "good"}, {"text": "long" + " " * 1_000_000}])
    tokenizer = TokenizerConfig(tokenizer_type="TikTokenizer", tokenizer_model=tiktoken_file(tmp_path))
    with pytest.raises(
        ConfigError, match=r"c\.jsonl:2: .*cannot take the text 'long .*1,000,004 char.*--skip-bad-lines"
    ):
        run([corpus], tmp_path / "out", tokenizer=tokenizer, workers=workers)
    summary = run([corpus], tmp_path / "out", tokenizer=tokenizer, workers=workers, skip_bad_lines=True)
    assert (summary.documents, summary.bad_lines) == (1, 1)


def test_a_tokenizer_that_raises_anything(tmp_path, monkeypatch):
    def fail(self, text):
        raise TypeError("not this")

    monkeypatch.setattr("megatron_lite.tokenizers.bytelevel_tokenizer.ByteLevelTokenizer.tokenize", fail)
    with pytest.raises(ConfigError, match=r"c\.jsonl:1: .*cannot take the text 'a' .*TypeError: not this"):
        run([write_lines(tmp_path / "c.jsonl", [{"text": "a"}])], tmp_path / "out")


@pytest.mark.parametrize("extension", [".gz", ".zst"])
def test_broken_compression_names_file_and_line(corpus, tmp_path, extension):
    data = Path(corpus).read_bytes()
    if extension == ".gz":
        whole = gzip.compress(data)
    else:
        whole = pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    path = tmp_path / f"c.jsonl{extension}"
    path.write_bytes(b"\x00\x01\x02\x03" + whole[4:])
    with pytest.raises(ConfigError, match=rf"c\.jsonl{extension}:1: the file is broken"):
        run([str(path)], tmp_path / "out")
    path.write_bytes(gzip.compress(data)[:-20] if extension == ".gz" else whole)
    if extension == ".gz":
        with pytest.raises(ConfigError, match=r"c\.jsonl\.gz:\d+: the file is broken after"):
            run([str(path)], tmp_path / "out")


def test_a_failure_keeps_the_files_that_were_there(corpus, tmp_path):
    run([corpus], tmp_path / "out")
    before = contents(tmp_path / "out")
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"text": "a"}) + "\n{")
    with pytest.raises(ConfigError):
        run([str(bad)], tmp_path / "out")
    assert contents(tmp_path / "out") == before


def command(*arguments, **kwargs):
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, env=environment, **kwargs
    )


def test_command_line(corpus, tmp_path):
    os.rename(corpus, tmp_path / "b.jsonl")
    write_lines(tmp_path / "a.jsonl.gz", [{"text": "first"}], gzip.open)
    done = command(
        "--input", f"{tmp_path}/*.jsonl*", "--output-prefix", tmp_path / "new" / "out", "--append-eod",
        "--tokenizer-type", "ByteLevelTokenizer", "--workers", 2, "--partitions", 4, "--log-interval", 10,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    dataset = IndexedDataset(f"{tmp_path}/new/out_text_document")
    assert bytes(dataset[0][:-1].tolist()) == b"first"
    assert len(dataset) == 201
    assert "documents            201" in done.stdout
    assert "tokens per document" in done.stdout
    assert "out_text_document.bin" in done.stdout
    assert "100%" in done.stderr


def test_command_line_mistakes(corpus, tmp_path, capsys):
    def command(*arguments):
        status = main([*map(str, arguments)])
        return SimpleNamespace(returncode=status, stderr=capsys.readouterr().err)

    base = ("--output-prefix", tmp_path / "out", "--tokenizer-type", "ByteLevelTokenizer")
    done = command("--input", tmp_path / "nowhere*", *base)
    assert (done.returncode, "matches no file" in done.stderr) == (2, True)
    done = command("--input", corpus, *base, "--json-keys", "body")
    assert (done.returncode, "corpus.jsonl:1: there is no member 'body', only 'text', 'n'" in done.stderr) == (2, True)
    assert "Traceback" not in done.stderr
    (tmp_path / "file").write_text("")
    done = command("--input", corpus, *base[2:], "--output-prefix", tmp_path / "file" / "out")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    numbers = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "9")
    done = command("--input", corpus, "--output-prefix", tmp_path / "out", *numbers)
    assert (done.returncode, "NullTokenizer reads numbers between spaces" in done.stderr) == (2, True)
    done = command("--input", corpus, "--output-prefix", tmp_path / "out", "--tokenizer-type", "NullTokenizer")
    assert (done.returncode, "--vocab-size" in done.stderr) == (2, True)
