"""Conversations as tokens: messages out of rows, and which tokens of them are the model's own answers.

A conversation is written piece by piece. Every answer begins where the template begins one (its generation prompt), so
the model trains on what it will see when it is asked, and ends with the template's end of a turn. Pieces are tokenised
apart: no token spans the border between a prompt and its answer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fedray.data.tasks.base import IGNORED
from fedray.errors import ConfigError

Message = dict[str, str]

#: How people call the three roles (the second: ShareGPT's words).
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLES = ("system", "user", "assistant")

#: Stanford Alpaca's headings around an instruction, and between an instruction and what it is about.
ALPACA, ALPACA_INPUT = "### Instruction:\n{}\n\n### Response:\n", "{}\n\n### Input:\n{}"
#: What templates that write a date (Llama 3) are told that it is: a run is the same on any day.
_DATE = "26 Jul 2024"
TEMPLATES = ("chat", "alpaca", "plain")


def messages_of(value: Any, where: str) -> list[Message]:
    """A list of messages, by whatever names roles and contents have. Raises ConfigError for what is none."""
    if isinstance(value, Mapping) and all(isinstance(each, list) for each in value.values()):
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]  # a column of structs
    if not isinstance(value, list) or not value:
        raise ConfigError(f"{where} holds {_short(value)}, which is no list of messages with role and content")
    return [_message(one, where) for one in value]


def _message(one: Any, where: str) -> Message:
    fields = one if isinstance(one, Mapping) else {}
    role, content = fields.get("role", fields.get("from")), fields.get("content", fields.get("value"))
    role = _ROLES.get(str(role), role)
    if role not in ROLES or not isinstance(content, str):
        raise ConfigError(f"{where} holds {_short(one)}, which is no message of {', '.join(ROLES)} with a content")
    return {"role": role, "content": content}


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 80 else f"{words[:77]}..."


def pieces(tokenizer: Any, template: str, messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """The conversation's text in pieces, and whether the model is to produce each. Raises ConfigError for a chat
    template that is missing, or that writes earlier turns anew when later ones follow."""
    if template == "chat":
        return _by_chat_template(tokenizer, messages)
    return _plain(tokenizer, template, messages)


def _by_chat_template(tokenizer: Any, messages: Sequence[Message]) -> list[tuple[str, bool]]:
    if not tokenizer.chat_template:
        raise ConfigError("the model's tokenizer has no chat template: give data.template alpaca or plain")
    found, written = [], ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        for end, prompted in ((i, True), (i + 1, False)):
            text = _rendered(tokenizer, messages[:end], prompted)
            if not text.startswith(written):
                raise ConfigError(
                    "the model's chat template writes earlier turns anew when another follows, so that its answers "
                    "cannot be told apart: give conversations of one turn, or data.template alpaca or plain"
                )
            found.append((text[len(written) :], not prompted))
            written = text
    if not found or messages[-1]["role"] != "assistant":
        found.append((_rendered(tokenizer, messages, True)[len(written) :], False))
    return found


def _rendered(tokenizer: Any, messages: Sequence[Message], prompted: bool) -> str:
    from jinja2 import TemplateError  # what a template raises of its own: roles out of order, no system message

    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=prompted, date_string=_DATE
        )
    except TemplateError as error:
        raise ConfigError(f"the model's chat template refuses a conversation of the data: {error}") from error
    return text


def _plain(tokenizer: Any, template: str, messages: Sequence[Message]) -> list[tuple[str, bool]]:
    """Without a chat template: what is asked in Alpaca's words or as it is, each answer closed by the end token."""
    around = ALPACA if template == "alpaca" else "{}"
    found, asked = [], list[str]()
    for message in messages:
        if message["role"] == "assistant":
            found += [(around.format("\n\n".join(asked)), False)]
            found += [(message["content"] + (tokenizer.eos_token or ""), True)]
            asked = []
        else:
            asked.append(message["content"])
    return [*found, (around.format("\n\n".join(asked)), False)] if asked else found


def tokens(tokenizer: Any, written: Sequence[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """Ids, and labels: an answer's own tokens up to the one that ends it; everything else is ignored."""
    ids: list[int] = []
    labels: list[int] = []
    special = _special(tokenizer)
    for text, answers in written:
        piece = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += piece
        scored = _answer_length(piece, special) if answers else 0
        labels += piece[:scored] + [IGNORED] * (len(piece) - scored)
    return ids, labels


def _special(tokenizer: Any) -> set[int]:
    """Tokens that are no text, named or not."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}


def end_of_turn(tokenizer: Any) -> int | None:
    """The token with which the chat template ends an answer; None where it ends with none."""
    if not tokenizer.chat_template:
        return None
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    _, labels = tokens(tokenizer, pieces(tokenizer, "chat", asked))
    last = [label for label in labels if label != IGNORED][-1]
    return last if last in _special(tokenizer) else None


def _answer_length(piece: Sequence[int], special: Collection[int]) -> int:
    """Up to the last special token, which ends a turn: what a template writes after it (a line break) belongs to the
    next one. All of it where there is none."""
    ends = [i for i, token in enumerate(piece) if token in special]
    return ends[-1] + 1 if ends else len(piece)


def cut(ids: list[int], labels: list[int], length: int) -> tuple[list[int], list[int]]:
    """At most so many tokens. What is too long loses the beginning of its prompt; an answer that is too long by itself
    loses its end."""
    if len(ids) <= length:
        return ids, labels
    answer = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids) - 1)
    start = max(0, min(len(ids) - length, answer - 1))
    return ids[start : start + length], labels[start : start + length]
