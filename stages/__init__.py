"""Signal processing of a song: pure functions on arrays, each with its frozen config beside it."""
