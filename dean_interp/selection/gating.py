"""Gates in closed form: raise both margins as much as possible for a given damage to other text.

To first order the margins move by `sum of delta * gain`, to second order general text pays `1/2 * delta' F delta`
(`selection.gains`). Of all changes that cost the same, the one that raises the sum of both margins most is

    delta  proportional to  (F + D) ^ -1  (gain_1 / size_1 + gain_2 / size_2)

where size_b is the mean absolute gain of behaviour b, so that neither behaviour drowns the other. F is known from a few
hundred answers, in as many directions. D makes it a cost of every direction: the diagonal of F, plus a ridge that keeps
neurons of little damage from being changed without limit. The inverse is taken by Woodbury's identity, one layer at a
time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dean_interp.errors import InputError, NothingToChangeError, refuse_below
from dean_interp.models.sites import Site
from dean_interp.models.torch_settings import own_torch_settings
from dean_interp.selection.gains import Damage, Gains, towards_zero
from dean_interp.selection.gates import Gates, gates_from_changes

Cost = Literal["together", "alone"]
"""Whether changes cost what their neurons do together, or what each does alone."""
PerNeuron = Mapping[Site, Float[Tensor, " d_mlp"]]
Among = Mapping[Site, Bool[Tensor, " d_mlp"]]
"""The neurons that may change."""


@dataclass(frozen=True)
class GatingConfig:
    """How gains and damage become gates."""

    cost: Cost = "together"
    """What a change costs: what neurons do together (`together`: F and its diagonal), or each alone (`alone`: its
    diagonal)."""
    ridge: float = 0.1
    """Multiple of the mean damage that is added to the damage of every neuron."""
    count: int | None = None
    """Number of neurons that change: those that raise the margins most at the given damage. Unset: all."""
    agree: bool = False
    """Change only neurons whose gains for both behaviours have the same sign."""
    folds: int = 0
    """Climb in proximal steps, and stop where so many folds of topics say that left-out topics rise most
    (`selection.iterated`). 0: the closed form, which goes all the way."""
    sparsity: float = 0.0
    """With folds: leave neurons alone that pull less than this share of the strongest."""
    certainty: float = 0.0
    """Shrink every gain towards 0 by so many standard errors, never past it. 0: gains as they are."""
    silence_only: bool = False
    """Only lower gates (at most to 0), never raise them."""
    against_register: float = 1.25
    """Weight of the gains for the register set, where there is one. They are subtracted from those for the behaviours,
    so that gates leave alone what raises the tone of safe answers only. 0: the register set chooses nothing."""

    def check(self) -> None:
        """Raise `InputError` where a setting is out of its range."""
        if self.cost not in get_args(Cost):
            raise InputError(f"cost must be one of {get_args(Cost)}, got {self.cost!r}")
        refuse_below(self, {"ridge": 0, "certainty": 0, "against_register": 0, "sparsity": 0, "count": 1})
        if self.folds < 0 or self.folds == 1:
            raise InputError(f"folds must be 0 or at least 2, got {self.folds}")
        is_for_closed_form = self.cost == "alone" or self.count is not None or self.silence_only
        if self.folds and is_for_closed_form:
            raise InputError("folds go with cost 'together', without count and silence_only")
        if self.sparsity and not self.folds:
            raise InputError("sparsity is for proximal steps: give folds, too")


@own_torch_settings()
def closed_form_gates(
    first: Gains,
    second: Gains,
    damage: Damage,
    *,
    register: Gains | None = None,
    config: GatingConfig = GatingConfig(),
) -> Gates:
    """The direction in which gates raise both margins at the least damage.

    Its size is such that neurons, each alone, cost 1 nat per token. Hand it to a search for the dose: `gates * dose`
    changes `dose` times as much.

    Args:
        first: gains for one behaviour.
        second: gains for the other.
        damage: what changes cost.
        register: gains for harmless answers in the registers of safe and unsafe ones (`GatingConfig.against_register`).
        config: how these become gates.

    Raises:
        InputError: a setting out of its range; gains or damage of another model.
        NothingToChangeError: no neuron that is left to change.
    """
    config.check()
    if not sorted(first.mean) == sorted(second.mean) == sorted(damage.rows):
        raise InputError("gains and damage must be of one model: their sites differ")
    benefit = benefit_of(first, second, register, config)
    changes = _cheapest(benefit, damage, config)
    # Fewer neurons are the best for a change of all of them; then their own best change is found.
    if config.silence_only or config.count is not None:
        among = _kept(changes, benefit, config)
        benefit = {site: benefit[site] * among[site] for site in benefit}
        changes = _cheapest(benefit, damage, config, among=among)
    if config.silence_only:
        changes = {site: change.clamp(max=0) for site, change in changes.items()}
    return gates_of_cost_one(changes, damage, first, second)


def gates_of_cost_one(
    changes: PerNeuron,
    damage: Damage,
    first: Gains,
    second: Gains,
) -> Gates:
    """Gates in the direction of changes that these gains chose. They cost 1 nat per token, each neuron alone.

    Raises `NothingToChangeError` where nothing changes.
    """
    gates = gates_from_changes(changes, first.prompt_hashes | second.prompt_hashes)
    cost = damage.kl_alone(gates)
    if not cost > 0:
        raise NothingToChangeError(
            f"no neuron raises both {first.behaviour} and {second.behaviour}: every gain is 0 under these settings "
            "(lower certainty, leave agree and silence_only off, or score more examples)"
        )
    # The cost grows with the square of the dose.
    return gates * cost**-0.5


def benefit_of(
    first: Gains,
    second: Gains,
    register: Gains | None,
    config: GatingConfig,
) -> dict[Site, Tensor]:
    """The sum of both behaviours' gains, less those for the register set, each in units of its mean size.

    Raises `NothingToChangeError` where no neuron moves the margin of a behaviour.
    """
    for gains in (first, second):
        if not gains.size > 0:
            raise NothingToChangeError(
                f"no neuron moves the margin of {gains.behaviour}: every gain is 0, as where its safe and unsafe "
                "answers are the same, or where the neurons do nothing"
            )
    benefit = {}
    for site in sorted(first.mean):
        for_first = shrunk(first, site, config.certainty) / first.size
        for_second = shrunk(second, site, config.certainty) / second.size
        total = for_first + for_second
        # A register set that no neuron tells apart has nothing to subtract.
        if register is not None and register.size > 0:
            # A neuron that does nothing for either behaviour is not changed for the register's sake.
            is_useful = (for_first != 0) | (for_second != 0)
            for_register = is_useful * config.against_register * register.mean[site] / register.size
            total = total - for_register
        if config.agree:
            total = torch.where(for_first * for_second > 0, total, 0.0)
        benefit[site] = total
    return benefit


def _cheapest(
    benefit: PerNeuron,
    damage: Damage,
    config: GatingConfig,
    *,
    among: Among | None = None,
) -> dict[Site, Tensor]:
    """`(F + D)^-1 benefit`, or `D^-1 benefit`; of some neurons alone where `among` says which."""
    d = damage.own_costs(config.ridge)
    alone = {site: benefit[site] / d[site] for site in benefit}
    if config.cost == "alone":
        return alone
    # Woodbury: (D + R'R/n)^-1 b = D^-1 b - D^-1 R' (n I + R D^-1 R')^-1 R D^-1 b, with R the rows of F.
    n_answers = len(damage.lengths)
    inner = damage.n_tokens * torch.eye(n_answers, dtype=torch.float64)
    along = torch.zeros(n_answers, dtype=torch.float64)
    for site in damage.rows:
        rows = _rows_among(damage, site, among)
        gram = (rows / d[site]) @ rows.T
        inner += gram.double()
        along += (rows @ alone[site]).double()
    weights = torch.linalg.solve(inner, along).float()
    changes = {}
    for site in damage.rows:
        rows = _rows_among(damage, site, among)
        shared = rows.T @ weights / d[site]
        changes[site] = alone[site] - shared
    return changes


def _rows_among(
    damage: Damage,
    site: Site,
    among: Among | None,
) -> Float[Tensor, "answer d_mlp"]:
    """The rows of F at a site, 0 for neurons that may not change."""
    rows = damage.rows[site]
    return rows if among is None else rows * among[site]


def _kept(
    changes: PerNeuron,
    benefit: PerNeuron,
    config: GatingConfig,
) -> dict[Site, Bool[Tensor, " d_mlp"]]:
    """The neurons that may change: those that are lowered, the `count` with the largest part in the rise, or both."""
    gates = gates_from_changes(changes)
    if config.silence_only:
        gates = gates.clipped(-float("inf"), 1.0)
    if config.count is not None:
        # A neuron's part in the rise is its change times its gains.
        parts = {site: change * benefit[site] for site, change in gates.changes.items()}
        gates = gates.strongest(config.count, by=parts)
    return {site: change != 0 for site, change in gates.changes.items()}


def shrunk(gains: Gains, site: Site, certainty: float) -> Float[Tensor, " d_mlp"]:
    """Gains moved towards 0 by `certainty` standard errors: their bound that is nearer to 0, or 0."""
    return towards_zero(gains.mean[site], certainty * gains.error[site])
