"""Networks, encoders, their checkpoints and the math they need. Imports nothing else of ours."""
