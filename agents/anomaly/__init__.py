"""Is what really happens still what the world knows? The monitor, its statistics, and what it is judged on."""
