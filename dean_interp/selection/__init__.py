"""Scores become sets: top fractions, set algebra, coupling, matched controls."""
