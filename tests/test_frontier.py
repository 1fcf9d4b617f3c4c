"""The comparison of arms recovers a planted ranking, keeps confirming prompts shut, and undoes every arm to the bit."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from planted_gates import planted_model, write_data, write_register

from dean_interp import AnswerConfig, ImproveConfig, InputError, ModelConfig, load_model
from dean_interp.arms.all_arms import all_arms
from dean_interp.arms.arm import flipped
from dean_interp.arms.choosing_settings import best_of, tried_settings
from dean_interp.arms.comparison import ComparisonConfig, begun
from dean_interp.arms.frontier_curves import MarginChanges, area_under, mean_under_curve, smaller_rises
from dean_interp.arms.sealed import SealBrokenError, sealed
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.study.improve_data import improve_data

sys.path.insert(0, str(Path(__file__).parents[1] / "analyses"))


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted_frontier") / "model"
    planted_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def config(folder, tmp_path_factory):
    """Both behaviours are real; the right edit silences the neuron that hurts both and opens the one that helps both."""
    data_folder = tmp_path_factory.mktemp("data")
    data = write_data(data_folder, n_topics=32, n_each=2, real=(True, True))
    study = ImproveConfig(
        model=ModelConfig(str(folder), template="raw", device="cpu"),
        first=data["first"],
        second=data["second"],
        general=data["general"],
        register=write_register(data_folder),
        answers=AnswerConfig(n_answers=0),
        n_score=20,
        n_choose=12,
        n_confirm=32,
        n_flips=2,
        n_random=1,
    )
    return ComparisonConfig(study=study)


@pytest.mark.slow
def test_quick_comparison_recovers_the_planted_ranking(config, tmp_path):
    import frontier

    given = frontier.FrontierRun(out=tmp_path / "run", quick=True, comparison=config)
    found = frontier.run(given)
    assert not found.missing
    rise = {arm.name: arm.points[0].smaller.mean for arm in found.arms if arm.points}
    print(rise)
    assert False
