"""Any Hugging Face sequence classifier as a judge."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dean_interp.errors import InputError
from dean_interp.evaluation.judges.forms import as_data, special_tokens
from dean_interp.evaluation.judges.protocol import Label, Verdict, refuse_unpaired
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
            InputError: it cannot be loaded, has a class that `labels` does not name, or does not choose one class.
        """
        try:
            if isinstance(model, PreTrainedModel):
                self.model = model.eval()
            else:
                where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
                self.model = AutoModelForSequenceClassification.from_pretrained(model).eval()
                torch.nn.Module.to(self.model, where)  # in place
            name = str(getattr(self.model.config, "_name_or_path", "") or model)
            self.tokenizer = tokenizer or AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot load the classifier {model!r}: {str(error).splitlines()[0]}") from error
        meaning: dict[str, Label] = {key.lower(): label for key, label in labels.items() if label in get_args(Label)}
        classes = [str(one) for _, one in sorted((self.model.config.id2label or {}).items())]
        kind = self.model.config.problem_type
        if len(classes) < 2 or kind == "multi_label_classification":
            raise InputError(
                f"the classifier {name!r} must choose one of two or more classes; it has {', '.join(classes)} "
                f"(problem type {kind})"
            )
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
        special = list(special_tokens(self.tokenizer))
        asked, given = ([as_data(text, special) for text in texts] for texts in (prompts, answers))
        first, second = (asked, given) if self.reads_prompt else (given, None)
        longest = min(self.tokenizer.model_max_length, self._n_positions())
        lengths = map(len, self.tokenizer(first, second).input_ids) if first else ()
        fits = [i for i, length in enumerate(lengths) if length <= longest]
        verdicts = [Verdict(None, "", "too long")] * len(answers)
        pads = self.tokenizer.pad_token is not None and self.model.config.pad_token_id is not None
        size = self.batch_size if pads else 1  # without a padding token each text stands alone
        for start in progress_bar(range(0, len(fits), size), desc="judging", unit="batch", leave=False):
            some = fits[start : start + size]
            own = [[column[i] for i in some] if column else None for column in (first, second)]
            tokens = self.tokenizer(own[0] or [], own[1], padding=pads, return_tensors="pt").to(self.model.device)
            chances = self.model(**tokens).logits.float().softmax(-1)
            for i, row in zip(some, chances, strict=True):
                best = int(row.argmax())
                found = bool(row.isfinite().all())
                verdicts[i] = Verdict(self.labels[best], f"{float(row[best]):.3f}") if found else Verdict(
                    None, "", "not finite")  # fmt: skip
        return verdicts

    def _n_positions(self) -> int:
        """How many tokens it takes; RoBERTa and its like count positions from behind the padding token's."""
        config = self.model.config
        before = (config.pad_token_id or 0) + 1 if "roberta" in config.model_type else 0
        return getattr(config, "max_position_embeddings", 10**9) - before
