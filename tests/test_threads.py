"""A run computes with the threads that are clearly the fastest, and with those that it began with when it goes on."""

import json
import logging

import pytest
import torch

from dean_interp.models import threads
from dean_interp.models.threads import chosen_threads

BUSY = {1: 1.0, 2: 1.5, 4: 4.0, 6: 5.0}
"""Seconds of a product by threads, on a machine whose cores are taken."""
ALONE = {1: 6.0, 2: 3.0, 4: 1.4, 6: 1.0}


@pytest.fixture(autouse=True)
def six_cores(monkeypatch):
    """A machine of six cores on which nobody has set the number of threads."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("psutil.cpu_count", lambda logical=True: 6)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)), raising=False)
    torch.set_num_threads(6)
    yield
    torch.set_num_threads(before)


def n_threads_in(model, path, seconds):
    with chosen_threads(model, path, time_product=seconds.__getitem__):
        inside = torch.get_num_threads()
    assert torch.get_num_threads() == 6, "afterwards all is as it was"
    return inside


@pytest.mark.parametrize(("seconds", "expected"), [(BUSY, 1), (ALONE, 6), ({1: 0.8, 2: 0.8, 4: 0.9, 6: 1.0}, 6)])
def test_fewer_threads_are_taken_only_where_they_are_clearly_faster(llama, tmp_path, caplog, seconds, expected):
    assert n_threads_in(llama, tmp_path / "threads.json", seconds) == expected
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("n_threads=1: a product is 5.0 times as fast as with 6" in line for line in said) == (expected == 1)


def test_a_run_that_goes_on_keeps_its_threads_and_times_nothing(llama, tmp_path):
    path = tmp_path / "threads.json"
    assert n_threads_in(llama, path, BUSY) == 1
    assert n_threads_in(llama, path, {}) == 1


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS"])
def test_a_run_begins_with_the_number_of_the_environment_and_times_nothing(llama, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "6")
    assert n_threads_in(llama, tmp_path / "threads.json", {}) == 6


def test_a_run_begins_with_the_number_that_a_caller_set_and_goes_on_with_it(llama, tmp_path):
    path = tmp_path / "threads.json"
    torch.set_num_threads(3)
    with chosen_threads(llama, path, time_product={}.__getitem__):
        assert torch.get_num_threads() == 3
    torch.set_num_threads(6)
    assert n_threads_in(llama, path, {}) == 3


def test_another_number_is_not_taken_by_a_run_that_goes_on_and_this_is_said(llama, tmp_path, caplog):
    path = tmp_path / "threads.json"
    assert n_threads_in(llama, path, ALONE) == 6
    torch.set_num_threads(1)
    with chosen_threads(llama, path, time_product={}.__getitem__):
        assert torch.get_num_threads() == 6
    assert torch.get_num_threads() == 1
    assert "the run began with n_threads=6 and goes on with them, so 1 is not taken" in caplog.text
    torch.set_num_threads(6)


def test_other_processes_can_be_told_the_choice(llama, tmp_path, monkeypatch):
    # One process chooses, and the others get what JSON makes of it.
    monkeypatch.setattr(threads, "on_rank0", lambda work: json.loads(json.dumps(work())))
    assert n_threads_in(llama, tmp_path / "threads.json", BUSY) == 1


def test_threads_are_put_back_where_timing_fails(llama, tmp_path):
    with pytest.raises(KeyError):
        n_threads_in(llama, tmp_path / "threads.json", {1: 1.0})
    assert torch.get_num_threads() == 6


def test_the_timer_computes_with_the_number_that_it_is_asked_for(llama, monkeypatch):
    monkeypatch.setattr(threads, "_SECONDS", 0.0)
    time_product = threads._product_timer(llama)
    assert time_product(2) > 0
    assert torch.get_num_threads() == 2
