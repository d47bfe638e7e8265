"""What a field of a row says: a text or messages, and where the prompt in it ends."""

COMPARED = (  # the keys that make two messages the same; ids, times and all others do not
    "role", "content", "reasoning_content", "thinking", "tool_calls", "tool_call_id", "name",
)  # fmt: skip
TURN = "\n\nAssistant:"  # begins an answer in HH-RLHF's texts


def text_or_messages(value, where, name: str) -> str | list[dict]:
    """The text or list of messages of a field; one message alone becomes a list.

    A content that is a list of texts, {"type": "text", "text": ...}, becomes their text.
    Raises ValueError that names where, the field, and the message.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        kind = type(value).__name__
        raise ValueError(f"{where}: field '{name}' must be text or a list of messages, not {kind}")
    if not value:
        raise ValueError(f"{where}: field '{name}' is empty; it needs a message")
    return [_message(m, f"{where}: field '{name}', message {i}") for i, m in enumerate(value, 1)]


def _message(message, where: str) -> dict:
    if isinstance(message, dict) and isinstance(message.get("role"), str):
        content = message.get("content")
        if isinstance(content, list) and all(map(_is_text, content)):
            return {**message, "content": "".join(part["text"] for part in content)}
        if isinstance(content, str) or (content is None and message.get("tool_calls")):
            return message
    raise ValueError(
        f"{where}: needs text in 'role' and 'content', which may also be parts of the form "
        "{'type': 'text', 'text': ...}; not 'from' and 'value', as in ShareGPT; several answers "
        "need a row each"
    )


def _is_text(part) -> bool:
    return (
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
    )


# -------------------------------------------------------------------------- where a prompt ends


def without_prompt(prompt, given: list, where) -> tuple[str | list[dict], list]:
    """The prompt, and the completions without it.

    Completions may repeat the prompt; where there is no prompt, they begin with it.
    """
    text = any(isinstance(value, str) for value in given)
    if prompt is None:
        size = _end_in_texts(given, where) if text else _end_in_messages(given, where)
        return given[0][:size], [value[size:] for value in given]
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    size = len(asked)
    if text or not all(len(m) > size and shared(m, asked) == size for m in given):
        return prompt, given
    if len(given) == 2 and shared(*given) < min(map(len, given)):
        size = shared(*given)
    return given[0][:size], [value[size:] for value in given]


def _end_in_messages(given: list[list[dict]], where) -> int:
    """How many messages at the beginning of chosen and rejected are their prompt."""
    size = shared(*given)
    if size in (0, *map(len, given)):
        what = "share no first message" if not size else "do not differ after their beginning"
        raise ValueError(
            f"{where}: fields 'chosen' and 'rejected' {what}, so the prompt cannot be told"
        )
    return size


def _end_in_texts(given: list, where) -> int:
    """How many characters at the beginning of chosen and rejected are their prompt."""
    texts = all(isinstance(value, str) for value in given)
    differ = (i for i, (a, b) in enumerate(zip(*given, strict=False)) if a != b)
    start = given[0].rfind(TURN, 0, next(differ, min(map(len, given)))) if texts else -1
    if start < 0:
        raise ValueError(
            f"{where}: field 'prompt' is missing; only messages hold it implicitly, and texts "
            f"that share a beginning up to {TURN!r}"
        )
    return start + len(TURN)


def shared(a: list[dict], b: list[dict]) -> int:
    """How many messages at their beginning two conversations share, by the keys in COMPARED."""
    a, b = ([{k: m.get(k) for k in COMPARED} for m in c] for c in (a, b))
    size = min(len(a), len(b))
    return next((i for i in range(size) if a[i] != b[i]), size)
