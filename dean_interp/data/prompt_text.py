"""When two prompts are one: the form in which they are compared, everywhere, and its hash.

A prompt that differs in blanks, case, punctuation, invisible characters or how its letters are encoded is the same
prompt to a model's answers, so it must not be scored here and measured there.
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


def normalised(text: str) -> str:
    """Letters and digits alone, in lower case, one space between words; a text without any is only stripped.

    Letters are those of NFKC, so composed, decomposed and wide forms are one, and marks belong to their letters.
    """
    if text.isascii():
        return " ".join(re.findall(r"\w+", text.lower())) or text.strip()
    plain = unicodedata.normalize("NFKC", _INVISIBLE.sub("", text)).casefold()
    plain = unicodedata.normalize("NFKC", plain)
    kept = [letter if _is_of_a_word(letter) else " " for letter in plain]
    return " ".join("".join(kept).split()) or plain.strip()


def prompt_hash(prompt: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of its normal form."""
    return _hash(normalised(prompt))


def is_among(prompt: str, hashes: Set[str]) -> bool:
    """Whether hashes of prompts hold this one."""
    return bool(hashes_of(prompt) & hashes)


def hashes_of(prompt: str) -> frozenset[str]:
    """The hash of its normal form, and, as older files have it, that of its text as it stands."""
    return frozenset((prompt_hash(prompt), _hash(prompt)))


def _is_of_a_word(letter: str) -> bool:
    return letter == "_" or unicodedata.category(letter)[0] in "LMN"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
