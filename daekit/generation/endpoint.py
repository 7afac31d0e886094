"""One call to an OpenAI-compatible endpoint, answered at once or piece by piece, and what its failure means."""

from __future__ import annotations

import asyncio
import email.utils
import json
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import httpx

from daekit.errors import UserError
from daekit.generation.calls import ChatRequest, at, clean_text, read_body, read_reply
from daekit.generation.keys import is_maskable, is_openai, masked
from daekit.recipe.judge import JudgeSpec

_PASSING = (408, 409, 425, 429)  # besides 5xx: the same call may succeed later
_SHOWN = 300  # characters of an endpoint's message that an error quotes
_LOOK = 10.0  # seconds for a look at an endpoint
_LARGEST = 64 * 2**20  # bytes of a body; a longer one is none


class Unreached(UserError):
    """Nobody listens at the URL of an endpoint, or nobody knows its host."""


class PassingFailure(Exception):
    """The call may succeed if it is sent again.

    Attributes:
        wait: Seconds that the endpoint asks to wait.
        unreachable: Nobody listens at the URL, or nobody knows its host.
    """

    def __init__(self, message: str, wait: float = 0.0, unreachable: bool = False) -> None:
        super().__init__(message)
        self.wait, self.unreachable = wait, unreachable


class RefusedRequest(Exception):
    """The endpoint does not answer this request; others it may."""


class Endpoint:
    """Sends single calls; used inside one event loop.

    Args:
        who: What the one that is asked is called in messages.
        key: What to authenticate with; empty: no key is sent.
    """

    def __init__(self, who: str, spec: JudgeSpec, key: str) -> None:
        assert spec.base_url is not None
        self._spec, self._key, self._who = spec, key, f"{who} at {spec.endpoint}"
        self._url = spec.base_url.rstrip("/")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=spec.concurrency)
        # a redirect would send the question, or a GET instead of it, to another place
        self._client = httpx.AsyncClient(headers=headers, timeout=spec.timeout, limits=limits, follow_redirects=False)

    async def aclose(self) -> None:
        """Close its connections (so ``contextlib.aclosing`` calls it)."""
        await self._client.aclose()

    async def look(self) -> None:
        """Ask once which models it has, which costs nothing; most answers, and none in time, prove nothing.

        Raises:
            UserError: Nobody listens there, or the key is refused.
        """
        try:
            async with asyncio.timeout(_LOOK), self._client.stream("GET", f"{self._url}/models") as response:
                if response.status_code == 401:  # 403 may mean this list alone: of keys with few rights, of gateways
                    raise self._failure(response.status_code, await _body(response), response.headers)
        except (httpx.TransportError, httpx.DecodingError, RefusedRequest, TimeoutError) as error:
            if nobody := _nobody_there(error):
                raise Unreached(f"{self._who}: not reached ({nobody}). Start the server, or correct the URL.") from None

    async def send(self, request: ChatRequest) -> str:
        """One attempt; returns the body of a response with status 200, without the key should the endpoint repeat it.

        Raises:
            PassingFailure, RefusedRequest: See there.
            UserError: No call can succeed (a wrong key or URL, a redirect, no such model, nothing left to spend).
        """
        async with self._posted(request) as response:
            return self._without_key(await _body(response))

    async def pieces(self, request: ChatRequest) -> AsyncGenerator[str, None]:
        """The answer to a request with ``stream``, piece by piece; of an endpoint that does not stream, as one piece.

        Raises:
            PassingFailure, RefusedRequest, UserError: see ``send``.
        """
        async with self._posted(request) as response:
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                reply = read_reply(await _body(response), 0.0)
                if reply is None:
                    raise RefusedRequest("no answer can be read in its reply")
                yield self._without_key(reply.text)
                return
            async for line in response.aiter_lines():
                if piece := _piece(line):
                    yield self._without_key(piece)

    @asynccontextmanager
    async def _posted(self, request: ChatRequest) -> AsyncIterator[httpx.Response]:
        """The response to one attempt, once it says that it is a success; see ``send``."""
        question = {"model": self._spec.model, **request.question()}
        if self._spec.token_limit != "max_tokens" and "max_tokens" in question:
            question[self._spec.token_limit] = question.pop("max_tokens")
        try:
            content = json.dumps(question, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise RefusedRequest(f"the prompt is no text that can be sent ({error})") from None
        try:
            async with self._client.stream(
                "POST", f"{self._url}/{request.path}", content=content, headers={"Content-Type": "application/json"}
            ) as response:
                if not response.is_success:
                    raise self._failure(response.status_code, await _body(response), response.headers)
                yield response
        except httpx.LocalProtocolError as error:  # its message may quote a header
            raise RefusedRequest(f"the request cannot be sent ({type(error).__name__})") from None
        except (httpx.TransportError, httpx.DecodingError) as error:  # time-outs too
            nobody = _nobody_there(error)
            raise PassingFailure(nobody or self._clean(f"{type(error).__name__}: {error}"), unreachable=bool(nobody)) from None

    def _failure(self, status: int, body: str, headers: Mapping[str, str]) -> Exception:
        said = f"HTTP {status}: {self._clean(body)}"
        if 300 <= status < 400:
            target = self._clean(_without_query(headers.get("location", "nowhere")))
            return UserError(
                f"{self._who}: HTTP {status} redirects to {target}, and redirects are not followed. Set the URL to the place "
                "that answers."
            )
        if "insufficient_quota" in body:
            return UserError(f"{self._who}: nothing is left to spend ({said}). Replies so far are kept; run again later.")
        if status in _PASSING or status >= 500:
            return PassingFailure(said, retry_after(headers))
        if status in (401, 403):
            return UserError(f"{self._who}: {self._about_key(said)}")
        if status == 404:
            return UserError(
                f"{self._who}: no such model or URL ({said}). The URL ends in /v1 as a rule; correct it or the model's name."
            )
        return RefusedRequest(said)

    def _about_key(self, said: str) -> str:
        """What is wrong with the key that was sent, or was not, and what to do."""
        variable = self._spec.api_key_env or ("OPENAI_API_KEY" if is_openai(self._url) else "")
        if self._key:
            return f"the key in {variable} is refused ({said}). Set {variable} to one that is valid there."
        if variable:
            return f"it wants a key, and {variable} is not set ({said}). Set {variable} to the key."
        return (
            f"it wants a key, and none was sent ({said}). Name the environment variable that holds it: api_key_env (of "
            "`daekit chat`: --key-env)."
        )

    def _clean(self, text: str) -> str:
        """The beginning of what an endpoint says, without the key and on one line."""
        text = masked(text, self._key)[:_SHOWN]
        return "".join(letter if letter.isprintable() else " " for letter in text)

    def _without_key(self, body: str) -> str:
        """A body to keep; where the key is spelled with escapes, it is written anew."""
        if not is_maskable(self._key):
            return body
        body = masked(body, self._key)
        if "\\" in body:
            try:
                spelled = json.dumps(json.loads(body), ensure_ascii=False)
            except (ValueError, RecursionError):
                return body
            if self._key in spelled:
                return masked(spelled, self._key)
        return body


def _nobody_there(error: BaseException | None) -> str:
    """Why a connection could not be made for want of somebody to talk to; empty for any other error."""
    while error is not None:
        parts = error.exceptions if isinstance(error, BaseExceptionGroup) else (error,)  # one for each address of the host
        if any(isinstance(part, socket.gaierror) and part.errno != socket.EAI_AGAIN for part in parts):
            return "nobody knows the name of its host"
        if all(isinstance(part, ConnectionRefusedError) for part in parts):
            return "connection refused"
        error = error.__cause__ or error.__context__
    return ""


def _piece(line: str) -> str:
    """The text in a line of server-sent events; none in usage alone, or a comment of the endpoint's own."""
    if not line.startswith("data:"):
        return ""
    piece = at(read_body(line.removeprefix("data:")), "choices", 0, "delta", "content")
    return clean_text(piece) if isinstance(piece, str) else ""


async def _body(response: httpx.Response) -> str:
    body = bytearray()
    async for part in response.aiter_bytes():
        body += part
        if len(body) > _LARGEST:
            raise RefusedRequest(f"the reply is longer than {_LARGEST:,} bytes")
    return body.decode(errors="replace")


def _without_query(url: str) -> str:
    try:
        parts = urlsplit(url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    except ValueError:
        return "a place that is no URL"


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds of a Retry-After header, which is a number or a date."""
    value = headers.get("retry-after", "")
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return 0.0
