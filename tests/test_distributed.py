"""Several processes give what one gives, and survive the loss of one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dean_interp import InputError, distributed
from dean_interp.fine_tuning import FineTuningConfig
from dean_interp.study.results import load_results
from tests.mixtures import save_mixture

SCRIPT = Path(__file__).with_name("several_processes.py")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Starts `n` processes of a job: their exit codes and standard error. What they import is imported once for all."""
    folder = tmp_path_factory.mktemp("errors")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, str(SCRIPT)], text=True, **pipes) as process:

        def started(n: int, job: str, *arguments: object) -> tuple[list[int], str]:
            errors = folder / str(len(list(folder.iterdir())))
            try:
                process.stdin.write(json.dumps([n, job, [*map(str, arguments)], str(errors)]) + "\n")
                process.stdin.flush()
                codes = json.loads(process.stdout.readline())
            except BaseException:  # a test that was stopped: those after it are not to wait for the same job
                process.kill()
                raise
            return codes, errors.read_text(errors="replace")

        yield started
        process.kill()


@pytest.fixture(scope="module")
def alone(start, checkpoints, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    assert start(1, "numbers", checkpoints["llama-gqa"], folder)[0] == [0]
    return load_file(folder / "0")


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_every_process_ends_with_the_numbers_of_one(n, start, alone, checkpoints, tmp_path):
    assert start(n, "numbers", checkpoints["llama-gqa"], tmp_path)[0] == [0] * n
    assert len({(tmp_path / str(k)).read_bytes() for k in range(n)}) == 1
    found = load_file(tmp_path / "0")
    assert found.keys() == alone.keys()
    for name, tensor in alone.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-6 * float(tensor.abs().max()), msg=name)
    assert torch.equal(found["answers"], alone["answers"])


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_a_mixture_is_scored_by_two_as_by_one(family, start, tokenizer, tmp_path):
    folder = save_mixture(family, tokenizer, tmp_path / "model")
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
        assert start(n, "mixture", folder, tmp_path / str(n))[0] == [0] * n
    assert (tmp_path / "2" / "0").read_bytes() == (tmp_path / "2" / "1").read_bytes()
    alone, together = load_file(tmp_path / "1" / "0"), load_file(tmp_path / "2" / "0")
    assert alone.keys() == together.keys() and any(name.startswith("slots") for name in alone)
    for name, tensor in alone.items():
        tolerance = 0.0 if name.startswith("slots") else 1e-4
        atol = tolerance * float(tensor.abs().max())
        torch.testing.assert_close(together[name], tensor, rtol=tolerance, atol=atol, msg=name)


@pytest.mark.slow
def test_a_study_by_two_is_that_of_one_and_a_lost_process_costs_a_restart(start, checkpoints, tmp_path):
    one, two, broken = (tmp_path / name for name in ("one", "two", "broken"))
    model = checkpoints["llama-gqa"]
    assert start(1, "study", model, one)[0] == [0]
    assert start(2, "study", model, two)[0] == [0, 0]
    for unit in ("neuron", "weight"):
        name = f"selection.{unit}.safetensors"
        assert (one / name).read_bytes() == (two / name).read_bytes()
    first, second = (load_results(folder / "results.json") for folder in (one, two))
    for unit in ("neuron", "weight"):
        for a, b in zip(first.of(unit).states, second.of(unit).states, strict=True):
            assert a.name == b.name and a.kl == pytest.approx(b.kl, rel=1e-3)
    assert first.answers == second.answers
    codes, said = start(2, "study", model, broken, 12)
    assert codes == [2, -9]
    assert "study (process 0): process 0 of 2 lost another one" in said and "start the same command again" in said
    assert not (broken / "results.json").exists() and list(broken.rglob("*.unfinished"))
    assert start(2, "study", model, broken)[0] == [0, 0]
    for path in two.rglob("*.*"):
        if path.is_file() and path.name != "times.json":
            assert (broken / path.relative_to(two)).read_bytes() == path.read_bytes(), path
    assert not list(broken.rglob("*.unfinished")) and not list(broken.rglob("*.part"))


def test_outside_of_torchrun_there_is_one_process():
    with distributed.process_group():
        assert (distributed.world_size(), distributed.rank(), distributed.is_rank0()) == (1, 0, True)
        assert distributed.shard([1, 2, 3]) == [1, 2, 3] == distributed.gather([1, 2, 3])
        assert distributed.on_rank0(lambda: "this") == "this"


def test_a_process_group_within_another_leaves_that_one_open(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with distributed.process_group():
            with distributed.process_group():
                pass
            assert distributed._is_open
        assert not distributed._is_open
    finally:
        torch.distributed.destroy_process_group()


def test_fine_tuning_is_refused_in_several_processes(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(InputError, match="fine-tuning runs in one process, got 2: start it without torchrun"):
        FineTuningConfig().check()


@pytest.mark.slow
def test_the_command_under_torchrun(checkpoints, tmp_path):
    out = tmp_path / "scores.safetensors"
    command = [
        "score",
        "privacy",
        "--n-calibration",
        "12",
        "--unit",
        "neuron",
        "weight",
        "--model",
        str(checkpoints["gpt2"]),
    ]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dean_interp.cli.main"]
    done = subprocess.run([sys.executable, *torchrun, *command, "--out", str(out)],
                          capture_output=True, text=True, timeout=600)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("mean loss") == 1
    alone = tmp_path / "alone.safetensors"
    subprocess.run([sys.executable, "-m", "dean_interp.cli.main", *command, "--out", str(alone)], check=True,
                   timeout=600)  # fmt: skip
    one, two = load_file(alone), load_file(out)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-7, msg=name)
