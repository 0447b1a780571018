"""The federated run: coordinator, round, channels, workers, placement, checkpoint. Ray begins in this layer."""
