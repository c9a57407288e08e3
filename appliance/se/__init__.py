"""The service engine: threads, and the only home of paramiko."""
