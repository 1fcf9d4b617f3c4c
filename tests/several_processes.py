"""Groups of processes that share one job, forked by a process that has imported everything.

It reads a line of JSON for each group, `[n, job, arguments, file for standard error]`, and answers with the exit codes.
The children find in their environment what `torchrun` would put there.
"""

import json
import os
import signal
import socket
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from dean_interp import ScoringConfig, Selection, Site, distributed, importance, load_behaviour, load_model, measure
from dean_interp.cli.ending import exit_code_of
from dean_interp.evaluation.windows import window_loss
from dean_interp.information.activations import read_activations
from dean_interp.models import loss
from dean_interp.models.generate import generate_to
from dean_interp.scoring.methods import wanda
from dean_interp.scoring.per_example import example_scores
from dean_interp.study.config import StudyConfig
from dean_interp.study.run import run_study
from dean_interp.study.settings import AnswerConfig, CalibrationConfig, ControlConfig, DataConfig, ModelConfig

ANSWER, UNITS = 12, ("neuron", "weight")
CHOSEN = {Site(0, "neurons"): torch.tensor([1, 7]), Site(2, "out"): torch.tensor([3, 40, 77])}


def config_of(checkpoint: str) -> StudyConfig:
    return StudyConfig(
        model=ModelConfig(checkpoint, device="cpu"),
        data=DataConfig(n_test=12, n_general_test=12),
        calibration=CalibrationConfig(n_calibration=12),
        controls=ControlConfig(n_random=2, n_equal_kl=1),
        answers=AnswerConfig(n_answers=4, answer_lengths=(8,), n_answer_controls=1),
        neuron_fraction=0.075,
        weight_fraction=0.03,
        information_fraction=0.3,
    )


def numbers(checkpoint: str, out: str) -> None:
    """What each process holds after every kind of loop, in a file of its own."""
    model = load_model(checkpoint, device="cpu")
    one = load_behaviour("privacy", n_examples=21)
    found: dict[str, torch.Tensor] = {}
    margin = ScoringConfig(target="margin", signed=True, batch_tokens=900, layers_per_pass=2)
    for name, how in {"plain": ScoringConfig(batch_tokens=700), "margin": margin}.items():
        scores = importance(model, one, unit=UNITS, config=how)
        found |= {f"{name} {kind} {site}": tensor for kind in ("values", "activation_mean", "activation_norm", "groups")
                  for site, tensor in getattr(scores, kind).items()}  # fmt: skip
        found[f"{name} loss"] = scores.loss
    found |= {f"wanda {site}": tensor for site, tensor in wanda(model, one).values.items()}
    found |= {f"examples {site}": tensor for site, tensor in example_scores(model, one, CHOSEN).items()}
    test = load_behaviour("fairness", split="test", n_examples=17)
    before = measure(model, [test], answer_tokens=ANSWER, batch_tokens=400)["fairness"]
    found |= {"log_prob": before.log_prob, "final": before.final}
    units = Selection({Site(1, "neurons"): torch.tensor([0, 5, 9])}, {Site(1, "neurons"): (40,)})
    reads = read_activations(model, [test], units, answers=True, answer_tokens=ANSWER, batch_tokens=400)
    found |= {"reads": reads.values[Site(1, "neurons")], "read answers": reads.answers[Site(1, "neurons")]}
    found["windows"] = window_loss(model, test.prompts, window=64).loss
    answers = generate_to(model, test.prompts, lengths=(9,), batch_size=4)[9]
    found["answers"] = torch.tensor(list("\n".join(answers).encode()))
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, Path(out) / f"{distributed.rank()}")


def mixture(checkpoint: str, out: str) -> None:
    """What each process holds of a mixture's scores, the slots of its experts among them."""
    model = load_model(checkpoint, device="cpu")
    privacy = load_behaviour("privacy", n_examples=7)
    scores = importance(model, privacy, unit=UNITS, config=ScoringConfig(template="raw", batch_tokens=500))
    found = {"loss": scores.loss}
    for kind in ("values", "activation_mean", "activation_norm", "groups", "slots"):
        found |= {f"{kind} {site}": tensor.contiguous() for site, tensor in getattr(scores, kind).items()}
    save_file(found, Path(out) / f"{distributed.rank()}")


def study(checkpoint: str, out: str, *dies: str) -> None:
    """A whole study; with `dies` the second process is killed before its batch of that number."""
    collate, seen = loss.collate, [0]

    def counted(*args: object, **options: object) -> object:
        seen[0] += 1
        if dies and distributed.rank() == 1 and seen[0] == int(dies[0]):
            os.kill(os.getpid(), signal.SIGKILL)
        return collate(*args, **options)

    loss.collate = counted
    run_study(config_of(checkpoint), out)


JOBS = {job.__name__: job for job in (numbers, mixture, study)}


def _child(k: int, n: int, port: int, job: str, arguments: list[str], errors: str) -> int:
    # One that hangs ends, and its group with it.
    signal.alarm(300)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    here = {"RANK": k, "LOCAL_RANK": k, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()} | {"MASTER_ADDR": "127.0.0.1"})
    return exit_code_of(lambda: JOBS[job](*arguments), name=job, debug=False)


def _group(n: int, job: str, arguments: list[str], errors: str) -> list[int]:
    """Exit codes of `n` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for k in range(n):
        child = os.fork()
        if child == 0:
            os._exit(_child(k, n, port, job, arguments, errors))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_group(*json.loads(line))) + "\n")
        sys.stdout.flush()
