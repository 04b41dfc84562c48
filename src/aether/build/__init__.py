"""Making an artifact on the developer's machine: detection, installation, ignore rules, caches."""
