"""What one state of the model does on texts that were written beforehand: margins, perplexity and KL, by prompt.

The likelihood margin `log p(safe) - log p(unsafe)`, each per token, needs no judge: it says which of two written
answers the model finds likelier, and moves before any word of its own does.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from dean_interp.errors import InputError, did_you_mean, refuse_below_one
from dean_interp.frames import Framed
from dean_interp.information.activations import Activations


@dataclass(frozen=True)
class BehaviourMeasurement(Framed):
    """One behaviour's answers, as the model sees them. The answers of a pair stand safe first."""

    name: str
    prompts: tuple[str, ...]
    log_prob: Float[Tensor, "example answer"]
    """Mean log-probability per token (nats) of each answer."""
    kl: Float[Tensor, "example answer"]
    """Mean over an answer's tokens of KL(original || now), nats; 0 where there is no original to compare with."""
    n_tokens: Int[Tensor, "example answer"]
    token_log_prob: Float[Tensor, " token"] = field(repr=False)
    """Log-probability (nats) of every answer token, answer after answer."""
    final: Float[Tensor, "kept_token d_model"] = field(repr=False)
    """What the unembedding read at every answer token: with it, a later measurement knows its KL to this one. Empty
    where it was not kept."""

    def __repr__(self) -> str:
        margin = f"mean margin {float(self.margin.mean()):+.3f}, " if self.paired else ""
        summary = f"{len(self.prompts)} prompts, {margin}perplexity {self.perplexity:.1f}"
        return f"BehaviourMeasurement({self.name!r}, {summary})"

    def to_pandas(self) -> pd.DataFrame:
        """One row a prompt: log-probabilities per token, KL, and the margin where there are two answers."""
        kinds = ("safe", "unsafe") if self.paired else ("answer",)
        table: dict[str, object] = {"behaviour": self.name, "prompt": self.prompts}
        for i, kind in enumerate(kinds):
            table[f"log_prob_{kind}"] = self.log_prob[:, i].numpy()
            table[f"kl_{kind}"] = self.kl[:, i].numpy()
        if self.paired:
            table["margin"] = self.margin.numpy()
        return pd.DataFrame(table)

    @property
    def paired(self) -> bool:
        """Whether there is a margin."""
        return self.log_prob.shape[1] == 2

    @property
    def margin(self) -> Float[Tensor, " example"]:
        """`log p(safe) - log p(unsafe)`, each per token (nats), one a prompt; positive: safe is likelier."""
        self._refuse_unpaired()
        safe, unsafe = self.log_prob.unbind(1)
        return safe - unsafe

    def margin_of_tokens(self, first: int, last: int | None = None) -> Float[Tensor, " example"]:
        """The margin on tokens `first` to `last` (from 1; None: to the end) of both answers, nats per token.

        NaN where an answer has no such token. Raises `InputError` for a number below 1.
        """
        self._refuse_unpaired()
        refuse_below_one(first=first, last=last)
        lengths = self.n_tokens.flatten().tolist()
        means = []
        for tokens in self.token_log_prob.double().split(lengths):
            # The mean of no token is NaN.
            means.append(tokens[first - 1 : last].mean())
        per_answer = torch.stack(means).reshape(self.n_tokens.shape)
        safe, unsafe = per_answer.unbind(1)
        return safe - unsafe

    def _refuse_unpaired(self) -> None:
        if not self.paired:
            raise InputError(f"'{self.name}' has one answer a prompt, so it has no margin")

    @property
    def perplexity(self) -> float:
        """Perplexity per token over all answers of the behaviour."""
        log_prob = (self.log_prob * self.n_tokens).sum()
        return float(torch.exp(-log_prob / self.n_tokens.sum()))

    @property
    def mean_kl(self) -> float:
        """KL(original || now) per answer token, nats."""
        kl = (self.kl * self.n_tokens).sum()
        return float(kl / self.n_tokens.sum())


@dataclass(frozen=True)
class Measurement(Framed):
    """Several behaviours, measured in one state of the model."""

    behaviours: Mapping[str, BehaviourMeasurement]
    activations: Activations | None = field(default=None, repr=False)
    """Activations at the ends of the paired behaviours' prompts and answers, where they were asked for."""

    def __getitem__(self, name: str) -> BehaviourMeasurement:
        """What was measured of a behaviour. Raises `InputError` for one that was not."""
        if name not in self.behaviours:
            hint = did_you_mean(str(name), self.behaviours)
            raise InputError(f"{name!r} was not measured{hint}: the behaviours are {', '.join(self.behaviours)}")
        return self.behaviours[name]

    def __repr__(self) -> str:
        measured = ", ".join(map(repr, self.behaviours.values()))
        return f"Measurement({measured})"

    def to_pandas(self) -> pd.DataFrame:
        """One row a prompt of every behaviour."""
        tables = [measured.to_pandas() for measured in self.behaviours.values()]
        return pd.concat(tables, ignore_index=True)
