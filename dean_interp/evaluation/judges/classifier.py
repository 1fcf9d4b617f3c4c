"""Any Hugging Face sequence classifier as a judge."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dean_interp.errors import InputError
from dean_interp.evaluation.judges.protocol import Label, Verdict, refuse_unpaired

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
    ) -> None:
        """Load it.

        Args:
            model: a name, a folder, or a model in memory (then `tokenizer` is needed).
            labels: what each of its class names means; upper and lower case are one.
            reads_prompt: whether it is given prompt and answer as a pair, or the answer alone.

        Raises:
            InputError: it cannot be loaded, or has a class that `labels` does not name.
        """
        try:
            self.model = (model if isinstance(model, PreTrainedModel)
                          else AutoModelForSequenceClassification.from_pretrained(model)).eval()  # fmt: skip
            name = str(getattr(self.model.config, "_name_or_path", "") or model)
            self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot load the classifier {model!r}: {str(error).splitlines()[0]}") from error
        meaning: dict[str, Label] = {key.lower(): label for key, label in labels.items() if label in get_args(Label)}
        classes = [str(one) for _, one in sorted((self.model.config.id2label or {}).items())]
        unknown = [one for one in classes if one.lower() not in meaning]
        if unknown:
            raise InputError(
                f"the classifier {name!r} has the classes {', '.join(classes)}; say what {', '.join(unknown)} means "
                f"({', '.join(get_args(Label))})"
            )
        self.labels: list[Label] = [meaning[one.lower()] for one in classes]
        self.name, self.reads_prompt, self.batch_size = f"classifier {name}", reads_prompt, batch_size

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """One verdict an answer; `said` is the class's probability. A text longer than it takes has no verdict."""
        refuse_unpaired(prompts, answers)
        first, second = (list(prompts), list(answers)) if self.reads_prompt else (list(answers), None)
        longest = min(self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", 10**9))
        lengths = map(len, self.tokenizer(first, second).input_ids) if first else ()
        fits = [i for i, length in enumerate(lengths) if length <= longest]
        verdicts = [Verdict(None, "", "too long")] * len(answers)
        for start in tqdm(range(0, len(fits), self.batch_size), desc="judging", unit="batch", leave=False):
            some = fits[start : start + self.batch_size]
            own = [[column[i] for i in some] if column else None for column in (first, second)]
            tokens = self.tokenizer(own[0] or [], own[1], padding=True, return_tensors="pt").to(self.model.device)
            chances = self.model(**tokens).logits.float().softmax(-1)
            for i, row in zip(some, chances, strict=True):
                best = int(row.argmax())
                found = bool(row.isfinite().all())
                verdicts[i] = Verdict(self.labels[best], f"{float(row[best]):.3f}") if found else Verdict(
                    None, "", "not finite")  # fmt: skip
        return verdicts
