"""One file per kind of tokenizer; registry.py says which kind is whose."""
