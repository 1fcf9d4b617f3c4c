"""What weights are scored by: the twin against its definition, the kernel against the twin in Triton's interpreter."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dean_interp.scoring.products import add_products

ROOT = Path(__file__).parents[1]
COUNTS = torch.tensor([[5, 0, 1, 37, 64, 3]])
OF_EXPERTS = torch.tensor([[5, 0, 1, 37], [0, 0, 0, 0], [0, 2, 0, 33]])
"""Places of each example in three experts, of which the second has none."""
FOLDS = ("value", "size", "square")
SUBSETS = [subset for n in (1, 2, 3) for subset in itertools.combinations(FOLDS, n)]


def given(d_in=70, d_out=130, dtype=torch.float32, counts=COUNTS):
    generator, n_places = torch.Generator().manual_seed(0), int(counts.sum())
    x = torch.randn(n_places, d_in, generator=generator).to(dtype)
    gradient = torch.randn(n_places, d_out, generator=generator).to(dtype)
    return x, gradient, counts


def begun(folds, *shape):
    """Totals that hold something already."""
    return {fold: torch.full(shape, 1.0 + number) for number, fold in enumerate(folds)}


def wide(n_experts, d_in, d_out):
    """The experts' parts of one wide matrix, which do not lie one behind the other."""
    return torch.zeros(d_in, n_experts * d_out).unflatten(1, (n_experts, -1)).transpose(0, 1)


def by_definition(fold, x, gradient, counts):
    total = torch.zeros(len(counts), x.shape[1], gradient.shape[1], dtype=torch.float64)
    lengths = counts.flatten().tolist()
    parts = zip(x.double().split(lengths), gradient.double().split(lengths), strict=True)
    for number, (read, written) in enumerate(parts):
        product = read.T @ written
        total[number // counts.shape[1]] += {"value": product, "size": product.abs(), "square": product.square()}[fold]
    return total


@pytest.mark.parametrize("counts", [COUNTS, OF_EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("folds", SUBSETS, ids="+".join)
def test_products_are_taken_by_example_and_expert_before_they_are_folded(folds, counts):
    totals = begun(folds, len(counts), 70, 130)
    before = {fold: total.clone() for fold, total in totals.items()}
    add_products(totals, *given(counts=counts))
    for fold, total in totals.items():
        added = by_definition(fold, *given(counts=counts))
        assert torch.allclose(total.double(), before[fold].double() + added, rtol=1e-4, atol=1e-3)


def test_several_folds_of_one_call_are_those_of_calls_of_their_own():
    together = begun(FOLDS, 3, 24, 20)
    add_products(together, *given(24, 20, counts=OF_EXPERTS))
    for fold in ("size", "square"):
        alone = {fold: begun(FOLDS, 3, 24, 20)[fold]}
        add_products(alone, *given(24, 20, counts=OF_EXPERTS))
        assert torch.equal(alone[fold], together[fold])


CASES = [(folds, name) for folds in SUBSETS for name in ("float32", "bfloat16")]
IN_INTERPRETER = """
import sys
import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from dean_interp.scoring.product_kernel import add_products_in_one
from tests.test_products import CASES, FOLDS, OF_EXPERTS, begun, given, wide

# The interpreter multiplies the bits of bfloat16 as integers: here they are the numbers that they stand for.
multiplied = interpreter.InterpreterBuilder.create_dot

def as_number(operand):
    if operand.dtype.scalar != tl.bfloat16:
        return operand
    return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

def create_dot(builder, a, b, *rest):
    return multiplied(builder, as_number(a), as_number(b), *rest)

interpreter.InterpreterBuilder.create_dot = create_dot

results = {}
for folds, name in CASES:
    results[folds, name] = begun(folds, 1, 70, 130)
    add_products_in_one(results[folds, name], *given(dtype=getattr(torch, name)))
results["wide"] = {fold: wide(3, 24, 20) for fold in FOLDS}
results["tall"] = begun(FOLDS, 3, 24, 20)
for layout in ("wide", "tall"):
    add_products_in_one(results[layout], *given(24, 20, counts=OF_EXPERTS))
torch.save(results, sys.argv[1])
"""


def in_triton(script, *arguments, **environment):
    """Run a script where Triton is installed; without `TRITON_INTERPRET` it compiles."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: it comes with a CUDA build of torch")
    roots = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    own |= {"PYTHONPATH": os.pathsep.join(roots), **environment}
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], env=own, check=True)


@pytest.fixture(scope="module")
def by_kernel(tmp_path_factory):
    """What the kernel gives, run by Triton's interpreter, which has to be asked for before Triton is imported."""
    path = tmp_path_factory.mktemp("kernel") / "results.pt"
    in_triton(IN_INTERPRETER, path, TRITON_INTERPRET="1")
    return torch.load(path)


@pytest.mark.parametrize(("folds", "name"), CASES, ids=lambda part: part if isinstance(part, str) else "+".join(part))
def test_the_kernel_gives_what_its_twin_gives(by_kernel, folds, name):
    twin = begun(folds, 1, 70, 130)
    add_products(twin, *given(dtype=getattr(torch, name)))
    assert by_kernel[folds, name].keys() == twin.keys()
    for fold, total in twin.items():
        assert torch.allclose(by_kernel[folds, name][fold], total, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("layout", ["wide", "tall"])
def test_one_call_of_the_kernel_adds_to_every_expert_that_has_places(by_kernel, layout):
    before = {fold: wide(3, 24, 20) for fold in FOLDS} if layout == "wide" else begun(FOLDS, 3, 24, 20)
    twin = {fold: total.clone() for fold, total in before.items()}
    add_products(twin, *given(24, 20, counts=OF_EXPERTS))
    for fold, total in by_kernel[layout].items():
        assert torch.allclose(total, twin[fold], rtol=1e-5, atol=1e-4)
        assert torch.equal(total[1], before[fold][1]) and not torch.equal(total[2], before[fold][2])


COMPILED = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from dean_interp.scoring.product_kernel import _add_folded, tile_of

pointers = {"values": "*fp32", "sizes": "*fp32", "squares": "*fp32", "starts": "*i64"}
strides = ("expert_stride", "row_stride", "column_stride")
numbers = dict.fromkeys(("n_examples", "d_in", "d_out", *strides), "i32")
for capability in (80, 90):
    for kind, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for n_folds in (1, 3):
            tile = tile_of(dtype, n_folds)
            constants = {"to_values": n_folds > 1, "to_sizes": True, "to_squares": n_folds > 1}
            constants |= {"rows_a_tile": tile.rows_a_tile, "columns_a_tile": tile.columns_a_tile}
            constants["places_at_once"] = tile.places_at_once
            types = {**pointers, **dict.fromkeys(("x", "gradient"), f"*{kind}"), **numbers}
            types |= dict.fromkeys(constants, "constexpr")
            source = ASTSource(_add_folded, {name: types[name] for name in _add_folded.arg_names}, constants)
            target = GPUTarget("cuda", capability, 32)
            compiled = compile(source, target=target, options={"num_warps": tile.num_warps})
            assert compiled.asm["cubin"]
            # The least that a program may take on any GPU from 8.0 on (8.6).
            assert compiled.metadata.shared <= 99 * 1024
"""


def test_the_kernel_compiles_for_gpus_without_one():
    in_triton(COMPILED)
