"""The HTTP server of ``skillnet serve``, and the replicas that hold its model."""
