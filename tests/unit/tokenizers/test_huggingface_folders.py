"""Folders of Hugging Face tokenizers in many shapes: the ids, sizes and texts are those of AutoTokenizer.

Each folder is drawn from a seed: a tokenizer trained on a few lines, and beside it the files that some version of
transformers, or a hand, has written; they may name further tokens, and may contradict each other.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_lite.errors import ConfigError
from megatron_lite.tokenizers import MegatronTokenizer, TokenizerConfig, build_tokenizer

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

LINES = [
    "def f(x):\n    return x\n",
    "for x in range(10):\n    print(x)\n",
    "Return the Value of the text, please .",
] * 9
TEXTS = [*LINES[:3], "", "  a  b ", "a<s>b</s><pad>", "é 日本 \U0001f389", "it 's do n't , no ?", "x" * 300]
ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
CLASSES = (
    *(None, "PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer"),
    *("BertTokenizer", "Qwen2TokenizerFast", "T5TokenizerFast", "GemmaTokenizer", "NobodysTokenizer"),
)


def trained(kind: str) -> dict[str, Any]:
    """The tokenizer.json of a tokenizer trained on LINES."""
    pre, models, trainers = tokenizers.pre_tokenizers, tokenizers.models, tokenizers.trainers
    special = ["<unk>", "<s>", "</s>", "[SEP]"]
    settings: dict[str, Any] = {"vocab_size": 300, "special_tokens": special, "show_progress": False}
    if kind == "BPE":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=sorted(pre.ByteLevel.alphabet()), **settings)
    elif kind == "WordPiece":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre.BertPreTokenizer()
        tokenizer.decoder = tokenizers.decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**settings)
    else:
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.normalizer = tokenizers.normalizers.NFKC()
        tokenizer.pre_tokenizer = pre.Metaspace()
        tokenizer.decoder = tokenizers.decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **settings)
    tokenizer.train_from_iterator(LINES, trainer)
    return json.loads(tokenizer.to_str())


@pytest.fixture(scope="module")
def bases() -> list[str]:
    """A tokenizer.json of each kind."""
    return [json.dumps(trained(kind)) for kind in ("BPE", "WordPiece", "Unigram")]


class Folder:
    """The files of a tokenizer, drawn from a seed."""

    def __init__(self, bases: list[str], seed: int) -> None:
        self.draw = random.Random(seed)
        self.tokenizer = json.loads(self.draw.choice(bases))
        self.largest = len(self.tokenizer["model"]["vocab"])
        self.files: dict[str, Any] = {}
        self.new: list[str] = []
        self._vary_tokenizer()
        for draw in self.draw.choice(([], [self._hand], [self._version_3], [self._version_4], [self._version_5])):
            draw()
        if self.draw.random() < 0.2:
            self.files["config"] = {"model_type": self.draw.choice(("gpt2", "llama", "bert", "qwen2"))}
        if self.draw.random() < 0.2:
            self._version_4()  # over what was there: the files contradict each other

    def write(self, path: Path) -> Path:
        """Write the files into a new folder."""
        path.mkdir()
        for name, content in {"tokenizer": self.tokenizer, **self.files}.items():
            (path / f"{name}.json").write_text(json.dumps(content))
        return path

    def texts(self) -> list[str]:
        """Texts with the new tokens, alone and within words and spaces."""
        around = ("{}", " {} ", "the  {}  text", "x{}x", "{0}{0}")
        return TEXTS + [text.format(token) for token in self.new for text in around]

    def _token(self, special: bool | None = None) -> dict[str, Any]:
        flags = {
            name: self.draw.random() < 0.3 for name in ("lstrip", "rstrip", "single_word", "normalized", "special")
        }
        known = ["</s>", "return", "the"]
        content = self.draw.choice([f"<{self.draw.choice('abc')}{len(self.new)}>", f"New {len(self.new)}", *known])
        if content not in known:
            self.new.append(content)
        return {"content": content, **flags, **({} if special is None else {"special": special})}

    def _tokens(self, special: bool | None = None) -> list[dict[str, Any]]:
        return [self._token(special) for _ in range(self.draw.randint(0, 3))]

    def _vary_tokenizer(self) -> None:
        if self.draw.random() < 0.5:
            self.tokenizer["truncation"] = {
                "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
            }  # fmt: skip
        if self.draw.random() < 0.5:
            self.tokenizer["padding"] = {
                "strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 1,
                "pad_type_id": 0, "pad_token": "<s>",
            }  # fmt: skip
        bos, eos = ({"SpecialToken": {"id": name, "type_id": 0}} for name in ("<s>", "</s>"))
        text = {"Sequence": {"id": "A", "type_id": 0}}
        template = self.draw.choice((None, [bos, text], [bos, text, eos], [text, eos]))
        if template:
            ids = {name: {"id": name, "ids": [at], "tokens": [name]} for at, name in ((1, "<s>"), (2, "</s>"))}
            pair = [*template, {"Sequence": {"id": "B", "type_id": 1}}]
            self.tokenizer["post_processor"] = {
                "type": "TemplateProcessing", "single": template, "pair": pair, "special_tokens": ids,
            }  # fmt: skip
        for token in self._tokens():
            if token["content"] in self.new:
                self.tokenizer["added_tokens"].append({"id": self.largest, **token})
                self.largest += 1
        if self.draw.random() < 0.2:
            self.tokenizer["normalizer"] = {"type": self.draw.choice(("NFC", "Lowercase", "NFD"))}

    def _roles(self, mark: str | None) -> dict[str, Any]:
        """Tokens by role, some as objects that carry the mark."""
        found: dict[str, Any] = {}
        for role in ROLES:
            name = {"bos": "<s>", "eos": "</s>", "unk": "<unk>"}.get(role, f"<{role}>")
            if self.draw.random() < (0.9 if role == "eos" else 0.4):
                marked = {"content": name, "lstrip": False, "rstrip": self.draw.random() < 0.5, "normalized": False}
                if mark is not None:
                    marked["__type"] = mark
                found[f"{role}_token"] = self.draw.choice((name, marked))
        return found

    def _config(self, **content: Any) -> None:
        for name in ("add_bos_token", "add_eos_token", "clean_up_tokenization_spaces", "add_prefix_space"):
            if self.draw.random() < 0.25:
                content[name] = self.draw.random() < 0.5
        if self.draw.random() < 0.3:
            content["model_max_length"] = 4
        name = self.draw.choice(CLASSES) if self.draw.random() < 0.6 else "PreTrainedTokenizerFast"
        if name is not None:
            content["tokenizer_class"] = name
        self.files["tokenizer_config"] = content

    def _hand(self) -> None:
        """A few settings, any of the files, tokens named by their text."""
        self._config(**{role: token for role, token in self._roles("AddedToken").items() if isinstance(token, str)})
        if self.draw.random() < 0.5:
            self.files["added_tokens"] = {
                token["content"]: self.largest + at for at, token in enumerate(self._tokens())
            }
        if self.draw.random() < 0.3:
            del self.files["tokenizer_config"]

    def _version_3(self) -> None:
        """added_tokens.json, special_tokens_map.json, and marked objects in tokenizer_config.json."""
        self._config(**self._roles("AddedToken"))
        extra = [token["content"] for token in self._tokens()]
        self.files["special_tokens_map"] = {**self._roles(None), "additional_special_tokens": extra}
        new = [*extra, *(token["content"] for token in self._tokens())]
        self.files["added_tokens"] = {token: self.largest + at for at, token in enumerate(dict.fromkeys(new))}

    def _version_4(self) -> None:
        """added_tokens_decoder, and the special tokens once more in special_tokens_map.json."""
        roles = {role: token for role, token in self._roles("AddedToken").items() if isinstance(token, str)}
        decoder = {
            str(self.largest + at + self.draw.choice((0, 0, 50))): token for at, token in enumerate(self._tokens())
        }
        extra = [token["content"] for token in self._tokens(special=True)]
        self._config(**roles, added_tokens_decoder=decoder, additional_special_tokens=extra)
        if self.draw.random() < 0.7:
            self.files["special_tokens_map"] = self._roles(None)

    def _version_5(self) -> None:
        """extra_special_tokens, as a list or by name, and no other file."""
        extra: Any = [token["content"] for token in self._tokens()]
        if self.draw.random() < 0.5:
            extra = {f"role{at}_token": token for at, token in enumerate(extra)}
        self._config(**self._roles("AddedToken"), extra_special_tokens=extra, backend="tokenizers")


def ours(path: Path) -> MegatronTokenizer:
    """The tokenizer of a folder or file."""
    return build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(path)))


def check(path: Path, texts: list[str]) -> str:
    """Hold a folder to AutoTokenizer; says how it ended."""
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(str(path))
    except Exception:
        with pytest.raises(ConfigError, match="transformers cannot load"):
            ours(path)
        return "refused"
    mine = ours(path)
    assert mine.vocab_size == max(len(theirs), 1 + max(theirs.get_vocab().values()))
    assert (mine.bos, mine.pad, mine.unk) == (theirs.bos_token_id, theirs.pad_token_id, theirs.unk_token_id)
    if theirs.eos_token is not None:
        assert mine.eod == mine.eos == theirs.eos_token_id
    of_file = ours(path / "tokenizer.json")
    for text in texts:
        try:
            ids = theirs.encode(text)
        except Exception:  # without a token for unknown pieces
            with pytest.raises(ConfigError, match="cannot take the text"):
                mine.tokenize(text)
            continue
        assert mine.tokenize(text) == of_file.tokenize(text) == ids, text
        assert mine.detokenize(ids) == theirs.decode(ids), text
    return "equal"


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 1500), marks=pytest.mark.full)], ids=str)
def test_ids_are_those_of_auto_tokenizer(bases: list[str], tmp_path: Path, seeds: range) -> None:
    ends = []
    for seed in seeds:
        folder = Folder(bases, seed)
        path = folder.write(tmp_path / str(seed))
        try:
            ends.append(check(path, folder.texts()))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {json.dumps(folder.files)}") from error
    assert ends.count("equal") > len(seeds) * 0.6, "most folders must say something"


def test_a_call_that_truncated_before_saving_changes_no_document(bases: list[str], tmp_path: Path) -> None:
    loaded = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(bases[0]))
    loaded.add_special_tokens({"eos_token": "</s>", "pad_token": "<pad>"})
    whole = loaded.encode(LINES[0])
    loaded(LINES[0], truncation=True, padding="max_length", max_length=4)
    loaded.save_pretrained(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["truncation"] is not None
    assert ours(tmp_path / "saved").tokenize(LINES[0]) == whole
    (tmp_path / "saved" / "tokenizer.json").rename(tmp_path / "alone.json")
    alone = ours(tmp_path / "alone.json")
    assert alone.tokenize(LINES[0]) == whole
    assert (alone.pad, alone.vocab_size) == (loaded.pad_token_id, len(loaded))


def test_tokens_as_plain_objects_and_files_of_other_names(bases: list[str], tmp_path: Path) -> None:
    """AutoTokenizer refuses an object without its mark, and knows no other name of the file; people write both."""
    (tmp_path / "mine.json").write_text(bases[0])
    settings = {"eos_token": {"content": "<end>", "rstrip": True}, "extra_special_tokens": ["<x>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = ours(tmp_path / "mine.json")
    size = len(json.loads(bases[0])["model"]["vocab"])
    assert (tokenizer.vocab_size, tokenizer.eod) == (size + 2, size)
    assert tokenizer.tokenize("<x><end>  ") == [size + 1, size]


def test_the_vocabulary_reaches_up_to_the_largest_id(bases: list[str], tmp_path: Path) -> None:
    content = json.loads(bases[0])
    vocabulary = content["model"]["vocab"]
    name, last = max(vocabulary.items(), key=lambda item: item[1])
    vocabulary[name] = last + 50
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert ours(tmp_path).vocab_size == last + 51


@pytest.mark.parametrize("name", ["tokenizer_config", "special_tokens_map", "added_tokens", "config"])
def test_settings_are_not_guessed_without_transformers(
    bases: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "tokenizer.json").write_text(bases[0])
    assert ours(tmp_path).eod == 2, "a file alone has one reading"
    (tmp_path / f"{name}.json").write_text("{}")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ConfigError, match=rf"settings in {name}\.json .*'transformers'.*pip install"):
            ours(path)
