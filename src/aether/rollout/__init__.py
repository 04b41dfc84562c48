"""One rollout engine for every workload: a pure state machine and the loop that applies it."""
