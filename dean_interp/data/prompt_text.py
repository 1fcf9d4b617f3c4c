"""When two prompts are one: the form in which they are compared, everywhere, and its hash.

A prompt that differs in blanks, case, punctuation, invisible characters or how its letters are encoded is the same
prompt to a model's answers, so it must not be scored here and measured there. The signs of arithmetic and code are no
punctuation: 3 + 4 is another question than 3 * 4.
"""

import hashlib
import re
import unicodedata
from collections.abc import Set

# Unicode's Default_Ignorable_Code_Point: what has no width (joiners, soft hyphens, marks of direction)
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U000e0000-\U000e0fff]"
)
# what says something in arithmetic and code
_SIGNS = "+<=>*/%#&@$^|~\\"
_MINUS_SIGN = "\N{MINUS SIGN}"
_WORDS = re.compile(rf"\w+|[{re.escape(_SIGNS)}{_MINUS_SIGN}]")
# a hyphen before a number, unless it joins that to a word
_HYPHEN_MINUS = re.compile(r"(?<![^\W\d_])-(?=\s?\d)")


def normalised(text: str) -> str:
    """Letters, digits and signs alone, in lower case, one space between words; a text without any is only stripped.

    Letters are those of NFKC, so composed, decomposed and wide forms are one, and marks belong to their letters.
    """
    if text.isascii():
        plain = _HYPHEN_MINUS.sub(_MINUS_SIGN, text.lower())
        words = _WORDS.findall(plain)
        return " ".join(words) or text.strip()
    visible = _INVISIBLE.sub("", text)
    plain = unicodedata.normalize("NFKC", visible).casefold()
    # lower case may undo a composition
    plain = unicodedata.normalize("NFKC", plain)
    plain = _HYPHEN_MINUS.sub(_MINUS_SIGN, plain)
    words = "".join(map(_spaced, plain)).split()
    return " ".join(words) or plain.strip()


def _spaced(letter: str) -> str:
    """A letter, digit or mark as it is; a sign between spaces; a space for all else."""
    category = unicodedata.category(letter)
    if letter == "_" or category[0] in "LMN":
        return letter
    if letter in _SIGNS or category == "Sm":
        return f" {letter} "
    return " "


def prompt_hash(prompt: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of its normal form."""
    return _hash(normalised(prompt))


def is_among(prompt: str, hashes: Set[str]) -> bool:
    """Whether hashes of prompts hold this one."""
    return bool(hashes_of(prompt) & hashes)


def hashes_of(prompt: str) -> frozenset[str]:
    """The hash of its normal form, and, as older files have it, that of its text as it stands."""
    return frozenset((prompt_hash(prompt), _hash(prompt)))


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode())
    return digest.hexdigest()[:16]
