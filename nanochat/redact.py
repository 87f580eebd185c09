"""What is secret is not printed and not recorded: an address's user, password and query, and the keys
and tokens of the environment.

Two ways, because neither is enough: by form, wherever the text looks like an address or a header with credentials, and
by value, for what the environment names as secret and a library's message repeats in a form of its own.
"""

import os
import re
from collections.abc import Iterator
from urllib.parse import unquote

HIDDEN = "***"
SCHEME = r"[A-Za-z][A-Za-z0-9+.-]*://"
SECRET_NAME = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASS|PASSWORD|PASSWD|PASSPHRASE|HEADERS|CREDENTIALS?)$")
ADDRESS_NAME = re.compile(r"(ENDPOINT|PROXY|URL)$")
FILE_NAME = re.compile(r"^OTEL_.*_CLIENT_KEY$")  # the name of a file
LEAST = 4  # characters of a value that is hidden wherever it occurs; shorter ones would take ordinary words with them


def redacted(url: str) -> str:
    """An address to be shown: without user, password, query and fragment. One without a scheme,
    `user:password@host:4317`, counts as one."""
    # up to the last @: passwords are not always escaped
    url = re.sub(rf"^({SCHEME})?.*@", rf"\g<1>{HIDDEN}@", url, flags=re.DOTALL)
    return re.sub(r"[?#].*", f"?{HIDDEN}", url, flags=re.DOTALL)


def scrubbed(text: str) -> str:
    """Any text, such as a library's message, without the secrets in it."""
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = re.sub(rf"{SCHEME}[^\s'\"<>]+", lambda found: redacted(found[0]), text)
    text = re.sub(r"([?&][\w.-]+=)[^\s&'\"<>)]+", rf"\g<1>{HIDDEN}", text)
    return re.sub(r"(authorization\W{1,5}(?:(?:basic|bearer)\s+)?)[^\s'\",}]+", rf"\g<1>{HIDDEN}", text,
                  flags=re.IGNORECASE)


def userinfo(url: str) -> tuple[str, str]:
    """("user:password", the address without it): percent-decoded; "" where there is none."""
    scheme, login, rest = re.fullmatch(rf"({SCHEME})?(?:([^/?#]*)@)?(.*)", url, re.DOTALL).groups(default="")
    return unquote(login), scheme + rest


def _secrets() -> Iterator[str]:
    """Values of the environment that are hidden wherever they occur, each as it is there and percent-decoded."""
    for name, value in os.environ.items():
        for secret in _of_variable(name, value):
            yield from (form for form in (secret, unquote(secret)) if len(form) >= LEAST)


def _of_variable(name: str, value: str) -> Iterator[str]:
    name = name.upper()
    if SECRET_NAME.search(name) and not FILE_NAME.search(name):
        yield value
    if name.endswith(("HEADERS", "RESOURCE_ATTRIBUTES")):  # lists of key=value, and messages about one that is not
        for pair in value.split(","):
            yield pair.strip()
            if name.endswith("HEADERS"):
                yield from (pair.partition("=")[2].strip(), *unquote(pair.partition("=")[2]).split()[-1:])
    if "://" in value or ADDRESS_NAME.search(name):
        login = re.sub(SCHEME, "", value).rpartition("@")[0]
        password = login.partition(":")[2]
        # as libraries cut one that is not escaped
        yield from (password, *re.split("[/?#]", password), *re.split("[/?#]", login)[:1] * bool(password))
        yield from re.findall(r"[?&][\w.-]+=([^&#\s]+)", value)
