"""Perplexity at fixed windows, against plain transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from dean_interp import InputError, Selection, Site, ablate
from dean_interp.evaluation.windows import window_loss
from dean_interp.models.native_tokenizer import native_tokenizer
from dean_interp.resume import Unfinished

TEXTS = ["The risotto wants stock.\nStir now and then.", "A pawn that reaches the last rank becomes a queen.", "Ends."]


def test_windows_are_those_of_plain_transformers(tiny, checkpoints, request):
    folder = checkpoints[request.node.callspec.params["tiny"]]
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor(native_tokenizer(tiny)("\n\n".join(TEXTS)).input_ids)
    found = window_loss(tiny, TEXTS, window=32)
    assert len(found.loss) == len(ids) // 32
    with torch.inference_mode():
        for row, loss in zip(ids[: len(found.loss) * 32].reshape(-1, 32), found.loss, strict=True):
            assert float(loss) == pytest.approx(float(plain(row[None], labels=row[None]).loss), abs=1e-4)
    assert found.perplexity == pytest.approx(float(found.loss.mean().exp()))
    assert not found.kl.any()


def silenced(model) -> Selection:
    site = Site(1, "neurons")
    return Selection({site: torch.arange(0, 40, 2)}, {site: (40,)})


@torch.no_grad()
def test_kl_is_that_of_the_logits_and_0_to_itself(llama):
    original = window_loss(llama, TEXTS, window=32)
    ids = torch.tensor(native_tokenizer(llama)("\n\n".join(TEXTS)).input_ids)[None, :32]
    before = llama(ids).log_softmax(-1)[0, :-1]
    with ablate(llama, silenced(llama)):
        now = window_loss(llama, TEXTS, window=32, original=original)
        after = llama(ids).log_softmax(-1)[0, :-1]
    kl = (before.exp() * (before - after)).sum(-1).mean()
    assert float(now.kl[0]) == pytest.approx(float(kl), rel=1e-3) and now.kl.min() > 0
    again = window_loss(llama, TEXTS, window=32, original=original)
    assert again.kl.abs().max() < 1e-5 and torch.equal(again.loss, original.loss)


def test_a_killed_measurement_goes_on_with_the_next_window(llama, tmp_path, monkeypatch):
    whole = window_loss(llama, TEXTS, window=16)
    unfinished = Unfinished(tmp_path / "windows.unfinished", "one")
    import dean_interp.evaluation.windows as module

    real, calls = module.answer_log_probs, []

    def fails_at_the_third(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module, "answer_log_probs", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        window_loss(llama, TEXTS, window=16, unfinished=unfinished)
    resumed = window_loss(llama, TEXTS, window=16, unfinished=unfinished)
    assert len(calls) == 3 + len(whole.loss) - 2
    assert torch.equal(resumed.loss, whole.loss) and torch.equal(resumed.final, whole.final)


@pytest.mark.parametrize(("window", "what"), [(1, "got 1"), (5000, "got 5000"), (1000, "fewer than one window")])
def test_windows_that_cannot_be_are_refused(llama, window, what):
    with pytest.raises(InputError, match=what):
        window_loss(llama, TEXTS, window=window)


def test_an_original_of_other_windows_is_refused(llama):
    original = window_loss(llama, TEXTS, window=32)
    with pytest.raises(InputError, match="windows of 32 tokens, now there are"):
        window_loss(llama, TEXTS, window=16, original=original)
