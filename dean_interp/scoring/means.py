"""A pass's sums become scores: means over examples, of which what is kept goes to the CPU."""

import contextlib
import ctypes
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from dean_interp.data.examples import Behaviour
from dean_interp.errors import InputError
from dean_interp.models.load import HookedModel
from dean_interp.models.matrices import weight
from dean_interp.models.sites import Site
from dean_interp.scoring.preparation import Prepared, ScoringConfig
from dean_interp.scoring.products import Fold, folded
from dean_interp.scoring.scores import Scores
from dean_interp.scoring.site_fields import Also, empty_fields, in_order
from dean_interp.scoring.sums import Sums
from dean_interp.scoring.top import at_kept, thinned

_FOLD_OF: dict[Also, Fold] = {"signed": "value", "squared": "square"}


def further_folds(also: Sequence[Also], config: ScoringConfig) -> tuple[Fold, ...]:
    """What is added up beside the config's own fold. Raises `InputError` for what is unknown, or no other."""
    unknown = set(also) - set(_FOLD_OF)
    if unknown:
        first = min(unknown)
        raise InputError(f"also must be some of {tuple(_FOLD_OF)}, got {first!r}")
    if also and config.target == "fisher":
        raise InputError("target='fisher' adds up the squares of effects that have no mean: leave also=()")
    if "signed" in also and config.signed:
        raise InputError("signed scores keep their sign themselves: leave 'signed' out of also")
    # In one order, whatever that of the names.
    return tuple(fold for name, fold in _FOLD_OF.items() if name in also)


def as_scores(
    model: HookedModel,
    behaviour: Behaviour,
    passes: Iterable[Sums],
    *,
    data: Prepared,
    fingerprint: str,
    facts: Mapping[str, Any],
    keep: float = 1.0,
) -> Scores:
    """The means over examples (squares: over answer tokens), on the CPU.

    The sums are used up, those of a pass before the next one runs.
    """
    loss = torch.zeros(0)
    fields = empty_fields()
    for sums in passes:
        loss = sums.sums["loss"]
        for site in sums.sites:
            of_site = _of_site(model, site, sums, data)
            # What is not kept stays on the device, and is freed there.
            values = of_site.pop("values")
            kept = thinned(behaviour.name, site, values, keep)
            fields["values"][site] = kept.cpu()
            for name, tensor in of_site.items():
                is_of_units = name in get_args(Also)
                of_kept = at_kept(tensor, values, kept) if is_of_units else tensor
                fields[name][site] = of_kept.cpu()
        give_back()
    # Groups that are no clusters have no names.
    clusters = dict(zip(data.group_names, data.group_sizes.tolist(), strict=False))
    return Scores(
        **in_order(fields),
        behaviour=behaviour.name,
        clusters=clusters,
        loss=loss,
        prompt_hashes=behaviour.prompt_hashes,
        fingerprint=fingerprint,
        facts=facts,
    )


def _of_site(model: HookedModel, site: Site, sums: Sums, data: Prepared) -> dict[str, Tensor]:
    """What the scores hold of one site, by field; the sums of the site are used up."""
    n_read = sums.n_read(site)
    first = sums.folds[0]
    # Fisher information is of an answer token, any other effect of an example.
    n_counted = sum(data.answer_lengths) if first == "square" else data.n_examples
    mean_square = sums.sums.pop(f"square/{site}") / n_read
    fields = {"activation_norm": mean_square.sqrt()}
    if site.is_of_experts:
        fields["slots"] = sums.sums.pop(f"slots/{site}")
    effects: dict[Fold, Tensor] = {}
    for fold in sums.folds:
        effects[fold] = sums.sums.pop(f"{fold} effect/{site}")
    means: dict[Fold, Tensor] = {}
    if site.unit == "neuron":
        fields["activation_mean"] = sums.sums.pop(f"sum/{site}") / n_read
        of_groups = effects[first]
        group_sizes = data.group_sizes[:, None].to(of_groups.device)
        fields["groups"] = of_groups / group_sizes
        # Squares are of each example, which is a group: they were not taken before.
        folded_groups = of_groups.square() if first == "square" else of_groups
        effects[first] = folded_groups.sum(0)
        for fold, effect in effects.items():
            means[fold] = effect / n_counted
    else:
        # In place, since a second tensor of a matrix's size may not fit.
        matrix = weight(model, site).detach().float()
        for fold, effect in effects.items():
            means[fold] = effect.div_(n_counted).mul_(folded(matrix, fold))
    fields["values"] = means.pop(first)
    for name, fold in _FOLD_OF.items():
        if fold in means:
            fields[name] = means[fold]
    return fields


def give_back() -> None:
    """Return the memory that glibc keeps of what was freed to the system, or it would count as held."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
