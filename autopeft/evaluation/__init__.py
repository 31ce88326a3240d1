"""From a configuration to its evaluation: exact costs, training, measurement."""
