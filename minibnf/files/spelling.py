"""Marking where messages spell the texts of control tokens, whole or in part.

MARK is one of Unicode's noncharacters, which no text may hold. It goes behind the first character
of what is said, "<" MARK "|im_end|>", so that a control token without a mark is the template's.
"""

import re

MARK = "\ufdd0"


class Spelling:
    """Puts marks into messages, and takes those out of a rendered chat that cut no token.

    control: the texts of all control tokens. markup: those that an answer may spell.
    ends: words that no role may spell, as im_end. Every other word in a role is left alone, since a
    template like '<|' + role + '|>' wants the token that it builds.
    """

    def __init__(self, control, markup, ends):
        self.pattern, self.ends = re.compile(any_of(control)), ends
        self.inside = "\n".join(text[1:] for text in control)
        self.finishes = tuple({text[k:] for text in control for k in range(1, len(text))})
        self.first = any_of({text[0] for text in control})
        self.no_markup = f"(?!{any_of(markup)})"

    def marked(self, value, answer=False, cautious=True):
        """A copy of messages, or of a value in them, with marks.

        cautious: behind every character that may begin a control token, and before a string that
        may go on with one. Else behind the first character of the tokens that a string spells.
        answer: but markup gets none.
        """
        where = self.first if cautious else self.pattern.pattern
        no_markup = self.no_markup if answer else ""
        heads = re.compile(f"{no_markup}(?={where}).", re.DOTALL)

        def behind_heads(text):
            return heads.sub(rf"\g<0>{MARK}", text)

        def mark(value, key=None):
            if isinstance(value, dict):
                return {behind_heads(str(k)): mark(v, k) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return [mark(item, key) for item in value]
            if not isinstance(value, str):
                return value
            core = value.strip()  # templates trim
            if key == "role" and re.fullmatch(r"\w+", core):
                part = core in self.ends
            else:
                part = core in self.inside or core.startswith(self.finishes)
            marked = behind_heads(value)
            if part and core and cautious:
                marked = marked.replace(core[0], MARK + core[0], 1)
            return marked

        return mark(value)

    def cut(self, text):
        """The text with the marks alone that stand in the text of a control token."""
        plain, pieces, end = text.replace(MARK, ""), [""], 0
        for part in text.split(MARK):
            if end and self.pattern.match(plain, end - 1):
                pieces.append("")
            pieces[-1] += part
            end += len(part)
        return MARK.join(pieces)


def any_of(texts):
    """A pattern that finds any of the texts, and the longest of several, as tokenizers do."""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)"
