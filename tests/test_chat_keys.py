"""Keys: which goes where, and that none is ever seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from daekit.errors import UserError
from daekit.generation import ChatClient, ChatRequest, Permissions
from daekit.generation.keys import endpoint_key
from daekit.recipe.judge import JudgeSpec
from tests.helpers.judge_server import JudgeServer

SECRET = "sk-very/secret"
QUESTION = [ChatRequest([{"role": "user", "content": "Rate this as [[rating]]"}], {"max_tokens": 64})]


def ask(server: JudgeServer, folder: Path, variable: str | None) -> list[object]:
    with ChatClient(JudgeSpec(model="judge", base_url=server.url, api_key_env=variable), folder) as client:
        return list(client.ask(QUESTION))


def sent_keys(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    seen: list[str | None] = []
    from tests.helpers import judge_server

    real = judge_server._Handler.do_POST

    def noting(handler: judge_server._Handler) -> None:
        seen.append(handler.headers.get("Authorization"))
        real(handler)

    monkeypatch.setattr(judge_server._Handler, "do_POST", noting)
    return seen


def test_no_key_is_sent_where_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    seen = sent_keys(monkeypatch)
    with JudgeServer() as server:
        assert ask(server, tmp_path / "none", None) != [None]
        with pytest.raises(UserError, match=r"OPENAI_API_KEY is not sent to 127\.0\.0\.1"):
            ask(server, tmp_path / "openai", "OPENAI_API_KEY")
    assert seen == [None] and not (tmp_path / "openai").exists()
    assert endpoint_key("judge", "https://api.openai.com/v1", None, Permissions()) == SECRET
    assert endpoint_key("judge", "https://mine.openai.azure.com/v1", None, Permissions()) == SECRET
    for foreign in (
        "https://api.openai.com.evil.example/v1",
        "https://evil.example/api.openai.com/v1",
        "https://openai.azure.com.x/",
    ):
        assert endpoint_key("judge", foreign, None, Permissions()) == ""


@pytest.mark.parametrize("variable", ["PATH", "HOME", "DATABASE_URL", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "X_KEY\n"])
def test_a_suite_may_name_no_other_variable_unless_it_is_allowed(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, SECRET)
    with pytest.raises(UserError, match="--allow-key-env") as told:
        endpoint_key("judge", "https://far.example/v1", variable, Permissions())
    assert "very" not in str(told.value)
    assert endpoint_key("judge", "https://far.example/v1", variable, Permissions(frozenset({variable}))) == SECRET


@pytest.mark.parametrize("variable", ["JUDGE_API_KEY", "TOGETHER_KEY", "VLLM_TOKEN", "API_KEY"])
def test_what_looks_like_a_key_may_be_named(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, f"{SECRET}\n")  # as mounted secrets are
    assert endpoint_key("judge", "https://far.example/v1", variable, Permissions()) == SECRET


@pytest.mark.parametrize("value", ["sk-very\nsecret", "sk very secret", "sk-very-secret-\x07", "sk-very-sécret"])
def test_what_is_no_key_is_refused_and_not_shown(value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JUDGE_KEY", value)
    with JudgeServer() as server, pytest.raises(UserError, match="JUDGE_KEY is no key") as told:
        ask(server, tmp_path, "JUDGE_KEY")
    assert "very" not in str(told.value) and server.calls == []


def test_a_key_with_a_line_break_at_its_end_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JUDGE_KEY", f" {SECRET}\r\n")
    seen = sent_keys(monkeypatch)
    with JudgeServer() as server:
        assert ask(server, tmp_path, "JUDGE_KEY") != [None]
    assert seen == [f"Bearer {SECRET}"]


@pytest.mark.parametrize("spelled", [SECRET, SECRET.replace("/", "\\/"), SECRET.replace("s", "\\u0073")])
def test_a_reply_that_repeats_the_key_is_kept_without_it(spelled: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    text = f'{{"choices": [{{"message": {{"content": "You sent {spelled}. Rating: [[7]]"}}}}], "model": "{spelled}"}}'
    with JudgeServer(lambda call: "echo_key", bodies={"echo_key": text.encode()}) as server:
        (reply,) = ask(server, tmp_path, "JUDGE_KEY")
    assert reply.text == "You sent ***. Rating: [[7]]" and reply.model == "***"
    written = "".join(file.read_text() for file in tmp_path.iterdir())
    assert "very" not in written and "***" in json.loads(written.splitlines()[0])["body"]


def test_a_short_key_does_not_change_what_a_reply_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JUDGE_KEY", "7")
    said = b'{"choices": [{"message": {"content": "Rating: [[7]]"}}]}'
    with JudgeServer(lambda call: "seven", bodies={"seven": said}) as server:
        (reply,) = ask(server, tmp_path, "JUDGE_KEY")
    assert reply.text == "Rating: [[7]]"


@pytest.mark.parametrize("host", ["far.example", "10.0.0.5", "127.0.0.1.evil.example", "0.0.0.0"])
def test_http_goes_to_this_machine_only_unless_allowed(host: str) -> None:
    with pytest.raises(UserError, match="--allow-http"):
        endpoint_key("judge", f"http://{host}/v1", None, Permissions())
    assert endpoint_key("judge", f"http://{host}/v1", None, Permissions(http=True)) == ""
    assert endpoint_key("judge", f"https://{host}/v1", None, Permissions()) == ""


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "[::1]:8000", "127.9.9.9"])
def test_http_to_this_machine_is_allowed(host: str) -> None:
    assert endpoint_key("judge", f"http://{host}/v1", None, Permissions()) == ""
