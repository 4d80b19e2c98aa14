"""The language model: attention, the transformer, its loss, and GPT-2's weights."""
