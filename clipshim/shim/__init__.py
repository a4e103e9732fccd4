"""The runtime's fast path: what runs between an engine and runc.

launcher.c finds the verb and execs runc for what is not ours; main.py starts Python for the rest;
verbs.py decides; create.py, rootfs.py and teardown.py make and remove what a container needs;
hook.py is for OCI hooks. Standard library only, and little of it: see tests/unit/shim/
test_startup.py. The node daemon uses the client, the states and the tear-down from here.
"""
