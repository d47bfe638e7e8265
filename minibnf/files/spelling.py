"""Finding where strings spell the texts of control tokens, whole or in part."""

import re


class Spelling:
    """Marks where strings spell some texts, or may spell one together with what is beside them.

    functional: words that no role may spell. Every other word in a role is left alone, since a
    template like '<|' + role + '|>' wants the token that it builds.
    """

    def __init__(self, texts, functional):
        self.texts, self.functional = list(texts), functional
        rests = {text[0]: [] for text in self.texts}
        for text in self.texts:
            rests[text[0]].append(re.escape(text[1:]))
        heads = (f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items())
        self.heads = re.compile("|".join(heads) or "(?!)")  # the first character of a text
        self.pattern = any_of(self.texts)
        self.starts = tuple({t[:k] for t in self.texts for k in range(1, len(t))})
        self.finishes = tuple({t[k:] for t in self.texts for k in range(1, len(t))})
        self.words = words(self.texts)

    def apart(self, value, mark, key=None):
        """A copy of messages, or of a value in them, with marks in its strings.

        A mark stands after the first character of each text that a string spells. A string that
        could be a part of a text gets marks at both its ends too. These stand inside the white
        space around the string, since templates trim that.
        """
        if isinstance(value, dict):  # a template looks up keys, so their ends get no mark
            return {self._marked(str(k), mark): self.apart(v, mark, k) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.apart(item, mark, key) for item in value]
        if not isinstance(value, str):
            return value
        core = value.strip()
        word = re.fullmatch(r"\w*", core)
        if word and key == "role":
            part = core in self.functional
        elif core.endswith(self.starts) or core.startswith(self.finishes):
            part = True
        else:
            part = core in self.words if word else any(core in text for text in self.texts)
        marked = self._marked(value, mark)
        core = marked.strip()
        return marked.replace(core, f"{mark}{core}{mark}", 1) if part else marked

    def _marked(self, text, mark):
        return self.heads.sub(lambda head: head[0] + mark, text)


def words(texts):
    """The words that are left of texts without their punctuation."""
    return {re.sub(r"\W", "", text) for text in texts} - {""}


def any_of(texts):
    """The pattern that finds any of the texts, and the longest of several, as tokenizers do."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
