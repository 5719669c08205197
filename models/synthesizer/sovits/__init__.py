"""The so-vits-svc voice family: networks, config.json, and reading and writing of its files."""
