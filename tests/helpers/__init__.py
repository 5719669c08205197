"""Songs, datasets, checkpoints and voices that several tests make."""
