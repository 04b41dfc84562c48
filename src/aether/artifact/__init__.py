"""What a build becomes: archive, manifest and digests, pure over streams."""
