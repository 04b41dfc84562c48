"""What operators see: logs, metrics and trace ids."""
