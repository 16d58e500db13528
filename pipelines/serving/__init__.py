"""Serving: bundles, predictions for raw inputs, registration, retrieval index and search page."""
