"""DEAN, the released selection and fine-tuning with unsafe answers only: the paper's malicious-data-only mode.

    python analyses/malicious_only.py --out runs/malicious

Units are scored on, and models fine-tuned on, unsafe answers; what is measured stays as it is. The paper claims that
DEAN still raises both behaviours there, and fine-tuning ruins them. The rest is `dean_against_finetuning.py`.
"""

import dataclasses
from pathlib import Path

import tyro
from dean_against_finetuning import Table, run

from dean_interp.cli.ending import script
from dean_interp.study.arm_results import ArmResults

TITLE = "DEAN against fine-tuning in {model}, with unsafe answers only"


def run_malicious(given: Table) -> ArmResults:
    """The table with `response="unsafe"`, whatever was given."""
    calibration = dataclasses.replace(given.study.calibration, response="unsafe")
    study = dataclasses.replace(given.study, calibration=calibration)
    return run(dataclasses.replace(given, study=study), TITLE)


if __name__ == "__main__":
    script(lambda: run_malicious(tyro.cli(Table, default=Table(out=Path("runs/malicious")), description=__doc__)))
