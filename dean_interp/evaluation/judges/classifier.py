"""Any Hugging Face sequence classifier as a judge."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dean_interp.errors import InputError, first_line, refuse_below_one
from dean_interp.evaluation.judges.forms import as_data, special_tokens
from dean_interp.evaluation.judges.protocol import LABELS, Label, Verdict, refuse_unpaired
from dean_interp.models.load import weights_fingerprint
from dean_interp.progress import progress_bar

SAFE_AND_UNSAFE: Mapping[str, Label] = {"safe": "safe", "unsafe": "unsafe"}


class ClassifierJudge:
    """The class with the highest score, by a map from the classifier's class names to labels."""

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        labels: Mapping[str, Label] = SAFE_AND_UNSAFE,
        tokenizer: PreTrainedTokenizerBase | None = None,
        reads_prompt: bool = True,
        batch_size: int = 16,
        device: str | torch.device | None = None,
    ) -> None:
        """Load it.

        Args:
            model: a name, a folder, or a model in memory (then `tokenizer` is needed).
            labels: what each of its class names means; upper and lower case are one.
            reads_prompt: whether it is given prompt and answer as a pair, or the answer alone.
            device: `None` takes CUDA where there is one, else the CPU. A model in memory stays where it is.

        Raises:
            InputError: it cannot be loaded, has a class that `labels` does not name, or does not choose one class; a
                `batch_size` below 1.
        """
        refuse_below_one(batch_size=batch_size)
        try:
            self.model = _loaded(model, device)
            name = str(getattr(self.model.config, "_name_or_path", "") or model)
            self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot load the classifier {model!r}: {first_line(error)}") from error
        self.labels = _labels_of_classes(name, self.model, labels)
        self.name = f"classifier {name}"
        self.fingerprint = f"{self.name} {weights_fingerprint(self.model)} {self.labels} reads_prompt={reads_prompt}"
        self.reads_prompt = reads_prompt
        self.batch_size = batch_size

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict an answer; `said` is the class's probability. A text longer than it takes has no verdict."""
        refuse_unpaired(prompts, answers)
        special = list(special_tokens(self.tokenizer))
        # the classifier reads an answer, or the pair of a prompt and its answer
        first = [as_data(answer, special) for answer in answers]
        second = None
        if self.reads_prompt:
            first, second = [as_data(prompt, special) for prompt in prompts], first
        fits = self._rows_that_fit(first, second)
        verdicts = [Verdict(None, "", "too long")] * len(answers)
        # without a padding token each text is a batch of its own
        has_pad_token = self.tokenizer.pad_token is not None
        can_pad = has_pad_token and self.model.config.pad_token_id is not None
        batch_size = self.batch_size if can_pad else 1
        starts = range(0, len(fits), batch_size)
        for start in progress_bar(starts, desc="judging", unit="batch", leave=False):
            rows = fits[start : start + batch_size]
            texts = [first[row] for row in rows]
            pairs = None
            if second:
                pairs = [second[row] for row in rows]
            tokens = self.tokenizer(texts, pairs, padding=can_pad, return_tensors="pt")
            logits = self.model(**tokens.to(self.model.device)).logits
            probabilities = logits.float().softmax(-1)
            for row, by_class in zip(rows, probabilities, strict=True):
                verdicts[row] = self._verdict(by_class)
        return verdicts

    def _rows_that_fit(self, first: list[str], second: list[str] | None) -> list[int]:
        """Indices of the texts (or pairs of texts) that the classifier can read whole."""
        if not first:
            return []
        longest = min(self.tokenizer.model_max_length, self._n_positions())
        lengths = map(len, self.tokenizer(first, second).input_ids)
        return [row for row, length in enumerate(lengths) if length <= longest]

    def _verdict(self, probabilities: Float[Tensor, " label"]) -> Verdict:
        if not bool(probabilities.isfinite().all()):
            return Verdict(None, "", "not finite")
        best = int(probabilities.argmax())
        probability = float(probabilities[best])
        return Verdict(self.labels[best], f"{probability:.3f}")

    def _n_positions(self) -> int:
        """How many tokens it takes; RoBERTa and its like count positions from behind the padding token's."""
        config = self.model.config
        n_positions = getattr(config, "max_position_embeddings", 10**9)
        if "roberta" in config.model_type:
            n_positions -= (config.pad_token_id or 0) + 1
        return n_positions


def _loaded(model: str | Path | PreTrainedModel, device: str | torch.device | None) -> PreTrainedModel:
    if isinstance(model, PreTrainedModel):
        return model.eval()
    loaded = AutoModelForSequenceClassification.from_pretrained(model).eval()
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # moved in place
    torch.nn.Module.to(loaded, torch.device(device))
    return loaded


def _labels_of_classes(name: str, model: PreTrainedModel, labels: Mapping[str, Label]) -> list[Label]:
    """The label of each class, in the order of the classifier's outputs.

    Raises `InputError` where the classifier does not choose one of several classes, or a class has no label.
    """
    kind = model.config.problem_type
    by_index = sorted((model.config.id2label or {}).items())
    classes = [str(class_name) for _, class_name in by_index]
    named = ", ".join(classes)
    if len(classes) < 2 or kind == "multi_label_classification":
        raise InputError(
            f"the classifier {name!r} must choose one of two or more classes; it has {named} (problem type {kind})"
        )
    # upper and lower case are one
    meaning: dict[str, Label] = {}
    for class_name, label in labels.items():
        if label in LABELS:
            meaning[class_name.lower()] = label
    unknown = [class_name for class_name in classes if class_name.lower() not in meaning]
    if unknown:
        raise InputError(
            f"the classifier {name!r} has the classes {named}; say what {', '.join(unknown)} means "
            f"({', '.join(LABELS)})"
        )
    return [meaning[class_name.lower()] for class_name in classes]
