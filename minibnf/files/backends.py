"""The two kinds of tokenizer files, which tokenizer.py puts one face on.

They are tokenizer.json, which the package tokenizers reads, and sentencepiece's tokenizer.model.
"""

import re
import struct
import warnings
from contextlib import contextmanager
from itertools import groupby

from minibnf.files.spelling import any_of

# Control tokens are the special tokens, and the other added tokens with markup in them, such as
# <think> or <tool_call>, since templates and parsers trust those as much. An added token that is
# only letters, digits and white space is ordinary vocabulary.
PLAIN = re.compile(r"[\w\s]*")


@contextmanager
def reading(path):
    """What a library raises becomes a ValueError; tokenizers knows nothing narrower than Exception.

    Where it panics, what it raises is no Exception either.
    """
    try:
        yield
    except (KeyboardInterrupt, MemoryError):
        raise
    except BaseException as error:
        raise ValueError(f"{path} cannot be read as a tokenizer: {error}") from error


class HuggingFace:
    """A tokenizer.json."""

    def __init__(self, path):
        try:
            from tokenizers import Tokenizer as Fast
            from tokenizers.pre_tokenizers import ByteLevel
        except ImportError:
            raise ImportError(f"{path} needs tokenizers: pip install 'minibnf[hf]'") from None
        self.path, self.special = path, {}
        with reading(path):
            self.fast = Fast.from_file(str(path))
            self.fast.no_truncation()  # the file may ask for either
            self.fast.no_padding()
            self.unknown = self.fast.encode("\U0010fffd", add_special_tokens=False).ids
            self.framed = self.fast.encode("a")  # with what the file puts around a text
        vocabulary, added = self.fast.get_vocab(), self.fast.get_added_tokens_decoder()
        self.id, self.vocab_size = self.fast.token_to_id, max(vocabulary.values(), default=-1) + 1
        self.control = {
            token.content: i
            for i, token in added.items()
            if token.special or not PLAIN.fullmatch(token.content)
        }
        self.special_texts = [token.content for token in added.values() if token.special]
        # A continuation is encoded behind some token that takes nothing of what follows it.
        simple = (t for t in added.values() if not (t.rstrip or t.single_word or t.normalized))
        self.before = next((t.content for t in simple), "")
        fallback = "ByteFallback" in repr(self.fast.decoder)  # it spells bytes by <0x00> to <0xFF>
        self.byte_tokens = {
            i for t, i in vocabulary.items() if fallback and re.fullmatch("<0x[0-9A-F]{2}>", t)
        }
        # A byte-level BPE spells each byte by one printable character. Some vocabularies, such as
        # SmolLM2's, lack a few of these. The library leaves out such bytes without a word, and so
        # does transformers; here a warning names them.
        unknown = getattr(self.fast.model, "unk_token", "")
        byte_level = "ByteLevel" in repr(self.fast.pre_tokenizer) and unknown is None
        self.unspelt = set(ByteLevel.alphabet()).difference(vocabulary) if byte_level else set()

    def begin(self, config, bos_id):
        """The ids that the file's post-processor puts before a text."""
        return self.framed.ids[: [*self.framed.special_tokens_mask, 0].index(0)]

    def encode(self, text, continuation):
        text.encode()  # half an emoji is a UnicodeEncodeError, which the library does not raise
        if lost := sorted(filter(self._is_lost, set(text) if self.unspelt else ())):
            warnings.warn(f"{self.path} has no token for {lost}: left out of a text", stacklevel=3)
        before = self.before if continuation else ""
        with reading(self.path):
            return self.fast.encode(before + text, add_special_tokens=False).ids[bool(before) :]

    def _is_lost(self, character):
        words = self.fast.pre_tokenizer.pre_tokenize_str(character)
        return any(self.unspelt.intersection(word) for word, _ in words)

    def decode(self, ids, skip_special):
        with reading(self.path):
            return self.fast.decode(ids, skip_special_tokens=skip_special)


class SentencePiece:
    """A tokenizer.model, whose control and user-defined pieces are control tokens."""

    def __init__(self, path):
        from sentencepiece import SentencePieceProcessor as Processor

        self.path, model, at = path, path.read_bytes(), 0
        with reading(path):
            self.first = Processor(model_proto=model or b"-")  # no bytes would stand for no file
        # The dummy prefix, a space before the text, belongs at its beginning only. The bytes add
        # normalizer_spec { add_dummy_prefix: false } to the model. In protobuf the last value of a
        # field counts. (The library's own way to edit a model needs the package protobuf.)
        self.rest = Processor(model_proto=model + b"\x1a\x02\x18\x00")
        self.vocab_size, self.control, self.special_texts = len(self.first), {}, []
        for i in range(self.vocab_size):
            piece = self.first.id_to_piece(i)
            # The library does not tell which pieces are user-defined, but the file does: a piece
            # is its text, 0x15, its score and, unless it is a normal piece, 0x18 and its type.
            entry = piece.encode() + b"\x15" + struct.pack("<f", self.first.get_score(i))
            at = model.index(entry, at) + len(entry)
            text = piece.replace("\u2581", " ")
            if self.first.is_control(i):
                self.special_texts.append(text)
            elif model[at : at + 2] != b"\x18\x04" or PLAIN.fullmatch(text):
                continue
            self.control[text] = i
        ids = {"bos": self.first.bos_id(), "eos": self.first.eos_id(), "pad": self.first.pad_id()}
        self.special = {f"{k}_token": self.first.id_to_piece(i) for k, i in ids.items() if i >= 0}
        self.unknown = [self.first.unk_id()]
        self.byte_tokens = ()  # sentencepiece decodes byte by byte
        self.texts = {i: text for text, i in self.control.items()}
        self.pattern = re.compile(f"({any_of(self.special_texts)})")

    def id(self, text):
        piece = text.replace(" ", "\u2581")
        i = self.first.piece_to_id(piece)
        return i if self.first.id_to_piece(i) == piece else None

    def begin(self, config, bos_id):
        """The ids before a text: bos_id where tokenizer_config.json asks for it, else none.

        The default is that of transformers 5.
        """
        default = str(config.get("tokenizer_class")).startswith("CodeLlama")
        return [bos_id] if config.get("add_bos_token", default) and bos_id is not None else []

    def encode(self, text, continuation):
        """The ids of a text; control pieces are read here, since sentencepiece reads none."""
        ids = []
        for k, part in enumerate(self.pattern.split(text)):  # ordinary text and control in turn
            if k % 2:
                ids.append(self.control[part])
            else:
                ids += (self.rest if k or continuation else self.first).encode(part)
        return ids

    def decode(self, ids, skip_special):
        text, processor = "", self.first
        shown = (i for i in ids if not skip_special or i not in self.texts)
        for is_control, run in groupby(shown, self.texts.__contains__):
            run = list(run)
            text += "".join(self.texts[i] for i in run) if is_control else processor.decode(run)
            processor = self.rest
        return text
