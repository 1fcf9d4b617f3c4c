"""The one door to TransformerLens: no other room imports it."""
