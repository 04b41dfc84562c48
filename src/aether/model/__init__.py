"""The nouns of Aether and their rules: pure, free of input and output, importable by every side."""
