"""Units get scores: how much each one matters to one behaviour."""
