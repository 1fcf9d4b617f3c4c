"""The measurement of one GPU is prepared: with a tiny model it runs to its end on a CPU."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def one_gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import one_gpu

    yield one_gpu
    # `scoring` is a file beside it, and would be found by its short name from then on.
    for name in ("one_gpu", "scoring"):
        sys.modules.pop(name)


@pytest.mark.slow
def test_the_prepared_measurement_of_a_gpu_runs_to_its_end(one_gpu, tmp_path):
    out = tmp_path / "tiny.json"
    one_gpu.main(out, shape="tiny", device="cpu")
    results = json.loads(out.read_text())
    parts = ("products", "cost", "behaviours", "memory", "answering", "profile", "improve")
    assert all(len(results[part]) > 1 for part in parts)
    assert results["products"]["largest_difference"] < 1e-5
    ratios = [*results["cost"].values(), *results["answering"].values(), results["memory"]["ratio"]]
    assert all(0 < ratio < 100 for ratio in ratios)
    assert sum(results["improve"]["steps"].values()) == pytest.approx(results["improve"]["seconds"], rel=0.5)


def test_without_a_gpu_it_says_how_to_try_it(one_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit, match="--shape tiny --device cpu"):
        one_gpu.main(tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()
