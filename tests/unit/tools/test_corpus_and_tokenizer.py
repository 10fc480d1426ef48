"""The corpus of Python sources and the tokenizer trained on it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_lite.tokenizers import TokenizerConfig, build_tokenizer

TOOLS = Path(__file__).parents[3] / "tools"


def command(tool, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parent)}
    return subprocess.run(
        [sys.executable, str(TOOLS / tool), *map(str, arguments)], capture_output=True, text=True, env=environment
    )


@pytest.fixture
def sources(tmp_path):
    """A small library with everything that has to be left out."""
    files = {f"module{number}.py": f"def f{number}(x):\n\treturn x + {number}\r\n\n" * 30 for number in range(20)}
    files |= {
        "package/__init__.py": "",
        "package/code.py": "import os  # é\n" * 10,
        "package/tests/test_code.py": "assert True\n",
        "site-packages/other.py": "other\n",
        "same.py": files["module3.py"],
        "readme.txt": "no\n",
    }
    for name, text in files.items():
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    (tmp_path / "lib" / "latin.py").write_bytes(b"# \xe9\n")
    return tmp_path / "lib"


def test_corpus(sources, tmp_path):
    outputs = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for output in outputs:
        done = command("make_python_corpus.py", "--root", sources, "--output", output)
        assert done.returncode == 0, done.stderr
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    documents = [json.loads(line) for line in outputs[0].read_text().splitlines()]
    names = [document["source"] for document in documents]
    assert len(names) == 21
    assert "package/code.py" in names
    assert len({"module3.py", "same.py"} & set(names)) == 1
    assert not [name for name in names if "test" in name or "site-packages" in name or name == "latin.py"]
    assert names != sorted(names), "mixed, so that the last documents are a fair sample"
    for document in documents:
        assert document["text"].encode() == (sources / document["source"]).read_bytes()
    done = command("make_python_corpus.py", "--root", sources, "--output", outputs[1], "--include-tests")
    assert "22 documents" in done.stdout


def test_tokenizer_returns_the_corpus_exactly(sources, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    command("make_python_corpus.py", "--root", sources, "--output", corpus)
    prefix = tmp_path / "new" / "tokenizer"
    done = command("train_sentencepiece.py", "--input", corpus, "--model-prefix", prefix, "--vocab-size", 310)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "new")) == ["tokenizer.model"]
    config = TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=f"{prefix}.model")
    tokenizer = build_tokenizer(config)
    assert (tokenizer.vocab_size, tokenizer.unk, tokenizer.eod) == (310, 0, 1)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    for text in [*texts, "  日本\n\n\t\x00🎉  ", "<|endoftext|> <unk>", " ", "\n"]:
        ids = tokenizer.tokenize(text)
        assert tokenizer.detokenize(ids) == text
        assert not {tokenizer.eod, tokenizer.unk} & set(ids)


def test_mistakes(tmp_path):
    done = command("make_python_corpus.py", "--root", tmp_path / "nowhere", "--output", tmp_path / "c.jsonl")
    assert done.returncode == 1
    assert "no Python sources" in done.stderr
    assert not (tmp_path / "c.jsonl").exists()
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    done = command("train_sentencepiece.py", "--input", tmp_path / "bad.jsonl", "--model-prefix", tmp_path / "t")
    assert (done.returncode, "bad.jsonl:2" in done.stderr) == (2, True)
    (tmp_path / "few.jsonl").write_text('{"text": "a b c"}\n')
    done = command("train_sentencepiece.py", "--input", tmp_path / "few.jsonl", "--model-prefix", tmp_path / "t")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert not (tmp_path / "t.model").exists()
