"""The toy world: stick figures in motion. Nothing in here is RealDPO."""
