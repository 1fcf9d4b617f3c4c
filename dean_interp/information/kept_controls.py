"""What the finished controls of a call left in its folder, so that a killed call goes on with the next control."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dean_interp.data.examples import Behaviour
from dean_interp.files import write_json
from dean_interp.information.estimands import InformationArm, MutualInformationConfig
from dean_interp.models.load import HookedModel, model_fingerprint
from dean_interp.models.native_tokenizer import chat_parts
from dean_interp.models.tokens import Template
from dean_interp.resume import read_kept

Changes = list[dict[str, float]]
"""The change of one control at every place, for each config."""


@dataclass(frozen=True)
class _Stored:
    fingerprint: str
    changes: list[Changes]


@dataclass(frozen=True)
class KeptControls:
    """The changes of finished controls, in one file that is replaced whole after each."""

    path: Path | None
    """None: nothing is kept."""
    fingerprint: str
    """Hash of everything that the changes depend on."""

    def load(self) -> list[Changes]:
        """The changes of the controls that were finished under the same fingerprint.

        Raises `InputError` where the file is damaged.
        """
        if self.path is None or not self.path.is_file():
            return []
        stored = read_kept(self.path, _Stored)
        if stored.fingerprint != self.fingerprint:
            return []
        return stored.changes

    def save(self, changes: Sequence[Changes]) -> None:
        """Replace the file by the changes of all controls that are finished."""
        if self.path is None:
            return
        write_json(self.path, {"fingerprint": self.fingerprint, "changes": changes})


def kept_controls(
    folder: str | Path | None,
    model: HookedModel,
    *,
    tests: Sequence[Behaviour],
    calibration: Sequence[Behaviour],
    configs: Sequence[MutualInformationConfig],
    arms: Sequence[InformationArm],
    template: Template,
) -> KeptControls:
    """The file of these controls in a folder; without a folder nothing is kept."""
    if folder is None:
        return KeptControls(None, "")
    parts = [model_fingerprint(model), template, *map(str, configs)]
    if template == "chat":
        parts += chat_parts(model)
    parts += [behaviour.fingerprint for behaviour in tests]
    # the same data set may be measured in one call and fit probes in the other
    parts.append("calibration")
    parts += [behaviour.fingerprint for behaviour in calibration]
    for arm in arms:
        parts += [arm.ablated.fingerprint, arm.first_neurons.fingerprint, arm.second_neurons.fingerprint]
    content = " ".join(parts)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return KeptControls(Path(folder) / "controls.json", fingerprint=digest[:16])
