"""Examples come in: the built-in behaviours, files, Hugging Face datasets."""
