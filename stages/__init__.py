"""What is done to a song: pure functions on arrays, each with its frozen config beside it."""
