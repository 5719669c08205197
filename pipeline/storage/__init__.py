"""Files on disk: atomic writes, locks, scratch folders, weight files and step logs."""
