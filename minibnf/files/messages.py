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
    if prompt is None:
        size = _end_of_prompt(*given, where)
        return given[0][:size], [value[size:] for value in given]
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    size, text = len(asked), any(isinstance(value, str) for value in given)
    if text or not all(len(m) > size and shared(m, asked) == size for m in given):
        return prompt, given
    if len(given) == 2 and shared(*given) < min(map(len, given)):
        size = shared(*given)
    return given[0][:size], [value[size:] for value in given]


def _end_of_prompt(chosen, rejected, where) -> int:
    """How many messages or characters at the beginning of chosen and rejected are their prompt."""
    size = shared(chosen, rejected) if type(chosen) is type(rejected) else 0
    if isinstance(chosen, str):
        start = chosen.rfind(TURN, 0, size)
        size = start + len(TURN) if start >= 0 else 0
    if size in (0, len(chosen), len(rejected)):
        raise ValueError(
            f"{where}: field 'prompt' is missing, and cannot be told from 'chosen' and 'rejected': "
            f"they share no text up to {TURN!r}, nor messages after which they differ"
        )
    return size


def shared(a: str | list[dict], b: str | list[dict]) -> int:
    """How many characters or messages two texts or conversations share at their beginning.

    Messages are the same by the keys in COMPARED.
    """
    if not isinstance(a, str):
        a, b = ([{k: m.get(k) for k in COMPARED} for m in c] for c in (a, b))
    size = min(len(a), len(b))
    return next((i for i in range(size) if a[i] != b[i]), size)
