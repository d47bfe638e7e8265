"""What the columns of a row do to a prompt's ids, against transformers' apply_chat_template."""

import json

import pytest

from minibnf.data import read_examples
from minibnf.files.tokenizer import load_tokenizer
from tests.test_rows import file_of, said
from tests.test_tokenizer import byte_level

transformers = pytest.importorskip("transformers", reason="parity needs transformers")

TEMPLATE = """
{%- if style is defined %}Style: {{ style }}{% endif %}
{%- if tools %}<|im_start|>system
{%- for tool in tools %} {{ tool | tojson }}{% endfor %}<|im_end|>{% endif %}
{%- for m in messages %}<|im_start|>{{ m.role }}:
{%- if m.content %} {{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %} {{ call.function | tojson }}{% endfor %}<|im_end|>
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant:{% endif %}"""
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}]
CHAT = [
    *said("user", "3 + 4?"), {"role": "assistant", "content": None, "tool_calls": CALL},
    *said("tool", "7"), *said("user", "Sure?"),
]  # fmt: skip


@pytest.mark.parametrize("system", [None, "Be kind."])
@pytest.mark.parametrize("tools", [None, TOOLS, json.dumps(TOOLS)])
@pytest.mark.parametrize("kwargs", [None, {"style": "brief"}])
def test_a_prompt_with_columns(tmp_path, system, tools, kwargs):
    """Arrow's nulls among the messages included, and a call of a tool without content."""
    columns = {"system": system, "tools": tools, "chat_template_kwargs": kwargs}
    chat = [{"tool_calls": None, **message} for message in CHAT]
    answers = {"chosen": said("assistant", "Yes."), "rejected": said("assistant", "No.")}
    file = file_of(tmp_path / "rows.jsonl", [{"prompt": chat, **answers, **columns}])
    config = {"bos_token": "<|im_start|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    directory = byte_level(tmp_path, TEMPLATE, clean_up_tokenization_spaces=False, **config)
    ((example,), _) = read_examples(file, load_tokenizer(directory), 10**6)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    tools = json.loads(tools) if isinstance(tools, str) else tools
    first = said("system", system) if system else []
    given = {"tools": tools, "return_dict": True, **(kwargs or {})}
    chat = first + CHAT
    prompt = theirs.apply_chat_template(chat, add_generation_prompt=True, **given).input_ids
    assert list(example.prompt) == prompt
    for answer, response in zip(answers.values(), example.responses, strict=True):
        whole = theirs.apply_chat_template(chat + answer, **given).input_ids
        assert whole[: len(prompt) + len(response)] == prompt + list(response)
