import dataclasses
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from dean_interp import InputError, load_behaviour, load_model, measure
from dean_interp.fine_tuning import FineTuningConfig, _rows, fine_tune
from dean_interp.models import chat_settings
from dean_interp.models.load import model_fingerprint
from dean_interp.models.scored_prompts import measuring_scored_prompts

pytestmark = pytest.mark.filterwarnings("ignore")  # of the trainer and its packages
SHORT = FineTuningConfig(n_steps=6, batch_size=4, every=2, learning_rate=3e-3)


@pytest.fixture(scope="module")
def behaviour():
    return load_behaviour("privacy", n_examples=8)


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_the_answers_that_were_trained_on_become_likelier_and_the_model_is_a_checkpoint(
    checkpoints, behaviour, tmp_path, method
):
    how = dataclasses.replace(SHORT, method=method, n_steps=8, learning_rate=None if method == "full" else 1e-2)
    how = dataclasses.replace(how, learning_rate=how.learning_rate or 3e-3)
    seen = {}
    folder = fine_tune(checkpoints["llama"], [behaviour], how, folder=tmp_path,
                       watch=lambda step, model: seen.update({step: loss(model, behaviour)}), device="cpu")  # fmt: skip
    assert list(seen) == [2, 4, 6, 8]
    before = loss(load_model(checkpoints["llama"], device="cpu"), behaviour)
    assert seen[8] < seen[2] < before
    trained = load_model(folder, device="cpu")
    assert loss(trained, behaviour) == pytest.approx(seen[8], rel=1e-4)
    assert not any("lora" in name for name in weights(folder))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "config.json"}
    changed = [
        name for name, old in weights(checkpoints["llama"]).items() if not torch.equal(old, weights(folder)[name])
    ]
    embeds = [name for name in changed if "embed" in name]
    assert bool(embeds) == (method == "full") and any("mlp.down_proj" in name for name in changed)


def loss(model, behaviour):
    """Mean cross-entropy of the trained answers, by the library's own measurement."""
    alone = tuple(dataclasses.replace(one, answers={"response": one.answers["safe"]}) for one in behaviour.examples)
    test = dataclasses.replace(behaviour, split=None, examples=alone)
    with measuring_scored_prompts(model):
        found = measure(model, [test])
    return float(-found[test.name].log_prob.mean())


def test_a_killed_fine_tuning_goes_on_to_the_same_weights_and_a_finished_one_is_not_repeated(
    checkpoints, behaviour, tmp_path
):
    whole = fine_tune(checkpoints["llama"], [behaviour], SHORT, folder=tmp_path / "whole", device="cpu")

    def killed(step, model):
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(checkpoints["llama"], [behaviour], SHORT, folder=tmp_path / "cut", watch=killed, device="cpu")
    seen = []
    cut = fine_tune(checkpoints["llama"], [behaviour], SHORT, folder=tmp_path / "cut", device="cpu",
                    watch=lambda step, model: seen.append(step))  # fmt: skip
    assert seen == [4, 6], "step 4 was not yet looked at to the end"
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], value, atol=0, rtol=0)
    again = fine_tune(checkpoints["llama"], [behaviour], SHORT, folder=tmp_path / "cut", device="cpu",
                      watch=lambda step, model: pytest.fail("trained again"))  # fmt: skip
    assert again == cut


def killed_at(last, name, behaviours, folder):
    """A fine-tuning that was killed while the model was looked at after its step `last`."""

    def kill(step, model):
        if step == last:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(name, behaviours, SHORT, folder=folder, watch=kill, device="cpu")


@pytest.fixture(scope="module", params=["finished", "killed"])
def begun(request, checkpoints, behaviour, tmp_path_factory):
    """A folder with a fine-tuning, and a copy of the model that it was begun with."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(checkpoints["llama"], folder / "base")
    if request.param == "finished":
        fine_tune(folder / "base", [behaviour], SHORT, folder=folder / "tuned", device="cpu")
    else:
        killed_at(4, folder / "base", [behaviour], folder / "tuned")
    return folder


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


OTHERS = {
    "another rate": ({"learning_rate": 1e-3}, {}, r"another learning_rate \(0.003 there, 0.001 now\)"),
    "more steps": ({"n_steps": 8}, {}, r"another n_steps \(6 there, 8 now\)"),
    "another method": ({"method": "lora"}, {}, r"another method \(full there, lora now\)"),
    "another template": ({}, {"template": "raw"}, r"another template \(chat there, raw now\)"),
    "other numbers": ({}, {"dtype": "bfloat16"}, r"another model_fingerprint"),
}


@pytest.mark.parametrize(("how", "options", "said"), OTHERS.values(), ids=OTHERS)
def test_a_folder_with_a_fine_tuning_by_other_settings_is_refused_and_what_differs_is_named(
    begun, behaviour, how, options, said
):
    before = content(begun)
    with pytest.raises(InputError, match=f"tuned holds a run with {said}.*choose another folder"):
        fine_tune(begun / "base", [behaviour], dataclasses.replace(SHORT, **how), folder=begun / "tuned",
                  device="cpu", **options)  # fmt: skip
    assert content(begun) == before


def test_a_folder_with_a_fine_tuning_on_other_examples_is_refused(begun, behaviour):
    before = content(begun)
    fewer = dataclasses.replace(behaviour, examples=behaviour.examples[:-1])
    unsafe = dataclasses.replace(behaviour, response="unsafe")
    general = load_behaviour("general", n_examples=8)
    changed, another = r"the data of privacy \(calibration\) changed", "holds a run with another behaviours"
    sets = {"fewer": ([fewer], changed), "unsafe": ([unsafe], changed), "others": ([general], another)}
    sets["more"] = ([behaviour, general], another)
    for behaviours, said in sets.values():
        with pytest.raises(InputError, match=said):
            fine_tune(begun / "base", behaviours, SHORT, folder=begun / "tuned", device="cpu")
    assert content(begun) == before


def test_a_fine_tuning_of_another_model_under_the_same_name_is_refused(begun, behaviour):
    model = AutoModelForCausalLM.from_pretrained(begun / "base")
    kept = shutil.copytree(begun / "base", begun / "kept")
    with torch.no_grad():
        next(model.parameters())[0] += 1
    model.save_pretrained(begun / "base")
    with pytest.raises(InputError, match=r"tuned holds a run with another model_fingerprint \(\w+ there, \w+ now\)"):
        fine_tune(begun / "base", [behaviour], SHORT, folder=begun / "tuned", device="cpu")
    shutil.copytree(kept, begun / "base", dirs_exist_ok=True)


def test_a_learning_rate_that_is_unset_is_the_one_that_it_stands_for(checkpoints, behaviour, tmp_path):
    unset = dataclasses.replace(SHORT, n_steps=2, learning_rate=None)
    result = fine_tune(checkpoints["llama"], [behaviour], unset, folder=tmp_path, device="cpu")
    said = dataclasses.replace(unset, learning_rate=2e-5)
    assert fine_tune(checkpoints["llama"], [behaviour], said, folder=tmp_path, device="cpu") == result


def test_a_fine_tuning_of_which_nothing_is_finished_begins_anew_with_other_settings(checkpoints, behaviour, tmp_path):
    killed_at(2, checkpoints["llama"], [behaviour], tmp_path / "cut")
    other = dataclasses.replace(SHORT, learning_rate=1e-3)
    cut = fine_tune(checkpoints["llama"], [behaviour], other, folder=tmp_path / "cut", device="cpu")
    whole = fine_tune(checkpoints["llama"], [behaviour], other, folder=tmp_path / "whole", device="cpu")
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], value, atol=0, rtol=0)


def test_a_fine_tuning_that_goes_on_on_another_day_has_the_prompts_of_the_first(
    checkpoints, behaviour, tokenizer, tmp_path, monkeypatch
):
    base = shutil.copytree(checkpoints["llama"], tmp_path / "base")
    clock = "{{ strftime_now('%d %b %Y') }} {% for message in messages %}{{ message.content }} {% endfor %}"
    (base / "chat_template.jinja").write_text(clock)
    monkeypatch.setattr(chat_settings, "today", lambda: "2031-01-01")
    whole = fine_tune(base, [behaviour], SHORT, folder=tmp_path / "whole", device="cpu")
    killed_at(4, base, [behaviour], tmp_path / "cut")
    monkeypatch.setattr(chat_settings, "today", lambda: "2031-01-02")
    cut = fine_tune(base, [behaviour], SHORT, folder=tmp_path / "cut", device="cpu")
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], value, atol=0, rtol=0)


def test_only_answers_and_the_end_of_text_are_learned(behaviour, tokenizer):
    for row, prompt, answer in zip(
        _rows(tokenizer, behaviour, "chat"), behaviour.prompts, behaviour.responses, strict=True
    ):
        learned = [token for token in row["labels"] if token != -100]
        assert tokenizer.decode(learned).startswith(answer) and learned[-1] == tokenizer.eos_token_id
        assert prompt in tokenizer.decode(row["input_ids"]) and len(row["labels"]) == len(row["input_ids"])


def test_what_was_trained_on_is_not_measured(checkpoints, behaviour, tmp_path):
    asked = []

    def watch(step, model):
        asked.append(step)
        with pytest.raises(InputError, match="scored"):
            measure(model, [dataclasses.replace(behaviour, split="test")])

    fine_tune(checkpoints["llama"], [behaviour], dataclasses.replace(SHORT, n_steps=2), folder=tmp_path, watch=watch,
              device="cpu")  # fmt: skip
    assert asked, "the model was watched"


def test_the_seed_decides_and_nothing_else(checkpoints, behaviour, tmp_path):
    prints = [
        model_fingerprint(load_model(fine_tune(
            checkpoints["llama"], [behaviour], dataclasses.replace(SHORT, method="lora", seed=seed),
            folder=tmp_path / name, device="cpu",
        ), device="cpu"))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]  # fmt: skip
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("method", "reft", "method must be one of full, lora, dora"), ("n_steps", 0, "n_steps must be at least 1"),
     ("every", 4, "n_steps must be a multiple of every"), ("learning_rate", 0.0, "learning_rate must be above 0")],
)  # fmt: skip
def test_wrong_settings_are_named_before_a_model_is_loaded(behaviour, tmp_path, name, value, said):
    how = dataclasses.replace(SHORT)
    object.__setattr__(how, name, value)  # past the type check of the tests
    with pytest.raises(InputError, match=said):
        fine_tune("no-such-model", [behaviour], how, folder=tmp_path)


def test_test_prompts_are_not_trained_on(tmp_path):
    with pytest.raises(InputError, match="calibration splits"):
        fine_tune("no-such-model", [load_behaviour("privacy", n_examples=4, split="test")], SHORT, folder=tmp_path)
    assert not list(tmp_path.iterdir())
