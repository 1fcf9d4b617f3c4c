"""One pass forward over all examples of a behaviour, whose activations are added to running sums."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.models.load import HookedModel
from dean_interp.models.loss import batched
from dean_interp.models.scored_prompts import note_scored
from dean_interp.models.sites import Site
from dean_interp.models.supported import refuse_not_finite
from dean_interp.models.tokens import Batch
from dean_interp.resume import Unfinished
from dean_interp.scoring.capture import stream_activations
from dean_interp.scoring.preparation import Prepared, ScoringConfig, batch_tokens_of


def forward_pass(
    model: HookedModel,
    behaviour: Behaviour,
    data: Prepared,
    config: ScoringConfig,
    *,
    sites: Sequence[Site],
    sums: Mapping[str, Tensor],
    add: Callable[[Batch, Site, Tensor], None],
    fingerprint: str,
    unfinished: Path | None,
) -> tuple[int, Float[Tensor, " row"]]:
    """Run every batch forward once. `add(batch, site, x)` adds what a site sees to `sums`, in place.

    Returns how many positions there were, and the loss of each row.
    """
    refuse_not_finite(model)
    started = Unfinished(unfinished, f"{fingerprint} {config}") if unfinished else None
    n_positions = torch.zeros((), dtype=torch.int64)
    loss = torch.zeros(len(data.rows))
    for batch in batched(
        model,
        data.rows,
        batch_tokens=batch_tokens_of(model, config),
        label=f"reading {behaviour.name}",
        leave=True,
        unfinished=started,
        sums={**sums, "n_positions": n_positions, "loss": loss},
        together=data.rows_each,
        padding=config.padding,
    ):

        def accumulate(site: Site, x: Tensor, batch: Batch = batch) -> None:
            add(batch, site, x)

        losses = stream_activations(model, batch, sites, accumulate)
        answers = batch.answer.unique().cpu()
        loss[answers] = losses.cpu()
        n_positions += int(batch.real.sum())
    note_scored(model, behaviour.prompt_hashes)
    return int(n_positions), loss
