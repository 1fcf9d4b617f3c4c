"""The text that is scored is the text that was given: templates, tokens that tokenizers append, the day, thoughts."""

import datetime
import json
import shutil
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from tokenizers import processors

from dean_interp import Selection, Site, load_model
from dean_interp.cli.measuring import AblateUnits, do_ablate
from dean_interp.data.examples import Behaviour, Example
from dean_interp.errors import InputError
from dean_interp.evaluation.guard import super_weights
from dean_interp.evaluation.judges import QUESTION, LexicalJudge, judged
from dean_interp.evaluation.outcomes import answer_outcomes
from dean_interp.models import chat_settings as settings_module
from dean_interp.models.chat_settings import ChatSettings, with_settings, with_system_text
from dean_interp.models.generate import generate
from dean_interp.models.native_tokenizer import chat_parts, chat_settings, native_tokenizer
from dean_interp.models.templates import appended, rendered_chat, text_ids
from dean_interp.models.thoughts import behind_thought, decoded, opened_thought
from dean_interp.models.tokens import encode
from dean_interp.scoring.preparation import ScoringConfig, facts_of, scores_fingerprint
from dean_interp.study import day
from dean_interp.study.settings import ModelConfig

TURNS = (
    "{% for m in messages %}<|{{ m['role'] }}|>CONTENT{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PARTS = "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
CLOCK = "Today is {{ strftime_now('%d %b %Y') }}, {{ strftime_now('%A') }}.\n" + TURNS
QWEN = TURNS[:-11] + (
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SMOLLM = (
    "{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
    "{% if enable_thinking %}/think{% else %}/no_think{% endif %}" + TURNS
)
R1 = TURNS[:-11] + "<think>\n{% endif %}"


def with_template(tokenizer, template: str, content: str = "{{ m['content'] }}"):
    changed = deepcopy(tokenizer)
    changed.chat_template = template.replace("CONTENT", content)
    return changed


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


class TestWhatTheTemplateShows:
    @pytest.mark.parametrize(
        "content",
        [
            "",  # nothing
            "{{ m['text'] }}",  # an undefined name
            "{{ m['content'][:40] }}",  # a part
            "{{ m['content'] | lower }}",
            "{{ m['content'] | striptags }}",
            "{{ m['content'] | e }}",
            "{{ m['content'].split('<')[0] }}",
            "{{ m['content'] | replace('\n', ' ') }}",
            "{{ m['content'] }}{{ m['content'] }}",  # twice
        ],
    )
    def test_a_template_that_changes_or_repeats_what_was_said_is_refused_by_the_prompt(self, tokenizer, content):
        with pytest.raises(InputError, match=r"template.*Is this fair"):
            encode(with_template(tokenizer, TURNS, content), "Is this fair?", ["Yes."])

    def test_a_template_that_changes_only_some_prompts_is_refused_for_those(self, tokenizer):
        picky = with_template(tokenizer, TURNS, "{{ m['content'].split('###')[0] }}")
        encode(picky, "Is this fair?", ["Yes."])
        with pytest.raises(InputError, match="Is this ### fair"):
            encode(picky, "Is this ### fair?", ["Yes."])

    def test_blanks_around_a_prompt_may_be_taken_away(self, tokenizer):
        strips = with_template(tokenizer, TURNS, "{{ m['content'] | trim }}")
        assert rendered_chat(strips, user("  Is this fair?\n")) == "<|user|>Is this fair?<|assistant|>"

    @pytest.mark.parametrize("content", [PARTS, "{{ m['content'][0]['text'] }}", "{{ (m['content'] | first).text }}"])
    def test_a_template_that_reads_parts_is_given_parts(self, tokenizer, content):
        assert rendered_chat(with_template(tokenizer, TURNS, content), user("Fair?")) == "<|user|>Fair?<|assistant|>"

    @pytest.mark.parametrize("content", ["{{ m['content'] }}", PARTS])
    def test_a_template_that_wants_a_system_message_gets_an_empty_one(self, tokenizer, content):
        insists = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS
        text = rendered_chat(with_template(tokenizer, insists, content), user("Fair?"))
        assert text == "<|system|><|user|>Fair?<|assistant|>"

    def test_a_template_that_raises_in_every_form_is_refused_with_its_own_words(self, tokenizer):
        with pytest.raises(InputError, match="refuses messages by user: never"):
            rendered_chat(with_template(tokenizer, "{{ raise_exception('never') }}"), user("Fair?"))

    def test_a_conversation_whose_answers_or_system_are_dropped_is_refused(self, tokenizer):
        only_user = TURNS.replace("messages %}", "messages if m['role'] == 'user' %}", 1)
        talk = [*user("Who?"), {"role": "assistant", "content": "Me."}, *user("Why?")]
        with pytest.raises(InputError, match="leaves out"):
            rendered_chat(with_template(tokenizer, only_user), talk)
        with pytest.raises(InputError, match="leaves out"):
            rendered_chat(with_template(tokenizer, only_user), [{"role": "system", "content": "Be kind."}, *user("?")])

    def test_thoughts_may_be_taken_out_of_earlier_answers(self, tokenizer):
        forgets = with_template(tokenizer, TURNS, "{{ m['content'].split('</think>')[-1] }}")
        talk = [*user("Who?"), {"role": "assistant", "content": "<think>hm</think>Me."}, *user("Why?")]
        assert rendered_chat(forgets, talk) == "<|user|>Who?<|assistant|>Me.<|user|>Why?<|assistant|>"

    def test_a_prompt_without_tokens_of_its_own_is_refused(self, tokenizer):
        for template in ("rendered", "released"):
            with pytest.raises(InputError, match="no tokens of its own"):
                encode(tokenizer, "", ["Yes."], template=template)


@pytest.fixture(scope="module")
def appending(tokenizer):
    """A tokenizer that puts a BOS before every text and an EOS behind it."""
    changed = deepcopy(tokenizer)
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    return changed


class TestTokensBehindATextAreNotThere:
    @pytest.mark.parametrize("template", ["raw", "released", "rendered", "chat"])
    def test_neither_a_prompt_nor_its_answers_hold_an_end_of_text(self, appending, template):
        encoded = encode(appending, "Is it?", ["Yes.", "No."], template=template)
        alone = encode(appending, "Is it?", [], template=template)
        assert 1 not in (*encoded.prompt, *encoded.answers[0], *encoded.answers[1], *alone.prompt)
        assert alone.prompt == encoded.prompt

    def test_what_stands_before_a_text_stays(self, appending, tokenizer):
        assert encode(appending, "Is it?", [], template="raw").prompt[0] == 0
        assert text_ids(appending, "a") == [0, *text_ids(tokenizer, "a")]
        assert appended(appending) == [1] and appended(tokenizer) == []

    def test_the_super_weights_are_looked_for_on_the_text_alone(self, checkpoints, appending, tmp_path):
        shutil.copytree(checkpoints["llama"], tmp_path / "m")
        appending.save_pretrained(tmp_path / "m")
        model = load_model(tmp_path / "m", device="cpu")
        seen = []
        handle = model.original_model.get_input_embeddings().register_forward_pre_hook(
            lambda module, given: seen.append(given[0])
        )
        super_weights(model)
        handle.remove()
        assert seen and all(int(tokens[0, -1]) != 1 for tokens in seen)


@pytest.fixture
def tomorrow(monkeypatch):
    """Makes it another day from the call on."""

    def change() -> None:
        class Later(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return super().now(tz) + datetime.timedelta(days=40)

        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
        monkeypatch.setattr(settings_module, "today", lambda: "2031-01-01")
        monkeypatch.setattr(day, "today", lambda: "2031-01-01")

    return change


@pytest.fixture(scope="module")
def dated(checkpoints, tokenizer, tmp_path_factory):
    """A checkpoint whose chat template writes the day."""
    folder = tmp_path_factory.mktemp("dated") / "model"
    shutil.copytree(checkpoints["llama-gqa"], folder)
    with_template(tokenizer, CLOCK).save_pretrained(folder)
    return folder


class TestOneDay:
    def test_the_day_that_was_asked_for_is_written(self, dated):
        model = load_model(dated, device="cpu", chat=ChatSettings(date="2024-02-05"))
        text = rendered_chat(native_tokenizer(model), user("Fair?"))
        assert text == "Today is 05 Feb 2024, Monday.\n<|user|>Fair?<|assistant|>"
        assert chat_settings(model) == ChatSettings("2024-02-05")

    @pytest.mark.parametrize("form", ["%d %B %Y", "%Y-%m-%d", "%-d.%-m.", "%H:%M", "100 %%d", "%A the %j."])
    def test_every_form_is_written_as_the_clock_would(self, tokenizer, form):
        clock = with_template(tokenizer, "{% set now = strftime_now('" + form + "') %}\n{{ now }}|" + TURNS)
        fixed, _ = with_settings(clock, ChatSettings("2026-03-09"))
        wanted = datetime.datetime(2026, 3, 9).strftime(form)
        assert rendered_chat(fixed, user("?")) == f"{wanted}|<|user|>?<|assistant|>"

    def test_a_model_keeps_to_its_day(self, dated, tomorrow):
        model = load_model(dated, device="cpu")
        before = encode(native_tokenizer(model), "Fair?", ["Yes."])
        tomorrow()
        assert encode(native_tokenizer(model), "Fair?", ["Yes."]) == before

    def test_a_bare_tokenizer_that_reads_the_clock_is_warned_of(self, tokenizer):
        with pytest.warns(UserWarning, match="writes the day of today"):
            encode(with_template(tokenizer, CLOCK), "Fair?", ["Yes."])

    def test_scores_say_their_day_and_differ_by_it(self, dated, llama):
        behaviour = Behaviour("mine", (Example("Fair?", {"safe": "Yes.", "unsafe": "No."}),), split="calibration")
        prints = set()
        for date in ("2024-02-05", "2024-02-06"):
            model = load_model(dated, device="cpu", chat=ChatSettings(date=date))
            assert facts_of(model, behaviour, ScoringConfig(), method="importance")["date"] == date
            prints.add(scores_fingerprint(model, behaviour, unit="neuron"))
        assert len(prints) == 2
        assert "date" not in facts_of(llama, behaviour, ScoringConfig(), method="importance")

    def test_a_run_goes_on_with_the_day_on_which_it_was_begun(self, dated, tmp_path, tomorrow):
        begun = day.of_run(ModelConfig(str(dated)), tmp_path)
        assert begun.date == datetime.date.today().isoformat()
        (tmp_path / "config.json").write_text(json.dumps({"config": {"model": {"date": begun.date}}, "data": {}}))
        tomorrow()
        assert day.of_run(ModelConfig(str(dated)), tmp_path).date == begun.date
        assert day.of_run(ModelConfig(str(dated)), tmp_path / "other").date == "2031-01-01"

    def test_answers_of_another_day_are_not_gone_on_from(self, dated, tmp_path, tomorrow, killed_after_two_batches):
        n_neurons = load_model(dated, device="cpu").cfg.d_mlp
        Selection({Site(0, "neurons"): torch.arange(5)}, {Site(0, "neurons"): (n_neurons,)}).save(tmp_path / "chosen")
        step = AblateUnits(
            tmp_path / "chosen",
            n_prompts=4,
            answer_length=6,
            answer_batch=1,
            out=tmp_path / "answers.json",
            model=ModelConfig(str(dated), device="cpu"),
        )
        with killed_after_two_batches():
            do_ablate(step)
        tomorrow()
        resumed = do_ablate(step)
        assert resumed.record == do_ablate(replace(step, out=tmp_path / "fresh.json")).record

    def test_a_template_without_a_clock_has_no_day(self, checkpoints, tmp_path):
        assert day.of_run(ModelConfig(str(checkpoints["llama"])), tmp_path).date is None
        assert day.of_evaluation(ModelConfig(str(checkpoints["llama"])), tmp_path, []).date is None
        assert not list(tmp_path.iterdir())

    def test_an_evaluation_takes_the_day_of_the_scores_and_keeps_it(self, dated, tmp_path, tomorrow, finished_scores):
        scored = [replace(finished_scores, facts={"date": "2024-02-05"})] * 3
        tomorrow()
        assert day.of_evaluation(ModelConfig(str(dated)), tmp_path, scored).date == "2024-02-05"
        assert day.of_evaluation(ModelConfig(str(dated)), tmp_path, []).date == "2024-02-05"
        with pytest.raises(InputError, match="prompts of 2024-02-05, got date 2024-02-06"):
            day.of_evaluation(ModelConfig(str(dated), date="2024-02-06"), tmp_path, [])

    def test_scores_of_several_days_are_warned_of(self, finished_scores, caplog):
        scores = [replace(finished_scores, facts={"date": date}) for date in ("2024-02-05", "2024-02-06")]
        day.warn_of_days(scores)
        assert "another date" in caplog.text

    def test_the_exported_tokenizer_keeps_its_clock(self, dated):
        from dean_interp.models.native_tokenizer import loaded_tokenizer

        model = load_model(dated, device="cpu", chat=ChatSettings(date="2024-02-05"))
        assert loaded_tokenizer(model).chat_template == CLOCK.replace("CONTENT", "{{ m['content'] }}")

    def test_another_template_is_another_text(self, dated, checkpoints):
        """A run that is gone on with must not mix prompts of two templates."""
        model, again, other = (load_model(folder, device="cpu", chat=ChatSettings(date="2024-02-05"))
                               for folder in (checkpoints["llama-gqa"], checkpoints["llama-gqa"], dated))  # fmt: skip
        assert chat_parts(model) == chat_parts(again) != chat_parts(other)
        behaviour = Behaviour("one", (Example("May I?", {"response": "Yes."}),))
        found = [scores_fingerprint(one, behaviour, unit="neuron") for one in (model, again, other)]
        assert found[0] == found[1] != found[2]

    def test_no_day_is_refused(self, dated):
        with pytest.raises(InputError, match="date must be a day such as 2026-11-28, got 'May'"):
            load_model(dated, device="cpu", chat=ChatSettings(date="May"))


@pytest.fixture(scope="module")
def finished_scores(llama):
    from dean_interp.scoring.importance import importance

    behaviour = Behaviour("mine", (Example("Fair?", {"safe": "Yes.", "unsafe": "No."}),), split="calibration")
    return importance(llama, behaviour)


class TestThoughts:
    @pytest.mark.parametrize(
        ("template", "thinking", "end"),
        [
            (QWEN, "off", "<|assistant|><think>\n\n</think>\n\n"),
            (QWEN, "on", "<|assistant|>"),
            (R1, "off", "<|assistant|><think>\n\n</think>\n\n"),
            (R1, "on", "<|assistant|><think>\n"),
        ],
    )
    def test_thinking_is_switched_as_the_template_knows_it(self, tokenizer, template, thinking, end):
        switched, kept = with_settings(with_template(tokenizer, template), ChatSettings(thinking=thinking))
        assert rendered_chat(switched, user("Fair?")) == "<|user|>Fair?" + end
        assert kept.thinking == thinking

    @pytest.mark.parametrize(("thinking", "begin"), [("off", "/no_think"), ("on", "/think")])
    def test_a_switch_with_a_default_is_set_before_it(self, tokenizer, thinking, begin):
        switched, _ = with_settings(with_template(tokenizer, SMOLLM), ChatSettings(thinking=thinking))
        assert rendered_chat(switched, user("Fair?")).startswith(begin + "<|user|>")

    def test_a_template_without_a_switch_is_refused(self, checkpoints):
        with pytest.raises(InputError, match="no switch for thinking"):
            load_model(checkpoints["llama"], device="cpu", chat=ChatSettings(thinking="off"))

    def test_a_tokenizer_without_a_template_has_no_switch(self, tokenizer):
        with pytest.raises(InputError, match="has no chat template, so it has no switch for thinking"):
            with_settings(with_template(tokenizer, ""), ChatSettings(thinking="off"))

    def test_a_system_text_stands_in_chats_letter_by_letter(self, tokenizer):
        text = "It's \\n {{ no }} {% block %}\r\nSecond\rthird\n\ttab é"
        chat = with_system_text(tokenizer, text).apply_chat_template(user("Fair?"), tokenize=False)
        assert chat == f"<|system|>{text}<|user|>Fair?"

    def test_an_answer_is_what_stands_behind_its_thought(self):
        assert behind_thought("Yes.") == "Yes."
        assert behind_thought("<think>No?</think>\n\nYes.").strip() == "Yes."
        assert behind_thought("No?\n</think>Yes.") == "Yes."
        assert behind_thought("[THINK]No?[/THINK]Yes.") == "Yes."
        assert behind_thought("<think>\nI cannot") is None
        assert opened_thought("<|assistant|><think>\n") == "<think>\n" and not opened_thought("<think></think>")

    def test_judges_look_behind_the_thought(self):
        answers = ["<think>I'm sorry, I can't help with that.</think>The sky is blue by day.", "<think>\nI'm sorry"]
        for verdicts in (judged(LexicalJudge(), ["?", "?"], answers), LexicalJudge()(["?", "?"], answers)):
            assert [verdict.label for verdict in verdicts] == ["safe", None]
            assert verdicts[1].fault == "ends inside its thought"

    def test_a_judges_own_thought_is_no_verdict(self):
        assert QUESTION.verdict("<think>yes, or no?</think>no").label == "safe"
        assert QUESTION.verdict("yes it is\n</think>no").label == "safe"
        assert QUESTION.verdict("<think>no, since").fault == "ends inside its thought"

    def test_an_answer_that_ends_inside_its_thought_counts_in_no_share(self):
        behaviour = Behaviour("mine", (Example("a", {"safe": "b"}), Example("c", {"safe": "d"})), split="test")
        answers = ["<think>I'm sorry, I can't help.", "<think>Hm.</think>I'm sorry, I can't help with that."]
        outcomes = answer_outcomes("over_refusal", behaviour, answers, {}, 8)
        assert torch.tensor(outcomes[0].values).nan_to_num(-1).tolist() == [-1, 1]

    def test_special_marks_of_a_thought_are_kept_in_the_text(self, tokenizer):
        marked = deepcopy(tokenizer)
        marked.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
        ids = marked("[THINK]Hm.[/THINK]Yes.<eos>", add_special_tokens=False).input_ids
        assert decoded(marked, ids) == "[THINK]Hm.[/THINK]Yes."

    def test_an_answer_to_an_opened_thought_begins_with_its_mark(self, checkpoints, tokenizer, tmp_path):
        shutil.copytree(checkpoints["llama"], tmp_path / "m")
        with_template(tokenizer, R1).save_pretrained(tmp_path / "m")
        model = load_model(tmp_path / "m", device="cpu")
        (answer,) = generate(model, ["Fair?"], max_new_tokens=3)
        assert answer.startswith("<think>\n") and behind_thought(answer) is None
