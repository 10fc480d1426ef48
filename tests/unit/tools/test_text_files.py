"""Text from files of several kinds, by both tools that read it; and files that hold none."""

import gzip
import json
import os
import random
import re
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from megatron_lite.datasets.indexed_dataset import IndexedDataset
from megatron_lite.datasets.text_files import TXT_DOCUMENTS, find_inputs, read_batches, texts_of
from megatron_lite.errors import ConfigError
from megatron_lite.tokenizers import TokenizerConfig, build_tokenizer
from tools import preprocess_data, train_sentencepiece

PLAIN = "first line\r\nsecond é\n\n \nthird paragraph\nof two lines\n\n"
DOCUMENTS = {
    "file": [PLAIN],
    "line": ["first line", "second é", "third paragraph", "of two lines"],
    "paragraph": ["first line\r\nsecond é", "third paragraph\nof two lines"],
}


def write_parquet(path: Path, columns: dict[str, object], **options: int) -> str:
    """A Parquet file of these columns."""
    pyarrow.parquet.write_table(pyarrow.table(columns), str(path), **options)
    return str(path)


def tokenized(prefix: Path, *arguments: object, workers: int = 1) -> list[str]:
    """The documents that tools/preprocess_data.py makes, as text again."""
    words = ["--output-prefix", prefix, "--tokenizer-type", "ByteLevelTokenizer", "--workers", workers, *arguments]
    assert preprocess_data.main([*map(str, words)]) == 0
    return [bytes(tokens.tolist()).decode() for tokens in IndexedDataset(f"{prefix}_text_document")[:]]


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("documents", TXT_DOCUMENTS)
def test_plain_text(tmp_path: Path, documents: str, ending: str) -> None:
    path = tmp_path / f"a.txt{ending}"
    content = b"\xef\xbb\xbf" + PLAIN.encode()
    path.write_bytes(gzip.compress(content) if ending else content)
    assert tokenized(tmp_path / "o", "--input", path, "--txt-documents", documents) == DOCUMENTS[documents]
    first = next(read_batches(str(path), txt_documents=documents)).records[-1].number
    assert first == {"file": 1, "line": 6, "paragraph": 5}[documents], "the line that errors name"


def test_a_folder_with_files_of_each_kind(tmp_path: Path) -> None:
    """Sorted by name; hidden files and those of other kinds are left alone. Mutation: take every file."""
    folder = tmp_path / "in"
    (folder / "sub" / ".git").mkdir(parents=True)
    (folder / "sub" / "none").mkdir()
    (folder / "b.txt").write_text("b")
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (folder / "sub" / "d.txt").write_text("d")
    write_parquet(folder / "c.parquet", {"text": ["c"]})
    for name in ("readme.md", ".hidden.txt", "sub/.git/x.txt"):
        (folder / name).write_text("no")
    (folder / "empty.txt").write_text("")
    assert tokenized(tmp_path / "o", "--input", folder) == ["a", "b", "c", "d"]
    assert find_inputs([f"{folder}/s*"]) == [f"{folder}/sub/d.txt"], "a pattern may stand for a folder"
    with pytest.raises(ConfigError, match=r"folder without a file whose name ends in \.jsonl.*\.parquet"):
        find_inputs([str(tmp_path / "in" / "sub" / "none")])


@pytest.mark.parametrize("workers", [1, 2])
def test_parquet(tmp_path: Path, workers: int) -> None:
    texts = [f"row {number} é" * (number % 7) for number in range(1000)]
    path = write_parquet(tmp_path / "a.parquet", {"n": list(range(1000)), "text": texts}, row_group_size=300)
    assert tokenized(tmp_path / "o", "--input", path, workers=workers) == [text for text in texts if text]
    batches = list(read_batches(path))
    assert sum(batch.file_bytes for batch in batches) == Path(path).stat().st_size, "progress ends at the end"
    assert [batch.records[0].number for batch in batches] == [1, 257, 513, 769]


def test_parquet_of_lists_and_bytes(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": [["a", "b"], ["c"]], "raw": [b"x", "é".encode()]})
    assert tokenized(tmp_path / "o", "--input", path) == ["a", "b", "c"]
    assert IndexedDataset(f"{tmp_path}/o_text_document").document_indices.tolist() == [0, 2, 3]
    assert [texts_of(record.content, "raw") for record in next(read_batches(path, ["raw"])).records] == [["x"], ["é"]]


def not_utf8() -> pyarrow.Array:
    """A column of text with a row that is none."""
    return pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"ok", b"\xff"]).buffers())


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (["a", None], "a.parquet:2: .*holds null"),
        ([1, 2], r"a.parquet:1: .*holds 1 \(int\)"),
        ([["a"], ["b", None]], "a.parquet:2: .*holds null"),
        (not_utf8(), r"a.parquet:2: byte 0, b'\\xff', is no UTF-8"),
    ],
)
def test_bad_rows(tmp_path: Path, column: object, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"text": column})
    base = ["--input", path, "--output-prefix", str(tmp_path / "o"), "--tokenizer-type", "ByteLevelTokenizer"]
    assert preprocess_data.main(base) == 2
    said = capsys.readouterr().err
    assert re.search(f"{message}.*--skip-bad-lines", said), said


def test_broken_parquet_and_wrong_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"body": ["a"] * 99, "id": list(range(99))})
    with pytest.raises(ConfigError, match=r"a\.parquet: there is no column 'text', only 'body', 'id'; .*--json-keys"):
        next(read_batches(path))
    content = Path(path).read_bytes()
    for damaged in (b"", b"junk", content[:-9], content[: len(content) // 2]):
        Path(path).write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"a\.parquet: the file is no Parquet or broken"):
            list(read_batches(path, ["body"]))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"'pyarrow'.*pip install 'megatron_lite\[data\]'"):
        next(read_batches(path))


def test_a_text_that_is_no_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\nb\xe9d\n")
    base = ["--input", str(path), "--output-prefix", str(tmp_path / "o"), "--tokenizer-type", "ByteLevelTokenizer"]
    for documents, line in (("file", 1), ("line", 2)):
        assert preprocess_data.main([*base, "--txt-documents", documents]) == 2
        assert f"a.txt:{line}: byte" in capsys.readouterr().err
    assert tokenized(tmp_path / "o", "--input", path, "--txt-documents", "line", "--skip-bad-lines") == ["good"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "held no document, at most blank lines"),
        ("a.jsonl", b"\n \r\n\n", "held no document"),
        ("a.txt", b" \n\n", "held no document"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "held no document"),
        ("a.jsonl", b'{"text": ""}\n{"text": []}\n', "held 2 documents without a token under 'text'"),
        ("a.jsonl", b'{"text": 3}\nx\n', r"held 2 bad lines, the first of them .*a\.jsonl:1: .*holds 3"),
        ("a.jsonl", b'{"text": ""}\nx\n', "held 1 documents without .* and 1 bad lines"),
    ],
)
def test_files_without_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    """Nothing is written, and what was there stays. Mutation: write the empty pair."""
    (tmp_path / "good.jsonl").write_text('{"text": "good"}\n')
    before = tokenized(tmp_path / "o", "--input", tmp_path / "good.jsonl")
    (tmp_path / name).write_bytes(content)
    base = ["--output-prefix", str(tmp_path / "o"), "--tokenizer-type", "ByteLevelTokenizer", "--skip-bad-lines"]
    assert preprocess_data.main(["--input", str(tmp_path / name), *base, "--append-eod"]) == 2
    said = capsys.readouterr().err
    assert re.search(f"There is nothing to write: .*{message}", said), said
    assert IndexedDataset(f"{tmp_path}/o_text_document")[0].tobytes() != b""
    assert [bytes(tokens.tolist()).decode() for tokens in IndexedDataset(f"{tmp_path}/o_text_document")[:]] == before
    files = ["--input", str(tmp_path / name), str(tmp_path / "good.jsonl")]
    assert preprocess_data.main([*files, *base]) == 0, "one such file among others does no harm"
    train = ["--input", str(tmp_path / name), "--model-prefix", str(tmp_path / "t"), "--skip-bad-lines"]
    assert train_sentencepiece.main(train) == 2
    assert "no line to learn from" in capsys.readouterr().err


def test_a_key_without_tokens_among_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "title": ""}\n')
    assert tokenized(tmp_path / "o", "--input", tmp_path / "a.jsonl", "--json-keys", "text", "title") == ["a"]
    assert "no document has a token under 'title'" in capsys.readouterr().out


def test_a_tokenizer_trains_on_every_kind(tmp_path: Path) -> None:
    """The same lines from each kind of file make the same tokenizer."""
    draw = random.Random(0)
    lines = ["".join(draw.choices("abcde ", k=40)) for _ in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(lines))
    write_parquet(tmp_path / "a.parquet", {"body": lines})
    made = []
    for source, key in ((tmp_path / "a.jsonl", "body"), (folder, "text"), (tmp_path / "*.parquet", "body")):
        words = ["--input", source, "--json-keys", key, "--model-prefix", tmp_path / "t", "--vocab-size", 300]
        assert train_sentencepiece.main([*map(str, words)]) == 0
        model = str(tmp_path / "t.model")
        tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=model))
        made.append([tokenizer.tokenize(line) for line in lines[:20]])
    assert made[0] == made[1] == made[2]


def test_bad_lines_of_the_trainer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = "".join(json.dumps({"text": f"some words {number}"}) + "\n" for number in range(60))
    (tmp_path / "a.jsonl").write_text(good + '{"text": "\\ud83d"}\n{"body": "b"}\n')
    words = ["--input", str(tmp_path / "a.jsonl"), "--model-prefix", str(tmp_path / "t"), "--vocab-size", "290"]
    assert train_sentencepiece.main(words) == 2
    assert "a.jsonl:61: character 0 of the member 'text' is '\\ud83d'" in capsys.readouterr().err
    assert train_sentencepiece.main([*words, "--skip-bad-lines"]) == 0
    few = list(train_sentencepiece.sampled_lines([words[1]], "text", max_bytes=1))
    assert few == ["some words 0"], "a share of less than a document is one document"


def test_a_zstd_file_that_is_cut_short(tmp_path: Path) -> None:
    """One that is whole is read whatever its frames. Mutation: the end of the file taken for the end of the frame."""
    whole = tmp_path / "a.txt.zst"
    frames = [zstandard.compress(os.urandom(200_000).hex().encode()), zstandard.compress(b"the end")]
    whole.write_bytes(b"".join(frames))
    (batch,) = read_batches(str(whole))
    assert len(batch.records[0].content["text"]) == 400_000 + len("the end")  # type: ignore[call-overload]
    for length in (3, len(frames[0]) // 2, len(frames[0]) + 3):
        whole.write_bytes(b"".join(frames)[:length])
        with pytest.raises(ConfigError, match=r"broken after this line: the last frame is cut short"):
            list(read_batches(str(whole)))


def test_patterns_and_links(tmp_path: Path) -> None:
    """Each file once, in linked folders too. Mutations: duplicates kept; links not followed; circles followed."""
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for name in ("d/a.txt", "d/sub/b.txt", "elsewhere/c.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "d" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d" / "sub" / "circle").symlink_to(tmp_path / "d")
    assert find_inputs([str(tmp_path / "d")]) == [
        str(tmp_path / "d" / name) for name in ("a.txt", "link/c.txt", "sub/b.txt")
    ]
    (tmp_path / "d" / "sub" / "circle").unlink()
    assert find_inputs([str(tmp_path / "d" / "**")]) == [
        str(tmp_path / "d" / name) for name in ("a.txt", "link/c.txt", "sub/b.txt")
    ]
