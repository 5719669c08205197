"""Extracting a dataset: songs, or shards of another dataset, become shards."""
