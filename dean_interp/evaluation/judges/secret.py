"""What is cut out of texts before they are kept or shown: a server's key, where it can be a secret at all.

Servers that need no key are given a placeholder (`EMPTY`, `local`, `x`), which is also a word of answers: cut out, it
would change what a model said. A key is taken for a secret by its length and by how hard it is to guess.
"""

import base64
import json
import math
import re
from collections import Counter
from urllib.parse import quote

LEAST_LENGTH = 12
"""Characters of the shortest key that is taken for a secret."""
LEAST_BITS = 40
"""How hard to guess a key is that is taken for a secret."""
# a letter of a word, written in one case or with a capital, says little (Shannon 1951); one of a random run much
_BITS_OF_WORD = 1.5
_BITS_OF_DIGIT = 3.3
_BITS_OF_RUN = 5.0
_BITS_OF_MARK = 4.0
_BITS_OF_PATH_MARK = 1.0
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_LOGIN = re.compile(r"(?<=://)[^/\s]*@|(?<=[?&])[\w-]*(key|token|secret|password)=[^&\s#]*", re.IGNORECASE)


def is_secret(key: str) -> bool:
    """Whether a key can be a secret: long enough, and no word, path or repetition."""
    has_blank = re.search(r"\s", key) is not None
    return len(key) >= LEAST_LENGTH and not has_blank and _bits(key) > LEAST_BITS


def without_secret(text: str, key: str) -> str:
    """A text without the key, however it is written there; as it is, where the key can be no secret."""
    if not is_secret(key):
        return text
    in_json = json.dumps(key)[1:-1]
    in_address = quote(key, safe="")
    in_base64 = base64.b64encode(key.encode()).decode().rstrip("=")
    for form in (key, in_json, in_address, in_base64):
        text = text.replace(form, "[key]")
    return text


def without_login(text: str) -> str:
    """A text without the user, password or key that an address in it may hold."""
    return _LOGIN.sub("[key]", text)


def _bits(key: str) -> float:
    """How hard to guess a key is: by the kinds of its runs, and no harder than by how often each character is there."""
    runs = re.findall(r"[^\W_]+|[\W_]", key)
    by_runs = sum(map(_bits_of_run, runs))
    shares = [n / len(key) for n in Counter(key).values()]
    by_characters = -len(key) * sum(share * math.log2(share) for share in shares)
    return min(by_runs, by_characters)


def _bits_of_run(run: str) -> float:
    """How hard to guess a run of letters and digits, or one mark, is."""
    if not run.isalnum():
        return _BITS_OF_PATH_MARK if run in "/." else _BITS_OF_MARK
    if _WORD.fullmatch(run):
        return _BITS_OF_WORD * len(run)
    if run.isdecimal():
        return _BITS_OF_DIGIT * len(run)
    return _BITS_OF_RUN * len(run)
