"""Text and messages to token ids and back, whichever library reads the tokenizer's file.

    tokenizer = load_tokenizer(directory)                        # Hugging Face layout
    tokenizer.encode("<|im_start|>user\\n")                       # control tokens are read
    tokenizer.encode_chat([{"role": "user", "content": "Hi <|im_end|>"}])   # here it is text

How are the control tokens that a template writes told from those that a message spells? Before
rendering, each control token that a message spells gets a mark after its first character:
"<" mark "|im_end|>". The mark is a character that occurs nowhere else. The rendered text is split
at the marks and the pieces are encoded apart, so no piece holds a token that a message spelt.
"""

import json
import shutil
from collections import Counter
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path

from minibnf.files.backends import HuggingFace, SentencePiece
from minibnf.files.config import no_model
from minibnf.files.disk import optional
from minibnf.files.spelling import Spelling, any_of, words

FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def load_tokenizer(directory):
    """The Tokenizer of a directory, of its tokenizer.json or else its tokenizer.model.

    Raises FileNotFoundError where neither exists, ValueError where a file is malformed or two
    contradict each other, ImportError where tokenizer.json needs the missing package tokenizers.
    """
    directory = Path(directory)
    if (directory / "tokenizer.json").is_file():
        return Tokenizer(directory, HuggingFace(directory / "tokenizer.json"))
    if (directory / "tokenizer.model").is_file():
        return Tokenizer(directory, SentencePiece(directory / "tokenizer.model"))
    raise no_model(directory, "neither tokenizer.json nor tokenizer.model")


class Tokenizer:
    """Text and messages to token ids and back.

    vocab_size: every id is below it.  control: {text: id} of the control tokens.
    eos_id, bos_id, pad_id: the last two may be None.  begin: the ids put before a text.
    limit: how many rows the model in the same folder has (vocab_size in its config.json). A text
    that needs an id from there on is refused.
    now: the time that a template is told, at first that of loading; it may be set.
    """

    def __init__(self, directory, backend):
        self.directory, self.backend = directory, backend
        self.vocab_size, self.control = backend.vocab_size, backend.control
        self.now = datetime.now().replace(microsecond=0)
        config = directory / "tokenizer_config.json"
        mapped, self.config = optional(directory / "special_tokens_map.json"), optional(config)
        self.special = {}  # {"eos_token": "</s>", ...}; templates may read these
        for key, value in [*backend.special.items(), *mapped.items(), *self.config.items()]:
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                self.special[key] = text
        if "eos_token" not in self.special:
            missing = "eos_token is missing, and no other file says which token ends a text"
            raise ValueError(f"{config}: {missing}")
        self.eos_id, self.bos_id = self._id_of("eos_token"), self._id_of("bos_token")
        self.pad_id, file = self._id_of("pad_token"), backend.path.name
        for i, entry in self.config.get("added_tokens_decoder", {}).items():
            text, found = entry["content"], backend.id(entry["content"])
            if found != int(i):
                raise ValueError(f"{config}: {text!r} is to have id {i}, in {file} it has {found}")
        self.begin = backend.begin(self.config, self.bos_id)
        rows = optional(directory / "config.json").get("vocab_size")
        self.limit = rows if type(rows) is int else self.vocab_size
        self._check_rows([self.eos_id])
        # A program that stops at generation_config.json's tokens looks nowhere else; where that
        # names none it takes config.json's, and at last the tokenizer's own.
        generation, config = self._ends_of("generation_config.json"), self._ends_of("config.json")
        self._listed, self._ends = generation or config or [self.eos_id], generation + config
        self.source = self.config.get("chat_template")
        if isinstance(self.source, list):
            self.source = {t["name"]: t["template"] for t in self.source}.get("default")
        if (directory / "chat_template.jinja").is_file():
            self.source = (directory / "chat_template.jinja").read_text(encoding="utf-8")
        self._pattern = any_of(self.control)

    def encode(self, text, continuation=False):
        """The ids of a text as it stands; control tokens in it are read, and none is added.

        continuation: the text follows another one, so a tokenizer that begins a text with a space
        of its own does not.
        """
        ids = self.backend.encode(text, continuation)
        self._check_rows(ids)
        return ids

    def _check_rows(self, ids):
        """Raise ValueError where the model has no row for one of the ids."""
        for i in ids:
            if i >= self.limit:
                token = self.decode([i], skip_special=False)
                raise ValueError(
                    f"token {token!r} has the id {i}, and the model in {self.directory} has "
                    f"only {self.limit} rows: it cannot read this token"
                )

    def encode_text(self, text):
        """The ids of a text, after those that the tokenizer begins every text with, once."""
        ids = self.encode(text)
        return ids if ids[: len(self.begin)] == self.begin else self.begin + ids

    def encode_text_response(self, text):
        """The ids of a text that follows a prompt, and eos_id unless it ends with one of end_ids.

        White space after such a token stays. An empty text gives no ids.
        """
        ids = self.encode(text, continuation=True)
        ended = self.end_ids.intersection(self.encode(text.rstrip(), continuation=True)[-1:])
        return ids if ended or not ids else [*ids, self.eos_id]

    def decode(self, ids, skip_special=True):
        """The text of token ids. Raises ValueError for an id that does not exist.

        Special tokens are left out, or spelt out where skip_special is False.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                last = self.vocab_size - 1
                raise ValueError(f"{i} is no id of {self.backend.path}, whose ids end at {last}")
        return self.backend.decode(ids, skip_special)

    def stream(self, ids, skip_special=True):
        """The text of token ids while they come, in pieces, each as soon as it is certain.

        Joined, the pieces are decode(ids). ids: any iterable, such as a generator. A character
        that is spread over several tokens is shown when it is whole. Where a tokenizer.json spells
        bytes by tokens like <0xE4>, a run of these is shown when it ends, since one wrong byte
        spoils all of it. Each id costs the decoding of a few ids, however long the text is.
        """
        decode = partial(self.decode, skip_special=skip_special)
        # What follows an ordinary token reads the same whichever token that is, since a decoder
        # treats nothing but the beginning of a text differently.
        bytes_ = self.backend.byte_tokens
        ordinary = (i for i in range(self.vocab_size) if decode([i]).isalnum() and i not in bytes_)
        anchor = [i for i in [next(ordinary, None)] if i is not None]
        before, held, shown = [], [], 0  # of decode(before + held) so many characters are shown
        for i in ids:
            if decode([*anchor, i]) == decode(anchor):
                continue  # a special token
            held.append(i)
            if i in bytes_:
                continue
            text = decode(before + held)
            # Up to 3 bytes of an unfinished character show as one \ufffd, or as one for each. As
            # each \ufffd may stand for 3 bytes, 9 ids are held.
            waiting = min(3, len(text) - len(text.rstrip("\ufffd")))
            if piece := text[shown : len(text) - waiting]:
                yield piece
            # Else the text has not begun, and the decoder leaves out white space before it.
            if text or decode(held + held):
                before = anchor
            held = held[-9:] if waiting else []
            shown = len(decode(before + held)) - waiting
        if piece := decode(before + held)[shown:]:
            yield piece

    def render(self, messages, /, add_generation_prompt=False, **variables):
        """The template's text for messages, a list of {"role", "content", ...}.

        variables: others that the template reads, such as tools=[...] or enable_thinking=False.
        Raises ValueError where there is no template, or it refuses the messages.
        """
        given = {"tools": None, "documents": None, "strftime_now": self.now.strftime}
        given |= self.special | variables | {"add_generation_prompt": add_generation_prompt}
        return self.template(messages=messages, **given)

    def reads(self, name):
        """Whether the template reads the variable of this name. ValueError: it is malformed."""
        return self.source is not None and name in self._variables

    def mentions(self, word):
        """Whether the template's source holds a word, such as a key of messages."""
        return self.source is not None and word in self.source

    def encode_chat(self, messages, /, add_generation_prompt=False, **variables):
        """The ids of the rendered chat, in which whatever the messages say is ordinary text.

        '<|im_end|>' in a message or a variable becomes tokens that spell it, never the control
        token. Without such strings this is encode(render(...)). Raises ValueError as render does,
        or where the template acts on control text in a message.
        """
        mark = self._mark(messages, variables)
        text = self._marked(mark, messages, [], add_generation_prompt, variables)
        return self._encode_marked(mark, text)

    def encode_response(self, messages, response, /, **variables):
        """(prompt ids, response ids), split where inference splits.

        The prompt is encode_chat(messages, True, ...), and the response is what follows it when
        the messages of the response are added. Markup in an assistant's message of the response
        that is no special token, such as <think>, becomes its token, as when it was generated.
        The response ends with its last end-of-turn token (one of end_ids), since no model
        generates what a template may write after it. Where the template closes the turn with text,
        all of that stays. Raises ValueError as encode_chat does, or where the chat does not begin
        with the prompt.
        """
        mark = self._mark(messages, response, variables)
        prompt = self._marked(mark, messages, [], True, variables)
        whole = self._marked(mark, messages, response, False, variables)
        if not whole.startswith(prompt):
            was, now = prompt.replace(mark, ""), whole.replace(mark, "")
            at = next((k for k, c in enumerate(was) if c != now[k : k + 1]), len(was))
            raise ValueError(
                "the chat template renders the prompt differently when a response follows, so no "
                f"boundary exists: from character {at} on {was[at : at + 40]!r} becomes "
                f"{now[at : at + 40]!r}"
            )
        ids = self._encode_marked(mark, whole[len(prompt) :], continuation=True)
        ends = [k for k, i in enumerate(ids) if i in self.end_ids]
        return self._encode_marked(mark, prompt), ids[: ends[-1] + 1] if ends else ids

    def save(self, directory):
        """Copy the tokenizer's files, as they are, into a directory, which is made if need be."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if directory.samefile(self.directory):
            return
        for name in FILES:
            if (self.directory / name).is_file():
                shutil.copyfile(self.directory / name, directory / name)
        more = self.directory / "additional_chat_templates"
        if more.is_dir():
            shutil.copytree(more, directory / more.name, dirs_exist_ok=True)

    @cached_property
    def template(self):
        if self.source is None:
            raise ValueError(
                f"{self.directory} has no chat template: chat_template.jinja, or chat_template in "
                "tokenizer_config.json (of several, the one named 'default')"
            )
        return templates().compile_template(self.source, f"the chat template of {self.directory}")

    @cached_property
    def closing_id(self):
        """The id of the token with which the template closes an assistant's turn.

        It is None where text closes it, or the template is missing or refuses a plain chat.
        """
        said = "It is Paris."
        chat = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": said}]
        try:
            _, found, rest = self.render(chat).rpartition(said)
        except (ValueError, ImportError):  # text needs no template, and so no jinja2
            return None
        closing = self._pattern.search(rest) if found else None
        return self.control[closing[0]] if closing else None

    @cached_property
    def end_ids(self):
        """The ids that end a turn.

        They are eos_id, closing_id, and every eos_token_id of generation_config.json and
        config.json.
        """
        closing = [] if self.closing_id is None else [self.closing_id]
        return frozenset([self.eos_id, *self._ends, *closing])

    @property
    def closing_warning(self):
        """A warning where other programs will not stop at the template's closing token, or ''."""
        if self.closing_id is None or self.closing_id in self._listed:
            return ""
        closing = self.decode([self.closing_id], skip_special=False)
        return (
            f"warning: the chat template closes turns with {closing} ({self.closing_id}), which "
            "no eos_token_id names: other programs will run on"
        )

    def _id_of(self, key):
        """The id of a special token such as "eos_token", or None where no file names it."""
        text = self.special.get(key)
        found = None if text is None else self.backend.id(text)
        if text is not None and found is None:
            where = f"{self.directory / 'tokenizer_config.json'}: {key}"
            raise ValueError(f"{where} is {text!r}, which {self.backend.path.name} does not hold")
        return found

    def _ends_of(self, file):
        """The eos_token_id of a file, as a list."""
        value = optional(self.directory / file).get("eos_token_id")
        ends = value if isinstance(value, list) else [] if value is None else [value]
        for i in ends:
            if type(i) is not int or not 0 <= i < self.vocab_size:
                lacks = f"which is no id of {self.backend.path.name}"
                raise ValueError(f"{self.directory}: an eos_token_id is {i!r}, {lacks}")
        return ends

    @cached_property
    def _variables(self):
        # The template comes first, since it says what is wrong with a malformed source.
        return self.template and templates().variables_read(self.source)

    @cached_property
    def _spelt_tokens(self):
        return Spelling(self.control, self._end_words)

    @cached_property
    def _spelt_special(self):
        """The control tokens that are special to the library, by name, or as the end of a turn."""
        names = {*self.backend.special_texts, *self.special.values()}
        for token in self.config.get("additional_special_tokens") or []:
            names.add(token["content"] if isinstance(token, dict) else token)
        for token in self.config.get("added_tokens_decoder", {}).values():
            names |= {token["content"]} if token.get("special") else set()
        texts = [t for t, i in self.control.items() if t in names or i in self.end_ids]
        return Spelling(texts, self._end_words)

    @cached_property
    def _spelt_firsts(self):
        return Spelling({text[0] for text in self.control}, self._end_words)

    @cached_property
    def _end_words(self):
        """The words in the tokens that begin, end or pad a text; no role may spell these."""
        ids = self.end_ids | {self.bos_id, self.pad_id}
        return words(text for text, i in self.control.items() if i in ids)

    @cached_property
    def _text_of(self):
        """{id: text} of the control tokens, but for what an unknown character becomes."""
        return {i: text for text, i in self.control.items() if i not in self.backend.unknown}

    def _mark(self, *values):
        """A character that occurs in none of the values, and in no template or control token."""
        values = [values, self.source, list(self.control)]
        seen = json.dumps(values, ensure_ascii=False, default=str)
        return next(c for c in map(chr, range(0xE000, 0x110000)) if c not in seen)

    def _marked(self, mark, messages, response, add_generation_prompt, variables):
        """The rendered chat with a mark wherever pieces are to be encoded apart."""

        def rendered(every, special):
            """special: the Spelling for what an assistant says in the response."""
            chat, given = every.apart(messages, mark), every.apart(variables, mark)
            for message in response:
                spelling = special if message.get("role") == "assistant" else every
                chat.append(spelling.apart(message, mark))
            if chat == [*messages, *response] and given == variables:
                return plain
            return self.render(chat, add_generation_prompt, **given)

        plain = self.render([*messages, *response], add_generation_prompt, **variables)
        text = rendered(self._spelt_tokens, self._spelt_special)
        # A template may also join two parts of a message. SmolLM3's takes '/think' out of a system
        # message, which turns '<|im_/thinkend|>' into '<|im_end|>'. With the first character of
        # every control token marked, none can be joined, and the template's own tokens are left.
        pattern = (self._spelt_special if response else self._spelt_tokens).pattern
        own = pattern.findall(rendered(self._spelt_firsts, self._spelt_firsts))
        if text.replace(mark, "") != plain or pattern.findall(text) != own:
            remedy = ""
            if self.mentions("reasoning_content"):
                remedy = (
                    ' What an assistant thought has a field of its own: {"role": "assistant", '
                    '"reasoning_content": "...", "content": "..."}'
                )
            raise ValueError(
                f"the chat template of {self.directory} acts on control text inside a message "
                "(such as '</think>'), which is to be ordinary text: take it out of the message."
                + remedy
            )
        return text

    def _encode_marked(self, mark, text, continuation=False):
        """The ids of the pieces of text between marks, each encoded by itself."""
        pieces = [piece for piece in text.split(mark) if piece]
        ids = [i for k, p in enumerate(pieces) for i in self.encode(p, continuation or k > 0)]
        made = Counter(i for i in ids if i in self._text_of)
        made -= Counter(self.control[found] for found in self._pattern.findall(text))
        if made:  # a normalizer makes '<think>' of full-width '＜think＞', say
            raise ValueError(
                f"{self.backend.path} makes the control token {self._text_of[min(made)]!r} of text "
                "that only resembles it: take that out of the message"
            )
        return ids


def templates():
    """The module of chat templates, which needs a package that texts do not need."""
    try:
        from minibnf.files import templates as module
    except ImportError:
        hint = "chat templates need the package jinja2: pip install 'minibnf[hf]'"
        raise ImportError(hint) from None
    return module
