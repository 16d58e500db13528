"""Search spaces, search strategies and rankings of sweeps."""
