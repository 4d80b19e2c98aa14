"""Text generation: sampling, streaming, loading a model, terminal chat."""
