"""Writes a model's weights in fewer bits, as a folder that this server, transformers and vLLM read."""
