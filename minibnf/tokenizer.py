"""Tokenizers behind one face: a tokenizer.json (package tokenizers) or a sentencepiece tokenizer.model; chat templates.

    tokenizer = load_tokenizer(directory)                                   # a Hugging Face directory
    tokenizer.encode("<|im_start|>user\\n")                                  # text: control tokens in it are read
    tokenizer.encode_chat([{"role": "user", "content": "Hi <|im_end|>"}])   # messages: what they say is only ever text

How the template's control tokens are told from those a message merely spells: the template renders a copy of the
messages in which stand-ins, strings that occur nowhere, replace the text of control tokens, so every control token it shows
is its own. Each of those becomes a mark (such a string, the id, a semicolon), the stand-ins become text again, and the
backend encodes the whole with control tokens spelt by marks and by nothing else.
"""

import json
import re
import secrets
import shutil
import struct
import warnings
from functools import cached_property
from itertools import groupby
from pathlib import Path

from minibnf.config import no_model
from minibnf.templates import compile_template, variables_of

FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)

# Which added tokens are control tokens: all that are special, and all others with markup in them, such as <think> or
# <tool_call>: templates and parsers trust those just as much. Letters, digits and white space alone are vocabulary.
PLAIN = re.compile(r"[\w\s]*")


def load_tokenizer(directory):
    """The Tokenizer of a directory in Hugging Face layout: of tokenizer.json, or tokenizer.model where there is none.

    Raises FileNotFoundError where neither exists, ValueError where a file is malformed or two contradict each other,
    ImportError where tokenizer.json is to be read and the package tokenizers is missing.
    """
    for name, backend in (("tokenizer.json", HuggingFace), ("tokenizer.model", SentencePiece)):
        if (Path(directory) / name).is_file():
            return Tokenizer(Path(directory), backend(Path(directory) / name))
    raise no_model(directory, "neither tokenizer.json nor tokenizer.model")


class Tokenizer:
    """Text and messages to token ids and back.

    vocab_size: every id is below it.  control: {text: id} of the control tokens.  eos_id; bos_id, pad_id: may be None.
    end_ids: the ids that end a turn, which are eos_id and the eos_token_id of generation_config.json and config.json.
    """

    def __init__(self, directory, backend):
        self.directory, self.backend = directory, backend
        self.vocab_size, self.control = backend.vocab_size, backend.control
        path = directory / "tokenizer_config.json"
        self.config, self.special = read_json(path), {}  # special: {"eos_token": "</s>", ...}, which templates may read
        for source in (backend.special, read_json(directory / "special_tokens_map.json"), self.config):
            texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in source.items()}
            self.special |= {key: t for key, t in texts.items() if key.endswith("_token") and isinstance(t, str)}
        if "eos_token" not in self.special:
            raise ValueError(f"{path}: eos_token is missing, and no other file says which token ends a text")
        self.eos_id, self.bos_id, self.pad_id = ids = [
            backend.id(self.special[f"{k}_token"]) if f"{k}_token" in self.special else None for k in ("eos", "bos", "pad")
        ]
        for key, i in zip(("eos_token", "bos_token", "pad_token"), ids, strict=True):
            if key in self.special and i is None:
                raise ValueError(f"{path}: {key} is {self.special[key]!r}, which {backend.path.name} does not hold")
        for i, entry in self.config.get("added_tokens_decoder", {}).items():
            if (found := backend.id(entry["content"])) != int(i):
                raise ValueError(f"{path}: {entry['content']!r} is to have id {i}, in {backend.path.name} it has {found}")
        ends = [read_json(directory / f).get("eos_token_id") for f in ("generation_config.json", "config.json")]
        ends = [i for value in ends for i in (value if isinstance(value, list) else [value]) if i is not None]
        if bad := [i for i in ends if type(i) is not int or not 0 <= i < self.vocab_size]:
            raise ValueError(f"{directory}: an eos_token_id is {bad[0]!r}, which is no id of {backend.path.name}")
        self.end_ids = frozenset([self.eos_id, *ends])
        path = directory / "chat_template.jinja"
        source = path.read_text(encoding="utf-8") if path.is_file() else self.config.get("chat_template")
        self.source = {t["name"]: t["template"] for t in source}.get("default") if isinstance(source, list) else source

        # For encode_chat: how to find control tokens, and which strings could be an end, or the middle, of one.
        texts, functional = list(self.control), self.end_ids | {self.bos_id, self.pad_id}
        self._pattern, self._fresh = any_of(texts), fresh_marks()
        self._starts = tuple({t[:k] for t in texts for k in range(1, len(t))})
        self._finishes = tuple({t[k:] for t in texts for k in range(1, len(t))})
        self._words = {re.sub(r"\W", "", t) for t in texts} - {""}
        self._functional = {re.sub(r"\W", "", t) for t in texts if self.control[t] in functional} - {""}

    def encode(self, text, continuation=False):
        """The ids of a text as it stands: control tokens written in it are read, none is added.

        continuation: the text follows another one, so a tokenizer that begins a text with a space of its own does not.
        """
        if not continuation:
            return self.backend.encode(text)
        mark = self._marks(text)[0]
        marked = self._pattern.sub(lambda m: f"{mark}{self.control[m[0]]};", text)
        return self.backend.encode_marked(marked, mark, continuation=True)

    def decode(self, ids, skip_special=True):
        """The text of token ids, special tokens left out or (skip_special=False) spelt out. ValueError: no such id."""
        ids = [int(i) for i in ids]
        if bad := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise ValueError(f"{bad[0]} is no id of {self.backend.path}, whose ids end at {self.vocab_size - 1}")
        return self.backend.decode(ids, skip_special)

    def stream(self, ids, skip_special=True):
        """The text of token ids while they come, in pieces, each as soon as it is certain: joined, they are decode(ids).

        ids: any iterable, such as a generator. A character spread over several tokens is shown when it is whole; where a
        tokenizer.json spells characters by <0xE4>-like tokens, a run of these is shown when it ends, since one wrong byte
        spoils all of it. Each id costs the decoding of a few ids, however long the text.
        """
        decode = lambda ids: self.decode(ids, skip_special)
        # Text after an ordinary token does not depend on which: a decoder treats only the beginning of a text as special.
        anchor = next(([i] for i in range(self.vocab_size) if decode([i]).isalnum() and i not in self.backend.byte_tokens), [])
        before, held, shown = [], [], 0  # of decode(before + held) the first characters that are shown
        for i in ids:
            if decode([*anchor, i]) == decode(anchor):
                continue  # a special token
            held.append(i)
            if i in self.backend.byte_tokens:
                continue
            text = decode(before + held)
            # The up to 3 first bytes of a character show as one \ufffd or as one each; a \ufffd can stand for 3 bytes.
            waiting = min(3, len(text) - len(text.rstrip("\ufffd")))
            if piece := text[shown : len(text) - waiting]:
                yield piece
            if text or decode(held + held):  # else this text has not begun: white space that the decoder leaves out
                before = anchor
            held = held[-9:] if waiting else []
            shown = len(decode(before + held)) - waiting
        if piece := decode(before + held)[shown:]:
            yield piece

    def reads(self, name):
        """Whether the chat template reads a variable of that name."""
        return self.source is not None and name in self._read

    @cached_property
    def _read(self):
        return variables_of(self.source)

    def render(self, messages, add_generation_prompt=False, **variables):
        """The template's text for a list of {"role", "content", ...}. ValueError: no template, or it refuses them."""
        ours = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        return self.template(**{"tools": None, "documents": None} | self.special | variables | ours)

    def encode_chat(self, messages, add_generation_prompt=False, **variables):
        """The ids of the rendered chat, in which whatever the messages say is only ever ordinary text.

        A message with '<|im_end|>' in it yields tokens that spell it, never the control token. Without such a message
        this is encode(render(...)). ValueError: as render; or the template itself acts on control text in a message.
        """
        marks = self._marks([messages, variables])
        if self._shield([messages, variables], marks) == [messages, variables]:
            return self.encode(self.render(messages, add_generation_prompt, **variables))
        marked, _ = self._marked(messages, add_generation_prompt, marks, **variables)
        return self.backend.encode_marked(marked, marks[0])

    def encode_response(self, messages, response_messages, **variables):
        """(prompt ids, response ids), split where inference splits: encode_chat(messages, True), and what follows it.

        The response ends with its last end-of-turn token (end_ids), for no model generates what a template may write
        after it; where the template closes the turn with text, all of that stays. ValueError: as encode_chat; or the
        rendered chat does not begin with the rendered prompt.
        """
        marks = self._marks([messages, response_messages, variables])
        prompt, prompt_text = self._marked(messages, True, marks, **variables)
        full, text = self._marked([*messages, *response_messages], False, marks, **variables)
        if not text.startswith(prompt_text) or not full.startswith(prompt):
            at = next((k for k in range(len(prompt_text)) if prompt_text[k] != text[k : k + 1]), len(prompt_text))
            raise ValueError(
                "the chat template renders the prompt differently when a response follows, so no boundary "
                f"exists: from character {at} on {prompt_text[at : at + 40]!r} becomes {text[at : at + 40]!r}"
            )
        ids = self.backend.encode_marked(full[len(prompt) :], marks[0], continuation=True)
        ends = [k for k, i in enumerate(ids) if i in self.end_ids]
        return self.encode_chat(messages, True, **variables), ids[: ends[-1] + 1] if ends else ids

    def save(self, directory):
        """Copy the tokenizer's files, as they are, into a directory, which is made where it does not exist."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (self.directory / name).is_file() and not Path(directory).samefile(self.directory):
                shutil.copyfile(self.directory / name, Path(directory) / name)
        more = self.directory / "additional_chat_templates"
        if more.is_dir() and not Path(directory).samefile(self.directory):
            shutil.copytree(more, Path(directory) / more.name, dirs_exist_ok=True)

    def _marks(self, messages):
        """Three strings that occur nowhere: for control tokens, stand-ins and guards.

        They are the same from call to call, since a tokenizer.json needs a twin for each, and random, so that no text can
        name them on purpose.
        """
        seen = json.dumps([messages, self.source, list(self.control)], ensure_ascii=False, default=str)
        while any(mark in seen for mark in self._fresh):
            self._fresh = fresh_marks()
        return self._fresh

    def _shield(self, value, marks, key=None):
        """A copy of the messages in which no string holds a control token, or becomes part of one.

        A control token's text becomes a stand-in. A string that could be an end or the middle of one gets guards at its
        ends, inside white space, which templates trim. Words get none, for a template like '<|' + role + '|>' means the
        token it builds; unless that token begins, ends or pads a text, or the word is no role.
        """
        if isinstance(value, dict):  # the template looks keys up, so they get no guards
            return {self._stand_in(str(k), marks): self._shield(v, marks, k) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._shield(item, marks) for item in value]
        if not isinstance(value, str):
            return value
        value = self._stand_in(value, marks)
        core = value.strip()
        if re.fullmatch(r"\w*", core):
            guard = core in (self._functional if key == "role" else self._words)
        else:
            guard = core.endswith(self._starts) or core.startswith(self._finishes) or any(core in t for t in self.control)
        return value.replace(core, marks[2] + core + marks[2], 1) if guard else value

    def _stand_in(self, text, marks):
        return self._pattern.sub(lambda m: f"{marks[1]}{self.control[m[0]]};", text)

    def _marked(self, messages, add_generation_prompt, marks, **variables):
        """The rendered chat, twice: with marks in place of the template's own control tokens, and as it is."""
        control, stand_in, guard = marks
        texts = {str(i): text for text, i in self.control.items()}
        shielded = {name: self._shield(value, marks) for name, value in variables.items()}
        shielded = self.render(self._shield(messages, marks), add_generation_prompt, **shielded)
        marked = self._pattern.sub(lambda m: f"{control}{self.control[m[0]]};", shielded)
        marked, plain = (
            re.sub(f"{stand_in}([0-9]+);", lambda m: texts[m[1]], version.replace(guard, "")) for version in (marked, shielded)
        )
        if plain != self.render(messages, add_generation_prompt, **variables):
            raise ValueError(
                f"the chat template of {self.directory} acts on control text inside a message (such as "
                "'</think>'), which is to be ordinary text: take it out of the message"
            )
        return marked, plain

    @cached_property
    def template(self):
        if self.source is None:
            raise ValueError(
                f"{self.directory} has no chat template: chat_template.jinja, or chat_template in "
                "tokenizer_config.json (of several, the one named 'default')"
            )
        return compile_template(self.source, f"the chat template of {self.directory}")


class HuggingFace:
    """A tokenizer.json."""

    def __init__(self, path):
        try:
            from tokenizers import Tokenizer as Fast
        except ImportError:
            raise ImportError(f"{path} needs the package tokenizers: pip install 'minibnf[hf]'") from None
        self.path, self.special, self.twins = path, {}, {}
        try:
            self.fast = Fast.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from error
        self.fast.no_truncation()  # the file may ask for either
        self.fast.no_padding()
        vocabulary = self.fast.get_vocab()
        self.id, self.vocab_size = self.fast.token_to_id, max(vocabulary.values()) + 1
        self.control = {
            token.content: i
            for i, token in self.fast.get_added_tokens_decoder().items()
            if token.special or not PLAIN.fullmatch(token.content)
        }
        fallback = "ByteFallback" in repr(self.fast.decoder)  # then the decoder spells bytes by <0x00> to <0xFF>
        self.byte_tokens = {i for token, i in vocabulary.items() if fallback and re.fullmatch("<0x[0-9A-F]{2}>", token)}
        # A byte-level BPE spells each byte by one printable character. Some vocabularies (SmolLM2's) lack a few of these,
        # and then the library leaves such bytes out, as transformers does too. Here that is at least said.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        spelt = dict(zip(printable + others, map(chr, printable + list(range(256, 512))), strict=False))
        byte_level = "ByteLevel" in repr(self.fast.pre_tokenizer) and getattr(self.fast.model, "unk_token", "") is None
        self.unspelt = {b for b in range(256) if byte_level and spelt[b] not in vocabulary}

    def ids(self, fast, text):
        if self.unspelt and (lost := sorted({c for c in set(text) if not self.unspelt.isdisjoint(c.encode())})):
            warnings.warn(f"{self.path} has no token for {lost}: left out of a text", stacklevel=4)
        return fast.encode(text, add_special_tokens=False).ids

    def encode(self, text):
        return self.ids(self.fast, text)

    def encode_marked(self, text, mark, continuation=False):
        if mark not in self.twins:
            self.twins = {mark: self.twin(mark)}
        start = f"{mark}start;" if continuation else ""  # a token before the text, so that the text begins nothing
        return self.ids(self.twins[mark], start + text)[bool(start) :]

    def twin(self, mark):
        """This tokenizer with every control token renamed to its mark: text cannot spell it, nor can merges make it."""
        spec = json.loads(self.fast.to_str())
        names = {text: f"{mark}{i};" for text, i in self.control.items()}
        model = spec["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {names.get(token, token): i for token, i in model["vocab"].items()}
        else:  # Unigram
            model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
        if "merges" in model:
            model["merges"] = [(a, b) for a, b in model["merges"] if names.keys().isdisjoint((a, b, a + b))]
        if "unk_token" in model:
            model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
        for token in spec["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        spec["added_tokens"].append({"id": self.vocab_size, "content": f"{mark}start;", "special": True} | flags)
        twin = type(self.fast).from_str(json.dumps(spec))
        if moved := [text for text, i in self.control.items() if twin.token_to_id(names[text]) != i]:
            raise ValueError(f"{self.path}: {moved[0]!r} has an id out of order, so text cannot be kept apart from it")
        return twin

    def decode(self, ids, skip_special):
        return self.fast.decode(ids, skip_special_tokens=skip_special)


class SentencePiece:
    """A tokenizer.model, whose control and user-defined pieces are control tokens."""

    def __init__(self, path):
        from sentencepiece import SentencePieceProcessor as Processor

        self.path, model, at = path, bytearray(path.read_bytes()), 0
        try:
            pieces = Processor(model_proto=bytes(model))
        except RuntimeError as error:
            raise ValueError(f"{path} cannot be read as a sentencepiece model: {error}") from error
        self.vocab_size, self.control = len(pieces), {}
        for i in range(len(pieces)):  # in the file a piece is its text, 0x15, its score and, unless normal, 0x18, its type
            text = pieces.id_to_piece(i)
            entry = text.encode() + b"\x15" + struct.pack("<f", pieces.get_score(i))
            at = model.index(entry, at) + len(entry)
            text = text.replace("\u2581", " ")
            user_defined = model[at : at + 2] == b"\x18\x04" and not PLAIN.fullmatch(text)
            if user_defined:
                model[at + 1] = 3  # makes it a control piece, which no text yields
            if user_defined or pieces.is_control(i):
                self.control[text] = i
        # The dummy prefix, a space before the text, belongs at its beginning only: rest has add_dummy_prefix off.
        self.first, self.rest = Processor(model_proto=bytes(model)), Processor(model_proto=bytes(model + b"\x1a\x02\x18\x00"))
        ids = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "pad_token": pieces.pad_id()}
        self.special = {key: pieces.id_to_piece(i) for key, i in ids.items() if i >= 0}
        self.byte_tokens = ()  # sentencepiece decodes byte by byte
        self.texts, self.pattern = {i: text for text, i in self.control.items()}, any_of(self.control)

    def id(self, text):
        piece = text.replace(" ", "\u2581")
        i = self.first.piece_to_id(piece)
        return i if self.first.id_to_piece(i) == piece else None

    def encode(self, text):
        mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text)
        return self.encode_marked(self.pattern.sub(lambda m: f"{mark}{self.control[m[0]]};", text), mark)

    def encode_marked(self, text, mark, continuation=False):
        ids = []
        for k, part in enumerate(re.split(f"{mark}([0-9]+);", text)):  # ordinary text and ids in turn
            ids += [int(part)] if k % 2 else (self.rest if k or continuation else self.first).encode(part)
        return ids

    def decode(self, ids, skip_special):
        text, processor = "", self.first
        shown = (i for i in ids if not skip_special or i not in self.texts)
        for run in (list(run) for _, run in groupby(shown, self.texts.__contains__)):
            text += "".join(self.texts[i] for i in run) if run[0] in self.texts else processor.decode(run)
            processor = self.rest
        return text


def any_of(texts):
    """The pattern that finds any of the texts, the longest first, as tokenizers do."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")


def fresh_marks():
    """Three strings of private-use characters around a random number."""
    return [f"{c}{secrets.token_hex(8)}{c}" for c in "\ue000\ue001\ue002"]


def read_json(path):
    """A JSON object from a file, {} where there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not hasattr(value, "items"):
        raise ValueError(f"{path} holds no JSON object")
    return value
