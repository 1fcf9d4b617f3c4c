"""What a value is called: in files, in words, and so that no two values that differ have one name."""

from dean_interp.editing.values import Given, Mean, Multiply, Noise, Project, Resample, Restore, Scale, Value, Zero
from dean_interp.models.load import model_fingerprint
from dean_interp.selection.gates import tensors_fingerprint

AND = " and "
"""Stands between the values of edits that were stacked."""


def described(value: Value) -> str:
    """The kind of a value, and what it holds where that is little: `Zero`, `Scale(0.5)`, `Mean`, `Multiply(a hash)`."""
    match value:
        case Scale(alpha):
            return f"Scale({alpha})"
        case Multiply(gates):
            return f"Multiply({gates.fingerprint})"
    return type(value).__name__


def value_fingerprint(value: Value) -> str:
    """Its kind and all that it holds, large things as a hash: values with equal fingerprints do the same."""
    match value:
        case Zero() | Scale() | Multiply():
            return described(value)
        case Mean(scores):
            held = scores.fingerprint
        case Noise(scores, scale, seed):
            held = f"{scores.fingerprint} {scale} {seed}"
        case Resample(bank, seed):
            held = f"{tensors_fingerprint(bank)} {seed}"
        case Project(directions):
            held = tensors_fingerprint(directions)
        case Restore(other):
            held = model_fingerprint(other)
        case Given(weights):
            held = tensors_fingerprint(weights)
    return f"{described(value)}({held})"


def described_in_words(described_value: str) -> str:
    """What `described` says of a value, as the end of a sentence that begins with the units."""
    parts = described_value.split(AND)
    if len(parts) > 1:
        return AND.join(f"in part {described_in_words(part)}" for part in parts)
    name, _, held = described_value.rstrip(")").partition("(")
    match name:
        case "Zero":
            return "set to 0"
        case "Mean":
            return "set to their means"
        case "Scale":
            return f"scaled by {held}"
        case "Multiply":
            return f"multiplied by gates (fingerprint {held})"
        case "Restore":
            return "restored from another checkpoint"
    return described_value
