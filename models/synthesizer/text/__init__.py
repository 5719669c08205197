"""The text-conditioned synthesizer: phonemes in place of content units."""
