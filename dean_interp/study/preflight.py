"""Judges, servers and tasks are asked once before the long part: what they lack is told before a model is loaded."""

from collections.abc import Iterable

from dean_interp.evaluation.harness import refuse_unknown_tasks
from dean_interp.evaluation.judges.make import make_judge, refuse_useless
from dean_interp.evaluation.served import Served, refuse_silent_server
from dean_interp.models.load import HookedModel
from dean_interp.study.settings import AnswerConfig


def refuse_unfit_self(answers: AnswerConfig, model: HookedModel) -> None:
    """Raise `InputError` where the studied model is to judge itself and cannot be asked."""
    if answers.n_answers and "self" in answers.judges:
        make_judge("self", model)


def refuse_silent(answers: AnswerConfig, servers: Iterable[Served] = ()) -> None:
    """Raise `InputError` where a task does not exist, a judge could not judge, or a server does not answer."""
    refuse_unknown_tasks(answers.tasks, answers.task_folder)
    if not answers.n_answers:
        return
    for name in dict.fromkeys(answers.judges):
        refuse_useless(name)
    for served in servers:
        refuse_silent_server(served)
