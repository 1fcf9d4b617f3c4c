"""The tokenizer that the checkpoint came with, and what is said of a model's text beside it."""

import hashlib
import logging

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dean_interp.models.chat_settings import ChatSettings, with_settings
from dean_interp.models.hooked_model import HookedModel
from dean_interp.models.notes import notes
from dean_interp.models.supported import refuse_larger_tokenizer

log = logging.getLogger(__name__)


def note_text(model: HookedModel, tokenizer: PreTrainedTokenizerBase | None, chat: ChatSettings) -> None:
    """Note what is said of the text of a model. One in memory keeps what is not said anew.

    Raises `InputError` where the tokenizer has tokens that the model has no embedding for.
    """
    noted = notes(model)
    if tokenizer is not None:
        noted.tokenizer = tokenizer
    if noted.tokenizer is not None:
        refuse_larger_tokenizer(model, noted.tokenizer)
    if tokenizer is not None or chat != ChatSettings():
        noted.chat_tokenizer, noted.chat = with_settings(loaded_tokenizer(model), chat)


def native_tokenizer(model: HookedModel) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer, whose chat template keeps to one day and to what was said of thinking.

    TransformerLens makes every tokenizer prepend a BOS, which most checkpoints never saw. For a model that `load_model`
    did not make, it is loaded by the name that the model's tokenizer carries; where that leads nowhere the model's own
    is taken, with a warning.
    """
    noted = notes(model)
    if noted.chat_tokenizer is None:
        noted.chat_tokenizer, noted.chat = with_settings(loaded_tokenizer(model), noted.chat)
    return noted.chat_tokenizer


def loaded_tokenizer(model: HookedModel) -> PreTrainedTokenizerBase:
    """The tokenizer as the checkpoint has it, for folders that are to hold it, too. Warns as `native_tokenizer`."""
    tokenizer = notes(model).tokenizer
    if tokenizer is None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model.tokenizer.name_or_path)
        except (OSError, ValueError):
            log.warning("%s: only TransformerLens' tokenizer is at hand, which always adds a BOS", model.cfg.model_name)
            tokenizer = model.tokenizer
        notes(model).tokenizer = tokenizer
    return tokenizer


def chat_parts(model: HookedModel) -> list[str]:
    """All that chats depend on beside their words, for fingerprints: the template itself, too."""
    template = native_tokenizer(model).chat_template
    digest = hashlib.sha256(str(template).encode()).hexdigest()[:16]
    return [*chat_settings(model).parts, f"template {digest}"]


def chat_settings(model: HookedModel) -> ChatSettings:
    """What the model's chats depend on beside their words: the day, where the template writes one, and thinking."""
    native_tokenizer(model)
    return notes(model).chat
