"""What a study would take, without a weight: sizes that are known, memory beside what is watched."""

import dataclasses
import json
import re

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dean_interp import InputError, ScoringConfig, load_behaviour, load_model
from dean_interp.cli.main import main
from dean_interp.models.matrices import neuron_sites
from dean_interp.planning import device_memory
from dean_interp.planning.memory import batch_bytes
from dean_interp.planning.placement import Devices, place_weights, room_for_sums
from dean_interp.planning.scoring import _HEAP, _Probe
from dean_interp.planning.study import forecast
from dean_interp.scoring.preparation import prepare
from dean_interp.study.config import StudyConfig
from dean_interp.study.settings import CalibrationConfig, ModelConfig

GIB = 2**30
MEASURED = "neurons: edit and controls"
pytestmark = pytest.mark.usefixtures("estimates_untimed")


@pytest.fixture(scope="module")
def seventy(checkpoints, tokenizer, tmp_path_factory):
    """A folder with the configuration of a 70B model and no weights."""
    folder = tmp_path_factory.mktemp("seventy")
    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
                         num_key_value_heads=8, vocab_size=128256, max_position_embeddings=4096)  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(seventy):
    return StudyConfig(
        model=ModelConfig(str(seventy), dtype="bfloat16", template="raw"),
        calibration=CalibrationConfig(score_tokens=2048),
    )


def steps(found):
    return {one.step: one for one in found.steps}


def test_seventy_billion_parameters_without_a_weight(config):
    found = forecast(config, Devices(gpus=4, tflops=200.0))
    assert found.n_parameters == 70_553_706_496
    assert found.weights_gib == pytest.approx(2 * 70_553_706_496 / GIB)
    n_weights = 80 * 3 * 8192 * 28672
    assert steps(found)["score"].host_gib == pytest.approx(12 * 0.02 * n_weights / GIB), "what is kept, with places"
    assert found.placement.startswith("laid over 4 GPUs") and "--device auto" in found.command
    assert found.n_passes > 1 and "--layers-per-pass" in found.command


def test_where_the_weights_lie(config):
    small = dataclasses.replace(config, unit=("neuron",))
    many = forecast(small, Devices(gpus=8, gpu_gib=640.0, tflops=200.0))
    one = forecast(small, Devices(gpus=1, gpu_gib=640.0, tflops=200.0))
    assert many.command.startswith("torchrun --nproc-per-node 8 --no-python dean-interp run")
    assert one.placement == "whole on the GPU" and one.n_passes == 1
    for name, step in steps(one).items():
        # One process estimates and writes.
        if name not in ("mutual information", "edit"):
            assert step.seconds == pytest.approx(8 * steps(many)[name].seconds)
    away = forecast(small, Devices(gpus=1, gpu_gib=100.0, host_gib=128.0, tflops=200.0))
    assert "fetched for every batch" in away.placement and "--device auto" in away.command
    assert steps(away)[MEASURED].seconds > 3 * steps(one)[MEASURED].seconds
    assert steps(away)["score"].device_gib <= 100


def test_devices_that_cannot_hold_a_batch_are_refused(config):
    with pytest.raises(InputError, match=r"score_tokens must be \d+ or less") as refused:
        forecast(config, Devices(gpus=1, gpu_gib=24.0, host_gib=64.0, tflops=200.0))
    allowed = int(re.findall(r"score_tokens must be (\d+)", str(refused.value))[0])
    smaller = dataclasses.replace(config, calibration=CalibrationConfig(score_tokens=allowed))
    assert forecast(smaller, Devices(gpus=1, gpu_gib=24.0, host_gib=64.0, tflops=200.0)).steps
    with pytest.raises(InputError, match="gpus must be at least 0, memory and tflops above 0, got"):
        forecast(config, Devices(gpus=-1))


def test_where_a_single_text_is_too_large_no_number_of_tokens_is_advised(config):
    with pytest.raises(InputError, match=r"no score_tokens is small enough for the longest text: take shorter texts"):
        forecast(config, Devices(gpus=1, gpu_gib=0.5, host_gib=64.0, tflops=200.0))


def test_sums_have_no_room_where_weights_fill_the_machine():
    """Without a GPU what is not on disk lies in the memory that sums would take."""
    machine = Devices(host_gib=64.0)
    filled = place_weights(100.0, 2.0, machine, 64.0)
    assert filled.offloaded and room_for_sums(filled, 2.0, machine, 64.0) == pytest.approx(0.0, abs=1e-9)
    half = place_weights(20.0, 2.0, machine, 64.0)
    assert room_for_sums(half, 2.0, machine, 64.0) == pytest.approx(0.8 * 64 - 22)
    with_gpu = Devices(gpus=1, gpu_gib=40.0, host_gib=64.0)
    fetched = place_weights(100.0, 2.0, with_gpu, 64.0)
    assert room_for_sums(fetched, 2.0, with_gpu, 64.0) == pytest.approx(0.8 * 64 - 32), "half of the host holds weights"


CPU = torch.device("cpu")
VERSION_1 = {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes", "inactive_file": "total_inactive_file"}
VERSION_2 = {"limit": "memory.max", "used": "memory.current", "inactive_file": "inactive_file"}


@pytest.fixture
def planted_groups(tmp_path, monkeypatch):
    """A function that writes what the system says of control groups: the process's own, and files of some."""

    def plant(own, groups):
        (tmp_path / "own").write_text(own)
        for folder, (names, limit, used, inactive_file) in groups.items():
            (tmp_path / "tree" / folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / "tree" / folder / names["limit"]).write_text(f"{limit}\n")
            (tmp_path / "tree" / folder / names["used"]).write_text(f"{used}\n")
            said = f"anon 500\n{names['inactive_file']} {inactive_file}\n"
            (tmp_path / "tree" / folder / "memory.stat").write_text(said)

    monkeypatch.setattr(device_memory, "_TREES", tmp_path / "tree")
    monkeypatch.setattr(device_memory, "_OWN_GROUPS", tmp_path / "own")
    return plant


@pytest.mark.parametrize(
    ("own", "top", "names"),
    [("0::/\n", "", VERSION_2), ("9:cpu,cpuacct:/\n4:memory:/docker/1a\n0::/\n", "memory", VERSION_1)],
    ids=["version 2", "version 1"],
)
def test_files_that_a_container_has_read_are_free_memory(planted_groups, tmp_path, own, top, names):
    planted_groups(own, {top: (names, 1000, 900, 300)})
    assert device_memory.free_memory(CPU) == 400 and device_memory.host_memory() == 1000
    (tmp_path / "tree" / top / "memory.stat").unlink()
    assert device_memory.free_memory(CPU) == 100
    (tmp_path / "tree" / top / names["used"]).write_text("1200")
    assert device_memory.free_memory(CPU) == 0, "a container may be above its limit for a moment"


@pytest.mark.parametrize(("names", "unlimited"), [(VERSION_1, 9223372036854771712), (VERSION_2, "max")])
def test_a_container_without_a_limit_has_the_machines_memory(planted_groups, names, unlimited, monkeypatch):
    top = "memory" if names is VERSION_1 else ""
    planted_groups("4:memory:/a\n" if top else "0::/a\n", {f"{top}/a".lstrip("/"): (names, unlimited, 900, 0)})
    machine = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    assert device_memory.host_memory() == machine.total
    assert device_memory.free_memory(CPU) == machine.available


def test_the_tightest_of_nested_limits_counts(planted_groups):
    planted_groups(
        "0::/user/job/step\n",
        {
            "user": (VERSION_2, 5000, 4900, 0),
            "user/job": (VERSION_2, 3000, 1000, 0),
            "user/job/step": (VERSION_2, "max", 10, 0),
            "user/other": (VERSION_2, 20, 10, 0),
        },
    )
    assert device_memory.free_memory(CPU) == 100, "what others of the outer group hold is not free"
    assert device_memory.host_memory() == 3000


def test_a_plan_counts_the_memory_of_its_container(config, planted_groups):
    planted_groups("4:memory:/\n", {"memory": (VERSION_1, 10 * GIB, 0, 0)})
    with pytest.raises(InputError, match=r"more than the 8 that may be used"):
        forecast(config, Devices(tflops=1.0))


@pytest.mark.parametrize(("width", "d_mlp", "heads", "layers"), [(128, 1024, 4, 3), (256, 384, 8, 5)])
def test_memory_of_a_batch_beside_what_is_watched(width, d_mlp, heads, layers, tokenizer, one_thread):
    torch.manual_seed(0)
    sizes = LlamaConfig(hidden_size=width, intermediate_size=d_mlp, num_hidden_layers=layers,
                        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=len(tokenizer))  # fmt: skip
    model = load_model(LlamaForCausalLM(sizes).eval(), tokenizer=tokenizer)
    how = ScoringConfig(template="raw", batch_tokens=4096)
    rows = prepare(model, load_behaviour("privacy", n_examples=8), how).rows
    lengths = [sum(len(branch.tokens) for branch in row) for row in rows]
    data = prepare(model, load_behaviour("privacy", n_examples=8), how)
    watched = _Probe(model, data, neuron_sites(model), how).batch_bytes()(8, max(lengths)) / _HEAP
    assert batch_bytes(model, rows, 8 * max(lengths), "float32") == pytest.approx(watched, rel=0.35)


def test_the_command_prints_a_table_or_json(seventy, capsys):
    given = ["plan", "--model", str(seventy), "--dtype", "bfloat16", "--gpus", "4", "--tflops", "200"]
    given += ["--unit", "neuron"]
    assert main(given) == 0
    said = capsys.readouterr().out
    assert (
        "70.55 billion parameters" in said
        and "start: dean-interp run --device auto" in said
        and "--unit neuron --out runs/study\n" in f"{said}\n"
    )
    assert "arithmetic at 200 TFLOP/s a device, to a factor of three" in said
    assert main([*given, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["steps"]
    assert [one["step"] for one in planned] == ["score", "neurons: edit and controls", "mutual information", "edit"]
    assert planned[0]["high"] == pytest.approx(9 * planned[0]["low"])


def test_a_step_of_each_unit_and_the_original_once(config):
    both = steps(forecast(config, Devices(gpus=4, tflops=200.0)))
    alone = steps(forecast(dataclasses.replace(config, unit=("neuron",)), Devices(gpus=4, tflops=200.0)))
    of_both = [both[f"{unit}s: edit and controls"].seconds for unit in ("neuron", "weight")]
    assert alone["neurons: edit and controls"].seconds == pytest.approx(of_both[0])
    # What the second unit lacks is the original.
    assert 0 < of_both[0] - of_both[1] < 0.5 * of_both[0]
