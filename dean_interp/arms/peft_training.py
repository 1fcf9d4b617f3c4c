"""An adapter of `peft`, trained on the pairs that an arm is given: LoRA or IA3, and its numbers after every few steps.

A plain copy of the model is trained, on the tokens that are measured and on no others. A finished training is kept in
the arm's own folder; one that was killed begins anew.
"""

import importlib.util
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dean_interp.arms.adapter_change import LORA_SCALING, AdapterKind, AdapterPath
from dean_interp.arms.arm import ArmExamples
from dean_interp.arms.pair_trainer import AdapterTraining, Where, train_on_pairs
from dean_interp.distributed import require_one_process
from dean_interp.errors import InputError
from dean_interp.files import read_tensors, write_tensors
from dean_interp.models.adapters import adapter_of
from dean_interp.models.load import HookedModel, load_plain, model_fingerprint
from dean_interp.models.loss import shares_prompts
from dean_interp.models.matrices import parameter, weight_sites
from dean_interp.models.native_tokenizer import chat_parts, native_tokenizer
from dean_interp.models.notes import notes
from dean_interp.models.offload import refuse_offloaded
from dean_interp.models.sites import Site
from dean_interp.models.tokens import Encoded, encode
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.study.store import fingerprint_of

ADAPTED: dict[tuple[AdapterKind, Where], tuple[str, ...]] = {
    ("lora", "mlp"): ("gate", "in", "out"),
    ("lora", "all"): ("q", "k", "v", "o", "gate", "in", "out"),
    ("ia3", "mlp"): ("out",),
    ("ia3", "all"): ("k", "v", "out"),
}
"""The matrices that get an adapter."""
TENSORS: dict[AdapterKind, tuple[str, ...]] = {"lora": ("lora_A.weight", "lora_B.weight"), "ia3": ("ia3_l",)}
"""What `peft` calls the tensors of one matrix."""
_FORMAT = "dean_interp.adapter_path.1"


@dataclass(frozen=True)
class _PathFacts:
    """What an adapter's file holds beside its tensors."""

    steps: list[int]


@own_torch_settings()
def trained_path(examples: ArmExamples, training: AdapterTraining) -> AdapterPath:
    """The adapter's way: from its file in the arm's own folder, else trained now.

    Raises `InputError` for data without pairs, a model that cannot be loaded again by its name or that keeps no fitting
    matrix in a tensor of its own, offloaded weights, `peft` missing, or where others work too.
    """
    require_one_process("training an adapter")
    if importlib.util.find_spec("peft") is None:
        raise InputError("LoRA and IA3 need the package peft: pip install 'dean_interp[tuning]'")
    for behaviour in examples.pairs:
        if not len(behaviour) or not behaviour.paired:
            raise InputError(f"adapters are trained on pairs, and '{behaviour.name}' has prompts without two answers")
    modules = adapted_modules(examples.model, training)
    path = examples.own_folder / f"{_fingerprint(examples, training)}.safetensors"
    if not path.is_file():
        kept = _trained(examples, training, modules)
        stacked = {}
        for name in kept[0]:
            stacked[name] = torch.stack([tensors[name] for tensors in kept.values()])
        write_tensors(path, _FORMAT, stacked, {"steps": list(kept)})
    tensors, facts = read_tensors(path, _FORMAT, _PathFacts)
    numbers = {}
    for site in modules:
        numbers[site] = tuple(tensors[f"{site} {name}"] for name in TENSORS[training.kind])
    first, second = examples.pairs
    return AdapterPath(
        kind=training.kind,
        steps=tuple(facts.steps),
        numbers=numbers,
        prompt_hashes=first.prompt_hashes | second.prompt_hashes,
    )


def _fingerprint(examples: ArmExamples, training: AdapterTraining) -> str:
    """A hash of all that a training depends on."""
    data = [behaviour.fingerprint for behaviour in examples.pairs]
    text = [examples.config.model.template, *chat_parts(examples.model)]
    return fingerprint_of(model_fingerprint(examples.model), *text, *data, json.dumps(asdict(training)))


def adapted_modules(model: HookedModel, training: AdapterTraining) -> dict[Site, tuple[str, bool]]:
    """What the checkpoint calls the modules that get an adapter, and whether each stores `(d_out, d_in)`.

    Matrices that the checkpoint keeps in one tensor with others are left out. Raises `InputError` where none is left,
    and for routed experts: they are no modules, so that an adapter would train everything but them without a word.
    """
    parts = ADAPTED[training.kind, training.where]
    beyond = [str(site) for site in weight_sites(model) if site.is_of_experts]
    if beyond:
        raise InputError(
            f"adapters of peft reach modules, and the routed experts of {model.cfg.model_name} are stacks of matrices: "
            f"{len(beyond)} of its matrices would not be trained ({', '.join(beyond[:3])}, …). Leave these arms out"
        )
    names = {id(stored): name for name, stored in _plain_twin(model).named_parameters()}
    modules = {}
    for site in weight_sites(model, training.where):
        stored, as_matrix = parameter(model, site)
        # What a bridge split off a joint tensor has no name.
        name = names.get(id(stored))
        if site.part in parts and name is not None:
            is_transposed = as_matrix is torch.t
            modules[site] = (name.removesuffix(".weight"), is_transposed)
    if not modules:
        raise InputError(f"{model.cfg.model_name} keeps none of {', '.join(parts)} in a tensor of its own")
    return modules


def _plain_twin(model: HookedModel) -> PreTrainedModel:
    """The model before it was wrapped, with the same parameters."""
    twin = notes(model).plain
    if twin is None:
        raise InputError(f"adapters need a bridge that load_model made, got a {adapter_of(model).kind} of others")
    return twin


def _trained(
    examples: ArmExamples,
    training: AdapterTraining,
    modules: Mapping[Site, tuple[str, bool]],
) -> dict[int, dict[str, Tensor]]:
    """The adapter's tensors by step, each by its site and `peft`'s name for it."""
    from peft import get_peft_model

    pairs = _pairs(examples)
    plain = _plain_copy(examples)
    torch.manual_seed(training.seed)
    with warnings.catch_warnings():
        # `peft` asks `transformers` for a property that has another name now.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted: Any = get_peft_model(plain, _settings(training, modules))
    parameters = {name.replace(".default", ""): value for name, value in adapted.named_parameters()}
    kept: dict[int, dict[str, Tensor]] = {}

    def keep(step: int) -> None:
        kept[step] = {}
        for site, (module, _) in modules.items():
            for tensor in TENSORS[training.kind]:
                parameter = parameters[f"base_model.model.{module}.{tensor}"]
                value = parameter.detach().float().cpu().clone()
                # IA3's multipliers are a row or a column.
                if training.kind == "ia3":
                    value = value.flatten()
                kept[step][f"{site} {tensor}"] = value

    keep(0)
    train_on_pairs(adapted, pairs, training, keep, branched=shares_prompts(examples.model, pairs))
    return kept


def _plain_copy(examples: ArmExamples) -> PreTrainedModel:
    """The model as `transformers` has it, loaded again. Raises `InputError` where its name leads to another one."""
    settings = examples.config.model
    try:
        plain, _ = load_plain(settings.name, device=settings.device, dtype=settings.dtype, adapter=settings.adapter)
    except InputError as error:
        raise InputError(f"adapters are trained on a copy of the model, loaded by its name: {error}") from error
    refuse_offloaded(plain, "training an adapter")
    ours = dict(_plain_twin(examples.model).named_parameters())
    for name, stored in plain.named_parameters():
        if name not in ours or not torch.equal(ours[name].cpu(), stored.cpu()):
            raise InputError(
                f"adapters are trained on a copy of the model, and '{settings.name}' is another one than that in "
                "memory: give the model's own name or folder"
            )
    return plain


def _settings(training: AdapterTraining, modules: Mapping[Site, tuple[str, bool]]) -> Any:  # noqa: ANN401 - of peft
    from peft import IA3Config, LoraConfig

    names = [name for name, _ in modules.values()]
    # A `Conv1D` stores its matrix the other way round. The matrices of one model are all alike.
    is_turned = not any(is_transposed for _, is_transposed in modules.values())
    if training.kind == "lora":
        return LoraConfig(
            r=training.rank,
            lora_alpha=LORA_SCALING * training.rank,
            target_modules=names,
            fan_in_fan_out=is_turned,
            task_type="CAUSAL_LM",
        )
    feedforward = [name for site, (name, _) in modules.items() if site.part == "out"]
    return IA3Config(
        target_modules=names,
        feedforward_modules=feedforward,
        fan_in_fan_out=is_turned,
        task_type="CAUSAL_LM",
    )


def _pairs(examples: ArmExamples) -> list[Encoded]:
    """Each prompt with its safe answer and its unsafe one, as the tokens that are measured."""
    tokenizer = native_tokenizer(examples.model)
    pairs = []
    for behaviour in examples.pairs:
        for example in behaviour.examples:
            pair = encode(
                tokenizer,
                example.prompt,
                [example.answers["safe"], example.answers["unsafe"]],
                template=examples.config.model.template,
                n_ctx=examples.model.cfg.n_ctx,
            )
            pairs.append(pair)
    return pairs
