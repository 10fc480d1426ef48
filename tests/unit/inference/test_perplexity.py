"""tools/evaluate.py: the loss of a text is what transformers computes from the same folder."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lite.inference.perplexity import Window, windows
from tests.e2e.commands import environment
from tests.e2e.warm_launcher import launch
from tools import convert_checkpoint, evaluate, generate

transformers = pytest.importorskip("transformers", minversion="5.0", reason="computes the same losses")
tiny_models = pytest.importorskip("tests.unit.checkpoint.huggingface.tiny_models", reason="needs transformers")

TEXT = Path(__file__).read_text(encoding="utf-8")[:700] + " früh €\n"


def folder_of(root: Path, name: str, begins_with: str | None, **changes: Any) -> Path:
    """A model with its tokenizer."""
    folder = root / name.replace(" ", "_")
    tiny_models.save(name, folder, vocab_size=300, **changes)
    tiny_models.save_tokenizer(folder, begins_with)
    return folder


def numbers(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, float]:
    """What the command prints."""
    capsys.readouterr()
    assert evaluate.main(list(words)) == 0
    return parsed(capsys.readouterr().out)


def parsed(out: str) -> dict[str, float]:
    split = [line.rpartition(" ") for line in out.splitlines()]
    return {name.strip(): float(value) for name, _, value in split}


def losses_of_transformers(folder: Path, ids: list[int], length: int, stride: int) -> tuple[float, int]:
    """Sum and number of the losses of all tokens but the first, a call for each window."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    total, seen = 0.0, 1
    for start in range(0, len(ids), stride):
        end = min(start + length + 1, len(ids))
        with torch.no_grad():
            logits = model(torch.tensor([ids[start : end - 1]])).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start + 1 : end]), reduction="none")
        total, seen = total + losses[seen - end :].sum().item(), end
        if end == len(ids):
            break
    return total, seen - 1


@pytest.mark.parametrize(("name", "begins_with"), [("llama2", "<s>"), ("gpt2", None), ("mixtral", "<s>")])
def test_it_is_what_transformers_computes(
    tmp_path: Path, name: str, begins_with: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also over chunks and overlapping windows, and of documents of unequal length in one batch.

    Mutations: the first token of a document or window counted or left out; a token counted twice; padding counted; the
    end of a document put before a text that the tokenizer begins itself.
    """
    folder = folder_of(tmp_path, name, begins_with, **({} if name == "gpt2" else {"max_position_embeddings": 512}))
    longest = 64 if name == "gpt2" else 512
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [TEXT, TEXT[:90], TEXT[300:340]]
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    lines = [json.dumps({"code": text}) for text in texts]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    before = [] if begins_with else [tokenizer.eos_token_id]
    documents = [before + tokenizer(text).input_ids for text in texts]
    for file, ids, length, stride, more in (
        ("text.txt", documents[:1], longest, longest, []),
        ("text.txt", documents[:1], 30, 30, ["--seq-length", "30"]),
        ("text.txt", documents[:1], 30, 11, ["--seq-length", "30", "--stride", "11", "--micro-batch-size", "3"]),
        ("texts.jsonl", documents, 60, 60, ["--seq-length", "60", "--json-key", "code"]),
    ):
        sums = [losses_of_transformers(folder, one, length, stride) for one in ids]
        loss, count = sum(one[0] for one in sums), sum(one[1] for one in sums)
        size = sum(len(text.encode("utf-8")) for text in texts[: len(ids)])
        found = numbers(capsys, str(tmp_path / file), "--load-hf", str(folder), *more)
        assert found["tokens"] == count == sum(len(one) - 1 for one in ids)
        assert (found["bytes"], found["documents"]) == (size, len(ids))
        assert found["loss per token"] == pytest.approx(loss / count, rel=2e-6)
        assert found["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-5)
        assert found["bits per byte"] == pytest.approx(loss / math.log(2) / size, rel=2e-6)


def test_a_checkpoint_of_ours_is_as_good_as_its_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To evaluate and to generate from. Mutation: the tokenizer of an imported checkpoint another one."""
    folder = folder_of(tmp_path, "llama2", "<s>")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    theirs = numbers(capsys, str(tmp_path / "text.txt"), "--load-hf", str(folder))
    words = ["--from", "hf", "--to", "megatron_lite", "--load", str(folder), "--save", str(tmp_path / "ours")]
    assert convert_checkpoint.main(words) == 0
    assert numbers(capsys, str(tmp_path / "text.txt"), "--load", str(tmp_path / "ours")) == theirs
    written = []
    for source in (["--load-hf", str(folder)], ["--load", str(tmp_path / "ours")]):
        capsys.readouterr()
        assert generate.main([*source, "--prompt", "def ", "--max-new-tokens", "8", "--temperature", "0"]) == 0
        written.append(capsys.readouterr().out)
    assert written[0] == written[1]


@pytest.mark.full
def test_two_ranks_find_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Split over tensor parallel ranks. Mutation: each rank's part of the vocabulary by itself."""
    folder = folder_of(tmp_path, "llama2", "<s>")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    words, output = [str(tmp_path / "text.txt"), "--load-hf", str(folder)], tmp_path / "out"
    output.write_text("")
    assert launch(2, words, output, environment(), 120.0, program="tools/evaluate.py") == 0, output.read_text()
    found, alone = parsed(output.read_text()), numbers(capsys, *words)
    assert found.keys() == alone.keys()
    assert found["loss per token"] == pytest.approx(alone["loss per token"], rel=2e-6)


def test_each_token_is_counted_once() -> None:
    """For any lengths. Mutation: the last window a token short, or begun again from the end."""
    for count in range(1, 12):
        for length in range(1, 7):
            for stride in range(1, length + 1):
                found = list(windows(list(range(count)), length, stride))
                counted = [token for window in found for token in window.tokens[len(window.tokens) - window.counted :]]
                assert counted == list(range(1, count))
                assert all(len(window.tokens) <= length + 1 for window in found)
    assert list(windows([7, 8, 9, 10], 2, 1)) == [Window([7, 8, 9], 2), Window([8, 9, 10], 1)]


def test_mistakes_end_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path, "llama2", "<s>")
    written = {
        "text.txt": b"text",
        "empty.txt": b"",
        "binary.txt": b"\xff\xfe",
        "binary.md": b"\xff",
        "no.jsonl": b"{}",
    }
    for name, content in (written | {"half.jsonl": rb'{"text": "\ud800"}'}).items():
        (tmp_path / name).write_bytes(content)
    for name, more, complaint in (
        ("text.txt", ["--seq-length", "65"], "seq_length is 65, but must be at least 1 and at most the model's 64"),
        ("text.txt", ["--stride", "65"], "stride is 65, but must be at least 1 and at most seq_length (64)"),
        ("text.txt", ["--micro-batch-size", "0"], "micro_batch_size is 0"),
        ("empty.txt", [], "empty.txt holds no text"),
        ("binary.txt", [], "binary.txt:1: byte 0, b'\\xff', is no UTF-8"),
        ("binary.md", [], "binary.md is not text in UTF-8"),
        ("half.jsonl", [], "half.jsonl:1: character 0 of the member 'text' is"),
        ("no.jsonl", [], "no.jsonl:1: there is no member 'text', only none"),
        ("nowhere.txt", [], "No such file"),
    ):
        capsys.readouterr()
        assert evaluate.main([str(tmp_path / name), "--load-hf", str(folder), *more]) == 2
        assert complaint in capsys.readouterr().err
    (folder / "tokenizer.json").unlink()
    assert evaluate.main([str(tmp_path / "text.txt"), "--load-hf", str(folder)]) == 2
    assert "holds no tokenizer" in capsys.readouterr().err
