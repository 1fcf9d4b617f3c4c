"""A look inside: what single neurons do, on which text, and what feeds a set of them."""
