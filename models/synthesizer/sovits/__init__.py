"""The so-vits-svc voice family: networks, configuration and files, both ways."""
