"""Every command, fed with every kind of wrong input: exit code 2 and one line, before a model is read.

Commands and their options are found in the command line itself. A new option that names something must be given a kind
in `KINDS`; until then the test fails and says so.
"""

import dataclasses
import os
import types
import typing
from pathlib import Path

import pytest
from tyro.conf import Positional

from dean_interp import ScoringConfig, create_edit, importance, load_behaviour
from dean_interp.cli import edits, main
from dean_interp.cli.help_examples import EXAMPLES
from dean_interp.cli.steps import Step
from dean_interp.errors import InputError
from dean_interp.selection.selection import top_fraction
from dean_interp.study import settings

READ = "the model is read now"
DATA = "sets name behaviour behaviours first second general register harmful over_refusal scored_data"
KINDS = {name: "data" for name in DATA.split()} | {
    "text": "text",
    "scores": "scores",
    "selection": "selection",
    "selections": "selection",
    "edit": "edit",
    "edits": "edit",
    "checkpoint": "checkpoint",
    "run": "run",
    "folders": "run",
    "task_folder": "task folder",
    "model": "model",
    "tokenizer": "tokenizer",
    "out": "out",
    **dict.fromkeys("prompts system expression neuron value values judges tasks answers_from".split(), "words"),
}
"""What each option that takes a text or a path names; `words` are no names of anything on the disk."""
ANY_NUMBER = {"dose"}
"""Options to which -1 is a number like any other."""


@dataclasses.dataclass(frozen=True)
class Option:
    name: str
    of: type
    is_positional: bool
    is_required: bool

    @property
    def kinds_of_value(self):
        return {*_leaves(self.of)}

    @property
    def kind(self):
        if not {str, Path} & self.kinds_of_value:
            return None
        # `edit diff` calls its two files first and second, too
        return "edit" if self.name in ("first", "second") and self.of is Path else KINDS.get(self.name)

    def words(self, *values):
        return [*values] if self.is_positional else [f"--{self.name.replace('_', '-')}", *values]


def _leaves(of):
    if typing.get_origin(of) is typing.Literal:
        return
    arguments = typing.get_args(of)
    if not arguments:
        yield of
    for argument in arguments:
        yield from _leaves(argument)


def _bare(of):
    """A type without its annotations, and these."""
    if typing.get_origin(of) is typing.Annotated:
        inner, *notes = typing.get_args(of)
        of, outer = _bare(inner)
        return of, [*notes, *outer]
    return of, []


def _options(step):
    found = []
    hints = typing.get_type_hints(step, include_extras=True)
    positional = {*typing.get_args(Positional[int])[1:]}
    for field in dataclasses.fields(step):
        of, notes = _bare(hints[field.name])
        is_required = field.default is field.default_factory is dataclasses.MISSING
        if dataclasses.is_dataclass(of):
            found += _options(of)
            continue
        names = [note.name for note in notes if getattr(note, "name", None)]
        found.append(Option(*names[:1] or [field.name], of, bool(positional & {*notes}), is_required))
    return found


def _commands(steps=Step, before=()):
    """Every command by its words, with the options that it takes."""
    found = {}
    of, _ = _bare(steps)
    for step in typing.get_args(of):
        record, notes = _bare(step)
        words = (*before, next(note.name for note in notes if hasattr(note, "name")))
        hints = typing.get_type_hints(record, include_extras=True)
        action, _ = _bare(hints.get("action", int))
        if isinstance(action, types.UnionType) or typing.get_origin(action) is typing.Union:
            found |= _commands(action, words)
        else:
            found[words] = _options(record)
    return found


COMMANDS = _commands()


@pytest.fixture(scope="module")
def good(tmp_path_factory, checkpoints, llama):
    """One good thing of each kind."""
    folder = tmp_path_factory.mktemp("good")
    data = folder / "mine.csv"
    rows = "".join(f"question {i}?,yes {i},no {i}\n" for i in range(60))
    data.write_text(f"prompt,safe,unsafe\n{rows}")
    behaviour = load_behaviour(data, n_examples=4)
    scores = importance(llama, behaviour, config=ScoringConfig(batch_tokens=512))
    scores.save(folder / "scores.safetensors")
    selection = top_fraction(scores, 0.1)
    selection.save(folder / "selection.safetensors")
    create_edit(llama, selection).save(folder / "edit.safetensors")
    return {
        "data": str(data),
        "scores": str(folder / "scores.safetensors"),
        "selection": str(folder / "selection.safetensors"),
        "edit": str(folder / "edit.safetensors"),
        "checkpoint": str(checkpoints["llama-gqa"]),
        "model": str(checkpoints["llama-gqa"]),
        "words": "L0.1",
        "run": str(folder),
    }


@pytest.fixture(scope="module")
def bad(tmp_path_factory, good):
    """What is wrong in the same way for every kind of file."""
    folder = tmp_path_factory.mktemp("bad")
    wrong = {"missing": "gone", "below a file": f"{good['data']}/mine", "with a long name": "x" * 300}
    contents = {
        "empty": b"",
        "noise": bytes(range(256)) * 4,
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a pointer of git-annex": b"/annex/objects/SHA256E-s1--ab.csv\n",
        "nested too deep": b"[" * 100_000,
    }
    for name, content in contents.items():
        for suffix in (".csv", ".jsonl", ".safetensors", ".json", ".txt", ".gguf"):
            (folder / f"{name.replace(' ', '_')}{suffix}").write_bytes(content)
        wrong[name] = str(folder / name.replace(" ", "_"))
    for suffix in (".csv", ".jsonl", ".safetensors", ".txt", ".gguf"):
        (folder / f"folder{suffix}").mkdir()
    wrong["a folder"] = str(folder / "folder")
    if os.geteuid() != 0:
        for suffix in (".csv", ".jsonl", ".safetensors", ".txt", ".gguf"):
            path = folder / f"locked{suffix}"
            path.touch(mode=0)
        wrong["not to be read"] = str(folder / "locked")
    return wrong


@pytest.fixture
def no_model_is_read(monkeypatch):
    """Whoever reads a model is told so, and ends as if it were wrong."""

    def told(*args, **options):
        raise InputError(READ)

    monkeypatch.setattr(settings, "load_model", told)
    # a check of a checkpoint's state is no reading of a model
    monkeypatch.setattr(edits, "super_weights", lambda model: [])


def ended(capsys, arguments):
    """The one line of a command that must end with code 2."""
    capsys.readouterr()
    try:
        code = main.main(arguments)
    except SystemExit as leaving:
        code = leaving.code
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.strip()]
    assert code == 2, (arguments, code, said.err, said.out[:300])
    assert "internal error" not in said.err and "Traceback" not in said.err, (arguments, said.err)
    if not lines[0].startswith("╭"):  # the box of the parser of arguments
        own = [line for line in lines if line.startswith("dean-interp: ")]
        assert len(own) == 1 and own[0] == lines[-1], (arguments, said.err)
        assert all(line.startswith(("INFO", "WARNING")) for line in lines[:-1]), (arguments, said.err)
    return lines[-1]


def arguments(words, good, tmp_path, **replaced):
    """The shortest good call of a command, but for the options that are replaced by other values."""
    line = [*words]
    for option in COMMANDS[words]:
        if option.name in replaced:
            line += option.words(*replaced[option.name])
        elif option.name == "out":
            line += option.words(str(tmp_path / "out" / "new"))
        elif option.is_required:
            n = 2 if option.name == "edits" else 3 if (words, option.name) == (("couple",), "scores") else 1
            line += option.words(*[good[option.kind]] * n)
    return line


def test_every_command_is_found_and_every_option_that_names_something_has_a_kind():
    assert {" ".join(words) for words in COMMANDS} == {*EXAMPLES} - {"", "data", "edit"}
    for words, options in COMMANDS.items():
        for option in options:
            if {str, Path} & option.kinds_of_value:
                assert option.kind, f"say in KINDS what `{option.name}` of `{' '.join(words)}` names"


def _cases(*kinds):
    """Every option of these kinds, of every command."""
    found = []
    for words, options in COMMANDS.items():
        for option in options:
            if option.kind in kinds:
                found.append(pytest.param(words, option, id=f"{' '.join(words)}, {option.name}"))
    return found


SUFFIXES = {"data": (".csv", ".jsonl"), "text": (".txt",)}


@pytest.mark.parametrize(("words", "option"), _cases("data", "scores", "selection", "edit", "run", "checkpoint"))
def test_a_wrong_file_ends_in_one_line_before_a_model_is_read(
    words, option, good, bad, tmp_path, monkeypatch, capsys, no_model_is_read
):
    monkeypatch.chdir(tmp_path)
    suffixes = SUFFIXES.get(option.kind, (".safetensors",))
    wrong = [f"{path}{suffix}" for path in bad.values() for suffix in suffixes]
    wrong += [good["data"]] if option.kind != "data" else [good["scores"]]
    for path in wrong:
        # a command that needs something beside what is wrong has it
        beside = {"scores": [path] * 3} if (words, option.name) == (("information",), "scores") else {}
        if words == ("edit", "create") and option.name == "scores":
            beside = {"value": ["mean"]}
        if words == ("chat",) or words[0] == "edit" or words[0] in ("ablate", "circuit", "neuron"):
            beside |= {}
        n = 3 if (words, option.name) in ((("couple",), "scores"), (("evaluate",), "scores")) else 1
        line = ended(capsys, arguments(words, good, tmp_path, **({option.name: [path] * n} | beside)))
        assert READ not in line, (words, option.name, path)


@pytest.mark.parametrize(("words", "option"), _cases("out"))
def test_a_place_that_cannot_be_written_ends_in_one_line_before_a_model_is_read(
    words, option, good, tmp_path, monkeypatch, capsys, no_model_is_read
):
    monkeypatch.chdir(tmp_path)
    for out in (f"{good['data']}/below", "/proc/nowhere/out", "x" * 300, f"{'y' * 300}/out"):
        assert READ not in ended(capsys, arguments(words, good, tmp_path, out=[out])), (words, out)


def _numbers():
    found = []
    for words, options in COMMANDS.items():
        for option in options:
            if {int, float} & option.kinds_of_value and option.name not in ANY_NUMBER:
                found.append(pytest.param(words, option, id=f"{' '.join(words)}, {option.name}"))
    return found


@pytest.mark.parametrize(("words", "option"), _numbers())
def test_a_negative_number_and_nan_are_refused_before_a_model_is_read(
    words, option, good, tmp_path, monkeypatch, capsys, no_model_is_read
):
    monkeypatch.chdir(tmp_path)
    for number in ("-1", "nan") if float in option.kinds_of_value else ("-1",):
        line = ended(capsys, arguments(words, good, tmp_path, **{option.name: [number]}))
        assert READ not in line, (words, option.name, number)
