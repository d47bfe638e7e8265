"""Text and messages to token ids and back, whichever library reads the tokenizer's file.

    tokenizer = load_tokenizer(directory)                        # Hugging Face layout
    tokenizer.encode("<|im_start|>user\\n")                       # control tokens are read
    tokenizer.encode_chat([{"role": "user", "content": "Hi <|im_end|>"}])   # here it is text

How are the control tokens that a template writes told from those that a message spells? Before
rendering, whatever in a message may begin a control token gets a mark (spelling.py). A token that
the rendered text spells across a mark is a message's: there the text is cut, and the pieces are
encoded apart.
"""

import re
import shutil
from collections import Counter
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path

from minibnf.files.backends import HuggingFace, SentencePiece
from minibnf.files.config import no_model
from minibnf.files.disk import VOCABULARY, check_fields, check_size, optional, read_text
from minibnf.files.spelling import MARK, Spelling, any_of

FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip
MUST = {  # what fields of tokenizer_config.json must be
    "add_bos_token": ("true or false", (bool,)), "added_tokens_decoder": ("an object", (dict,)),
    "chat_template": ("text", (str,)), "additional_special_tokens": ("a list", (list, dict)),
}  # fmt: skip
BACKENDS = {"tokenizer.json": HuggingFace, "tokenizer.model": SentencePiece}
LONGEST = 10**7  # the squared lengths of all control tokens; no published tokenizer has 10**6


def load_tokenizer(directory):
    """The Tokenizer of a directory, of its tokenizer.json or else its tokenizer.model.

    Raises FileNotFoundError where neither exists, ValueError where a file is malformed or two
    contradict each other, ImportError where tokenizer.json needs the missing package tokenizers.
    """
    directory = Path(directory)
    for name, backend in BACKENDS.items():
        if (directory / name).is_file():
            check_size(directory / name, VOCABULARY)
            return Tokenizer(directory, backend(directory / name))
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
        self.source = self.config.get("chat_template")
        if isinstance(self.source, list):
            named = [t for t in self.source if isinstance(t, dict) and t.get("name") == "default"]
            self.source = named[-1].get("template") if named else None
        check_fields(config, self.config | {"chat_template": self.source}, MUST)
        if (directory / "chat_template.jinja").is_file():
            self.source = read_text(directory / "chat_template.jinja")
        self.special = {}  # {"eos_token": "</s>", ...}; templates may read these
        for key, value in [*backend.special.items(), *mapped.items(), *self.config.items()]:
            if key.endswith("_token") and isinstance(_text(value), str):
                self.special[key] = _text(value)
        if "eos_token" not in self.special:
            missing = "eos_token is missing, and no other file says which token ends a text"
            raise ValueError(f"{config}: {missing}")
        self.eos_id, self.bos_id = self._id_of("eos_token"), self._id_of("bos_token")
        self.pad_id, file = self._id_of("pad_token"), backend.path.name
        self.added = self.config.get("added_tokens_decoder") or {}
        for i, entry in self.added.items():
            text = _text(entry)
            if not isinstance(entry, dict) or not isinstance(text, str):
                raise ValueError(f"{config}: added_tokens_decoder {i} needs 'content', a text")
            if (found := backend.id(text)) is None or str(found) != i:
                raise ValueError(f"{config}: {text!r} is to have id {i}, in {file} it has {found}")
        if sum(len(text) ** 2 for text in self.control) > LONGEST:
            longest = max(map(len, self.control))
            what = f"{len(self.control)} control tokens, of up to {longest} characters"
            raise ValueError(f"{backend.path}: {what}, are too many or too long to tell from text")
        self.begin = backend.begin(self.config, self.bos_id)
        rows = optional(directory / "config.json").get("vocab_size")
        self.limit = rows if type(rows) is int else self.vocab_size
        self._check_rows([self.eos_id])
        # A program that stops at generation_config.json's tokens looks nowhere else; where that
        # names none it takes config.json's, and at last the tokenizer's own.
        generation, config = self._ends_of("generation_config.json"), self._ends_of("config.json")
        self._listed, self._ends = generation or config or [self.eos_id], generation + config

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
        spoils all of it; a special token that is left out does not end it.
        """
        silent = {self.control[t] for t in self.backend.special_texts if skip_special}
        held, shown = [], 0  # ids behind the last certain one, which stands first; characters shown
        for i in ids:
            held.append(i)
            if i in self.backend.byte_tokens or i in silent:
                continue
            text = self.decode(held, skip_special)
            # Up to 3 bytes of an unfinished character show as one \ufffd, or as one for each.
            waiting = min(3, len(text) - len(text.rstrip("\ufffd")))
            if piece := text[shown : len(text) - waiting]:
                yield piece
                shown += len(piece)
                if not waiting:
                    held, shown = [i], len(self.decode([i], skip_special))
        if piece := self.decode(held, skip_special)[shown:]:
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
        return self.source is not None and name in self.template.variables

    def mentions(self, word):
        """Whether the template's source holds a word, such as a key of messages."""
        return self.source is not None and word in self.source

    def encode_chat(self, messages, /, add_generation_prompt=False, **variables):
        """The ids of the rendered chat, in which whatever the messages say is ordinary text.

        '<|im_end|>' in a message or a variable becomes tokens that spell it, never the control
        token. Without such strings this is encode(render(...)). Raises ValueError as render does,
        or where the template acts on control text in a message.
        """
        return self._encode_cut(self._cut(messages, [], add_generation_prompt, variables))

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
        prompt = self._cut(messages, [], True, variables)
        whole = self._cut(messages, response, False, variables)
        if not whole.startswith(prompt):
            was, now = prompt.replace(MARK, ""), whole.replace(MARK, "")
            at = next((k for k, c in enumerate(was) if c != now[k : k + 1]), len(was))
            raise ValueError(
                "the chat template renders the prompt differently when a response follows, so no "
                f"boundary exists: from character {at} on {was[at : at + 40]!r} becomes "
                f"{now[at : at + 40]!r}"
            )
        ids = self._encode_cut(whole[len(prompt) :], continuation=True)
        ends = [k for k, i in enumerate(ids) if i in self.end_ids]
        return self._encode_cut(prompt), ids[: ends[-1] + 1] if ends else ids

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
        try:
            from minibnf.files.templates import Template
        except ImportError:
            hint = "chat templates need the package jinja2: pip install 'minibnf[hf]'"
            raise ImportError(hint) from None
        return Template(self.source, f"the chat template of {self.directory}")

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
        closing = re.search(any_of(self.control), rest) if found else None
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
    def _spelling(self):
        special = {*self.backend.special_texts, *self.special.values()}
        more = map(_text, self.config.get("additional_special_tokens") or [])
        special |= {text for text in more if isinstance(text, str)}
        special |= {token["content"] for token in self.added.values() if token.get("special")}
        markup = [t for t, i in self.control.items() if t not in special and i not in self.end_ids]
        ends = self.end_ids | {self.bos_id, self.pad_id}
        words = {re.sub(r"\W", "", text) for text, i in self.control.items() if i in ends}
        return Spelling(self.control, markup, words)

    def _cut(self, messages, response, add_generation_prompt, variables):
        """The rendered chat, with a mark wherever pieces are to be encoded apart."""

        def marked(cautious):
            mark = partial(self._spelling.marked, cautious=cautious)
            chat = [mark(message) for message in messages]
            chat += [mark(message, message.get("role") == "assistant") for message in response]
            return self.render(chat, add_generation_prompt, **mark(variables))

        plain = self.render([*messages, *response], add_generation_prompt, **variables)
        if MARK in plain:
            raise ValueError("a text holds U+FDD0, which is no character: take it out")
        text = cautious = marked(True)
        if text.replace(MARK, "") != plain:  # the template acts on text that only begins like one
            text = marked(False)
        text, tokens_in = self._spelling.cut(text), self._spelling.pattern.findall
        if text.replace(MARK, "") != plain or tokens_in(text) != tokens_in(cautious):
            raise ValueError(
                f"the chat template of {self.directory} acts on control text inside a message "
                "(such as '</think>'), which is to be ordinary text: take it out of the message. "
                'What an assistant thought may have a field of its own: {"role": "assistant", '
                '"reasoning_content": "...", "content": "..."}'
            )
        return text

    def _encode_cut(self, text, continuation=False):
        """The ids of the pieces of text between marks, each encoded by itself."""
        pieces = [piece for piece in text.split(MARK) if piece]
        ids = [i for k, p in enumerate(pieces) for i in self.encode(p, continuation or k > 0)]
        made, spelt = Counter(ids), Counter(self._spelling.pattern.findall(text))
        for token, i in self.control.items():
            # a normalizer makes '<think>' of full-width '＜think＞', say
            if made[i] > spelt[token] and i not in self.backend.unknown:
                raise ValueError(
                    f"{self.backend.path} makes the control token {token!r} of text that only "
                    "resembles it: take that out of the message"
                )
        return ids


def _text(token):
    """The text of a special token, which may also stand in an object."""
    return token.get("content") if isinstance(token, dict) else token
