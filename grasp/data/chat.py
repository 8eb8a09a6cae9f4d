"""Render conversations as text with the tokenizer's chat template."""

from __future__ import annotations

import hashlib
from typing import Any

from grasp.data.reading import Empty
from grasp.errors import GraspError, reason

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}  # other roles have the same name in both


def render_chat(tokenizer: Any, conversation: list[Any], where: str) -> str | Empty:
    """Render a conversation as the model sees it, including the tokens that the template adds.

    Messages have `role` and `content`, or ShareGPT's `from` and `value`. A content in parts becomes
    the joined texts of its parts. Returns Empty if a message has no content. Raises GraspError,
    which names `where`: no chat template, no messages, a part that is not text, or a template that
    refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise GraspError(
            f"{where} is a conversation, and the tokenizer of {tokenizer.name_or_path} has no chat "
            "template: put one beside it (chat_template.jinja), or give text"
        )
    messages = [_message(message, where) for message in conversation]
    if any(message["content"] is None for message in messages):
        return Empty("a message without content")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program, which may fail in any way
        raise GraspError(
            f"{where}: the chat template of {tokenizer.name_or_path} refuses this conversation "
            f"({reason(error)}): change it or remove it"
        ) from None


def template_name(tokenizer: Any) -> str:
    """The name of the tokenizer, and a hash of its chat template."""
    digest = hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()
    return f"the chat template of {tokenizer.name_or_path} (sha256 {digest[:12]})"


def _message(message: Any, where: str) -> dict[str, Any]:
    """The message as templates expect it: role, content (None if missing) and its other keys."""
    if not isinstance(message, dict) or not {"role", "from"} & {*message}:
        found = ", ".join(message) if isinstance(message, dict) else type(message).__name__
        raise GraspError(
            f"{where}: expected messages with role and content, or from and value (found: {found})"
        )
    if "role" not in message:
        role = SHAREGPT_ROLES.get(message["from"], message["from"])
        message = {"role": role, "content": message.get("value")}
    # a table has every key in every row, but templates test whether a key is present
    message = {key: value for key, value in message.items() if value is not None}
    calls = "" if "tool_calls" in message else None
    return {**message, "content": _text_of(message.get("content", calls), where)}


def _text_of(content: Any, where: str) -> str | None:
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise GraspError(f"{where}: a message has a part of type {kind}: only text is read")
        return "".join(part["text"] for part in content)
    if content is None or isinstance(content, str):
        return content
    raise GraspError(f"{where}: a message's content is {type(content).__name__}, not text")
