"""The toy world: stick figures in motion. Nothing in here is RealDPO."""
import model                                               # before torch: see the top of model.py
