"""Stick figures on which RealDPO can be watched on a laptop. Nothing in here is RealDPO itself."""
