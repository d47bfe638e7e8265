"""Where strings spell the texts of control tokens, whole or in part."""

import re


class Spelling:
    """Where strings spell some texts, or could become part of one beside other text.

    functional: words that no role may be. Other words of roles are left alone, for a template
    like '<|' + role + '|>' means the token that it builds.
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
        """A copy of messages, or of what is in them, with a mark after the first character of
        each text that a string spells. A string that could be an end or the middle of a text gets
        marks at its own ends, inside white space, which templates trim."""
        if isinstance(value, dict):  # the template looks keys up, so their ends get no marks
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
    """What is left of texts without their punctuation."""
    return {re.sub(r"\W", "", text) for text in texts} - {""}


def any_of(texts):
    """The pattern that finds any of the texts, the longest first, as tokenizers do."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")
