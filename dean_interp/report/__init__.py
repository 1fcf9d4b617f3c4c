"""Pictures and a page, from results alone."""
