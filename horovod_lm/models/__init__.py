"""The language model: attention, the transformer around it, its loss, and drawing text from it."""
