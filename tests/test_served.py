"""Answers from a server that holds the checkpoint are the model's own, and its failures are no answers."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from dean_interp import InputError, Selection, Site, ablate, load_behaviour, load_model
from dean_interp.evaluation.served import Served, generate_served, refuse_silent_server
from dean_interp.models.generate import _continue, generate_to
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.study.answering import answers_of
from dean_interp.study.config import EvaluationConfig
from dean_interp.study.evaluate import servers_of
from dean_interp.study.settings import AnswerConfig, DataConfig
from dean_interp.study.store import ORIGINAL, State, Store

EDIT = Selection({Site(1, "neurons"): torch.tensor([3, 5])}, {Site(1, "neurons"): (40,)})

LENGTHS = (4, 9)


@contextmanager
def served(model, *, fails=lambda number: None):
    """A server with OpenAI's completions that runs the model under its hooks; yields address, requests and keys."""
    lock, bodies, keys = threading.Lock(), [], []

    class Handler(BaseHTTPRequestHandler):
        def _send(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(text.encode())

        def do_GET(self):
            self._send(200, json.dumps({"object": "list", "data": [{"id": "own", "object": "model"}]}))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                bodies.append(body)
                keys.append(self.headers["Authorization"])
                broken = fails(len(bodies) - 1)
                if broken is not None:
                    return self._send(*broken)
                new = _continue(model, [body["prompt"]], body["max_tokens"])[0]
            text = native_tokenizer(model).decode(new[new >= 0], skip_special_tokens=True)
            return self._send(200, json.dumps({"object": "text_completion", "choices": [{"index": 0, "text": text}]}))

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1", bodies, keys
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


@pytest.fixture(scope="module")
def prompts():
    return load_behaviour("privacy", split="test", n_examples=5).prompts


@torch.inference_mode()
def test_its_answers_are_those_of_the_model(llama, prompts):
    own = generate_to(llama, prompts, lengths=LENGTHS)
    with served(llama) as (url, bodies, _):
        found = generate_served(Served(url), native_tokenizer(llama), prompts, lengths=LENGTHS)
    assert found[9] == own[9]
    assert {(one["model"], one["temperature"], one["max_tokens"]) for one in bodies} == {("own", 0, 9)}
    assert all(found[9][i].startswith(found[4][i].rstrip("\ufffd")) for i in range(len(prompts)))


def test_a_request_leaves_nothing_to_the_settings_of_the_checkpoint(llama, prompts, caplog):
    tokenizer, ends = native_tokenizer(llama), [1, 9]
    with served(llama) as (url, bodies, _):
        found = generate_served(Served(url), tokenizer, prompts[:1], lengths=(5,), ends=ends)
    (body,) = bodies
    given = {"temperature": 0, "top_p": 1, "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0,
             "repetition_penalty": 1, "repeat_penalty": 1, "ignore_eos": False}  # fmt: skip
    assert {name: body[name] for name in given} == given
    assert body["stop_token_ids"] == ends and body["stop"] == ["<eos>"], (
        "a letter is no mark, and stops as a token only"
    )
    # a server that takes OpenAI's parameters alone
    openai = {"model", "prompt", "max_tokens", "stop", "temperature", "top_p", "presence_penalty", "frequency_penalty"}
    refused = (400, '{"error": {"message": "Unrecognized request argument supplied: repetition_penalty"}}')
    with served(llama, fails=lambda n: refused if set(bodies[n]) - openai else None) as (url, bodies, _):
        assert generate_served(Served(url), tokenizer, prompts[:1], lengths=(5,), ends=ends) == found
        assert len(bodies) == 2 and caplog.text.count("takes OpenAI's parameters only") == 1
        # Of several prompts the first alone is sent twice.
        generate_served(Served(url, concurrency=1), tokenizer, prompts, lengths=(5,), ends=ends)
        assert len(bodies) == 2 + len(prompts) + 1 and caplog.text.count("takes OpenAI's parameters only") == 2


def test_a_server_that_writes_the_end_of_a_turn_out_and_goes_on_is_cut_there(llama, prompts):
    said = json.dumps({"object": "text_completion", "choices": [{"index": 0, "text": "No.<eos><|user|>And you?"}]})
    with served(llama, fails=lambda n: (200, said)) as (url, *_):
        found = generate_served(Served(url), native_tokenizer(llama), prompts[:1], lengths=(2, 9))
    assert found == {2: ["No"], 9: ["No."]}


def test_failures_that_pass_are_retried_and_those_that_stay_keep_the_other_answers(
    llama, prompts, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret-key")
    how = {"lengths": (5,), "replies": tmp_path / "replies.jsonl"}
    error = (500, '{"error": {"message": "a-secret-key is wrong"}}')
    with served(llama, fails=lambda n: error if n < 2 else None) as (url, bodies, keys):
        first = generate_served(Served(url), native_tokenizer(llama), prompts, **how)
        assert len(bodies) == len(prompts) + 2 and set(keys) == {"Bearer a-secret-key"}
        again = generate_served(Served(url), native_tokenizer(llama), prompts, **how)
        assert again == first and len(bodies) == len(prompts) + 2
    assert "a-secret-key" not in (tmp_path / "replies.jsonl").read_text()
    rubbish = {1: (200, "{}"), 2: (200, '{"choices": []}')}
    other = tmp_path / "other.jsonl"
    with served(llama, fails=rubbish.get) as (url, *_):
        with pytest.raises(
            InputError, match=r"failed on 2 of 5 prompts \(not a completion 2\); the other answers are kept"
        ):
            generate_served(Served(url, concurrency=1), native_tokenizer(llama), prompts, lengths=(5,), replies=other)
        assert len(other.read_text().splitlines()) == 3


def test_a_server_that_is_not_there_is_an_error(llama, prompts):
    with served(llama) as (url, *_):
        pass
    with pytest.raises(InputError, match=r"does not say which model it serves \(APIConnectionError"):
        generate_served(Served(url, max_retries=0), native_tokenizer(llama), prompts, lengths=(5,))
    with pytest.raises(InputError, match="base_url must begin with http"):
        generate_served(Served("localhost"), native_tokenizer(llama), prompts, lengths=(5,))


STATE = State("edit", "edit", ablated=EDIT)


def answered(folder, model, behaviour, server=None, state=STATE):
    """The state's answers, from the store in that folder."""
    store = Store(folder, "x", [behaviour], DataConfig(), "chat")
    config = AnswerConfig(answer_lengths=LENGTHS, answer_batch=4)
    return answers_of(store, model, state, [behaviour], config, server=server)


@torch.inference_mode()
def test_a_state_is_answered_by_its_server_and_kept(llama, checkpoints, tmp_path):
    test = load_behaviour("fairness", split="test", n_examples=4)
    own = answered(tmp_path / "own", llama, test)
    edited = load_model(checkpoints["llama-gqa"], device="cpu")
    with ablate(edited, EDIT), served(edited) as (url, bodies, _):
        given = answered(tmp_path / "served", llama, test, Served(url))
        assert given[9] == own[9] and len(bodies) == 4
        assert answered(tmp_path / "served", llama, test, Served(url)) == given
        assert len(bodies) == 4
    with pytest.raises(InputError, match="is of another model, other data, lengths or units"):
        answered(tmp_path / "served", llama, test)


def test_a_server_of_another_checkpoint_is_refused_before_the_rest_is_asked(llama, checkpoints, tmp_path):
    test = load_behaviour("privacy", split="test", n_examples=12)
    other = load_model(checkpoints["qwen2"], device="cpu")
    with (
        served(other) as (url, bodies, _),
        pytest.raises(InputError, match="holds another checkpoint: none of its first 8 answers begins as the model's"),
    ):
        answered(tmp_path, llama, test, Served(url), ORIGINAL)
    assert len(bodies) == 8
    assert not list(tmp_path.rglob("*.replies.jsonl")), "the right one may come to the same address"


def test_a_servers_own_words_stand_in_the_error_and_its_key_does_not(llama, prompts, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-9f8Ge7Dc6Ba5x4Zy3w2V")
    said = json.dumps({"detail": "context of 16 tokens exceeded by Bearer sk-9f8Ge7Dc6Ba5x4Zy3w2V"})
    words = r"failed on 5 of 5 prompts \(BadRequestError 400 5: 'context of 16 tokens exceeded by Bearer \[key\]'\)"
    with served(llama, fails=lambda _: (400, said)) as (url, *_), pytest.raises(InputError, match=words):
        generate_served(Served(url), native_tokenizer(llama), prompts, lengths=(5,))


@pytest.mark.parametrize("key", ["EMPTY", "never", "e", "international", "own"])
def test_a_key_that_is_a_word_stays_in_answers(llama, prompts, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    said = f"{key} is what one {key}s internationally."
    reply = json.dumps({"choices": [{"index": 0, "text": said}]})
    with served(llama, fails=lambda _: (200, reply)) as (url, *_):
        given = generate_served(Served(url), native_tokenizer(llama), prompts, lengths=(90,))
    assert given[90] == [said] * len(prompts)


@torch.inference_mode()
def test_a_server_is_asked_once_for_one_token_and_refused_with_its_words(llama):
    with served(llama) as (url, bodies, _):
        refuse_silent_server(Served(url))
        assert [(body["model"], body["max_tokens"], body["prompt"]) for body in bodies] == [("own", 1, [1])]
    broken = {"error": {"message": "the tokenizer is not loaded"}}
    with served(llama, fails=lambda _: (200, json.dumps(broken))) as (url, *_):
        with pytest.raises(InputError, match="error with status 200: 'the tokenizer is not loaded'; it serves own"):
            refuse_silent_server(Served(url, "another"))
    with pytest.raises(InputError, match=r"does not say which model it serves \(APIConnectionError: '.*refused'\); is"):
        refuse_silent_server(Served(url, max_retries=0))


def test_addresses_with_a_login_are_refused_before_they_stand_in_a_file():
    for address in ("http://me:pass@host/v1", "http://host/v1?api_key=pass"):
        with pytest.raises(InputError, match="no user, password or query") as refused:
            EvaluationConfig(answers_from=(address, "http://b/v1")).check()
        assert "pass@" not in str(refused.value) and "=pass" not in str(refused.value)
        with pytest.raises(InputError, match="no user, password or query"):
            EvaluationConfig(answers=AnswerConfig(judges=(f"json:m@{address}",))).check()


def test_each_state_has_its_address():
    servers = servers_of(EvaluationConfig(answers_from=("http://a/v1", "http://b/v1")))
    assert (servers["original"].base_url, servers["edit"].base_url) == ("http://a/v1", "http://b/v1")
    assert servers_of(EvaluationConfig()) == {}
    with pytest.raises(InputError, match="answers_from must be two addresses"):
        EvaluationConfig(answers_from=("http://a/v1",)).check()
