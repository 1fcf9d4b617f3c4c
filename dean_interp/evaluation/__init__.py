"""Behaviour and ability, measured."""
