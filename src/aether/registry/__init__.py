"""The server's side of artifacts: upload sessions, verification, quota, retention."""
