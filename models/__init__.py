"""Neural networks, their checkpoints and the math they need. Imports no other package of Cantor."""
