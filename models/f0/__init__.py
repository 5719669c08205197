"""Networks that estimate f0 from 16 kHz audio."""
