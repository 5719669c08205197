"""Running tasks on a Ray cluster or in this process: workload, graph, rounds, progress."""

import os

# Ray reads some of these when it is imported, which only modules below this package do.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Ray's own handler of SIGTERM prints a native stack trace and aborts.
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
# Ray reports restarted actors and lost workers on our terminal; we handle those.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
