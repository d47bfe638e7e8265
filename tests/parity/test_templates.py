"""The chat templates of the model families against transformers: text and ids.

The templates are in our own words, but behave as the families' own.
"""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minibnf.files.tokenizer import load_tokenizer
from tests.test_stream import byte_fallback
from tests.test_templates import QWEN_3, SMOLLM_3, strings
from tests.test_tokenizer import byte_level, controls

tokenizers = pytest.importorskip("tokenizers", reason="needs minibnf[hf]")
jinja2 = pytest.importorskip("jinja2", reason="needs minibnf[hf]")
transformers = pytest.importorskip("transformers", reason="parity needs transformers")

TURNS = """{%- if (m.role == 'user') == (loop.index0 % 2 == 1) -%}
{{ raise_exception('user and assistant take turns') }}{%- endif -%}"""
LLAMA_2 = (  # the system message inside the first user's; every answer ends with a space and </s>
    """
{%- set system = '' -%}
{%- if messages[0].role == 'system' -%}
    {%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
    """
    + TURNS
    + """
    {%- set content = ((system if loop.first else '') + m.content).strip() -%}
    {{ bos_token + '[INST] ' + content + ' [/INST]' if m.role == 'user'
       else ' ' + content + ' ' + eos_token }}
{%- endfor -%}"""
)
MISTRAL_3 = (  # the system message goes to the last user's message, if that is the chat's last
    """
{%- if messages[0]['role'] == 'system' %}
    {%- set system, rest = messages[0]['content'], messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{{- bos_token }}
{%- for m in rest | rejectattr('role', 'equalto', 'tool') %}
    """
    + TURNS
    + """
    {%- if m['role'] == 'user' %}
        {%- if loop.last and system is defined %}
            {{- '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' }}
        {%- else %}{{- '[INST] ' + m['content'] + '[/INST]' }}{% endif %}
    {%- else %}{{- ' ' + m['content']|trim + eos_token }}{% endif %}
{%- endfor %}"""
)
LLAMA_31 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") if strftime_now is defined else "26 Jul 2024" %}
{%- endif %}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- set system = "" %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{#- always there, with the dates #}
{{- "<|start_header_id|>system<|end_header_id|>\n\n" }}
{{- "Environment: ipython\n" if tools is not none else "" }}
{{- "Cutting Knowledge Date: December 2023\nToday Date: " + date_string }}
{{- "\n\n" + system + "<|eot_id|>" }}
{%- for m in messages %}
    {%- if not (m.role in ['ipython', 'tool'] or 'tool_calls' in m) %}
        {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' }}
        {{- m['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in m %}
        {%- if not m.tool_calls|length == 1 %}
            {{- raise_exception("one tool call at a time") }}
        {%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\n\n" }}
        {%- if m.content is mapping or (m.content is iterable and m.content is not string) %}
            {{- m.content | tojson }}
        {%- else %}{{- m.content }}{% endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}
"""
GEMMA_3 = (
    """{{ bos_token }}
{%- set prefix = "" -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}
    {%- set prefix = (system if system is string else system[0]['text']) + '\n\n' -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for m in messages -%}
    """
    + TURNS
    + """
    {{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' }}
    {{- prefix if loop.first else "" }}
    {%- if m['content'] is string -%}{{ m['content'] | trim }}
    {%- elif m['content'] is iterable -%}
        {%- for item in m['content'] -%}
            {%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{ raise_exception("content of no known kind") }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}"""
)

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML += ["<think>", "</think>", "<tool_call>", "</tool_call>"]
HEADERS = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
START_OF_TURN = ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<start_of_image>"]
WORDS = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SETTINGS = {  # template, kind of tokenizer, special tokens, bos, end of turn
    "llama 2": (LLAMA_2, "unigram", ["<s>", "</s>"], "<s>", "</s>"),
    "mistral 3": (MISTRAL_3, "metaspace", ["<s>", "</s>", "[INST]", "[/INST]"], "<s>", "</s>"),
    "llama 3.1": (LLAMA_31, "byte level", HEADERS, "<|begin_of_text|>", "<|eot_id|>"),
    "qwen 3": (QWEN_3, "byte level", CHATML, "<|endoftext|>", "<|im_end|>"),
    "smollm 3": (SMOLLM_3, "byte level", CHATML, "<|endoftext|>", "<|im_end|>"),
    "gemma 3": (GEMMA_3, "gemma", START_OF_TURN, "<bos>", "<end_of_turn>"),
}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
PROPERTY = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """{family: (our tokenizer, transformers' one)}"""
    pairs = {}
    for name, (template, kind, special, bos, eos) in SETTINGS.items():
        directory = tmp_path_factory.mktemp("family")
        config = dict(bos_token=bos, eos_token=eos, pad_token=None, **FAST)
        if kind == "byte level":
            byte_level(directory, template, special=special, words=WORDS, **config)
        else:
            byte_fallback(directory, kind, special, template, **config)
        theirs = transformers.AutoTokenizer.from_pretrained(directory)
        pairs[name] = load_tokenizer(directory), theirs
    return pairs


each = pytest.mark.parametrize("family", SETTINGS)
SAID = ["<think>\nhm\n</think>\n\nyes", "a</think>", "Hi /think", "/no_think", "/system_override"]
marked_up = st.text() | st.sampled_from([*SAID, "\n", " "])
plain = st.text(st.characters(exclude_characters="<|>[]/\ufdd0", exclude_categories=["Cs"]))


def chats(contents):
    """System, user and assistant, mostly in turn.

    Now and then they come in any order, for the templates that refuse it.
    """

    def in_turn(system, texts):
        roles = ("user", "assistant") * len(texts)
        return system + [
            {"role": role, "content": text} for role, text in zip(roles, texts, strict=False)
        ]

    system = contents.map(lambda t: [{"role": "system", "content": t}]) | st.just([])
    roles = st.sampled_from(["system", "user", "assistant"])
    message = st.fixed_dictionaries({"role": roles, "content": contents})
    turns = st.builds(in_turn, system, st.lists(contents, min_size=1, max_size=4))
    return turns | st.lists(message, min_size=1)


def outcome(error, function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except error:
        return "refused"


def text_of(theirs, chat, prompt=False):
    return theirs.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)


def ids_of(theirs, chat, prompt=False):
    return theirs.apply_chat_template(
        chat, add_generation_prompt=prompt, return_dict=True
    ).input_ids


@each
@PROPERTY
@given(chat=chats(marked_up), prompt=st.booleans())
def test_the_text_is_that_of_transformers(both, family, chat, prompt):
    ours, theirs = both[family]
    expected = outcome(jinja2.TemplateError, text_of, theirs, chat, prompt)
    assert outcome(ValueError, ours.render, chat, prompt) == expected


@each
@PROPERTY
@given(chat=chats(plain), prompt=st.booleans())
def test_the_ids_are_those_of_transformers(both, family, chat, prompt):
    ours, theirs = both[family]
    expected = outcome(jinja2.TemplateError, ids_of, theirs, chat, prompt)
    assert outcome(ValueError, ours.encode_chat, chat, prompt) == expected


def test_tools_and_reasoning(both):
    call = {"function": {"name": "add", "arguments": {"a": 1, "é": [1.5, None, True]}}}
    chat = [
        {"role": "user", "content": "1 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "3", "reasoning_content": "hm"},
    ]
    for family in ("llama 3.1", "qwen 3", "smollm 3"):
        ours, theirs = both[family]
        for end in (1, 3, 4):
            assert ours.render(chat[:end], True) == text_of(theirs, chat[:end], True)


@each
def test_parts_of_a_message(both, family):
    """Content as a list of parts: read, spelt out as Python does, or refused."""
    ours, theirs = both[family]
    chat = [{"role": "user", "content": [{"type": "text", "text": " Hi "}, {"type": "image"}]}]
    errors = (jinja2.TemplateError, TypeError, AttributeError)
    expected = outcome(errors, text_of, theirs, chat)
    assert outcome(ValueError, ours.render, chat) == expected
    taken = family.startswith(("llama 3", "gemma", "qwen 3", "smollm 3"))
    assert (expected == "refused") == (not taken)


@each
@PROPERTY
@given(chat=chats(plain), answer=plain)
def test_the_boundary_is_where_transformers_would_generate(both, family, chat, answer):
    ours, theirs = both[family]
    refused = outcome(ValueError, ours.render, chat, True) == "refused"
    if chat[-1]["role"] != "user" or refused:
        return
    response = [{"role": "assistant", "content": answer}]
    # Mistral's third template drops the system message as soon as an answer follows.
    if family == "mistral 3" and chat[0]["role"] == "system":
        with pytest.raises(ValueError, match="no boundary exists"):
            ours.encode_response(chat, response)
        return
    prompt, ids = ours.encode_response(chat, response)
    assert prompt == ids_of(theirs, chat, True)
    text, full = text_of(theirs, chat, True), text_of(theirs, chat + response)
    assert full.startswith(text)
    assert ids[-1] == ours.eos_id and controls(ours, ids).count(ours.eos_id) == 1
    eos, rest = theirs.eos_token, full[len(text) :]
    assert ids == ours.encode(rest[: rest.rindex(eos) + len(eos)], continuation=True)


@pytest.mark.parametrize("kind", ["byte level", "metaspace", "gemma", "unigram"])
@pytest.mark.parametrize("single", [None, "$A", "<s> $A", "<s> $A </s>"])
def test_ids_of_text_prompts(kind, single, tmp_path):
    """As transformers has them, once where the text begins so itself; an end has no place here."""
    special = ["<s>", "</s>"]
    config = dict(bos_token="<s>", eos_token="</s>", pad_token=None, **FAST)
    if kind == "byte level":
        byte_level(tmp_path, special=special, **config)
    else:
        byte_fallback(tmp_path, kind, special, **config)
    if single is not None:
        file = str(tmp_path / "tokenizer.json")
        fast = tokenizers.Tokenizer.from_file(file)
        ids = [(token, fast.token_to_id(token)) for token in special]
        template = tokenizers.processors.TemplateProcessing
        fast.post_processor = template(single, special_tokens=ids)
        fast.save(file)
    ours, theirs = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in strings(300, ["The capital", " of ", "naïve", "</s>", "  ", "\n"]):
        expected = theirs(text).input_ids
        if single == "<s> $A </s>":
            expected = expected[:-1]
        twice = single not in (None, "$A") and text.startswith("<s>")
        assert ours.encode_text(text) == expected[twice:], text


@each
def test_5000_strings_give_no_control_token(both, family):
    """In a user's message, where no template here acts on what a string spells."""
    ours, _ = both[family]
    expected = controls(ours, ours.encode_chat([{"role": "user", "content": "a"}], True))
    parts = [*ours.control, *(t[:-1] for t in ours.control), *(t[1:] for t in ours.control)]
    for text in strings(5000, parts):
        ids = ours.encode_chat([{"role": "user", "content": text}], True)
        assert controls(ours, ids) == expected, text


PLAIN = ["The capital", " of ", "naïve", "你好", "привет", "\r\n", "    return x", "𝔘", "\x00"]


@each
def test_ids_of_5000_strings(both, family):
    ours, theirs = both[family]
    for text in strings(5000, [*ours.control, *PLAIN]):
        expected = theirs(text, add_special_tokens=False).input_ids
        assert ours.encode(text) == expected, text
        for skip in (False, True):
            decoded = theirs.decode(
                expected, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
            assert ours.decode(expected, skip) == decoded
