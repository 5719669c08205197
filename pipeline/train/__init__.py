"""Training a synthesizer from shards, on one process or several."""
