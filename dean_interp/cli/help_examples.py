"""The examples that each `--help` ends with. A test parses every command in it."""

from collections.abc import Sequence

from dean_interp.cli.ending import EXIT_CODES
from dean_interp.errors import did_you_mean

EXAMPLES = {
    "": (
        "dean-interp improve --first fairness --second privacy --out runs/improve",
        "dean-interp run --out runs/study",
        "dean-interp data show privacy",
    ),
    "data": (
        "dean-interp data show mine.csv",
        "dean-interp data audit fairness privacy mine.csv",
    ),
    "data audit": (
        "dean-interp data audit calibration.csv test.csv",
        "dean-interp data audit fairness privacy mine.csv --out audit.json",
        "dean-interp data audit beavertails:fairness salad:fairness --threshold 0.5",
    ),
    "data show": ("dean-interp data show mine.csv --n-examples 5",),
    "plan": (
        "dean-interp plan",
        "dean-interp plan --model meta-llama/Llama-3.1-70B-Instruct --dtype bfloat16 --gpus 4 --score-tokens 4096",
    ),
    "verify": ("dean-interp verify runs/study", "dean-interp verify runs/study --full --json"),
    "score": (
        "dean-interp score fairness --out scores/fairness.safetensors",
        "dean-interp score privacy --unit neuron weight --dry-run --out scores/privacy.safetensors",
        "dean-interp score mine.csv --model Qwen/Qwen2.5-0.5B-Instruct --out mine.safetensors",
    ),
    "couple": (
        "dean-interp couple fairness.safetensors privacy.safetensors general.safetensors --out coupled.safetensors",
        "dean-interp couple a.safetensors b.safetensors c.safetensors --unit weight --fraction 0.001 0.001 0.0005 "
        "--out coupled.safetensors",
        "dean-interp couple fairness.safetensors privacy.safetensors general.safetensors refusal.safetensors "
        '--expression "(fairness & privacy) - general - refusal" --count 500 --within model --out chosen.safetensors',
    ),
    "ablate": (
        'dean-interp ablate coupled.safetensors --prompts "May I read my flatmate\'s diary?"',
        "dean-interp ablate coupled.safetensors --behaviour privacy --n-prompts 16 --out answers.json",
    ),
    "evaluate": (
        "dean-interp evaluate coupled.safetensors --scores fairness.safetensors privacy.safetensors "
        "general.safetensors --out runs/evaluation",
        "dean-interp evaluate runs/mine/gates.safetensors --harmful salad_fairness.csv salad_privacy.csv "
        "--judges lexical md-judge:OpenSafetyLab/MD-Judge-v0.1 --tasks arc_easy --out runs/salad",
    ),
    "information": (
        "dean-interp information coupled.safetensors --scores fairness.safetensors privacy.safetensors "
        "general.safetensors --out runs/evaluation",
    ),
    "edit": (
        "dean-interp edit create coupled.safetensors --model path/to/checkpoint --out edit.safetensors",
        "dean-interp edit apply edit.safetensors path/to/checkpoint --out path/to/edited",
        "dean-interp edit revert edit.safetensors path/to/edited --out path/to/original",
    ),
    "edit create": (
        "dean-interp edit create coupled.safetensors --value 0.5 --model path/to/checkpoint --out edit.safetensors",
        "dean-interp edit create coupled.safetensors --value mean --scores general.safetensors --out edit.safetensors",
        "dean-interp edit create gates.safetensors --model path/to/checkpoint --out edit.safetensors",
    ),
    "edit show": ("dean-interp edit show edit.safetensors",),
    "edit apply": ("dean-interp edit apply edit.safetensors path/to/checkpoint --out path/to/edited",),
    "edit verify": ("dean-interp edit verify edit.safetensors path/to/edited",),
    "edit revert": ("dean-interp edit revert edit.safetensors path/to/edited --out path/to/original",),
    "edit diff": ("dean-interp edit diff one.safetensors two.safetensors",),
    "edit stack": ("dean-interp edit stack one.safetensors two.safetensors --out both.safetensors",),
    "edit export": ("dean-interp edit export edit.safetensors --model model.gguf --out path/to/edited",),
    "edit card": (
        "dean-interp edit card runs/improve --out card/README.md",
        "dean-interp edit card edit.safetensors --run runs/improve --licence apache-2.0 --out card/README.md",
    ),
    "chat": (
        "dean-interp chat --edit gates.safetensors",
        "dean-interp chat --edit edit.safetensors --model path/to/checkpoint --dose 0.5 --system 'Answer briefly.'",
        "dean-interp chat --edit coupled.safetensors --answer-length 64 --out transcript.json",
    ),
    "explore": (
        "dean-interp explore gates.safetensors --out page.html",
        "dean-interp explore edit.safetensors --model path/to/checkpoint --behaviours mine.csv privacy --out page.html",
        "dean-interp explore coupled.safetensors --scores fairness.safetensors privacy.safetensors --prompts "
        "'Who should I hire?'",
    ),
    "neuron": (
        "dean-interp neuron L17.1042",
        "dean-interp neuron L17.1042 --run runs/study",
        "dean-interp neuron L3.88 --model Qwen/Qwen2.5-0.5B-Instruct --behaviours mine.csv --scores mine.safetensors",
    ),
    "circuit": (
        "dean-interp circuit runs/study/selection.neuron.safetensors --behaviour privacy",
        "dean-interp circuit coupled.safetensors --behaviour mine.csv --example 3 --n-targets 5 --out circuit.html",
    ),
    "pages": (
        "dean-interp pages runs/improve",
        "dean-interp pages runs/study --n-units 100 --n-traced 4 --out pages",
    ),
    "improve": (
        "dean-interp improve --first fairness --second privacy --out runs/improve",
        "dean-interp improve --first mine.csv --second privacy --model Qwen/Qwen2.5-0.5B-Instruct --max-kl 0.1 "
        "--out runs/mine",
        "dean-interp improve --count 500 --silence-only --n-answers 0 --out runs/silenced",
    ),
    "sweep": (
        "dean-interp sweep --out runs/sweep",
        "dean-interp sweep --unit neuron --neuron-fractions 0.005 0.01 0.02 --values 0 0.5 mean --out runs/doses",
    ),
    "run": (
        "dean-interp run --out runs/study",
        "dean-interp run --model Qwen/Qwen2.5-0.5B-Instruct --first mine.csv --unit neuron --out runs/mine",
    ),
    "report": (
        "dean-interp report runs/study",
        "dean-interp report runs/study runs/mine --out comparison.html",
    ),
}
"""Up to three examples for each command; the empty name is `dean-interp` itself."""


def after_help(arguments: Sequence[str]) -> str:
    """The examples of the command that these arguments ask help for; `dean-interp --help` adds the exit codes."""
    name = command_name(arguments)
    lines = "\n".join(["", "examples:", *(f"  {example}" for example in EXAMPLES[name])])
    return lines if name else f"{lines}\n\n{EXIT_CODES}"


def nearest_command(arguments: Sequence[str]) -> str:
    """A question that names the command that a mistyped one is nearest to; empty where none is near, or none wrong."""
    words = [argument for argument in arguments if not argument.startswith("-")]
    known = {name.split()[0] for name in EXAMPLES if name}
    prefix = ""
    if words and words[0] in known:
        # The second word is a command, too, where the first one has actions.
        prefix = f"{words.pop(0)} "
        known = {name.removeprefix(prefix) for name in EXAMPLES if name.startswith(prefix)}
    if not words or words[0] in known:
        return ""
    hint = did_you_mean(words[0], known)
    if not hint:
        return ""
    mistyped = prefix + words[0]
    return f"dean-interp: no command {mistyped!r}{hint}"


def command_name(arguments: Sequence[str]) -> str:
    """The longest name of a command that the arguments begin with: `edit create`, `edit`, or the empty name."""
    words = [argument for argument in arguments if not argument.startswith("-")]
    for n_words in (2, 1):
        name = " ".join(words[:n_words])
        if name in EXAMPLES:
            return name
    return ""
