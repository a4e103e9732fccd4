"""clipshim: an OCI runtime that wraps runc and starts containers before their image has arrived."""

__version__ = "0.1.0"
