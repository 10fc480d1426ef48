"""Text from a command line or a YAML file -> the value a field's type annotation asks for."""

import ast
import operator
import re
import types
import typing
from typing import Any

YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def convert(raw: Any, hint: Any) -> Any:
    """`raw` (text, None, or a list of these) as a value of type `hint`.

    Raises:
        ValueError: with the end of a sentence, "a whole number", that says what was expected.
    """
    alternatives = _alternatives(hint)
    if raw is None:
        if type(None) in alternatives:
            return None
        raise ValueError(f"{_words(hint)}, not empty")
    for alternative in alternatives:
        if alternative is type(None):
            continue
        try:
            return _convert_one(raw, alternative)
        except (ValueError, OverflowError):  # int() of an infinite number overflows
            continue
    raise ValueError(_words(hint))


def takes_many(hint: Any) -> bool:
    """Whether a flag of this type takes several words; a whole number or a list of these is one word: [0]*3+[1]*5."""
    kinds = [kind for kind in _alternatives(hint) if kind is not type(None)]
    return [typing.get_origin(kind) for kind in kinds] == [list] or kinds in ([str, list[str]], [float, list[float]])


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _convert_one(raw: Any, kind: Any) -> Any:
    origin = typing.get_origin(kind)
    if origin is list:
        return _convert_list(raw, typing.get_args(kind)[0])
    if origin is tuple:
        return _convert_tuple(raw, typing.get_args(kind))
    if origin is typing.Literal:
        return _convert_literal(raw, typing.get_args(kind))
    if isinstance(raw, (list, dict)):
        raise ValueError(_words(kind))
    text = str(raw).strip()
    if kind is bool:
        if text.lower() in YES + NO:
            return text.lower() in YES
    elif kind is int:
        number = float(text) if re.search("[.eE]", text) else int(text)
        if number == int(number):
            return int(number)
    elif kind is float:
        return float(text)
    elif kind is str:
        return text
    raise ValueError(_words(kind))


def _convert_list(raw: Any, item: Any) -> list[Any]:
    if isinstance(raw, list):
        words = raw
    elif isinstance(raw, str) and raw.strip().startswith(("[", "(")):
        words = list_expression(raw)
    else:
        words = [raw]
    if item in (int, float):
        words = [part for word in words for part in str(word).replace(",", " ").split()]
    return [convert(word, item) for word in words]


def _convert_tuple(raw: Any, items: tuple[Any, ...]) -> tuple[Any, ...]:
    words = raw if isinstance(raw, list) else re.sub(r"[()\[\],]", " ", str(raw)).split()
    if len(words) != len(items):
        raise ValueError(f"{len(items)} values")
    return tuple(convert(word, item) for word, item in zip(words, items, strict=True))


def _convert_literal(raw: Any, legal: tuple[Any, ...]) -> Any:
    for value in legal:
        if str(raw).strip() == str(value):
            return value
    raise ValueError("one of " + ", ".join(str(value) for value in legal))


def list_expression(text: str) -> list[int]:
    """The list that an expression of integers, brackets, `+` and `*` spells, such as "([0]*3+[1]*58)".

    Raises:
        ValueError: anything else is in the text.
    """
    try:
        value = _evaluate(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError("a list such as [0]*3+[1]*2") from error
    if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
        raise ValueError("a list of whole numbers")
    return value


def _evaluate(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.List):
        return [_evaluate(item) for item in node.elts]
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mult)):
        left, right = _evaluate(node.left), _evaluate(node.right)
        if isinstance(node.op, ast.Mult):
            sizes = [len(side) if isinstance(side, list) else abs(side) for side in (left, right)]
            if sizes[0] * sizes[1] > 100_000 or (isinstance(left, list) and isinstance(right, list)):
                raise ValueError("a list of at most 100,000 numbers")
            return operator.mul(left, right)
        if type(left) is type(right):
            return operator.add(left, right)
    raise ValueError("a list such as [0]*3+[1]*2")


def _words(hint: Any) -> str:
    """What a value of this type is, in words."""
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    described = []
    for kind in _alternatives(hint):
        origin, arguments = typing.get_origin(kind), typing.get_args(kind)
        if origin is list:
            described.append(f"a list, each item {_words(arguments[0])}")
        elif origin is tuple:
            described.append(f"{len(arguments)} values, each {_words(arguments[0])}")
        elif origin is typing.Literal:
            described.append("one of " + ", ".join(str(value) for value in arguments))
        else:
            described.append(names.get(kind, str(kind)))
    wanted = [words for words in described if words != "null"]
    return " or ".join(wanted)
