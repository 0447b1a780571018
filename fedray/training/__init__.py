"""One client's local work: model, optimizer step, local training, evaluation. No Ray here."""
