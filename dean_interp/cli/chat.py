"""`dean-interp chat`: talk to the original and the edited model at once, their answers side by side."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import OmitArgPrefixes

from dean_interp.cli.columns import side_by_side, wrapped
from dean_interp.cli.edits import EditedModel
from dean_interp.cli.step_result import StepResult
from dean_interp.cli.terminal import Talk
from dean_interp.distributed import require_one_process
from dean_interp.editing.conversation import Conversation, Turn
from dean_interp.editing.edit_at_dose import load_any_edit, refuse_dose
from dean_interp.errors import InputError, refuse_below_one
from dean_interp.files import check_writable, write_json

COMMANDS = {
    "/dose NUMBER": "change the dose from the next turn on",
    "/reset": "begin the conversation anew; the dose stays",
    "/help": "show this",
    "/quit": "end, as Ctrl-D and Ctrl-C do",
}
"""What a line may ask for in place of an answer."""
_LEAST_WIDTH = 80  # of a terminal that holds two columns


@dataclass(frozen=True)
class ChatWithEdit:
    """Talk to the original and the edited model at once. Their answers stand side by side.

    Each remembers its own answers. In the chat, `/dose 0.5` changes the dose and `/help` shows all commands. In a pipe
    each line of stdin is a prompt or a command. Nothing of what is said is kept, unless `--out` names a file.
    """

    edit: Path
    """Gates file, edit file, or selection file (its units are silenced)."""
    dose: float = 1.0
    """How much of the edit's change is made: 0 is the original, 0.5 half of it, 1 the edit, -1 the opposite."""
    system: str | None = None
    """System message at the beginning of the conversation. Unset: what the model's chat template says by itself."""
    answer_length: int = 128
    """Number of new tokens of each answer, at most."""
    out: Path | None = None
    """JSON file to write the conversation to, after each turn. Unset: nothing is written."""
    model: OmitArgPrefixes[EditedModel] = field(default_factory=EditedModel)


def do_chat(step: ChatWithEdit, talk: Talk) -> StepResult:
    """Answer the user's lines until the last. Raises `InputError` for what its user can put right."""
    require_one_process("chat")
    # What can be wrong is told before the model is loaded.
    refuse_dose(step.dose)
    refuse_below_one(answer_length=step.answer_length)
    if step.out:
        check_writable(step.out)
    edit = load_any_edit(step.edit)
    conversation = Conversation(
        step.model.load(), edit, dose=step.dose, system=step.system, answer_length=step.answer_length
    )
    chat = _Chat(step, conversation, talk)
    chat.hold()
    return StepResult(chat.record, "")


class _Chat:
    """One run of the command: what was said in it, in all its conversations."""

    def __init__(self, step: ChatWithEdit, conversation: Conversation, talk: Talk) -> None:
        self.step, self.conversation, self.talk = step, conversation, talk
        self.n_conversations = 1
        self.turns: list[dict[str, Any]] = []

    @property
    def record(self) -> dict[str, Any]:
        """What `--json` prints and `--out` keeps."""
        step = self.step
        return {
            "model": step.model.model,
            "edit": str(step.edit),
            "system": step.system,
            "answer_length": step.answer_length,
            "turns": self.turns,
        }

    def hold(self) -> None:
        """Take the user's lines until they end, or one ends them."""
        if self.talk.has_person:
            dose = dose_text(self.conversation.dose)
            self.talk.say(f"{self.step.model.model}, and with {self.step.edit} at dose {dose}")
            self.talk.say("/help shows the commands, /quit ends")
        try:
            for number, line in enumerate(self.talk.lines(), 1):
                if line.split()[:1] == ["/quit"]:
                    return
                self._take(line, number)
        except KeyboardInterrupt:
            # A person ends a chat so. Where a program gives the lines, some are left unanswered, and it must know.
            if not self.talk.has_person:
                raise
            self.talk.say("")

    def _take(self, line: str, number: int) -> None:
        try:
            if line.startswith("/"):
                self.talk.say(self._obey(line))
            elif line.strip():
                self._answer(line)
        except InputError as error:
            # A person tries again. A program would take what comes next for something else than it is.
            if not self.talk.has_person:
                raise InputError(f"line {number}: {error}") from error
            self.talk.say(str(error))

    def _answer(self, prompt: str) -> None:
        turn = self.conversation.say(prompt)
        self.turns.append({"conversation": self.n_conversations, **asdict(turn)})
        if self.step.out:
            write_json(self.step.out, self.record)
        if not self.talk.shows_lines:
            self.talk.say(f"> {prompt}\n")
        self.talk.say(f"{turn_text(turn, self.talk.width)}\n")

    def _obey(self, line: str) -> str:
        """Do what a command says, and say so."""
        command, _, given = line.strip().partition(" ")
        match command:
            case "/dose":
                self._change_dose(given.strip())
                return f"dose {dose_text(self.conversation.dose)}"
            case "/reset":
                self.conversation.reset()
                self.n_conversations += 1
                return "a new conversation"
            case "/help":
                return "\n".join(f"{name:<14}{what}" for name, what in COMMANDS.items())
        raise InputError(
            f"there is no command {command}, only {', '.join(COMMANDS)} (a prompt that begins with / needs a space "
            "before it)"
        )

    def _change_dose(self, given: str) -> None:
        try:
            self.conversation.dose = _number(given)
        except InputError as error:
            kept = f"; it stays {dose_text(self.conversation.dose)}" if self.talk.has_person else ""
            raise InputError(f"{error}{kept}") from error


def _number(given: str) -> float:
    try:
        return float(given)
    except ValueError:
        raise InputError(f"dose must be a number, such as 0.5, got {given!r}") from None


def dose_text(dose: float) -> str:
    """A dose with two decimals, or with more where it has more."""
    return f"{dose:.2f}" if round(dose, 2) == dose else f"{dose:g}"


def turn_text(turn: Turn, width: int | None) -> str:
    """Both answers of a turn, in two columns where there is room; as they are where `width`, a terminal's, is None."""
    titles = ("original", f"edited, dose {dose_text(turn.dose)}")
    if turn.original == turn.edited:
        return f"{' and '.join(titles)}: the same answer, to the letter\n{_text(turn.original, width)}"
    if width is not None and width >= _LEAST_WIDTH:
        return side_by_side(turn.original, turn.edited, titles=titles, width=width)
    original, edited = _text(turn.original, width), _text(turn.edited, width)
    return f"{titles[0]}:\n{original}\n\n{titles[1]}:\n{edited}"


def _text(answer: str, width: int | None) -> str:
    return answer if width is None else "\n".join(wrapped(answer, width))
