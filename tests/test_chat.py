"""A chat with the original and the edited model: two histories, one user, one model, and a dose between turns."""

import copy
import io
import json
import re
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from units import logits_of, some_neurons, some_weights

from dean_interp import InputError, Scale, Selection, ablate, create_edit, generate, load_model
from dean_interp.cli.chat import COMMANDS
from dean_interp.cli.columns import n_cells, side_by_side, wrapped
from dean_interp.cli.main import main
from dean_interp.cli.terminal import Talk
from dean_interp.editing.ablation import gated
from dean_interp.editing.conversation import Conversation
from dean_interp.editing.edit_at_dose import at_dose, load_any_edit
from dean_interp.models.load import model_fingerprint
from dean_interp.models.matrices import neuron_sites
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.selection.gates import Gates, gates_of

LENGTH = 8


def some_gates(model, seed=0):
    """Gates between the limits, which change answers."""
    generator = torch.Generator().manual_seed(seed)
    return Gates({site: 2 * torch.rand(model.cfg.d_mlp, generator=generator) for site in neuron_sites(model)})


def conversation(model, edit, **options):
    return Conversation(model, edit, answer_length=LENGTH, **options)


def answered(model, text):
    """The answer to what a chat template gave."""
    return generate(model, [text], max_new_tokens=LENGTH, template="rendered")[0]


# Conversations


def test_dose_0_gives_the_originals_answers_to_the_letter(llama):
    talk = conversation(llama, some_gates(llama), dose=0.0)
    for prompt in ("Hello?", "And now?"):
        turn = talk.say(prompt)
        assert turn.edited == turn.original and turn.dose == 0
    assert talk.turns[0].original == generate(llama, ["Hello?"], max_new_tokens=LENGTH)[0]


def test_dose_1_gives_what_gated_models_generate(llama):
    gates = some_gates(llama)
    with gated(llama, gates):
        expected = generate(llama, ["Hello?"], max_new_tokens=LENGTH)[0]
    turn = conversation(llama, gates).say("Hello?")
    assert turn.edited == expected != turn.original


def test_each_side_remembers_its_own_answers_under_the_users_turns(llama, monkeypatch):
    gates, template, read = some_gates(llama), native_tokenizer(llama).apply_chat_template, []

    def generate_and_tell(model, prompts, **options):
        read.extend(prompts)
        return generate(model, prompts, **options)

    monkeypatch.setattr("dean_interp.editing.conversation.generate", generate_and_tell)
    talk = conversation(llama, gates, system="Speak.")
    first, second = talk.say("Hello?"), talk.say("And now?")
    assert first.original != first.edited
    expected = []
    for answer in (first.original, first.edited):
        history = [
            {"role": "system", "content": "Speak."},
            {"role": "user", "content": "Hello?"},
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "And now?"},
        ]
        expected.append(template(history, tokenize=False, add_generation_prompt=True))
    assert read[2:] == expected and second.original == answered(llama, expected[0])
    with gated(llama, gates):
        assert second.edited == answered(llama, expected[1])
    talk.reset()
    assert talk.turns == () and talk.say("Hello?") == first


def test_a_new_dose_between_turns_changes_the_edited_side_alone(llama):
    gates, answers = some_gates(llama), {}
    for dose in (1.0, -1.0):
        talk = conversation(llama, gates)
        talk.say("Hello?")
        talk.dose = dose
        answers[dose] = talk.say("And now?")
    assert answers[1.0].original == answers[-1.0].original
    assert answers[1.0].edited != answers[-1.0].edited and answers[-1.0].dose == -1


@pytest.mark.parametrize("choose", [some_neurons, some_weights])
def test_a_selection_is_silenced(llama, choose):
    selection = choose(llama, n=30)
    with ablate(llama, selection):
        silenced = logits_of(llama)
        expected = generate(llama, ["Hello?"], max_new_tokens=LENGTH)[0]
    with at_dose(llama, selection, 1.0):
        torch.testing.assert_close(logits_of(llama), silenced)
    turn = conversation(llama, selection).say("Hello?")
    assert turn.edited == expected != turn.original


# Doses


@pytest.mark.parametrize("dose", [-1.0, 0.25, 1.0, 3.0])
def test_a_dose_moves_gates_in_proportion_and_within_their_limits(llama, dose):
    gates = some_gates(llama)
    moved = {site: (1 + dose * (gate - 1)).clamp(0, 2) for site, gate in gates.multipliers.items()}
    with gated(llama, Gates(moved)):
        expected = logits_of(llama)
    with at_dose(llama, gates, dose):
        torch.testing.assert_close(logits_of(llama), expected)


@pytest.mark.parametrize("choose", [some_neurons, some_weights])
@pytest.mark.parametrize("dose", [-1.0, 0.25, 1.0, 3.0])
def test_a_dose_moves_weights_in_proportion(llama, choose, dose):
    """Weights are scaled by 1 + dose * (0.5 - 1)."""
    selection = choose(llama, n=30)
    with ablate(llama, selection, value=Scale(1 - 0.5 * dose)):
        expected = logits_of(llama)
    with at_dose(llama, create_edit(llama, selection, value=Scale(0.5)), dose):
        torch.testing.assert_close(logits_of(llama), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dose", [-1.0, 0.25])
def test_half_silenced_is_the_same_as_gates_and_as_weights(llama, dose):
    neurons = some_neurons(llama)
    with at_dose(llama, gates_of(neurons), dose):
        expected = logits_of(llama)
    for edit in (neurons, create_edit(llama, neurons)):
        with at_dose(llama, edit, dose):
            torch.testing.assert_close(logits_of(llama), expected, atol=1e-4, rtol=1e-4)
    weights = some_weights(llama)
    with at_dose(llama, create_edit(llama, weights), dose):
        expected = logits_of(llama)
    with at_dose(llama, weights, dose):
        torch.testing.assert_close(logits_of(llama), expected, atol=1e-4, rtol=1e-4)


def test_at_dose_1_gates_are_the_edit_also_beyond_the_usual_limits(llama):
    wide = gates_of(some_neurons(llama), multiplier=3.0)
    with gated(llama, wide):
        expected = logits_of(llama)
    with at_dose(llama, wide, 1.0):
        assert torch.equal(logits_of(llama), expected)


def test_units_of_another_kind_than_those_that_are_edited_are_refused(llama):
    neurons = some_neurons(llama)
    edit = create_edit(llama, neurons)
    with pytest.raises(InputError, match="units must be among those that the edit changes"):
        with at_dose(llama, edit, 1.0, units=neurons):
            pass


def test_at_dose_1_weights_are_the_edits_to_the_bit(llama):
    edit = create_edit(llama, some_weights(llama), value=Scale(0.3))
    selection, value = edit.hooked()
    with ablate(llama, selection, value=value):
        expected = logits_of(llama)
    with at_dose(llama, edit, 1.0):
        assert torch.equal(logits_of(llama), expected)


def test_the_model_is_restored_after_a_turn_and_after_an_exception(llama):
    plain, weights = logits_of(llama), model_fingerprint(llama)
    for edit in (some_gates(llama), some_weights(llama), create_edit(llama, some_neurons(llama))):
        talk = conversation(llama, edit)
        talk.say("Hello?")
        assert torch.equal(logits_of(llama), plain) and model_fingerprint(llama) == weights
        with pytest.raises(KeyError), at_dose(llama, edit, 0.5):
            raise KeyError
        assert torch.equal(logits_of(llama), plain)


# What is refused


@pytest.mark.parametrize("dose", [float("nan"), float("inf"), -1001.0])
def test_a_dose_out_of_range_is_refused_and_the_old_one_kept(llama, dose):
    talk = conversation(llama, some_gates(llama), dose=0.5)
    with pytest.raises(InputError, match=re.escape("dose must be from -1000 to 1000 (0 is the original, 1 the edit)")):
        talk.dose = dose
    assert talk.dose == 0.5
    with pytest.raises(InputError, match="dose must be"):
        conversation(llama, some_gates(llama), dose=dose)


def test_an_edit_that_is_not_of_the_model_or_changes_nothing_is_refused(llama, checkpoints, one_layer):
    for edit in (some_gates(llama), some_weights(llama)):
        with pytest.raises(InputError, match="not of this model"):
            conversation(load_model(one_layer, device="cpu"), edit)
    same_shape = load_model(checkpoints["qwen2"], device="cpu")
    with pytest.raises(InputError, match="is neither the base of this edit nor its result"):
        conversation(llama, create_edit(same_shape, some_neurons(same_shape)))
    neurons = some_neurons(llama)
    nothing = Selection({site: units[:0] for site, units in neurons.units.items()}, neurons.shapes)
    for edit in (some_gates(llama) * 0.0, nothing):
        with pytest.raises(InputError, match="changes nothing"):
            conversation(llama, edit)


def test_a_model_that_has_no_chat_template_or_knows_no_system_message_is_refused(checkpoints, tokenizer):
    plain = load_model(checkpoints["llama"], device="cpu").original_model
    for template, said in (("", "has no chat template"), ("{{ raise_exception('no system') }}", "refuses messages by")):
        other = copy.deepcopy(tokenizer)
        other.chat_template = template
        model = load_model(plain, tokenizer=other)
        with pytest.raises(InputError, match=said):
            conversation(model, some_gates(model), system="Be brief.")


def test_a_conversation_that_has_grown_too_long_is_refused_and_can_be_reset(llama):
    talk = conversation(llama, some_gates(llama))
    talk.say("Hello?")
    with pytest.raises(InputError, match="is more than the 1024 that the model takes"):
        talk.say("word " * 300)
    assert len(talk.turns) == 1


# Files


def test_gates_selections_and_edits_are_told_apart_by_their_files(llama, tmp_path):
    gates, selection = some_gates(llama), some_neurons(llama)
    edit = create_edit(llama, selection)
    for name, saved in (("a", gates), ("b", selection), ("c", edit)):
        saved.save(tmp_path / name)
    assert load_any_edit(tmp_path / "a").fingerprint == gates.fingerprint
    assert load_any_edit(tmp_path / "b").fingerprint == selection.fingerprint
    assert load_any_edit(tmp_path / "c").digest == edit.digest


def test_a_file_that_is_something_else_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no file .*gone: give a gates file, a selection file or an edit file"):
        load_any_edit(tmp_path / "gone")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(InputError, match="is not a gates file, a selection file or an edit file"):
        load_any_edit(tmp_path / "text")


# The command


@pytest.fixture(scope="module")
def files(llama, tmp_path_factory):
    """A folder with gates and a selection of the model."""
    folder = tmp_path_factory.mktemp("chat")
    some_gates(llama).save(folder / "gates")
    some_neurons(llama, n=30).save(folder / "selection")
    return folder


@pytest.fixture
def chat(files, checkpoints, monkeypatch):
    """Run the command on these lines of stdin; `person` types them at a terminal."""

    def run(lines, *options, edit="gates", model="llama-gqa", person=False):
        stdin = io.StringIO("".join(f"{line}\n" for line in lines))
        monkeypatch.setattr(stdin, "isatty", lambda: person)
        monkeypatch.setattr(sys, "stdin", stdin)
        model = checkpoints.get(model, model)
        command = ["chat", "--edit", files / edit, "--model", model, "--device", "cpu", "--answer-length", LENGTH]
        return main([*map(str, command), *map(str, options)])

    return run


@pytest.fixture
def terminal(monkeypatch):
    """Standard output is a terminal of so many columns."""

    def of(columns):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(columns))

    return of


def test_a_pipe_with_json_gives_one_object_with_the_turns(chat, llama, capsys):
    lines = ["Hello?", "", "/dose 0.5", "And now?", "/reset", "Hello?"]
    assert chat(lines, "--system", "Speak.", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    talk = conversation(llama, some_gates(llama), system="Speak.")
    first = talk.say("Hello?")
    talk.dose = 0.5
    expected = [(1, first), (1, talk.say("And now?"))]
    talk.reset()
    expected.append((2, talk.say("Hello?")))
    assert [turn.pop("conversation") for turn in record["turns"]] == [number for number, _ in expected]
    assert record["turns"] == [vars(turn) for _, turn in expected] and record["system"] == "Speak."


def test_a_pipe_gets_prompts_and_answers_on_standard_output_and_nothing_else(chat, llama, capsys, monkeypatch):
    def loud(*args, **options):
        sys.stdout.write("a library's greeting\n")
        return generate(*args, **options)

    monkeypatch.setattr("dean_interp.editing.conversation.generate", loud)
    assert chat(["Hm. Hello?"], edit="selection") == 0
    said = capsys.readouterr()
    turn = conversation(llama, some_neurons(llama, n=30)).say("Hm. Hello?")
    assert turn.original != turn.edited and "a library's greeting" in said.err
    assert said.out == f"> Hm. Hello?\n\noriginal:\n{turn.original}\n\nedited, dose 1.00:\n{turn.edited}\n\n"


def test_equal_answers_are_said_to_be_equal_and_shown_once(chat, llama, capsys):
    assert chat(["Hello?"], "--dose", 0) == 0
    answer = generate(llama, ["Hello?"], max_new_tokens=LENGTH)[0]
    title = "original and edited, dose 0.00: the same answer, to the letter"
    assert capsys.readouterr().out == f"> Hello?\n\n{title}\n{answer}\n\n"


def test_a_person_changes_the_dose_begins_anew_and_is_told_of_mistakes(chat, capsys):
    lines = ["/dose 0.125", "/dose much", "/dose 1e9", "/reset", "/help", "/shout", "/quit", "Hello?"]
    assert chat(lines, person=True) == 0
    said = capsys.readouterr().out.splitlines()[2:]
    assert said[:2] == ["dose 0.125", "dose must be a number, such as 0.5, got 'much'; it stays 0.125"]
    assert said[2].startswith("dose must be from -1000 to 1000") and said[2].endswith("it stays 0.125")
    allowed = [command.split()[0] for command in COMMANDS]
    assert said[3] == "a new conversation" and [line.split()[0] for line in said[4:8]] == allowed
    assert said[8].startswith(f"there is no command /shout, only {', '.join(COMMANDS)}") and len(said) == 9


def test_a_wrong_line_of_a_pipe_ends_the_command_and_is_named(chat, capsys):
    for line, said in (
        ("/dose much", "dose must be a number, such as 0.5, got 'much'\n"),
        ("/shout", "there is no command /shout"),
    ):
        assert chat(["", line, "Hello?"]) == 2
        told = capsys.readouterr()
        assert told.out == "" and told.err.startswith(f"dean-interp: line 2: {said}") and told.err.count("\n") == 1


@pytest.mark.parametrize(("person", "code"), [(True, 0), (False, 130)])
def test_ctrl_c_ends_a_chat_calmly_and_a_pipe_as_interrupted(chat, capsys, monkeypatch, person, code):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("dean_interp.editing.conversation.generate", interrupted)
    assert chat(["Hello?"], person=person) == code
    assert "Traceback" not in capsys.readouterr().err


def test_answers_stand_side_by_side_where_the_terminal_has_room(chat, terminal, capsys):
    terminal(80)
    assert chat(["Hm. Hello?"], person=True) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if " | " in line]
    assert [cell.strip("> ") for cell in rows[0]] == ["original", "edited, dose 1.00"] and len(rows) >= 3
    terminal(79)
    assert chat(["Hm. Hello?"], person=True) == 0
    said = capsys.readouterr().out
    assert "> original:\n" in said and "\nedited, dose 1.00:\n" in said and "Hm." not in said


def test_with_json_a_person_is_answered_on_standard_error(chat, capsys):
    assert chat(["Hm. Hello?"], "--json", person=True) == 0
    said = capsys.readouterr()
    (turn,) = json.loads(said.out)["turns"]
    assert f"original:\n{turn['original']}\n" in said.err


def test_a_transcript_is_written_only_where_it_is_asked_for(chat, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert chat(["Hello?"], "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())
    assert chat(["Hello?"], "--out", "transcript.json") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["transcript.json"]
    assert json.loads((tmp_path / "transcript.json").read_text()) == record


@pytest.mark.parametrize(
    ("options", "given", "said"),
    [
        ([], {"edit": "gone"}, "give a gates file, a selection file or an edit file"),
        ([], {"model": "one layer"}, "the selection is not of this model"),
        (["--dose", "nan"], {}, "dose must be from -1000 to 1000 (0 is the original, 1 the edit), got nan"),
        (["--answer-length", "0"], {}, "--answer-length must be at least 1, got 0"),
    ],
)
def test_each_mistake_is_one_line_and_exit_code_2(chat, one_layer, capsys, options, given, said):
    if given.get("model") == "one layer":
        given = {"model": one_layer}
    assert chat(["Hello?"], *options, **given) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith("dean-interp: ") and said in told.err and told.err.count("\n") == 1


def test_lines_that_are_no_text_are_the_users_mistake():
    talk = Talk(io.TextIOWrapper(io.BytesIO(b"Hello?\n\xff\xfe\n"), "utf-8"), sys.stdout)
    with pytest.raises(InputError, match="stdin must be text in utf-8, got other bytes"):
        list(talk.lines())
    assert list(Talk(None, sys.stdout).lines()) == []


# Columns


@given(text=st.text(alphabet="ab 漢é\u0301\t\x1b\n", max_size=60), width=st.integers(8, 30))
def test_no_line_is_wider_than_its_column_and_no_letter_is_lost(text, width):
    lines = wrapped(text, width)
    assert all(n_cells(line) <= width and line.isprintable() for line in lines)
    kept = "".join(lines).replace(" ", "").replace("\\x1b", "\x1b")
    assert kept == re.sub(r"\s", "", text)


def test_columns_keep_their_place_beside_wide_letters():
    shown = side_by_side("漢字 and more", "    indented", titles=("left", "right"), width=19)
    assert shown.splitlines() == [
        "left     | right",
        "-------- | --------",
        "漢字 and |     inde",
        "more     | nted",
    ]
