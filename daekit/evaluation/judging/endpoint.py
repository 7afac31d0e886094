"""One call to an OpenAI-compatible endpoint, and what its failure means."""

from __future__ import annotations

import email.utils
import json
import os
import time
from collections.abc import Mapping
from typing import Any

from daekit.errors import UserError
from daekit.evaluation.judging.calls import JudgeReply, JudgeRequest
from daekit.recipe.judge import JudgeSpec

_PASSING = (408, 409, 425, 429)  # besides 5xx: the same call may succeed later
_SHOWN = 300  # characters of an endpoint's message that an error quotes


class PassingFailure(Exception):
    """The call may succeed if it is sent again.

    Attributes:
        wait: seconds that the endpoint asks to wait.
    """

    def __init__(self, message: str, wait: float = 0.0) -> None:
        super().__init__(message)
        self.wait = wait


class RefusedRequest(Exception):
    """The endpoint does not answer this request; others it may."""


class Endpoint:
    """Sends single calls; used inside one event loop."""

    def __init__(self, who: str, spec: JudgeSpec) -> None:
        import openai  # takes a second, and only judges need it

        assert spec.base_url is not None
        self._spec, self._openai = spec, openai
        self._who = f"{who} at {spec.endpoint}"
        self._key = os.environ.get(spec.api_key_env, "")
        # without a key local servers take any; our retries are counted, the package's own are not
        self._client = openai.AsyncOpenAI(
            api_key=self._key or "none", base_url=spec.base_url, timeout=spec.timeout, max_retries=0
        )
        self._create: Any = self._client.chat.completions.with_raw_response.create  # its types list OpenAI's own models

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()

    async def send(self, request: JudgeRequest) -> JudgeReply:
        """One attempt.

        Raises:
            PassingFailure, RefusedRequest: see there.
            UserError: no call can succeed (a wrong key or URL, no such model, nothing left to spend, no logprobs).
        """
        parameters = dict(request.parameters)
        if self._spec.token_limit != "max_tokens" and "max_tokens" in parameters:
            parameters[self._spec.token_limit] = parameters.pop("max_tokens")
        openai = self._openai
        try:
            raw = await self._create(
                model=self._spec.model, messages=[dict(message) for message in request.messages], **parameters
            )
        except openai.APIStatusError as error:
            raise self._failure(error.status_code, error.response.text, error.response.headers) from None
        except openai.APIConnectionError as error:  # time-outs too
            raise PassingFailure(self._clean(f"{type(error).__name__}: {error.__cause__ or error}")) from None
        except UnicodeEncodeError as error:
            raise RefusedRequest(f"the prompt is no text that can be sent ({error})") from None
        return self._reply(request, raw.http_response.content)

    def _reply(self, request: JudgeRequest, body: bytes) -> JudgeReply:
        """The reply in a body, which is read strictly: half an answer is no answer."""
        try:
            response = json.loads(body)
        except ValueError:
            raise PassingFailure(f"the reply is no JSON: {self._clean(body[:_SHOWN].decode(errors='replace'))!r}") from None
        text = _text(response)
        if text is None:
            raise PassingFailure(f"the reply holds no message: {self._clean(json.dumps(response)[:_SHOWN])}")
        if request.parameters.get("logprobs") and not (response["choices"][0].get("logprobs") or {}).get("content"):
            raise UserError(
                f"{self._who}: it sends no logprobs, which the annotator needs. Choose an "
                "annotator that reads the judge's text (annotator: alpaca_eval_gpt4), or an endpoint that has logprobs."
            )
        return JudgeReply(text, response, time.time())

    def _failure(self, status: int, body: str, headers: Mapping[str, str]) -> Exception:
        said = f"HTTP {status}: {self._clean(body[:_SHOWN])}"
        if "insufficient_quota" in body:
            return UserError(f"{self._who}: nothing is left to spend ({said}). Replies so far are kept; run again later.")
        if status in _PASSING or status >= 500:
            return PassingFailure(said, _wait(headers))
        if status in (401, 403):
            have = f"the key in {self._spec.api_key_env} is refused" if self._key else f"{self._spec.api_key_env} is not set"
            return UserError(f"{self._who}: {have} ({said}). Set the environment variable to a valid key.")
        if status == 404:
            return UserError(
                f"{self._who}: no such model or URL ({said}). base_url ends in /v1 as a rule; correct it or model."
            )
        return RefusedRequest(said)

    def _clean(self, text: str) -> str:
        """Without the key, should an endpoint repeat it."""
        return text.replace(self._key, "***") if self._key else text


def _text(response: Any) -> str | None:
    """The text of the first choice; None if the response does not have the protocol's form."""
    try:
        message = response["choices"][0]["message"]
        calls = message.get("tool_calls")
        text = calls[0]["function"]["arguments"] if calls else message["content"]
    except (TypeError, KeyError, IndexError, AttributeError):
        return None
    if text is None:
        return ""  # a refusal, or all tokens spent on reasoning: an answer without a rating
    return text if isinstance(text, str) else None


def _wait(headers: Mapping[str, str]) -> float:
    """Seconds of a Retry-After header, which is a number or a date."""
    value = headers.get("retry-after", "")
    try:
        return max(float(value), 0.0)
    except ValueError:
        pass
    try:
        return max(email.utils.parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0
