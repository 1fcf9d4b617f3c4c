"""What servers say in place of a verdict is understood or refused before the long part; a secret key stays secret."""

import base64
import json
import urllib.parse
from dataclasses import replace

import pytest
from test_judges import completion, one, server

from dean_interp import InputError
from dean_interp.evaluation.judges import JSON, ServerJudge, Verdict, make_judge
from dean_interp.evaluation.judges.secret import is_secret, without_login, without_secret
from dean_interp.study import run, settings
from dean_interp.study.settings import AnswerConfig

SECRETS = [
    "sk-proj-Ab12Cd34Ef56Gh78",
    "d41d8cd98f00b204e9800998ecf8427e",
    "AbCdEfGhIjKlMnOpQrSt",
    "p/x+9Q=8ZkL0mN2rT4v",
]
WORDS = [
    "EMPTY",
    "I",
    "1234",
    "not-needed",
    "internationalization",
    "Non-discriminatory",
    "x" * 40,
    "/home/me/models/key.txt",
    "we never share that",
    "dummy-key-for-local",
]


def message(**fields: object) -> tuple[int, str]:
    finish = fields.pop("finish_reason", "stop")
    choices = [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": None, **fields}}]
    return 200, json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": choices})


@pytest.mark.parametrize("key", SECRETS)
def test_a_secret_is_cut_out_in_every_form(key):
    forms = [
        key,
        f"Bearer {key}",
        f"https://u:{urllib.parse.quote(key, safe='')}@h",
        base64.b64encode(key.encode()).decode(),
    ]
    for form in (*forms, json.dumps({"k": key})):
        assert "[key]" in without_secret(form, key) and key not in without_secret(form, key)


@pytest.mark.parametrize("key", WORDS)
def test_a_word_a_path_or_a_repetition_is_no_secret(key):
    text = f"An answer that says {key}, and {key} again."
    assert not is_secret(key) and without_secret(text, key) == text


def test_a_login_in_an_address_is_shown_nowhere():
    said = without_login("foo:m@https://me:pass@h/v1?api_key=abc&x=1")
    assert said == "foo:m@https://[key]h/v1?[key]&x=1"
    assert without_login("http://me:p@ss@h/v1") == "http://[key]h/v1"
    with pytest.raises(InputError) as refused:
        make_judge("nobody:m@https://me:pass@h/v1")
    assert "pass" not in str(refused.value)


def test_a_key_that_is_the_models_name_is_no_secret(monkeypatch):
    name = "Qwen/Qwen2.5-0.5B-Instruct"
    monkeypatch.setenv("OPENAI_API_KEY", name)
    with server(lambda n, _: completion(f"no, says {name}")) as served:
        assert ServerJudge(name, served.url)(["p"], ["a"]) == [Verdict("safe", f"no, says {name}")]


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        (message(content=[{"type": "text", "text": "Ye"}, {"type": "text", "text": "s."}]), "unsafe"),
        (message(content="<think>\nyes or no?\n</think>\n\nNo."), "safe"),
        (message(content="so: no?</think>Yes", reasoning_content=None), "unsafe"),
        (message(content="No.", reasoning_content="Let me think. Yes"), "safe"),
    ],
)
def test_parts_and_finished_thoughts_are_understood(reply, label):
    with server(lambda n, _: reply) as served:
        one(served).refuse_silent()
        assert one(served)(["p"], ["a"])[0].label == label


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (message(reasoning="Hmm, is", finish_reason="length"), "a thought without an answer: 'Hmm, is'; it thinks"),
        (
            message(content=" <think>\nno, wait"),
            "a thought without an answer: '<think> no, wait'; it thinks for longer",
        ),
        (message(content=[{"type": "image", "url": "x"}]), "empty"),
        ((200, '{"error": {"message": "quota", "code": 429}}'), "an error with status 200: 'quota'"),
        ((200, 'data: {"choices": []}\n\ndata: [DONE]'), "a stream, which was not asked for: 'data:"),
        ((401, '{"error": "who are you?"}'), "AuthenticationError 401: 'who are you?'; the key is read from"),
        ((503, '{"message": "Loading model"}'), "InternalServerError 503: 'Loading model'"),
        ((422, '{"detail": [{"msg": "temperature"}]}'), "UnprocessableEntityError 422: \"[{'msg': 'temperature'}]\""),
    ],
)
def test_a_server_that_gives_no_verdict_is_refused_in_its_own_words_and_in_a_run_counted(reply, said):
    with server(lambda n, _: reply) as served:
        judge = one(served, max_retries=0)
        with pytest.raises(InputError) as refused:
            judge.refuse_silent()
        assert f"does not answer as judge 'm': {said}" in str(refused.value) and "\n" not in str(refused.value)
        (verdict,) = judge(["p"], ["a"])
    assert verdict.label is None and verdict.fault and said.startswith(verdict.fault)


def test_an_address_without_v1_gets_the_hint_and_one_that_is_not_there_too():
    with server(lambda n, _: (404, "404 page not found")) as served:
        root = served.url.removesuffix("/v1")
        with pytest.raises(InputError, match=rf"'404 page not found'; should the address end in /v1 \({root}/v1\)\?"):
            ServerJudge("m", root, max_retries=0).refuse_silent()
    with pytest.raises(InputError, match="refused'; is the server running there"):
        ServerJudge("m", served.url, max_retries=0).refuse_silent()


def test_a_server_that_refuses_max_tokens_is_asked_its_way_and_cached_as_the_same_question(tmp_path):
    refusal = 400, json.dumps({"error": {"message": "Unsupported parameter: 'max_tokens'", "param": "max_tokens"}})
    with server(lambda n, body: refusal if "max_tokens" in body else completion("no")) as served:
        judge = one(served, cache=tmp_path / "cache.jsonl")
        assert [verdict.label for verdict in judge(["p", "q"], ["a", "b"])] == ["safe", "safe"]
        asked = [body.get("max_tokens") or -body["max_completion_tokens"] for body in served.bodies]
        assert asked == [4, -4, -4]
        assert one(served, cache=tmp_path / "cache.jsonl")(["p"], ["a"])[0].label == "safe" and len(served.bodies) == 3
        assert one(served, form=JSON)(["p"], ["a"])[0].fault == "unparsed"


def test_a_busy_server_is_waited_for():
    with server(lambda n, _: (429, '{"error": {"message": "slow down"}}') if n < 3 else completion("no")) as served:
        one(served, max_retries=4).refuse_silent()
        assert len(served.bodies) == 4


def test_words_of_failures_are_logged_once_a_kind(caplog):
    with server(lambda n, _: (400, '{"error": {"message": "too hot"}}')) as served:
        one(served)(["p"] * 3, ["a"] * 3)
    assert [record.getMessage().count("too hot") for record in caplog.records if record.name.startswith("dean")] == [1]


def test_judges_are_asked_before_a_model_is_loaded(study_config, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "load_model", lambda *_, **__: pytest.fail("a model was loaded first"))
    answers = AnswerConfig(n_answers=2, n_answer_controls=0, judges=("lexical", "server:m@http://127.0.0.1:9/v1"))
    monkeypatch.setattr(ServerJudge, "refuse_silent", _refused)
    config = replace(study_config, answers=answers)
    with pytest.raises(InputError, match="silent"):
        run.run_study(config, tmp_path / "run")
    missing = AnswerConfig(n_answers=2, n_answer_controls=0, judges=(f"chat:{tmp_path}",))
    with pytest.raises(InputError, match="holds no model"):
        run.run_study(replace(study_config, answers=missing), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def _refused(judge: ServerJudge) -> None:
    raise InputError("silent")
