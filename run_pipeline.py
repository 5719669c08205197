#!/usr/bin/env python3
"""Cantor's command line, from a checkout: `python run_pipeline.py --help`.

Tested by tests/pipeline/test_cli.py.
"""

from pipeline.cli import main

if __name__ == "__main__":
    main()
