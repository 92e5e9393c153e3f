"""Chats: what a message is, and the one rendering of a chat as text that all stages share.

A plain prompt is taken as it is. A chat, and a transcript in HH-RLHF's form, which is a chat too,
is rendered by the tokenizer's chat template, or as a transcript where it has none.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]

TURN = "\n\nAssistant:"  # what opens the assistant's turn in an HH-RLHF transcript
OPENINGS = {"system": "\n\nSystem: ", "user": "\n\nHuman: ", "assistant": f"{TURN} "}
SPEAKERS = {"System": "system", "Human": "user", "Assistant": "assistant"}


def check_unicode(text: str, name: str) -> str:
    """The text; JSON can write half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(
            f"{name}: expected Unicode text, got the lone surrogate {half!r}"
        ) from None
    return text


def check_messages(messages: Any, name: str) -> Messages:
    """The messages; raise ValueError for the first that is none."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{name}: expected a list of one or more messages")
    for k, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"{name}[{k}]: expected an object, got {type(message).__name__}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"{name}[{k}].{key}: expected a string, got {message.get(key)!r}")
            check_unicode(message[key], f"{name}[{k}].{key}")
        if message["role"] not in OPENINGS:
            raise ValueError(
                f"{name}[{k}].role: expected system, user or assistant, got {message['role']!r}"
            )
    return messages


def check_question(messages: Any, name: str) -> Messages:
    """Messages that end before the assistant's turn."""
    if check_messages(messages, name)[-1]["role"] == "assistant":
        raise ValueError(f"{name}: expected the last one before the assistant's turn")
    return messages


def check_answer(messages: Any, name: str) -> Messages:
    """Messages that end with what the assistant says."""
    last = check_messages(messages, name)[-1]
    if last["role"] != "assistant":
        raise ValueError(
            f"{name}: expected the last one from the assistant, got one from {last['role']!r}"
        )
    if not last["content"].strip():
        raise ValueError(f"{name}[{len(messages) - 1}].content: expected an answer, got blank text")
    return messages


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A chat as text: by the tokenizer's chat template, or as an HH-RLHF transcript where it has
    none.

    A chat that does not end with the assistant's message ends with what opens its turn.
    """
    open_turn = not messages or messages[-1]["role"] != "assistant"
    if tokenizer is not None and tokenizer.chat_template is not None:
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=open_turn
            )
        except Exception as error:  # a template is a program, and may raise anything
            raise ValueError(f"messages: the chat template refuses them: {error}") from error
        return str(text)
    text = "".join(OPENINGS[message["role"]] + message["content"] for message in messages)
    return text + TURN if open_turn else text


def render_turn(
    question: Messages, answer: Messages, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[str, str]:
    """(prompt, response): the chat as text, cut where the assistant's answer to the question
    begins."""
    prompt, whole = render(question, tokenizer), render([*question, *answer], tokenizer)
    if not whole.startswith(prompt):
        raise ValueError("messages: the chat template changes the prompt when the answer is added")
    return prompt, whole[len(prompt) :]


def turn_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes behind an assistant's message, without space around it; empty
    where there is no template, or one that refuses a short chat."""
    if tokenizer.chat_template is None:
        return ""
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    try:
        return render_turn([question], [answer], tokenizer)[1].rpartition("b")[2].strip()
    except ValueError:
        return ""


def read_transcript(text: str, name: str) -> Messages:
    """The chat that a transcript in HH-RLHF's form holds; the assistant's last turn may be open,
    and is then left out."""
    parts = re.split(rf"\n\n({'|'.join(SPEAKERS)}):", text)
    if parts[0].strip() or len(parts) == 1:
        raise ValueError(
            f"{name}: expected a transcript that opens with '\\n\\nHuman:', got {text[:30]!r}"
        )
    turns = zip(parts[1::2], parts[2::2], strict=True)
    messages: Messages = []
    for who, said in turns:
        role, content = SPEAKERS[who], said.strip()
        if messages and messages[-1]["role"] == role:  # templates want them to alternate
            messages[-1]["content"] += f"\n\n{content}"
        else:
            messages.append({"role": role, "content": content})
    open_turn = messages[-1]["role"] == "assistant" and not messages[-1]["content"]
    return messages[:-1] if open_turn else messages
