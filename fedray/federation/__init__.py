"""The federated run: coordinator, workers, wire, placement, failures, checkpoint. Ray is used from this layer upwards."""
