"""Converting songs with a voice: one song, or a folder of songs exactly once."""
