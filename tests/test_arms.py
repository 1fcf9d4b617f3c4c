"""The contract of arms: each undoes itself to the bit, refuses wrong input, and never reads a confirming prompt."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from planted_gates import planted_model, planted_settings
from units import logits_of

from dean_interp import Behaviour, Example, InputError, generate, load_model
from dean_interp.arms.all_arms import TOGETHER, all_arms
from dean_interp.arms.arm import Arm, Change, flipped
from dean_interp.arms.comparison import ComparisonConfig, begun, piece_folder, records_of, refuse_chosen_on
from dean_interp.arms.measured_arms import arm_record, name_together
from dean_interp.arms.pieces import compare_arms
from dean_interp.arms.sealed import SealBrokenError, sealed
from dean_interp.arms.system_prompt import LONG, SHORT, SystemPromptArm, SystemText
from dean_interp.errors import NothingToChangeError
from dean_interp.evaluation.measure import measure
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.models.tokens import encode
from dean_interp.study.improve_data import improve_data
from dean_interp.study.store import file_name

ARMS = all_arms(1)
every_arm = pytest.mark.parametrize("arm", ARMS, ids=[arm.name for arm in ARMS])
pytestmark = pytest.mark.hooks


@pytest.fixture(scope="module")
def work(tokenizer, tmp_path_factory):
    """A planted model whose chats have a system turn, and what its arms share."""
    folder = tmp_path_factory.mktemp("arms")
    study = planted_settings(folder, tokenizer, n_ctx=1024, template="chat", n_confirm=24, n_flips=2, n_random=1)
    config = ComparisonConfig(kls=(0.05,), n_choices=2, study=study)
    return begun(folder / "run", config, improve_data(study), load_model(folder / "model", device="cpu"))


def fitted(work, arm, **changes) -> Change:
    """The change of an arm under the first of its settings."""
    settings = {name: values[0] for name, values in arm.choices.items()}
    if "fraction" in settings:
        # Matrices this small hold too few weights for the paper's fractions.
        settings["fraction"] = 0.02 if "weights" in arm.name else 0.1
    return arm.fit(dataclasses.replace(work.examples(arm), **changes), settings)


def bits_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_every_arm_keeps_the_protocol_and_has_files_of_its_own():
    assert all(isinstance(arm, Arm) for arm in ARMS)
    names = [arm.name for arm in ARMS] + [name_together(prompt, arm) for prompt, arm in TOGETHER]
    assert len({file_name(name).lower() for name in names}) == len(names)
    for arm in ARMS:
        assert arm.source and all(len(set(values)) == len(values) > 1 for values in arm.choices.values())


@every_arm
def test_an_arm_undoes_itself_to_the_bit(work, arm):
    model = work.model
    with work.sealed():
        change = fitted(work, arm)
    assert isinstance(change, Change) and change.n_bytes >= 0
    before, parameters, chats = logits_of(model), bits_of(model), native_tokenizer(model)
    with change.at(0.0).applied(model):
        assert torch.equal(logits_of(model), before)
    dose = min(change.largest_dose, 2 * change.first_dose)
    with pytest.raises(ZeroDivisionError), change.at(dose).applied(model):
        generate(model, ["what follows f?"], max_new_tokens=4)
        raise ZeroDivisionError
    assert torch.equal(logits_of(model), before) and native_tokenizer(model) is chats
    after = bits_of(model)
    assert all(torch.equal(parameter, after[name]) for name, parameter in parameters.items())


@every_arm
def test_an_arm_gives_the_same_change_again(work, arm):
    changes = [fitted(work, arm) for _ in range(2)]
    dose = changes[0].first_dose
    assert changes[0].at(dose).fingerprint == changes[1].at(dose).fingerprint != ""


@every_arm
@pytest.mark.filterwarnings("ignore:the ablation of:UserWarning")
def test_an_arm_that_knows_labels_takes_flipped_ones(work, arm):
    first, second = work.data.scoring[:2]
    flip = tuple({example.cluster: -1 for example in behaviour.examples} for behaviour in (first, second))
    change = fitted(work, arm)
    try:
        turned = fitted(work, arm, flip=flip, own_folder=work.folder / "flips" / file_name(arm.name))
    except NothingToChangeError:
        assert arm.uses_labels
        return
    dose = min(change.first_dose, turned.first_dose)
    logits = []
    for each in (change, turned):
        with each.at(dose).applied(work.model):
            logits.append(logits_of(work.model))
    is_same = torch.allclose(logits[0], logits[1], atol=1e-5)
    # A direction and its opposite are the same when they are taken out.
    assert is_same == (not arm.uses_labels or arm.name == "directional ablation")


@every_arm
def test_an_arm_that_knows_labels_refuses_behaviours_without_pairs(work, arm):
    if not arm.uses_labels:
        pytest.skip("it reads safe answers alone")
    plain = tuple(
        dataclasses.replace(behaviour, examples=tuple(Example(e.prompt, {"response": "x"}) for e in behaviour.examples))
        for behaviour in work.data.scoring[:2]
    )
    settings = {name: values[0] for name, values in arm.choices.items()}
    examples = work.examples(arm)
    given = dataclasses.replace(
        examples,
        scoring=(*plain, *examples.scoring[2:]),
        folder=work.folder / "unpaired" / file_name(arm.name),
        own_folder=work.folder / "unpaired" / file_name(arm.name) / "own",
    )
    with pytest.raises(InputError):
        arm.fit(given, settings)


def test_the_arm_of_the_documentation_keeps_the_contract(work):
    page = (Path(__file__).parents[1] / "docs" / "how_to" / "add_an_arm.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict = {}
    exec(compile(code, "add_an_arm.md", "exec"), names)
    arm = names["MostImportant"]()
    assert isinstance(arm, Arm)
    with work.sealed():
        change = fitted(work, arm)
    # The neurons that matter fire at these letters.
    tokens = torch.tensor([native_tokenizer(work.model)("ffYpN").input_ids])
    with torch.inference_mode():
        before = work.model(tokens, return_type="logits")
        with change.at(1.0).applied(work.model):
            assert not torch.equal(work.model(tokens, return_type="logits"), before)
        assert torch.equal(work.model(tokens, return_type="logits"), before)


def test_flipped_labels_change_roles_by_topic_and_leave_out_what_has_no_sign():
    examples = [Example(f"prompt {i}", {"safe": f"s{i}", "unsafe": f"u{i}"}, f"topic {i}") for i in range(3)]
    behaviour = Behaviour("pairs", tuple(examples))
    turned = flipped(behaviour, {"topic 0": 1, "topic 1": -1})
    assert [example.answers["safe"] for example in turned.examples] == ["s0", "u1"]


def test_a_sealed_prompt_cannot_be_read_by_any_model(work):
    model, confirming = work.model, work.data.confirming
    prompt = confirming[0].prompts[0]
    tokenizer = native_tokenizer(model)
    allowed = work.data.choosing[0].prompts[0]
    with sealed(tokenizer, confirming):
        generate(model, [allowed], max_new_tokens=2)
        for broken in ([prompt], [allowed, f"{prompt} "]):
            with pytest.raises(SealBrokenError, match=confirming[0].name):
                generate(model, broken, max_new_tokens=2)
        # A copy of the model, and the prompt in another template.
        plain = planted_model(tokenizer)
        with pytest.raises(SealBrokenError):
            plain(torch.tensor([tokenizer(f"say: {prompt} now").input_ids]))
        with pytest.raises(SealBrokenError):
            measure(model, confirming)
    measure(model, confirming)


@dataclasses.dataclass(frozen=True)
class Cheat:
    """An arm that looks at confirming prompts while it is fitted."""

    confirming: Behaviour
    name: str = "cheat"
    kind: str = "gates"
    source: str = "nowhere"
    uses_labels: bool = True

    @property
    def choices(self):
        return {}

    def fit(self, examples, settings):
        measure(examples.model, [self.confirming])
        raise AssertionError("it was let through")


def test_an_arm_that_reads_confirming_prompts_stops_the_comparison(work):
    with pytest.raises(SealBrokenError, match="it is for confirming"):
        compare_arms(work, [Cheat(work.data.confirming[1])])
    assert not records_of(work.folder, ["cheat"])


def test_a_killed_comparison_goes_on_and_ends_in_the_same_record(work, monkeypatch):
    arm = next(arm for arm in ARMS if arm.name == "gates, closed form")
    whole = arm_record(work, arm)
    calls = []
    from dean_interp.arms import measured_arms

    whole_measured = measured_arms.measured_state

    def killed(*args, **kwargs):
        calls.append(args[1].name)
        raise KeyboardInterrupt

    monkeypatch.setattr(measured_arms, "measured_state", killed)
    with pytest.raises(KeyboardInterrupt):
        compare_arms(work, [arm])
    assert calls and not (piece_folder(work.folder, arm.name) / "arm.json").is_file()
    monkeypatch.setattr(measured_arms, "measured_state", whole_measured)
    compare_arms(work, [arm])
    record = records_of(work.folder, [arm.name])[arm.name]
    assert dataclasses.replace(record, seconds=0.0) == dataclasses.replace(whole, seconds=0.0)


def test_further_data_that_chose_something_are_refused(work):
    scored = work.data.scoring[0]
    with pytest.raises(InputError, match="score or choose"):
        refuse_chosen_on(work.data, [dataclasses.replace(scored, name="again")])
    plain = dataclasses.replace(scored, name="plain", examples=(Example("new?", {"response": "x"}),))
    with pytest.raises(InputError, match="two answers"):
        refuse_chosen_on(work.data, [plain])


def test_a_system_prompt_stands_in_every_chat_and_is_gone_afterwards(work):
    model, text = work.model, "Be kind.\nIt's \\fine {{here}}."
    tokenizer = native_tokenizer(model)
    plain = encode(tokenizer, "hello", ["you"], template="chat")
    with SystemText(text).applied(model):
        prompted = encode(native_tokenizer(model), "hello", ["you"], template="chat")
        general = measure(model, [work.data.choosing[2]])
    assert text in tokenizer.decode(prompted.prompt) and prompted.answers == plain.answers
    assert list(prompted.prompt)[-len(plain.prompt) :] == list(plain.prompt)
    assert encode(native_tokenizer(model), "hello", ["you"], template="chat") == plain
    # The same answers are measured, behind longer prompts.
    name = work.data.choosing[2].name
    assert torch.equal(general[name].n_tokens, measure(model, [work.data.choosing[2]])[name].n_tokens)


def test_a_system_prompt_is_refused_where_chats_have_no_system_turn(work, tokenizer):
    import copy

    from dean_interp.models.chat_settings import with_system_text
    from dean_interp.models.templates import rendered_chat

    strict = copy.copy(tokenizer)
    strict.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        "<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(InputError, match="no system turn"):
        rendered_chat(with_system_text(strict, SHORT), [{"role": "user", "content": "hi"}])
    raw = dataclasses.replace(work.config.study, model=dataclasses.replace(work.config.study.model, template="raw"))
    arm = SystemPromptArm("long", LONG)
    with pytest.raises(InputError, match="template"):
        arm.fit(dataclasses.replace(work.examples(arm), config=raw), {})
