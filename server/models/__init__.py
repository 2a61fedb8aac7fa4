"""Loading a model: default, hub, directory, GGUF."""
