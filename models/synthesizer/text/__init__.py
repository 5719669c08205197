"""The text-conditioned synthesizer: phonemes in the place of content units."""
