"""Tokenizers: exact round trips, Megatron's ids and names, and errors that say what to do."""

import base64
import itertools
import json
import pickle
import sys

import pytest
import sentencepiece

from megatron_lite.datasets.megatron_dataset import describe
from megatron_lite.errors import ConfigError
from megatron_lite.tokenizers import TokenizerConfig, build_tokenizer
from megatron_lite.tokenizers.config import TOKENIZER_TYPES

TEXTS = [
    "def f(x):\n    return x\n",
    "  two  spaces\t\tand tabs \n\n\n",
    " ",
    "",
    "日本語 é 🎉 \r\n",
    "0123456789",
]
CORPUS = [*TEXTS[:2], "for x in range(10):\n    print(x)\n", "return the value of the text\n"] * 20


def sentencepiece_model(folder, **changes):
    model_prefix = str(folder / "sp")
    settings = {
        "vocab_size": 320,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "user_defined_symbols": ["\n"],
        "unk_id": 0,
        "eos_id": 1,
        "bos_id": -1,
        "pad_id": -1,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=model_prefix, **(settings | changes)
    )
    return f"{model_prefix}.model"


def gpt2_files(folder):
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(CORPUS, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    trained.save_model(str(folder))
    return str(folder / "vocab.json"), str(folder / "merges.txt"), trained


def huggingface_folder(folder, settings='{"eos_token": {"content": "</s>"}, "bos_token": "<s>"}'):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(settings)
    return str(folder)


def tiktoken_file(folder, changes=None):
    tokens = [bytes([value]) for value in range(256)]
    tokens += [b"  ", b"re", b"turn", b"return", b"te", b"xt", b"text", "é".encode()]
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": token.decode(errors="replace")}
        for rank, token in enumerate(tokens)
    ]
    for position, value in (changes or {}).items():
        entries[position] = value
    (folder / "vocab.json").write_text(json.dumps(entries))
    return str(folder / "vocab.json")


def make(tokenizer_type, folder):
    """A tokenizer of each type, trained on the spot."""
    settings = {}
    if tokenizer_type == "GPT2BPETokenizer":
        settings["vocab_file"], settings["merge_file"], _ = gpt2_files(folder)
    elif tokenizer_type == "HuggingFaceTokenizer":
        settings["tokenizer_model"] = huggingface_folder(folder)
        settings["tokenizer_hf_no_include_special_tokens"] = True
    elif tokenizer_type == "TikTokenizer":
        pytest.importorskip("tiktoken")
        settings["tokenizer_model"] = tiktoken_file(folder)
    elif tokenizer_type == "NullTokenizer":
        settings["vocab_size"] = 1000
    elif tokenizer_type != "ByteLevelTokenizer":
        settings["tokenizer_model"] = sentencepiece_model(folder)
    config = TokenizerConfig(tokenizer_type=tokenizer_type, **settings)
    config.validate()
    return build_tokenizer(config)


@pytest.mark.parametrize("tokenizer_type", TOKENIZER_TYPES)
def test_round_trip(tokenizer_type, tmp_path):
    tokenizer = make(tokenizer_type, tmp_path)
    assert 0 <= tokenizer.eod < tokenizer.vocab_size
    texts = ["3 1 4", "999"] if tokenizer_type == "NullTokenizer" else TEXTS
    for text in texts:
        ids = tokenizer.tokenize(text)
        assert all(isinstance(token, int) and 0 <= token < tokenizer.vocab_size for token in ids)
        assert tokenizer.eod not in ids or tokenizer_type == "NullTokenizer"
        assert tokenizer.detokenize(ids) == text


def test_every_type_names_its_cache_differently(tmp_path):
    hashes = set()
    for tokenizer_type in TOKENIZER_TYPES:
        folder = tmp_path / tokenizer_type
        folder.mkdir()
        hashes.add(describe({"tokenizer": make(tokenizer_type, folder)})[1])
    assert len(hashes) == len(TOKENIZER_TYPES)


def test_null_tokenizer():
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=1000))
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (1000, 999, None)
    settings = {"null_tokenizer_eod_id": 7, "null_tokenizer_pad_id": 3}
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=1000, **settings))
    assert (tokenizer.eod, tokenizer.pad) == (7, 3)
    with pytest.raises(ConfigError, match="1000 is not below the vocabulary size 1000"):
        build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=1000, null_tokenizer_eod_id=1000))


def test_byte_level_tokenizer():
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="ByteLevelTokenizer"))
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    assert tokenizer.tokenize("é") == [0xC3, 0xA9]
    assert tokenizer.detokenize([104, 105, 256, 0xC3]) == "hi\ufffd"


def test_names_that_megatron_hashes_into_its_cache_files():
    """As printed by Megatron-LM for the same flags; cached indices of either are read by the other."""
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=1000))
    assert tokenizer.unique_identifiers == {
        "class": "megatron.core.tokenizers.text.text_tokenizer.MegatronTokenizerText",
        "tokenizer_path": None,
        "vocab_size": "1000",
        "pad_id": "-1",
    }


def test_sentencepiece_ids(tmp_path):
    path = sentencepiece_model(tmp_path)
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="SentencePieceTokenizer", tokenizer_model=path))
    processor = sentencepiece.SentencePieceProcessor(model_file=path)
    assert tokenizer.vocab_size == processor.get_piece_size()
    assert (tokenizer.unk, tokenizer.eos, tokenizer.eod, tokenizer.bos, tokenizer.pad) == (0, 1, 1, None, None)
    assert tokenizer.tokenize(TEXTS[0]) == processor.encode(TEXTS[0])
    assert tokenizer.detokenize([*tokenizer.tokenize("a b"), tokenizer.eod]) == "a b"
    assert list(tokenizer.unique_identifiers) == [
        "class",
        "tokenizer_path",
        "chat_template",
        "ignore_extra_whitespaces",
        "legacy",
        "special_tokens",
    ]
    assert pickle.loads(pickle.dumps(tokenizer)).tokenize("x y") == tokenizer.tokenize("x y")


def test_gpt2_ids(tmp_path):
    vocab_file, merge_file, trained = gpt2_files(tmp_path)
    tokenizer = build_tokenizer(TokenizerConfig(vocab_file=vocab_file, merge_file=merge_file))
    for text in TEXTS:
        assert tokenizer.tokenize(text) == trained.encode(text).ids
    assert tokenizer.tokenize("a<|endoftext|>b")[1] == tokenizer.eod == tokenizer.eos == 0
    assert tokenizer.vocab_size == len(json.loads((tmp_path / "vocab.json").read_text()))
    config = TokenizerConfig(vocab_file=vocab_file, merge_file=merge_file, tokenizer_special_tokens=["<x>"])
    more = build_tokenizer(config)
    assert more.vocab_size == tokenizer.vocab_size + 1
    assert more.tokenize("<x>") == [tokenizer.vocab_size]


def test_huggingface_special_tokens(tmp_path):
    path = huggingface_folder(tmp_path)
    for model in (path, f"{path}/tokenizer.json"):
        tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=model))
        assert (tokenizer.bos, tokenizer.eos, tokenizer.eod, tokenizer.pad) == (0, 1, 1, None)
        ids = tokenizer.tokenize("return")
        assert ids[0] == 0
        assert tokenizer.detokenize(ids) == "<s>return"
    (tmp_path / "tokenizer_config.json").unlink()
    assert build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=path)).eod == 1
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is not a tokenizer\.json"):
        build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(broken)))


def test_tiktoken_ids(tmp_path):
    pytest.importorskip("tiktoken")
    path = tiktoken_file(tmp_path)
    config = TokenizerConfig(tokenizer_type="TikTokenizer", tokenizer_model=path, tiktoken_num_special_tokens=10)
    tokenizer = build_tokenizer(config)
    assert tokenizer.vocab_size == 10 + 264
    assert (tokenizer.unk, tokenizer.bos, tokenizer.eos, tokenizer.eod, tokenizer.pad) == (0, 1, 2, 2, 4)
    for pattern in ("v1", "v2", None):
        config.tiktoken_pattern = pattern
        ids = build_tokenizer(config).tokenize("return text</s>é")
        assert ids == [269, 42, 272, 2, 273], "not the ids of Megatron-LM for the same file"
    assert tokenizer.detokenize([2, 9]) == "</s><SPECIAL_9>"
    config.vocab_size = 10 + 256
    assert build_tokenizer(config).tokenize("re") == [10 + ord("r"), 10 + ord("e")]
    config.vocab_size = 10 + 265
    with pytest.raises(ConfigError, match="write at most 274"):
        build_tokenizer(config)


@pytest.mark.parametrize(
    ("position", "entry"),
    [
        (3, {"rank": 4, "token_bytes": "Aw==", "token_str": ""}),
        (3, {"rank": 3, "token_bytes": "BA==", "token_str": ""}),
        (3, {"rank": 3, "token_bytes": "?", "token_str": ""}),
        (3, {"rank": 3}),
        (263, {"rank": 263, "token_bytes": "cmU=", "token_str": "re"}),
        (3, 3),
    ],
)
def test_broken_tiktoken_files(tmp_path, position, entry):
    path = tiktoken_file(tmp_path, {position: entry})
    with pytest.raises(ConfigError, match=r"vocab\.json"):
        build_tokenizer(TokenizerConfig(tokenizer_type="TikTokenizer", tokenizer_model=path))


@pytest.mark.parametrize(
    ("package", "tokenizer_type"),
    [
        ("sentencepiece", "SentencePieceTokenizer"),
        ("tokenizers", "GPT2BPETokenizer"),
        ("tokenizers", "HuggingFaceTokenizer"),
        ("tiktoken", "TikTokenizer"),
    ],
)
def test_missing_packages_are_explained(tmp_path, monkeypatch, package, tokenizer_type):
    (tmp_path / "tokenizer.json").write_text("[]")
    path = tiktoken_file(tmp_path)
    if tokenizer_type == "HuggingFaceTokenizer":
        path = str(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    config = TokenizerConfig(tokenizer_type=tokenizer_type, tokenizer_model=path, vocab_file=path, merge_file=path)
    with pytest.raises(ConfigError, match=f"{package}.*pip install"):
        build_tokenizer(config)


def test_a_name_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"transformers.*pip install"):
        build_tokenizer(TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="someone/model"))


def test_missing_files_are_named(tmp_path):
    for tokenizer_type in ("SentencePieceTokenizer", "TikTokenizer"):
        with pytest.raises(ConfigError, match=r"--tokenizer-model is 'nowhere\.model'"):
            build_tokenizer(TokenizerConfig(tokenizer_type=tokenizer_type, tokenizer_model="nowhere.model"))
    with pytest.raises(ConfigError, match="needs --vocab-file"):
        build_tokenizer(TokenizerConfig())
    (tmp_path / "junk.model").write_bytes(b"junk")
    for tokenizer_type in ("SentencePieceTokenizer", "TikTokenizer"):
        with pytest.raises(ConfigError, match=r"junk\.model"):
            build_tokenizer(
                TokenizerConfig(tokenizer_type=tokenizer_type, tokenizer_model=str(tmp_path / "junk.model"))
            )


def test_sentencepiece_without_an_end(tmp_path):
    path = sentencepiece_model(tmp_path, eos_id=-1)
    with pytest.raises(ConfigError, match="no end-of-sequence symbol"):
        build_tokenizer(TokenizerConfig(tokenizer_type="Llama2Tokenizer", tokenizer_model=path))


def test_rules():
    assert TokenizerConfig().violations() == []
    for settings, message in [
        ({"tokenizer_type": "BertWordPieceCase"}, "must be one of: GPT2BPETokenizer"),
        ({"tokenizer_type": "NullTokenizer"}, "--vocab-size"),
        ({"tiktoken_pattern": "v3"}, "v1, v2"),
    ]:
        assert any(message in violation for violation in TokenizerConfig(**settings).violations())
    needy = [name for name in TOKENIZER_TYPES if TokenizerConfig(tokenizer_type=name, vocab_size=9).lacks_model]
    assert needy == list(itertools.compress(TOKENIZER_TYPES, [0, 1, 1, 1, 1, 1, 0, 0]))
