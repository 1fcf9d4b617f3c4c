"""Kills, full and read-only disks, truncated files, weights that are not finite: on the real command, in processes."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from forked_runs import runner
from safetensors.torch import load_file, save_file

from dean_interp import InputError, load_behaviour, load_model
from dean_interp.cli.main import main
from dean_interp.fine_tuning import FineTuningConfig, fine_tune
from dean_interp.resume import Unfinished
from dean_interp.study.run_folder import locked
from dean_interp.study.settings import DataConfig
from dean_interp.study.store import ORIGINAL, Store

pytestmark = pytest.mark.slow

NAMES = ("fairness", "privacy", "general")
MEASURED = ["--n-test", 12, "--n-general-test", 4, "--answer-tokens", 4]
BESIDE = ["--n-random", 1, "--n-equal-kl", 1]
ANSWERS = ["--n-answers", 2, "--answer-lengths", 4, "--n-answer-controls", 1]
SWEEP = ["--n-calibration", 4, *MEASURED, *BESIDE, "--neuron-fractions", 0.06, "--weight-fractions", 0.03]
STUDY = ["--n-calibration", 4, *MEASURED, *BESIDE, *ANSWERS, "--neuron-fraction", 0.06, "--weight-fraction", 0.03]
STUDY += ["--information-fraction", 0.3, "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(one_layer) -> Path:
    return one_layer


@pytest.fixture(scope="module")
def run(folder):
    with runner(folder) as run:
        yield run


@pytest.fixture(scope="module")
def inputs(run, folder, tmp_path_factory) -> dict[str, Path]:
    """Scores, a selection, an edit and an edited checkpoint, made by the command; and a text."""
    made = tmp_path_factory.mktemp("inputs")
    model = ["--model", folder, "--device", "cpu"]
    scores = [made / f"{name}.safetensors" for name in NAMES]
    for path in scores:
        assert not run(["score", path.stem, "--n-calibration", 4, "--out", path, *model]).code
    assert not run(["couple", *scores, "--fraction", 0.06, "--out", made / "selection.safetensors"]).code
    assert not run(["edit", "create", made / "selection.safetensors", "--out", made / "edit.safetensors", *model]).code
    assert not run(["edit", "apply", made / "edit.safetensors", folder, "--out", made / "edited"]).code
    (made / "text.txt").write_text("A pawn that reaches the last rank becomes a queen. " * 20)
    return {path.stem: path for path in made.iterdir()}


def command(name: str, folder: Path, inputs: dict[str, Path], out: Path) -> list[object]:
    """A command that writes into `out`, or to it."""
    model = ["--model", folder, "--device", "cpu"]
    scores = ["--scores", *(inputs[one] for one in NAMES)]
    measured = [inputs["selection"], "--out", out, *model, *MEASURED, *scores, *BESIDE, "--information-fraction", 0.3]
    answers = ["--n-answers", 4, "--answer-lengths", 2, 4, "--n-answer-controls", 1]
    answers += ["--text", inputs["text"], "--window", 200]
    return {
        "run": ["run", "--model", folder, "--out", out, *STUDY],
        "sweep": ["sweep", *model, "--out", out, *SWEEP],
        "score": ["score", "privacy", "--n-calibration", 24, "--unit", "neuron", "weight", "--score-tokens", 256,
                  "--out", out / "scores.safetensors", *model],
        "evaluate": ["evaluate", *measured, *answers],
        "information": ["information", *measured],
        "edit apply": ["edit", "apply", inputs["edit"], folder, "--out", out / "edited"],
        "edit revert": ["edit", "revert", inputs["edit"], inputs["edited"], "--out", out / "reverted"],
        "edit export": ["edit", "export", inputs["edit"], "--out", out / "exported", *model],
    }[name]  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    """What a command left, but what differs from run to run: times, and what the report says beside its being there
    (the view of circuitsvis).
    """
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("times.json", ".lock"))
    return {path.relative_to(folder).as_posix(): b"" if path.name == "report.html" else path.read_bytes()
            for path in files}  # fmt: skip


def finished(folder: Path) -> dict[str, bytes]:
    """The same without what is on its way: sums of batches, parts, and the growing list of equal-KL controls."""
    growing = (".unfinished", ".try", "_equal_kl.json")
    return {name: found for name, found in content(folder).items()
            if not name.endswith(growing) and ".part/" not in name}  # fmt: skip


def measured(folder: Path) -> dict[Path, int]:
    """When each state that a run keeps was written."""
    return {path: path.stat().st_mtime_ns for path in (folder / "states").rglob("*.safetensors")}


KILLED = [
    pytest.param("run", 3, marks=pytest.mark.product),
    ("score", 2),
    ("evaluate", 2),
    ("edit apply", 3),
    ("edit export", 2),
]
"""Commands with how often they are killed."""
BY_HAND = [("run", 50)] + [(one, 25) for one in ("sweep", "score", "evaluate", "information", "edit apply",
                                                 "edit revert", "edit export")]  # fmt: skip


@pytest.mark.parametrize(("name", "n_kills"), KILLED + [pytest.param(*one, marks=pytest.mark.long) for one in BY_HAND])
def test_a_command_that_is_killed_loses_nothing_and_ends_in_the_same_bytes(
    name, n_kills, run, folder, inputs, tmp_path
):
    killed = tmp_path / "killed"
    for each in (tmp_path / "whole", killed):
        each.mkdir()
    alone = run(command(name, folder, inputs, tmp_path / "whole"))
    assert alone.code == 0, alone.error
    whole, draw, n_killed, n_kept = content(tmp_path / "whole"), random.Random(n_kills), 0, 0
    while (to_kill := n_killed < n_kills or (name == "run" and not n_kept)) or content(killed) != whole:
        if content(killed) == whole:  # also where the kill came between the last byte and the end of the process
            shutil.rmtree(killed)
            killed.mkdir()
        # Later where all kills came before anything was measured: the machine may be slower than it was.
        after = draw.uniform(0, alone.seconds * max(1, n_killed / n_kills)) if to_kill else None
        kept = measured(killed)
        n_kept += len(kept)
        ended = run(command(name, folder, inputs, killed), kill_after=after)
        n_killed += ended.code == -9
        assert ended.code in (0, -9), ended.error
        assert finished(killed).items() <= whole.items(), "what is there is whole"
        assert ended.code or content(killed) == whole
        assert kept.items() <= measured(killed).items(), "what was measured is not measured again"


@pytest.mark.parametrize(
    "name",
    ["score", "edit apply", "edit export", *(pytest.param(one, marks=pytest.mark.long) for one in ("run", "evaluate"))],
)
def test_a_file_that_finds_no_room_is_one_line_and_the_same_command_goes_on(name, run, folder, inputs, tmp_path):
    """Files may not grow beyond a limit, which is raised until all fit."""
    largest, errors = 64, []
    while (ended := run(command(name, folder, inputs, tmp_path), largest_file=largest)).code:
        before = finished(tmp_path)
        assert ended.code == 2 and "cannot write" in ended.error and "File too large" in ended.error, ended.error
        assert not list(tmp_path.rglob("*.part"))
        errors.append(ended.error)
        largest *= 8
    after = finished(tmp_path)
    assert errors and before.items() <= after.items(), "what was finished is kept as it was"


def disk(folder: Path, options: str) -> None:
    folder.mkdir(exist_ok=True)
    kind = ["-o", options, "-t", "tmpfs", "none"] if "remount" not in options else ["-o", options]
    done = subprocess.run(["mount", *kind, str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("no disk can be mounted here")


@pytest.fixture
def small(tmp_path):
    """A disk of 48 KiB."""
    disk(tmp_path / "disk", "size=48k")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_disk_that_is_full_and_one_that_becomes_read_only_keep_what_was_finished(small, run, folder, inputs):
    step = command("run", folder, inputs, small)
    full = run(step)
    assert full.code == 2 and "No space left on device" in full.error, full.error
    there = finished(small)
    assert any(name.startswith("scores/") for name in there)
    disk(small, "remount,ro,size=48k")
    denied = run(step)
    assert denied.code == 2 and "Read-only file system" in denied.error, denied.error
    assert finished(small) == there
    disk(small, "remount,rw,size=8m")
    assert run(step).code == 0
    assert there.items() <= finished(small).items() and (small / "results.json").is_file()


@pytest.fixture(scope="module")
def study(run, folder, inputs, tmp_path_factory) -> Path:
    """A finished study."""
    out = tmp_path_factory.mktemp("study")
    assert not run(command("run", folder, inputs, out)).code
    return out


KINDS = (
    "config.json",
    "results.json",
    "times.json",
    "scores/privacy.safetensors",
    "states/original.safetensors",
    "states/calibration/activations.safetensors",
    "states/neuron_random_1.safetensors",
    "states/weight_equal_kl.json",
    "answers/original.json",
)


CUT = [(name, 0.0) for name in KINDS] + [("scores/privacy.safetensors", 0.99), ("states/original.safetensors", 0.99)]
BY_HALF = [pytest.param(name, 0.5, marks=pytest.mark.long) for name in KINDS]


@pytest.mark.parametrize(("name", "kept"), CUT + BY_HALF)
def test_a_truncated_file_of_a_run_is_named_and_nothing_is_written_over_it(
    name, kept, study, run, folder, inputs, tmp_path
):
    shutil.copytree(study, tmp_path / "run")
    path = tmp_path / "run" / name
    if name != "results.json":
        (tmp_path / "run" / "results.json").unlink()
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    before = content(tmp_path / "run")
    ended = run(command("run", folder, inputs, tmp_path / "run"))
    assert ended.code == 2 and f"{name} is damaged" in ended.error, ended.error
    assert content(tmp_path / "run") == before


def test_sums_that_were_cut_off_or_are_of_another_shape_are_not_taken_up(tmp_path):
    kept, sums = Unfinished(tmp_path / "sums.unfinished", "x"), {"loss": torch.arange(3.0)}
    kept.keep(sums, n_batches=2)
    for other in ({"loss": torch.zeros(4)}, {"loss": torch.zeros(3, dtype=torch.int64)}, {"other": torch.zeros(3)}):
        assert kept.restore(other) == 0 and not any(tensor.any() for tensor in other.values())
    whole = kept.path.read_bytes()
    for length in range(len(whole)):
        kept.path.write_bytes(whole[:length])
        assert kept.restore(sums) == 0
    kept.path.write_bytes(whole)
    assert kept.restore({"loss": torch.zeros(3)}) == 2


@pytest.fixture(params=[torch.nan, torch.inf])
def not_finite(request, folder, tmp_path) -> Path:
    """The checkpoint with one weight that is no number."""
    shutil.copytree(folder, tmp_path / "bad")
    weights = load_file(tmp_path / "bad" / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight"][3, 5] = request.param
    save_file(weights, tmp_path / "bad" / "model.safetensors", {"format": "pt"})
    return tmp_path / "bad"


@pytest.mark.parametrize("name", ["run", "sweep", "score", "evaluate", "information", "ablate", "edit create"])
def test_weights_that_are_not_finite_are_refused_by_every_command(name, not_finite, inputs, tmp_path, capsys):
    out = tmp_path / "out"
    if name in ("ablate", "edit create"):
        step = [*name.split(), inputs["selection"], "--out", out / "made", "--model", not_finite, "--device", "cpu"]
    else:
        step = command(name, not_finite, inputs, out)
    assert main([*map(str, step)]) == 2
    assert "has weights that are not finite (NaN or infinite) in 1 tensors" in capsys.readouterr().err
    assert not {path.suffix for path in out.rglob("*")} & {".safetensors", ".unfinished"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.9])
def test_a_truncated_checkpoint_is_one_line_that_names_it(name, kept, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cut")
    path = tmp_path / "cut" / name
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    with pytest.raises(InputError, match=f"cannot load the model '{tmp_path / 'cut'}'"):
        load_model(tmp_path / "cut", device="cpu")


def test_fine_tuning_goes_on_from_the_last_whole_checkpoint(folder, tmp_path):
    """A kill leaves a checkpoint of the trainer without what is written last."""
    how = FineTuningConfig(method="full", n_steps=4, every=2, batch_size=2)
    examples = [load_behaviour("privacy", n_examples=4)]

    def die(step, model):
        if step == 4:
            raise KeyboardInterrupt

    whole = fine_tune(str(folder), examples, how, folder=tmp_path / "whole", device="cpu")
    with pytest.raises(KeyboardInterrupt):
        fine_tune(str(folder), examples, how, folder=tmp_path / "cut", device="cpu", watch=die)
    half = tmp_path / "cut" / "trainer" / "checkpoint-4"
    shutil.copytree(tmp_path / "cut" / "trainer" / "checkpoint-2", half)
    (half / "optimizer.pt").unlink()
    (half / "trainer_state.json").unlink()
    again = fine_tune(str(folder), examples, how, folder=tmp_path / "cut", device="cpu")
    first, second = (load_file(one / "model.safetensors") for one in (whole, again))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_two_runs_in_one_folder_are_refused(run, folder, inputs, tmp_path):
    """A run that was killed leaves no lock: above, the same command goes on after it."""
    with locked(tmp_path):
        refused = run(command("run", folder, inputs, tmp_path))
    assert refused.code == 2 and f"another run is writing to {tmp_path}" in refused.error
    assert content(tmp_path) == {}, "it wrote nothing"


def test_what_a_kill_right_after_saving_left_is_cleared_by_the_next_run(llama, tmp_path):
    sets = [load_behaviour(name, n_examples=3, split="test") for name in ("fairness", "privacy", "general")]
    store = Store(folder=tmp_path, fingerprint="x", tests=sets, config=DataConfig(), template="chat")
    left = []
    for _ in range(2):
        store.measurement(llama, ORIGINAL)
        assert store.record("answers/a.json", [], int, lambda _: 3) == 3
        assert not list(tmp_path.rglob("*.unfinished"))
        for file in [*tmp_path.rglob("*.safetensors"), tmp_path / "answers" / "a.json"]:
            left.append(file.with_suffix(".unfinished"))
            Unfinished(left[-1], "y").keep({"sum": torch.ones(2)}, n_batches=1)
    assert len(left) == 2 * 3
