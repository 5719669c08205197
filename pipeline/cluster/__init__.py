"""Running tasks on a Ray cluster or in this process: workload, graph, rounds, progress."""
