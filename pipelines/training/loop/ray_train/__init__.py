"""Training on Ray Train: start of the workers, and their rendezvous."""
