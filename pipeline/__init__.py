"""Everything that touches disk layout, Ray, configuration, the command line and the clock."""
