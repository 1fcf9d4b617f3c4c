"""What weights are scored by: the twin against its definition, the kernel against the twin in Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dean_interp.scoring.products import add_products

ROOT = Path(__file__).parents[1]
LENGTHS = [5, 0, 1, 37, 64, 3]


def given(d_in=70, d_out=130, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(LENGTHS), d_in, generator=generator).to(dtype)
    gradient = torch.randn(sum(LENGTHS), d_out, generator=generator).to(dtype)
    return x, gradient


def by_definition(x, gradient, fold):
    total = torch.zeros(x.shape[1], gradient.shape[1], dtype=torch.float64)
    for read, written in zip(x.double().split(LENGTHS), gradient.double().split(LENGTHS), strict=True):
        product = read.T @ written
        total += {"value": product, "size": product.abs(), "square": product.square()}[fold]
    return total


@pytest.mark.parametrize("fold", ["value", "size", "square"])
def test_products_are_taken_by_example_before_they_are_folded(fold):
    x, gradient = given()
    total = torch.ones(70, 130)
    add_products(total, x, gradient, LENGTHS, fold)
    assert torch.allclose(total.double(), 1 + by_definition(x, gradient, fold), rtol=1e-4, atol=1e-3)


# The interpreter multiplies the bits of bfloat16 as integers, so half precision is tried in float16.
CASES = [(fold, name) for fold in ("value", "size", "square") for name in ("float32", "float16")]
IN_INTERPRETER = """
import sys
import torch
from dean_interp.scoring.product_kernel import add_products_in_one
from tests.test_products import CASES, LENGTHS, given

results = {}
for fold, name in CASES:
    results[fold, name] = torch.ones(70, 130)
    add_products_in_one(results[fold, name], *given(dtype=getattr(torch, name)), LENGTHS, fold)
results["wide"] = torch.zeros(24, 3 * 20)
add_products_in_one(results["wide"].unflatten(1, (3, -1))[:, 1], *given(24, 20), LENGTHS, "size")
torch.save(results, sys.argv[1])
"""


@pytest.fixture(scope="module")
def by_kernel(tmp_path_factory):
    """What the kernel gives, run by Triton's interpreter, which has to be asked for before Triton is imported."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: it comes with a CUDA build of torch")
    path = tmp_path_factory.mktemp("kernel") / "results.pt"
    roots = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    given_to_it = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(roots)}
    subprocess.run([sys.executable, "-c", IN_INTERPRETER, str(path)], env=given_to_it, check=True)
    return torch.load(path)


@pytest.mark.parametrize(("fold", "name"), CASES)
def test_the_kernel_gives_what_its_twin_gives(by_kernel, fold, name):
    twin = torch.ones(70, 130)
    add_products(twin, *given(dtype=getattr(torch, name)), LENGTHS, fold)
    assert torch.allclose(by_kernel[fold, name], twin, rtol=1e-5, atol=1e-4)


def test_the_kernel_adds_to_one_experts_part_of_a_wide_matrix_and_to_no_other(by_kernel):
    twin = torch.zeros(24, 20)
    add_products(twin, *given(24, 20), LENGTHS, "size")
    wide = by_kernel["wide"]
    assert torch.allclose(wide[:, 20:40], twin, rtol=1e-5, atol=1e-4)
    assert not wide[:, :20].any() and not wide[:, 40:].any()


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from dean_interp.scoring.product_kernel import _add_folded

pointers = {"total": "*fp32", "starts": "*i64"}
numbers = dict.fromkeys(("n_examples", "d_in", "d_out", "row_stride", "column_stride"), "i32")
tiles = {"rows_a_tile": 64, "columns_a_tile": 64, "places_at_once": 32}
for kind in ("bf16", "fp16", "fp32"):
    for fold in (0, 1, 2):
        constants = {"fold": fold, **tiles}
        types = {**pointers, **dict.fromkeys(("x", "gradient"), f"*{kind}"), **numbers}
        types |= dict.fromkeys(constants, "constexpr")
        in_order = {name: types[name] for name in _add_folded.arg_names}
        compiled = compile(ASTSource(_add_folded, in_order, constants), target=GPUTarget("cuda", 90, 32))
        assert compiled.asm["cubin"]
"""


def test_the_kernel_compiles_for_a_gpu_without_one():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: it comes with a CUDA build of torch")
    roots = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": roots}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run([sys.executable, "-c", COMPILED], env=environment, check=True)
