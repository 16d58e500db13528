"""Configuration of sweeps, studies and their trials."""
