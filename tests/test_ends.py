"""Every command, fed with every kind of wrong input: exit code 2 and one line, before a model is read.

Commands and their options are found in the command line itself. A new option that names something must be given a kind
in `KINDS`; until then the test fails and says so.
"""

import dataclasses
import io
import json
import os
import random
import shutil
import sys
import types
import typing
from pathlib import Path

import pytest
import torch
from tyro.conf import Positional

from dean_interp import ScoringConfig, create_edit, importance, load_behaviour
from dean_interp.cli import edits, main
from dean_interp.cli.help_examples import EXAMPLES
from dean_interp.cli.steps import Step
from dean_interp.errors import InputError
from dean_interp.models import gguf_file
from dean_interp.models.load import load_model
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
    "source": "edit",
    "checkpoint": "checkpoint",
    "run": "run",
    "folders": "run",
    "finished": "run",
    "task_folder": "task folder",
    "model": "model",
    "tokenizer": "tokenizer",
    "out": "out",
    "adapter": "adapter",
    "date": "day",
    **dict.fromkeys("prompts system expression neuron value values judges tasks answers_from licence".split(), "words"),
}
"""What each option that takes a text or a path names; `words` are no names of anything on the disk."""
N_OF = {
    (("couple",), "scores"): 3,
    (("evaluate",), "scores"): 3,
    (("information",), "scores"): 3,
    (("edit", "stack"), "edits"): 2,
}
"""How many a command needs, where it is more than one."""
SMALL = {"n_score": 12, "n_choose": 4, "n_confirm": 12, "n_calibration": 8, "n_test": 12, "n_general_test": 4}
"""Sizes that small sets have room for."""
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


def _written(path, word, *, paired=True):
    """A small set whose prompts no other set shares, nor nearly."""
    draw = random.Random(word)
    rows = []
    for i in range(48):
        prompt = " ".join(draw.choice("bcdfgklmnprst") + draw.choice("aeiou") + f"{word}{draw.randrange(999)}"
                          for _ in range(7))  # fmt: skip
        rows.append(f"{prompt},yes {i},no {i}" if paired else f"{prompt},answer {i}")
    path.write_text("\n".join(["prompt,safe,unsafe" if paired else "prompt,response", *rows]) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def good(tmp_path_factory, checkpoints, llama):
    """One good thing of each kind, and of each option that has one of its own."""
    folder = tmp_path_factory.mktemp("good")
    sets = {name: _written(folder / f"{name}.csv", name) for name in ("first", "second", "mine")}
    sets["general"] = _written(folder / "general.csv", "general", paired=False)
    scores = importance(llama, load_behaviour(sets["mine"], n_examples=4), config=ScoringConfig(batch_tokens=512))
    scores.save(folder / "scores.safetensors")
    selection = top_fraction(scores, 0.1)
    selection.save(folder / "selection.safetensors")
    create_edit(llama, selection).save(folder / "edit.safetensors")
    return sets | {
        "data": sets["mine"],
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
            line += option.words(str(tmp_path / "new"))
        elif option.is_required:
            line += option.words(*[good[option.kind]] * N_OF.get((words, option.name), 1))
        # the built-in sets are large, and what is compared with them takes its time
        elif option.kind == "data" and option.name in good:
            line += option.words(good[option.name])
        elif option.name in SMALL:
            line += option.words(str(SMALL[option.name]))
        elif option.name in ("over_refusal", "register"):
            line += option.words(*["None"] * (option.name == "register"))
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


@pytest.mark.parametrize(("words", "option"), _cases("data", "scores", "selection", "edit", "run", "checkpoint"))
def test_a_wrong_file_ends_in_one_line_before_a_model_is_read(
    words, option, good, bad, tmp_path, monkeypatch, capsys, no_model_is_read
):
    monkeypatch.chdir(tmp_path)
    suffixes = (".safetensors",) if option.kind != "data" else (".csv", ".jsonl") if words[0] == "data" else (".csv",)
    wrong = [f"{path}{suffix}" for path in bad.values() for suffix in suffixes]
    wrong.append(good["scores" if option.kind == "data" else "data"])
    for path in wrong:
        replaced = {option.name: [path] * N_OF.get((words, option.name), 1)}
        # what is read only with another option has it
        if option.name == "scores" and any(other.name == "value" for other in COMMANDS[words]):
            replaced["value"] = ["mean"]
        line = ended(capsys, arguments(words, good, tmp_path, **replaced))
        assert READ not in line, (words, option.name, path)


@pytest.mark.parametrize(("words", "option"), _cases("out"))
def test_a_place_that_cannot_be_written_ends_in_one_line_before_a_model_is_read(
    words, option, good, tmp_path, monkeypatch, capsys, no_model_is_read
):
    monkeypatch.chdir(tmp_path)
    for out in (f"{good['data']}/below", "/proc/nowhere/out", "x" * 300, f"{'y' * 300}/out"):
        assert READ not in ended(capsys, arguments(words, good, tmp_path, out=[out])), (words, out)


@pytest.mark.parametrize(("words", "option"), _cases("adapter", "day"))
def test_a_wrong_adapter_or_day_ends_in_one_line(words, option, good, bad, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wrong = ["yesterday", "2026-02-30", "28.11.2026"]
    if option.kind == "adapter":
        wrong = ["gone/here", good["model"], good["data"], bad["noise"], "x" * 300]
        (tmp_path / "noise").mkdir()
        wrong.append(str(_file(tmp_path / "noise" / "adapter_config.json", bytes(range(256))).parent))
    for value in wrong:
        ended(capsys, arguments(words, good, tmp_path, model=[good["model"]], **{option.name: [value]}))


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


MODELS = {
    "missing": lambda folder, good: "gone/here",
    "a folder that is empty": lambda folder, good: folder,
    "a GGUF that is none": lambda folder, good: _file(folder / "noise.gguf", bytes(range(256))),
    "a GGUF that is empty": lambda folder, good: _file(folder / "empty.gguf", b""),
    "a GGUF that is a pointer": lambda folder, good: _file(folder / "lfs.gguf", LFS),
    "a GGUF that is a folder": lambda folder, good: _folder(folder / "folder.gguf"),
    "settings that are no JSON": lambda folder, good: _file(_copy(folder, good) / "config.json", b"{").parent,
    "settings of another kind": lambda folder, good: _file(_copy(folder, good) / "config.json", b"[1]").parent,
    "an unknown kind of model": lambda folder, good: (
        _file(_copy(folder, good) / "config.json", b'{"model_type": "nobody"}').parent
    ),
    "weights that are a pointer": lambda folder, good: _file(_copy(folder, good) / "model.safetensors", LFS).parent,
    "weights that are noise": lambda folder, good: _file(_copy(folder, good) / "model.safetensors", b"xyz" * 99).parent,
    "no tokenizer": lambda folder, good: _without(_copy(folder, good), "tokenizer"),
    "a tokenizer that is noise": lambda folder, good: _file(_copy(folder, good) / "tokenizer.json", b"{").parent,
    "no weights": lambda folder, good: _without(_copy(folder, good), "model"),
    "a long name": lambda folder, good: "x" * 300,
    "a name with a line end": lambda folder, good: "a\nb",
}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def _file(path, content):
    path.write_bytes(content)
    return path


def _folder(path):
    path.mkdir()
    return path


def _copy(folder, good):
    return Path(shutil.copytree(good["model"], folder / "copy"))


def _without(folder, name):
    for path in folder.glob(f"{name}*"):
        path.unlink()
    return folder


@pytest.mark.parametrize("wrong", MODELS)
def test_a_wrong_model_ends_in_one_line(wrong, good, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEAN_INTERP_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    name = str(MODELS[wrong](tmp_path, good))
    ended(capsys, arguments(("score",), good, tmp_path, model=[name]))
    # whatever takes a model takes it through the same door
    if wrong != "missing":
        return
    for words, options in COMMANDS.items():
        if any(option.name == "model" for option in options) and words != ("edit", "export"):
            beside = {"scores": [good["scores"]] * 3} if words == ("information",) else {}
            line = ended(capsys, arguments(words, good, tmp_path / words[-1], model=[name], **beside))
            assert "cannot load the model 'gone/here'" in line


@pytest.mark.parametrize(
    "device", ["cudaa", "cuda:99", "mps:3", "", "xla", "privateuseone", {"model.norm": "cuda:99"}, {"": 77}]
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_read(device, tmp_path):
    with pytest.raises(InputError, match=r"device '.*' is not there: take 'cpu', or another that is") as told:
        load_model(tmp_path / "gone", device=device)
    assert len(str(told.value).splitlines()) == 1


def test_meta_and_disk_are_devices(good):
    assert next(load_model(good["model"], device="meta").parameters()).is_meta


@pytest.mark.parametrize("place", ["a file", "nowhere"])
def test_a_cache_folder_that_cannot_be_written_is_named_with_the_variable_that_names_it(
    place, good, tmp_path, monkeypatch, capsys
):
    cache = good["data"] if place == "a file" else "/proc/nowhere"
    monkeypatch.setenv("DEAN_INTERP_CACHE", cache)
    gguf = _file(tmp_path / "tiny.gguf", b"GGUF")
    line = ended(capsys, arguments(("score",), good, tmp_path, model=[str(gguf)]))
    assert f"cannot write to the cache folder {cache}" in line and "DEAN_INTERP_CACHE" in line


def test_a_user_without_a_home_is_told_which_variable_names_a_cache(monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    for name in ("DEAN_INTERP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(InputError, match="name one by DEAN_INTERP_CACHE"):
        gguf_file.cache_folder()


def test_an_empty_variable_names_no_folder(monkeypatch):
    monkeypatch.setenv("DEAN_INTERP_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert gguf_file.cache_folder() == Path.home() / ".cache" / "dean_interp"
    monkeypatch.setenv("DEAN_INTERP_CACHE", "~/mine")
    assert gguf_file.cache_folder() == Path.home() / "mine"


@pytest.fixture
def emoji(tmp_path):
    path = tmp_path / "emoji.csv"
    path.write_text("prompt,safe,unsafe\n\U0001f642 d\u00e9j\u00e0,a,b\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "cp932", "utf-8"])
def test_what_a_stream_cannot_print_is_written_by_its_number(encoding, emoji, monkeypatch):
    for more in ([], ["--json"]):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        assert main.main(["data", "show", emoji, *more]) == 0
        said = stream.buffer.getvalue().decode(encoding)
        if more:
            assert json.loads(said)["examples"][0]["prompt"] == "\U0001f642 d\u00e9j\u00e0"
        else:
            assert said.startswith("\U0001f642" if encoding == "utf-8" else r"\U0001f642")
        assert stream.errors == "strict"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_an_error_is_said_on_a_stream_that_cannot_print_it(encoding, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="backslashreplace")
    monkeypatch.setattr(sys, "stderr", stream)
    assert main.main(["data", "show", "\U0001f642.csv"]) == 2
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding) == "dean-interp: no file \\U0001f642.csv" + os.linesep


def test_streams_that_were_closed_before_the_process_began_are_none(emoji, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert main.main(["data", "show", emoji]) == 0
    assert main.main(["data", "show", "gone.csv"]) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_result_that_finds_a_full_disk_ends_in_one_line(emoji, monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main.main(["data", "show", emoji]) == 2
    said = capsys.readouterr().err
    assert said == "dean-interp: cannot write the result to standard output: No space left on device\n"


@pytest.mark.parametrize("size", ["two", "2", "-1", ""])
def test_a_number_of_processes_that_torchrun_did_not_start_ends_in_one_line(size, emoji, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", size)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    line = ended(capsys, ["data", "show", emoji])
    assert f"WORLD_SIZE={size} asks for several processes" in line and "torchrun" in line


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError(13, "Permission denied", "/a/b"), "cannot use /a/b: Permission denied"),
        (OSError(36, "File name too long", b"/a/\xff"), r"cannot use /a/\udcff: File name too long"),
        (FileNotFoundError(2, "No usable temporary directory", "/tmp"), "cannot use /tmp: No usable temporary"),
        (MemoryError(), "out of memory: take smaller batches"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory: take smaller batches"),
    ],
)
def test_what_the_system_refuses_is_no_fault_of_the_program(error, said, monkeypatch, capsys):
    def refused(step, talk):
        raise error

    monkeypatch.setattr(main, "do", refused)
    assert said in ended(capsys, ["data", "show", "privacy"])
