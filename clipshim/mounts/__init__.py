"""Mounts: system calls, mountinfo, EROFS and overlay mounts, graft, verification.

Standard library only: the runtime's fast path imports from here. It knows nothing of indexes,
daemons or containers; callers hand it paths, descriptors and options.
"""
