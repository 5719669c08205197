"""The singing voice synthesizer."""
