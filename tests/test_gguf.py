"""A GGUF file becomes the folder that plain `transformers` makes of it; it is parsed once; a kill leaves nothing."""

import io
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from dean_interp import InputError, load_model, show_progress
from dean_interp.models import gguf_file
from dean_interp.models.gguf_file import convert_gguf, folder_of_gguf

pytestmark = pytest.mark.hooks

N_LAYERS, D_MODEL, D_MLP = 2, 32, 64
MERGES = ("a b", "c d", "ab cd")
TOKENS = ("<|endoftext|>", *map(chr, range(33, 127)), "Ġ", "ab", "cd", "abcd")


def written(path: Path, *, architecture: str = "qwen2", kind: GGMLQuantizationType = GGMLQuantizationType.Q8_0) -> Path:
    """A tiny Qwen2 of random weights as a GGUF file, its matrices in blocks of the kind `kind`."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(hidden_size=D_MODEL, intermediate_size=D_MLP, num_hidden_layers=N_LAYERS, num_attention_heads=4,
                    num_key_value_heads=2, vocab_size=len(TOKENS), tie_word_embeddings=False)
    )  # fmt: skip
    assert sum(parameter.numel() for parameter in model.parameters()) < 50_000
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(N_LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(D_MLP)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([TokenType.CONTROL] + [TokenType.NORMAL] * (len(TOKENS) - 1))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, N_LAYERS)
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        its_kind = kind if values.ndim == 2 else GGMLQuantizationType.F32
        its_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert its_name is not None
        if its_kind == GGMLQuantizationType.Q8_1:  # which `gguf` writes for nobody: blocks of zeros
            blocks = gguf.quants.quant_shape_to_byte_shape(values.shape, its_kind)
            values = torch.zeros(blocks, dtype=torch.uint8).numpy()
        else:
            values = gguf.quants.quantize(values, its_kind)
        writer.add_tensor(its_name, values, raw_dtype=its_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path):
    return written(tmp_path / "tiny.gguf")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DEAN_INTERP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def shown(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_the_folder_is_the_one_that_plain_transformers_makes(file, cache, tmp_path):
    options = {"gguf_file": file.name, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    plain.save_pretrained(tmp_path / "plain")
    AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name).save_pretrained(tmp_path / "plain")
    made = folder_of_gguf(file)
    assert contents(made) == contents(tmp_path / "plain")
    assert shown(cache) == [made.name]
    model = load_model(file, device="cpu")
    assert model.cfg.d_mlp == D_MLP and list(model.tokenizer("ab abcd")["input_ids"]) == [96, 95, 98]


def test_a_file_is_parsed_once_by_a_reader_that_transformers_asks_for(file, cache, monkeypatch):
    parsed, asked = [], []
    parse, look_up = gguf_file._QuickReader._build_fields, gguf_file.functools.cache

    def counted_parse(reader, *arguments):
        parsed.append(type(reader))
        return parse(reader, *arguments)

    def counted_cache(function):
        kept = look_up(function)

        def ask(*arguments):
            asked.append(function)
            return kept(*arguments)

        return ask

    monkeypatch.setattr(gguf.GGUFReader, "_build_fields", counted_parse)
    monkeypatch.setattr(gguf_file.functools, "cache", counted_cache)
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    folder_of_gguf(file)
    assert parsed == [gguf_file._QuickReader]
    assert asked.count(gguf_file._QuickReader) >= 3, "transformers no longer looks the reader up in `gguf`"
    assert asked.count(before[1]) > N_LAYERS, "transformers no longer looks the map of names up in `gguf`"
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_the_quick_reader_reads_what_the_reader_of_gguf_reads(file):
    quick, plain = gguf_file._QuickReader(file), gguf.GGUFReader(file)
    assert type(quick.data) is not type(plain.data)
    for name, field in plain.fields.items():
        assert quick.fields[name].contents() == field.contents() and quick.fields[name].types == field.types
    for mine, theirs in zip(quick.tensors, plain.tensors, strict=True):
        assert mine.name == theirs.name and (mine.data == theirs.data).all()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_on", [True, False])
def test_a_conversion_shows_its_progress_in_our_bars_or_in_none(file, cache, monkeypatch, is_on):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(tqdm, "monitor_interval", 0)
    show_progress(is_on)
    try:
        folder_of_gguf(file)
    finally:
        show_progress()
    said = sys.stderr.getvalue()
    assert ("converting tiny.gguf" in said and "3/3" in said) == is_on
    assert ("Converting and de-quantizing" in said) == is_on, "the bar of the tensors passes by our style"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: written(path, architecture="martian"), "martian"),
        (lambda path: written(path, kind=GGMLQuantizationType.Q8_1), "Q8_1"),
        (lambda path: os.truncate(written(path), 1000), ""),
        (lambda path: os.truncate(written(path), 20_000), ""),
    ],
    ids=["an architecture", "blocks", "cut in its tokens", "cut in its tensors"],
)
def test_a_file_that_cannot_be_read_is_refused_in_one_line_and_leaves_nothing(cache, tmp_path, spoil, said):
    spoil(tmp_path / "bad.gguf")
    with pytest.raises(InputError, match=r"cannot load the model .*bad\.gguf") as error:
        load_model(tmp_path / "bad.gguf")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert shown(cache) == []


_SLOW = """
import pathlib, sys, time
from transformers import Qwen2ForCausalLM
from dean_interp.models.gguf_file import folder_of_gguf

save = Qwen2ForCausalLM.save_pretrained
def slowly(model, folder):
    save(model, folder)
    pathlib.Path(folder, "by_another_process").touch()
    print("saved", flush=True)
    time.sleep(float(sys.argv[2]))
Qwen2ForCausalLM.save_pretrained = slowly
folder_of_gguf(pathlib.Path(sys.argv[1]))
"""


def converting(file: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that has written most of a folder, and waits so long before it goes on."""
    command = [sys.executable, "-c", _SLOW, str(file), str(seconds)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert running.stdout is not None and running.stdout.readline() == "saved\n"
    return running


def test_what_a_killed_conversion_left_is_deleted_by_the_next_one_of_another_file(file, cache, tmp_path):
    with converting(file, 60) as running:
        running.kill()
    assert shown(cache) == [".converting"] and "model.safetensors" in contents(cache / ".converting")
    shutil.copyfile(file, tmp_path / "other.gguf")
    made = folder_of_gguf(tmp_path / "other.gguf")
    assert shown(cache) == [made.name] and "by_another_process" not in contents(made)


def test_a_conversion_that_is_terminated_leaves_nothing(file, cache):
    with converting(file, 60) as running:
        running.terminate()
    assert running.returncode == 128 + signal.SIGTERM and shown(cache) == []


def test_a_conversion_waits_for_one_that_lives_and_takes_its_folder(file, cache, caplog):
    caplog.set_level(logging.INFO, logger="dean_interp")
    with converting(file, 5) as running:
        made = folder_of_gguf(file)
        assert "waiting until it has ended" in caplog.text
    assert running.returncode == 0 and shown(cache) == [made.name]
    assert "by_another_process" in contents(made), "it was converted twice"


def test_a_signal_is_handled_by_the_program_that_handles_it_itself(file, cache):
    def own(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, own)
    try:
        convert_gguf(file, cache / "made")
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)
