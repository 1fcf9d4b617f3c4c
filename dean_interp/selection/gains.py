"""Gains and damage: what a neuron's gate does to a behaviour's margin, and what it costs on other text.

The gain of neuron i is the derivative of the mean margin `log p(safe) - log p(unsafe)` by its gate, which multiplies
its activation a: the mean over examples of `sum over positions of a * d margin / d a`, nats per token. To first order,
changing the gates by delta moves the mean margin by `sum of delta_i * gain_i`. A neuron with a gain below 0 raises the
margin when it is silenced.

The damage is the Fisher information F of the gates, per answer token of general text: to second order, changing the
gates moves the model's predictions there by `KL = 1/2 * delta' F delta`, nats per token. It is estimated from one
gradient an answer (`scoring.importance.fisher_step`), so its rank is at most the number of answers. Its diagonal says
what each neuron costs alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dean_interp.errors import InputError
from dean_interp.frames import Framed
from dean_interp.models.sites import Site
from dean_interp.scoring.scores import Scores
from dean_interp.selection.gates import Gates


@dataclass(frozen=True)
class Damage:
    """The Fisher information of the gates of all neurons: `F = rows' rows / (number of tokens)`."""

    rows: Mapping[Site, Float[Tensor, "answer d_mlp"]]
    """Gradient of each answer's log-probability by every gate (nats). Its tokens are drawn from the model itself."""
    lengths: Int[Tensor, " answer"]
    """Number of tokens of each answer."""

    @property
    def n_tokens(self) -> int:
        """Number of tokens in all answers."""
        return int(self.lengths.sum())

    def of_answers(self, wanted: Bool[Tensor, " answer"]) -> "Damage":
        """The damage that some of the answers show."""
        return Damage({site: rows[wanted] for site, rows in self.rows.items()}, self.lengths[wanted])

    @property
    def diagonal(self) -> dict[Site, Float[Tensor, " d_mlp"]]:
        """What each neuron costs alone: F_ii, nats per token."""
        return {site: rows.square().sum(0) / self.n_tokens for site, rows in self.rows.items()}

    def own_costs(self, ridge: float) -> dict[Site, Float[Tensor, " d_mlp"]]:
        """What each neuron costs alone, plus `ridge` mean damages; never 0."""
        diagonal = self.diagonal
        added = ridge * float(torch.cat(list(diagonal.values())).mean())
        return {site: (own + added).clamp(min=1e-30) for site, own in diagonal.items()}

    def kl(self, gates: Gates) -> float:
        """`1/2 * delta' F delta`, nats per token. Too small for gates that were chosen by this very estimate."""
        along = sum(self.rows[site].double() @ change.double() for site, change in gates.changes.items())
        return 0.5 * float(torch.as_tensor(along).square().sum()) / self.n_tokens

    def kl_alone(self, gates: Gates) -> float:
        """`1/2 * sum of F_ii * delta_i ** 2`, nats per token: as if no two neurons moved a prediction together."""
        diagonal = self.diagonal
        parts = [diagonal[site].double() @ change.double().square() for site, change in gates.changes.items()]
        return 0.5 * float(sum(parts))


@dataclass(frozen=True)
class Gains(Framed):
    """The gain of every neuron for one behaviour, with its standard error."""

    behaviour: str
    mean: Mapping[Site, Float[Tensor, " d_mlp"]]
    """Nats per token, float32."""
    error: Mapping[Site, Float[Tensor, " d_mlp"]]
    """Standard error of the mean, clustered by topic, else by prompt (CR1, as `statistics.standard_error`)."""
    n_clusters: int
    prompt_hashes: frozenset[str]

    def __repr__(self) -> str:
        n_neurons = sum(len(mean) for mean in self.mean.values())
        return f"Gains({self.behaviour!r}, {n_neurons} neurons, {self.n_clusters} topics)"

    @property
    def size(self) -> float:
        """The mean absolute gain of all neurons: the scale on which two behaviours are weighed."""
        return float(torch.cat(list(self.mean.values())).abs().mean())

    def of(self, gates: Gates) -> float:
        """The change of the mean margin under the gates, to first order, nats per token."""
        return sum(float(change.double() @ self.mean[site].double()) for site, change in gates.changes.items())

    def to_pandas(self) -> pd.DataFrame:
        """One row a neuron, the largest gain first: layer, index, gain, standard error."""
        tables = []
        for site, mean in self.mean.items():
            columns = {"layer": site.layer, "index": range(len(mean)), "gain": mean, "error": self.error[site]}
            tables.append(pd.DataFrame(columns))
        table = pd.concat(tables, ignore_index=True)
        return table.sort_values("gain", key=abs, ascending=False, ignore_index=True)


def gains_of(scores: Scores, *, signs: Mapping[str, int] | None = None) -> Gains:
    """The gains in scores of the margin that keep their sign and were grouped by cluster.

    Args:
        scores: `importance(..., config=ScoringConfig(target="margin", signed=True, groups="cluster"))`.
        signs: the topics whose examples count, each with 1, or with -1 where safe and unsafe answers change roles: then
            the margin, and so the gain, changes its sign. None: all topics, with 1.

    Raises:
        InputError: other scores, topics that were not scored, or fewer than two topics.
    """
    refuse_other_scores(scores)
    sizes, _ = _topics(scores, signs)
    mean, error = {}, {}
    for site in scores.groups:
        if site.unit == "neuron":
            mean[site], error[site] = gains_at(scores, site, signs=signs)
    return Gains(scores.behaviour, mean, error, int((sizes > 0).sum()), scores.prompt_hashes)


def gains_at(
    scores: Scores, site: Site, *, signs: Mapping[str, int] | None = None
) -> tuple[Float[Tensor, " unit"], Float[Tensor, " unit"]]:
    """The gain of each unit of a site and its standard error, nats per token. Errors as of `gains_of`.

    Units have their effects by group, or the mean of their squares (`Scores.squared`) where each topic is one prompt.
    """
    # The loss is minus the margin, so scores are minus gains.
    if site in scores.groups or signs is not None:
        return _mean_and_error(-scores.groups[site], *_topics(scores, signs))
    # A matrix that was kept whole has two axes.
    n_prompts, mean = int(_topics(scores, None)[0].sum()), -scores.signed_means(site).flatten()
    variance = (scores.squared[site].flatten() - mean.square()).clamp(min=0)
    return mean, (variance / (n_prompts - 1)).sqrt()


def has_errors(scores: Scores, site: Site) -> bool:
    """Whether the standard errors of a site's gains are known (`gains_at`)."""
    are_single = set(scores.clusters.values()) == {1}
    return site in scores.groups or (are_single and site in scores.squared)


def hold_gains(scores: Scores) -> bool:
    """Whether scores are of the margin, with their sign, by topic: then they are minus gains."""
    facts = scores.facts
    return (facts.get("target"), facts.get("signed"), facts.get("groups")) == ("margin", True, "cluster")


def refuse_other_scores(scores: Scores) -> None:
    """Raise `InputError` for scores that are not of the margin, with their sign, by topic."""
    if not hold_gains(scores):
        raise InputError(
            f"gains are made from scores of the margin, with their sign, by topic; those of '{scores.behaviour}' are "
            "others: ScoringConfig(target='margin', signed=True, groups='cluster')"
        )


def towards_zero(mean: Float[Tensor, " unit"], by: Float[Tensor, " unit"]) -> Float[Tensor, " unit"]:
    """Numbers moved towards 0, never past it."""
    return mean.sign() * (mean.abs() - by).clamp(min=0)


def _topics(
    scores: Scores, signs: Mapping[str, int] | None
) -> tuple[Float[Tensor, " cluster"], Float[Tensor, " cluster"]]:
    """The number of examples of each topic that counts (0: it does not), and its sign."""
    names = list(scores.clusters)
    sign_of = dict.fromkeys(names, 1) if signs is None else signs
    unknown = {*sign_of} - {*names}
    if unknown:
        raise InputError(f"'{scores.behaviour}' was scored on no topic {min(unknown)!r}")
    sizes, sign_of_topic = torch.zeros(len(names)), torch.zeros(len(names))
    for number, name in enumerate(names):
        if name in sign_of:
            sizes[number], sign_of_topic[number] = scores.clusters[name], sign_of[name]
    n_clusters = int((sizes > 0).sum())
    if n_clusters < 2:
        raise InputError(f"gains of '{scores.behaviour}' need examples of at least two topics, got {n_clusters}")
    return sizes, sign_of_topic


def _mean_and_error(
    means: Float[Tensor, "cluster d_mlp"], sizes: Float[Tensor, " cluster"], signs: Float[Tensor, " cluster"]
) -> tuple[Float[Tensor, " d_mlp"], Float[Tensor, " d_mlp"]]:
    """Mean over examples and its cluster-robust standard error (CR1), from each cluster's own mean."""
    n_clusters, n_examples = int((sizes > 0).sum()), sizes.sum()
    sums = means * (sizes * signs)[:, None]
    mean = sums.sum(0) / n_examples
    squares = (sums - mean * sizes[:, None]).square().sum(0)
    return mean, (n_clusters / (n_clusters - 1) * squares).sqrt() / n_examples


def hold_damage(scores: Scores) -> bool:
    """Whether scores are of the Fisher information of general text."""
    return scores.facts.get("target") == "fisher"


def damage_of(scores: Scores) -> Damage:
    """The damage in scores of general text.

    Raises `InputError` where they were not made with `ScoringConfig(target="fisher")`.
    """
    if not hold_damage(scores):
        raise InputError(
            f"damage is made from scores of the Fisher information; those of '{scores.behaviour}' are others: "
            "ScoringConfig(target='fisher')"
        )
    rows = {site: groups for site, groups in scores.groups.items() if site.unit == "neuron"}
    return Damage(rows, torch.tensor(scores.facts["answer_lengths"]))
