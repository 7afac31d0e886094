"""Which key goes to which endpoint, and what may be sent to it without encryption."""

from __future__ import annotations

import ipaddress
import os
import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from daekit.errors import UserError

_LIKE_A_KEY = re.compile(r"\w*(KEY|TOKEN)", re.IGNORECASE)
_OPENAI = "OPENAI_API_KEY"
# keys that belong to one host; a suite of someone else's must not send them anywhere else
_HOSTS = {
    _OPENAI: ("api.openai.com", ".openai.azure.com"),
    "ANTHROPIC_API_KEY": ("api.anthropic.com",),
    "HF_TOKEN": ("huggingface.co", ".huggingface.co"),
    "HUGGING_FACE_HUB_TOKEN": ("huggingface.co", ".huggingface.co"),
    "GITHUB_TOKEN": (),
    "GH_TOKEN": (),
    "AWS_SECRET_ACCESS_KEY": (),
    "AWS_SESSION_TOKEN": (),
    "AZURE_OPENAI_API_KEY": (".openai.azure.com",),
    "MISTRAL_API_KEY": (".mistral.ai",),
    "GOOGLE_API_KEY": (".googleapis.com",),
    "GEMINI_API_KEY": (".googleapis.com",),
    "WANDB_API_KEY": (),
    "NPM_TOKEN": (),
    "CI_JOB_TOKEN": (),
    "SSH_KEY": (),
}
_SHORTEST_MASKED = 8  # characters; to mask a shorter word in a reply would change what the reply says


@dataclass(frozen=True)
class Permissions:
    """What the user allows beyond what a suite may ask for.

    Attributes:
        key_variables: Names of environment variables that may be sent as keys to whatever endpoint a suite names.
        http: Whether questions and keys may be sent without encryption to other machines.
    """

    key_variables: frozenset[str] = frozenset()
    http: bool = False


def is_openai(base_url: str | None) -> bool:
    """Whether OpenAI answers at a URL: any server can call its model gpt-4."""
    return _is_at(_host(base_url or ""), _HOSTS[_OPENAI])


def endpoint_key(where: str, base_url: str, variable: str | None, allowed: Permissions) -> str:
    """The key to send to an endpoint, stripped; empty where there is none.

    Args:
        where: Begins an error (``judge``, ``models.far``).
        variable: Environment variable that holds the key; None: OPENAI_API_KEY at OpenAI's own hosts, else no key.

    Raises:
        UserError: The endpoint may not be asked without encryption, the variable may not be sent there, or its value is no
            key. No message holds the value.
    """
    host = _host(base_url)
    if urlsplit(base_url).scheme == "http" and not is_loopback(base_url) and not allowed.http:
        raise UserError(
            f"{where}: http://{host} is another machine, and http sends questions and keys unencrypted. Use https, or allow "
            "it: --allow-http."
        )
    if variable is None:
        variable = _OPENAI if is_openai(base_url) else ""
    elif variable not in allowed.key_variables:
        _require_sendable(where, host, variable)
    key = os.environ.get(variable, "").strip() if variable else ""
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            f"{where}: the value of {variable} is no key: it holds a space, a line break or another character that no key "
            "has. Set the variable to the key alone."
        )
    return key


def required_key(where: str, base_url: str, variable: str | None, allowed: Permissions) -> str:
    """The same for an endpoint that is about to be asked: where a variable is named, or OpenAI answers, it is not empty.

    Raises:
        UserError: see ``endpoint_key``; the variable is not set.
    """
    key = endpoint_key(where, base_url, variable, allowed)
    if not key and variable is not None:
        raise UserError(
            f"{where}.api_key_env: {variable} is not set. Set it to the key of {_host(base_url)}, or name no variable if none "
            "is needed there."
        )
    if not key and is_openai(base_url):
        raise UserError(
            f"{where}: {_host(base_url)} wants a key, and {_OPENAI} is not set. Set it, or name the variable that holds the "
            "key: api_key_env (of `daekit chat`: --key-env)."
        )
    return key


def masked(text: str, key: str) -> str:
    """A message without the key, should an endpoint repeat it."""
    return text.replace(key, "***") if key else text


def is_maskable(key: str) -> bool:
    """Whether a key is long enough to be masked in replies without changing what they say."""
    return len(key) >= _SHORTEST_MASKED


def _require_sendable(where: str, host: str, variable: str) -> None:
    allow = f"If it is meant to be sent to {host}, allow it: --allow-key-env {variable}."
    if not _LIKE_A_KEY.fullmatch(variable):
        raise UserError(
            f"{where}.api_key_env: {variable!r} does not look like the name of a key (..._API_KEY, ..._KEY, ..._TOKEN). {allow}"
        )
    hosts = _HOSTS.get(variable.upper())
    if hosts is not None and not _is_at(host, hosts):
        raise UserError(f"{where}.api_key_env: {variable} is not sent to {host}, to which it does not belong. {allow}")


def _host(url: str) -> str:
    return (urlsplit(url).hostname or "").rstrip(".")


def _is_at(host: str, hosts: tuple[str, ...]) -> bool:
    return any(host.endswith(each) if each.startswith(".") else host == each for each in hosts)


def is_loopback(url: str) -> bool:
    """Whether an URL leads to this machine."""
    host = _host(url)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
